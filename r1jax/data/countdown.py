"""Countdown: make a target from given numbers. Problems, prompts, and text for a weak base model.

Everything here is a pure function of its arguments and made on demand: row i of a split depends on
the seed, the split's name and i alone, not on how many rows there are.

Text of the tiny world (`short_prompt`, `attempts_rows`), for models of some 300,000 weights:

    make 9 from 7 5 3 <think> 3 + 5 = 8 + 7 = 15 no . 7 + 5 = 12 - 3 = 9 yes </think>
    <answer> 7 + 5 - 3 </answer>

without the line break, or `... no . give up </think> <answer> none </answer>`. An attempt puts the
numbers in a random order with random signs, and carries the result along, so that each step is one
sum of two numbers.
"""

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, Literal

from r1jax.data.sources import LazyRows

TEST_SHARE = 8  # one problem in so many is a test problem
MAX_DRAWS = 100_000  # for one row, before its settings are called impossible
LARGEST = 99  # the largest number in the tiny world's text
FENCE = "```"  # begins and ends a program in it

TINY_ZERO = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves "
    "it. The assistant first thinks about the reasoning process in the mind and then provides the "
    "user with the answer.\n"
    "User: Using the numbers {numbers}, create an equation that equals {target}. You can use basic "
    "arithmetic operations (+, -, *, /) and each number can only be used once. Show your work in "
    "<think> </think> tags. And return the final answer in <answer> </answer> tags, for example "
    "<answer> (1 + 2) / 3 </answer>.\n"
    "Assistant:"
)
TINY_ZERO_PREFILL = " Let me solve this step by step.\n<think>"

# --------------------------------------------------------------------------- problems


def rows(
    split: Literal["train", "test"],
    *,
    num: int,
    seed: int,
    counts: Sequence[int] = (3, 4),
    low: int = 1,
    high: int = 99,
    operators: str = "+-*/",
    target_low: int = 1,
    target_high: int = 99,
) -> Sequence[dict[str, Any]]:
    """`num` problems `{"numbers": [...], "target": n, "verifier": "countdown", "id": ...}`.

    How many numbers there are is drawn from `counts`, each number from `low` to `high`. The target
    is the value of a random expression that uses each number once, and is a whole number from
    `target_low` to `target_high`: every problem can be solved.

    Train and test share no problem, whatever their seeds, sizes and settings: a hash of the sorted
    numbers and the target puts one problem in eight into test. Test problems are all different and
    made here; training problems are made when asked for, and may repeat. The first rows of a
    larger split are those of a smaller one.

    Raises:
      ValueError: unknown split or operator, an empty range, or too few problems within it.
    """
    spec = _Spec(
        counts=tuple(counts),
        low=low,
        high=high,
        operators=operators,
        target_low=target_low,
        target_high=target_high,
    )
    if num < 1:
        raise ValueError(f"num must be >= 1, got {num}")
    if split == "train":
        problems = LazyRows(num, partial(_row, spec, split, seed))
        problems[0]  # impossible settings fail here, not in the middle of a run
        return problems
    if split == "test":
        return _different(spec, num, seed)
    raise ValueError(f"split must be 'train' or 'test', got {split!r}")


@dataclass(frozen=True, kw_only=True)
class _Spec:
    """Which problems there are. The fields are arguments of `rows`."""

    counts: tuple[int, ...]
    low: int
    high: int
    operators: str
    target_low: int
    target_high: int

    def __post_init__(self) -> None:
        if not self.counts or min(self.counts) < 1:
            raise ValueError(f"counts must be one or more numbers >= 1, got {self.counts}")
        if not self.operators or set(self.operators) - set("+-*/"):
            raise ValueError(f"operators must be some of '+-*/', got {self.operators!r}")
        if not 0 <= self.low <= self.high:
            raise ValueError(f"need 0 <= low <= high, got {self.low} and {self.high}")
        if not 1 <= self.target_low <= self.target_high:
            raise ValueError(
                f"need 1 <= target_low <= target_high, got {self.target_low} and {self.target_high}"
            )


def _row(spec: _Spec, split: str, seed: int, index: int) -> dict[str, Any]:
    rng = random.Random(f"countdown problem {seed} {split} {index}")
    for _ in range(MAX_DRAWS):
        count = spec.counts[below(rng, len(spec.counts))]
        numbers = [spec.low + below(rng, spec.high - spec.low + 1) for _ in range(count)]
        target = _random_value(rng, numbers, spec.operators)
        if (
            isinstance(target, int)
            and spec.target_low <= target <= spec.target_high
            and _split(numbers, target) == split
        ):
            return {
                "numbers": numbers,
                "target": target,
                "verifier": "countdown",
                "id": f"countdown-{split}-{seed}-{index}",
            }
    raise ValueError(f"no {split} problem found in {MAX_DRAWS:,} draws with {spec}")


def _different(spec: _Spec, num: int, seed: int) -> list[dict[str, Any]]:
    """The first `num` problems of the test split that differ from those before them."""
    found: dict[tuple[int, ...], dict[str, Any]] = {}
    repeats, index = 0, 0
    while len(found) < num:
        row = _row(spec, "test", seed, index)
        key = (*sorted(row["numbers"]), row["target"])
        repeats = repeats + 1 if key in found else 0
        if repeats > 1_000:
            raise ValueError(f"found only {len(found)} test problems of {num} with {spec}")
        found.setdefault(key, row)
        index += 1
    return list(found.values())


def _split(numbers: Sequence[int], target: int) -> str:
    """Where a problem belongs; the order of its numbers does not matter."""
    draw = stable_hash(f"{sorted(numbers)} {target}")
    return "test" if draw % TEST_SHARE == 0 else "train"


def stable_hash(text: str) -> int:
    """A whole number that follows from the text alone; Python salts `hash` in every process."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _random_value(
    rng: random.Random, numbers: Sequence[int], operators: str
) -> int | Fraction | None:
    """The value of a random expression over all numbers: two of them are joined until one is left.

    None if it would divide by zero.
    """
    values: list[int | Fraction] = list(numbers)
    while len(values) > 1:
        left = values.pop(below(rng, len(values)))
        right = values.pop(below(rng, len(values)))
        joined = _join(left, operators[below(rng, len(operators))], right)
        if joined is None:
            return None
        values.append(joined)
    return values[0]


def _join(left: int | Fraction, symbol: str, right: int | Fraction) -> int | Fraction | None:
    if symbol == "+":
        value = left + right
    elif symbol == "-":
        value = left - right
    elif symbol == "*":
        value = left * right
    elif right == 0:
        return None
    else:
        value = Fraction(left) / right
    return value.numerator if value.denominator == 1 else value


def below(rng: random.Random, count: int) -> int:
    """A whole number from 0 to `count` - 1."""
    # random() gives the same sequence in every Python version; randrange() is not promised to.
    return int(rng.random() * count)


# --------------------------------------------------------------------------- prompts


def tiny_zero_prompt(row: Mapping[str, Any]) -> str:
    """TinyZero's prompt for base models up to `Assistant:`, where the answer begins.

    The rest of its template, `TINY_ZERO_PREFILL`, is how it lets every answer begin.

    Source: github.com/Jiayi-Pan/TinyZero, examples/data_preprocess/countdown.py.
    """
    numbers = str(list(row["numbers"]))
    return TINY_ZERO.replace("{numbers}", numbers).replace("{target}", str(row["target"]))


def short_prompt(row: Mapping[str, Any]) -> str:
    """The tiny world's prompt: `make 9 from 7 5 3`."""
    return f"make {row['target']} from {' '.join(str(number) for number in row['numbers'])}"


# --------------------------------------------------------------------------- text of a weak base


def attempts_rows(
    num: int,
    *,
    seed: int,
    counts: Sequence[int] = (3,),
    low: int = 1,
    high: int = 15,
    operators: str = "+-",
    target_low: int = 1,
    target_high: int = LARGEST,
    give_up: float = 0.5,
    persistent: float = 0.1,
    max_attempts: int = 12,
) -> Sequence[dict[str, Any]]:
    """`num` texts `{"prompt", "answer"}` that try, and most often give up too early.

    The problems are training problems of `rows` with the same settings. Attempts do not depend on
    each other: each is drawn evenly from all orders and signs whose steps are whole numbers from 0
    to 99. (Where the numbers add up to more than 99, a problem may be without a hit.) Sums and
    verdicts are always right. The first hit ends the text. After each miss a text gives up with
    probability `give_up`, but a `persistent` share of texts goes on for `max_attempts`, so that a
    model has seen long searches too.

    A problem that an attempt hits with probability p is solved with probability
    p (1 - r^M) / (1 - r), r = (1 - p)(1 - give_up), M = max_attempts, in the texts that are not
    persistent, and 1 - (1 - p)^M in those that are. The second is also what a model reaches that
    has learned never to give up. Means over test problems, + and - only, seed 0:

        numbers          give_up  persistent  M    these texts  never give up  most tokens
        three of 1..15   0.5      0.1         12   48%          94%            141
        three of 1..15   0.7      0.05        11   38%          93%            130
        three of 1..20   0.8      0.05        11   35%          93%            130
        four of 1..9     0.5      0.05        8    32%          74%            131
        four of 1..15    0.5      0.05        12   31%          84%            191

    Raises:
      ValueError: a setting out of its range.
    """
    for name, value in (("give_up", give_up), ("persistent", persistent)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}")
    if max_attempts < 1:
        raise ValueError(f"max_attempts must be >= 1, got {max_attempts}")
    problems = _problems(num, seed, counts, low, high, operators, target_high, target_low)
    habit = partial(
        _text,
        operators=operators,
        give_up=give_up,
        persistent=persistent,
        max_attempts=max_attempts,
    )
    return LazyRows(num, partial(_told, problems, seed, habit))


def listing_rows(
    num: int,
    *,
    seed: int,
    counts: Sequence[int] = (3,),
    low: int = 1,
    high: int = 15,
    operators: str = "+-",
    lines: int = 8,
    answered: float = 0.5,
) -> Sequence[dict[str, Any]]:
    """`num` texts `{"prompt", "answer"}` that write a program where others search:

        <think> ``` 7 + 5 + 3 . 3 - 7 + 5 . 7 + 3 - 5 . ``` </think> <answer> 3 - 7 + 5 </answer>

    The program is a list of `lines` random expressions. Nobody runs it, so that none has a value:
    the answer, which a share `answered` of texts has, is one of them at random, and the others end
    with the program. Problems are those of `attempts_rows`, and each expression could be one of its
    attempts. The tokenizer needs `FENCE` among its words.

    Raises:
      ValueError: a setting out of its range.
    """
    if lines < 1:
        raise ValueError(f"lines must be >= 1, got {lines}")
    if not 0 <= answered <= 1:
        raise ValueError(f"answered must be from 0 to 1, got {answered}")
    problems = _problems(num, seed, counts, low, high, operators, LARGEST)
    habit = partial(_listing, operators=operators, lines=lines, answered=answered)
    return LazyRows(num, partial(_told, problems, seed, habit))


def _problems(
    num: int,
    seed: int,
    counts: Sequence[int],
    low: int,
    high: int,
    operators: str,
    target_high: int,
    target_low: int = 1,
) -> Sequence[dict[str, Any]]:
    """The training problems of a text of the tiny world."""
    if not set("+-") <= set(operators):
        # With both there is always an attempt within 0 and 99: the numbers in falling order, each
        # taken away where it can be, and added where not.
        raise ValueError(f"operators must hold both + and -, got {operators!r}")
    if max(high, target_high) > LARGEST:
        raise ValueError(f"high and target_high must be <= {LARGEST}, got {high} and {target_high}")
    return rows(
        "train",
        num=num,
        seed=seed,
        counts=counts,
        low=low,
        high=high,
        operators=operators,
        target_low=target_low,
        target_high=target_high,
    )


def _listing(
    rng: random.Random,
    problem: Mapping[str, Any],
    *,
    operators: str,
    lines: int,
    answered: float,
) -> str:
    shown = [random_attempt(rng, problem["numbers"], operators)[1] for _ in range(lines)]
    text = f" <think> {FENCE} {' . '.join(shown)} . {FENCE} </think>"
    if rng.random() >= answered:
        return text
    return f"{text} <answer> {shown[below(rng, lines)]} </answer>"


def _told(problems: Sequence[dict[str, Any]], seed: int, habit: Any, index: int) -> dict[str, Any]:
    problem = problems[index]
    rng = random.Random(f"countdown attempts {seed} {index}")
    return {"prompt": short_prompt(problem), "answer": habit(rng, problem)}


def _text(
    rng: random.Random,
    problem: Mapping[str, Any],
    *,
    operators: str,
    give_up: float,
    persistent: float,
    max_attempts: int,
) -> str:
    persists = rng.random() < persistent
    thought = ""
    for attempt in range(1, max_attempts + 1):
        steps, expression, value = random_attempt(rng, problem["numbers"], operators)
        thought += f" {steps}"
        if value == problem["target"]:
            return f" <think>{thought} yes </think> <answer> {expression} </answer>"
        thought += " no ."
        if attempt == max_attempts or (not persists and rng.random() < give_up):
            break
    return f" <think>{thought} give up </think> <answer> none </answer>"


def random_attempt(
    rng: random.Random, numbers: Sequence[int], operators: str
) -> tuple[str, str, int]:
    """A random chain: its text with all results, its expression, and its value."""
    for _ in range(MAX_DRAWS):
        left = list(numbers)
        value = left.pop(below(rng, len(left)))
        steps = expression = str(value)
        sum_last = False
        while left:
            number = left.pop(below(rng, len(left)))
            symbol = operators[below(rng, len(operators))]
            joined = _join(value, symbol, number)
            if not isinstance(joined, int) or not 0 <= joined <= LARGEST:
                break
            if sum_last and symbol in "*/":
                expression = f"( {expression} )"
            sum_last = symbol in "+-"
            value = joined
            steps += f" {symbol} {number} = {value}"
            expression += f" {symbol} {number}"
        else:
            return steps, expression, value
    raise ValueError(f"no attempt at {list(numbers)} with {operators!r} stays within 0 and 99")


# --------------------------------------------------------------------------- texts told anew


def journey(wrong: Sequence[str], right: str, *, max_attempts: int = 11) -> str:
    """One text that makes the attempts of all these answers, given up or not, and then is right.

    Of more than `max_attempts` the first are left out. For `r1jax.data.passes.retell`.

    Raises:
      ValueError: `right` has no attempt that ends in `yes`, or `max_attempts` < 1.

    Source: journey learning, arXiv:2410.18982: trial, error, reflection and backtracking are
    learned from, and not the right path alone.
    """
    if max_attempts < 1:
        raise ValueError(f"max_attempts must be >= 1, got {max_attempts}")
    failed = [one for text in (*wrong, right) for one in _attempts(text) if one.endswith("no .")]
    kept = failed[max(0, len(failed) + 1 - max_attempts) :]
    return _only(kept, right)


def shortcut(wrong: Sequence[str], right: str) -> str:
    """The right answer without its attempts that failed, as if it had been known at once.

    Raises:
      ValueError: `right` has no attempt that ends in `yes`.
    """
    del wrong
    return _only([], right)


def _only(failed: Sequence[str], right: str) -> str:
    """A right answer with these failed attempts in the place of its own."""
    hits = [one for one in _attempts(right) if one.endswith("yes")]
    if not hits:
        raise ValueError(f"a right answer needs an attempt that ends in yes, got {right[:200]!r}")
    rest = right.partition(" </think>")[2]
    return f" <think>{''.join([*failed, hits[-1]])} </think>{rest}"


def _attempts(text: str) -> list[str]:
    """The attempts of a text with the space before each and the verdict behind it."""
    thought = text.partition("<think>")[2].partition("</think>")[0]
    return re.findall(r" [^a-z]*?(?:yes|no \.)", thought)
