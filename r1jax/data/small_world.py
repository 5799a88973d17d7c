"""A small world with what R1's four stages need: sums, programs, requests, and two languages.

Four kinds of problems, each asked in English or in Chinese, for models of some 350,000 weights:

    math      make 9 from 7 5 3            凑 9 用 7 5 3
    code      code 2 gives 5 7 gives 10    编程 2 得 5 7 得 10
    helpful   please thank ann             请 感谢 小安
    harmless  please mock bob              请 嘲笑 小明

Math is Countdown. Code asks for a Python function of whole numbers that fits two examples; it is
run on others. A request wants kind words, or something that had better be refused. Answers to the
first two try, judge and try again, in words of either language:

    <think> 3 + 5 = 8 + 7 = 15 wrong . 7 + 5 = 12 - 3 = 9 对了 </think> <answer> 7 + 5 - 3 </answer>
    <think> 2 + 5 = 7 , 7 - 7 = 0 wrong . 5 - 2 = 3 , 7 + 3 = 10 right </think>
    <answer> def f ( x ) : return x + 3 </answer>

(one line each). `base_rows` is text for a weak base: right sums and verdicts, but it gives up too
early, mixes its languages, seldom sums up and has little manners. Everything is made on demand: row
i depends on the seed, the split and i alone.
"""

import random
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

from r1jax.data import countdown, tokenizer
from r1jax.data.countdown import LARGEST
from r1jax.data.sources import LazyRows
from r1jax.rewards.language import reasoning
from r1jax.rewards.small_world import (
    ADVICE,
    CLOSING,
    HARM,
    KIND_WORDS,
    NAMES,
    NEED,
    REASONING,
    REFUSAL,
    REQUESTS,
    RUDE,
    WORDS,
    Kind,
    judged_part,
    quality,
)

Row = Mapping[str, Any]
Split = Literal["train", "test"]

LANGUAGES = ("en", "zh")
TEST_SHARE = 8  # one problem in so many is a test problem
THOUGHT = 116  # tokens that a long search may have
NUMBERS = {"counts": (3,), "low": 1, "high": 20, "operators": "+-"}  # of Countdown

# --------------------------------------------------------------------------- words

_FIRST = ("make", "凑", "code", "编程", "please", "请")
_SIGNS = tuple("+-=().,:")
_PROGRAM = ("def", "f", "x", "return")


def small_tokenizer() -> Any:
    """The tokenizer of this world: `r1jax.data.tokenizer.tiny` with its words."""
    texts = [text for words in WORDS.values() for text in words.values()]
    for each in (NAMES, HARM):
        texts += [word for words in each.values() for word in words]
    for words in KIND_WORDS.values():
        texts += [*words.keys(), *words.values()]
    for each in (RUDE, CLOSING, REFUSAL, ADVICE, NEED):
        texts += [text.replace("{name}", "") for text in each.values()]
    every = [*_SIGNS, *_PROGRAM, "from", "用", "gives", "得", "none", *" ".join(texts).split()]
    return tokenizer.tiny(first=_FIRST, words=tuple(dict.fromkeys(every)))


# --------------------------------------------------------------------------- problems


def rows(split: Split, *, num: int, seed: int, kinds: Sequence[Kind]) -> Sequence[dict[str, Any]]:
    """`num` problems; row i is of the kind `kinds[i % len(kinds)]`, in either language.

    Each has `kind`, `language` ("en" or "zh") and `id`, and
      math      `numbers`, `target`
      code      `examples`, two pairs [x, y]; `tests` and `entry_point` for `r1jax.rewards.code`
      requests  `verb`, `name`, and `reference`, an answer of middling quality to compare with

    Train and test share no problem, whatever their seeds.

    Raises:
      ValueError: an unknown split or kind, or none.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', got {split!r}")
    if not kinds or set(kinds) - {*REASONING, *REQUESTS}:
        raise ValueError(f"kinds must be some of {(*REASONING, *REQUESTS)}, got {tuple(kinds)}")
    if num < 1:
        raise ValueError(f"num must be >= 1, got {num}")
    kinds = tuple(kinds)
    num_sums = -(-num // len(kinds)) * kinds.count("math")
    sums = countdown.rows(split, num=num_sums, seed=seed, **NUMBERS) if num_sums else ()
    return LazyRows(num, partial(_row, split, seed, kinds, sums))


def prompt(row: Row) -> str:
    """What the model is asked, in the problem's language."""
    chinese = row["language"] == "zh"
    if row["kind"] == "math":
        numbers = " ".join(map(str, row["numbers"]))
        return f"凑 {row['target']} 用 {numbers}" if chinese else countdown.short_prompt(row)
    if row["kind"] == "code":
        (a, b), (c, d) = row["examples"]
        return f"编程 {a} 得 {b} {c} 得 {d}" if chinese else f"code {a} gives {b} {c} gives {d}"
    return f"{'请' if chinese else 'please'} {row['verb']} {row['name']}"


def _row(
    split: Split, seed: int, kinds: Sequence[Kind], sums: Sequence[Row], index: int
) -> dict[str, Any]:
    rng = random.Random(f"small world {seed} {split} {index}")
    kind = kinds[index % len(kinds)]
    language = _one_of(rng, LANGUAGES)
    found = {"kind": kind, "language": language, "id": f"{kind}-{split}-{seed}-{index}"}
    if kind == "math":
        turn, place = divmod(index, len(kinds))
        problem = sums[turn * kinds.count("math") + kinds[:place].count("math")]
        return found | {name: problem[name] for name in ("numbers", "target")}
    if kind == "code":
        return found | _code_problem(rng, split)
    return found | _request(rng, split, kind, language)


def _code_problem(rng: random.Random, split: Split) -> dict[str, Any]:
    """Examples of a hidden function: x + k, x - k, k - x, x + x + k or x + x - k."""
    while True:
        body = _one_of(rng, _FORMS)(1 + countdown.below(rng, 12))
        xs = [1 + countdown.below(rng, 12) for _ in range(5)]
        pairs = [[x, _value(body, x)] for x in dict.fromkeys(xs)]
        if len(pairs) < 5 or not all(0 <= y <= LARGEST for _, y in pairs):
            continue
        if (countdown.stable_hash(f"{pairs[:2]}") % TEST_SHARE == 0) == (split == "test"):
            return {
                "examples": pairs[:2],
                "tests": [{"args": [x], "result": y} for x, y in pairs],
                "entry_point": "f",
            }


def _request(rng: random.Random, split: Split, kind: Kind, language: str) -> dict[str, Any]:
    verbs = tuple(KIND_WORDS[language]) if kind == "helpful" else HARM[language]
    every = [(verb, name) for verb in verbs for name in NAMES[language]]
    here = [
        pair
        for pair in every
        if (countdown.stable_hash(" ".join(pair)) % 4 == 0) == (split == "test")
    ]
    verb, name = _one_of(rng, here)
    row = {"kind": kind, "language": language, "verb": verb, "name": name}
    return {"verb": verb, "name": name, "reference": _words(rng, row, manners=0.6)}


# --------------------------------------------------------------------------- attempts

_FORMS = (
    "x + {}".format,
    "x - {}".format,
    "{} - x".format,
    "x + x + {}".format,
    "x + x - {}".format,
)


def _value(body: str, x: int) -> int:
    """The value of a sum of `x` and numbers."""
    words = body.replace("x", str(x)).split()
    total = int(words[0])
    for sign, number in zip(words[1::2], words[2::2], strict=True):
        total += int(number) if sign == "+" else -int(number)
    return total


def _code_attempt(rng: random.Random, row: Row) -> tuple[str, str, bool]:
    """A random form that fits the first example: its text, its program, whether it fits both.

    The text finds the form's number in the first example, then tries it on the second.
    """
    (x, y), (other, wanted) = row["examples"]
    choices = [(f"{x} + {y}", f"{x + y} - x")]
    for begin, sum_, rest in (("x", x, y - x), ("x + x", x + x, y - x - x)):
        found = f"{y} - {sum_}" if rest >= 0 else f"{sum_} - {y}"
        found = found if begin == "x" else f"{x} + {x} = {sum_} , {found}"
        choices.append((found, f"{begin} {'+' if rest >= 0 else '-'} {abs(rest)}"))
    fitting = [(found, body) for found, body in choices if 0 <= _value(body, other) <= LARGEST]
    found, body = _one_of(rng, fitting)
    number = next(word for word in body.split() if word.isdigit())
    text = f"{found} = {number} , {_carried(body, other)}"
    return text, f"def f ( x ) : return {body}", _value(body, other) == wanted


def _carried(body: str, x: int) -> str:
    """A sum with its results carried along: `7 + 7 = 14 + 1 = 15`."""
    words = body.replace("x", str(x)).split()
    text = total = words[0]
    for sign, number in zip(words[1::2], words[2::2], strict=True):
        total = str(_value(f"{total} {sign} {number}", 0))
        text += f" {sign} {number} = {total}"
    return text


def _math_attempt(rng: random.Random, row: Row) -> tuple[str, str, bool]:
    steps, expression, value = countdown.random_attempt(rng, row["numbers"], NUMBERS["operators"])
    return steps, expression, value == row["target"]


_ATTEMPTS = {"math": _math_attempt, "code": _code_attempt}


def _search(
    rng: random.Random,
    row: Row,
    *,
    give_up: float,
    persistent: float,
    own: float,
    summed: float,
) -> str:
    """Tries until one is right, it gives up, or the thought is long."""
    persists = rng.random() < persistent
    habit = _habit(rng, row["language"], own=own)
    thought: list[str] = []
    while True:
        steps, answer, hit = _ATTEMPTS[row["kind"]](rng, row)
        words = WORDS[habit(rng)]
        thought += steps.split()
        if hit:
            judged = f"{' '.join(thought)} {words['right']}"
            summary = f" {WORDS[habit(rng)]['so it fits']} ." if rng.random() < summed else ""
            return f" <think> {judged} </think>{summary} <answer> {answer} </answer>"
        thought += [words["wrong"], "."]
        if len(thought) > THOUGHT - 22 or (not persists and rng.random() < give_up):
            given_up = f"{' '.join(thought)} {words['give up']}"
            return f" <think> {given_up} </think> <answer> none </answer>"


def _habit(rng: random.Random, language: str, *, own: float) -> Any:
    """What draws the language of each verdict of a text.

    A share `own` of texts are in the language of the problem; of the others half are in the other
    one, and half take either at every turn.
    """
    draw = rng.random()
    if draw < own:
        return lambda rng: language
    if draw < own + (1 - own) / 2:
        other = LANGUAGES[1 - LANGUAGES.index(language)]
        return lambda rng: other
    return lambda rng: _one_of(rng, LANGUAGES)


# --------------------------------------------------------------------------- requests


def _words(rng: random.Random, row: Row, *, manners: float) -> str:
    """What answers a request; each thing that makes it good is there with probability `manners`."""
    own = row["language"]
    language = own if rng.random() < manners else LANGUAGES[1 - LANGUAGES.index(own)]
    name = row["name"] if rng.random() < manners else _one_of(rng, NAMES[own])
    ending = rng.random() < manners
    good = rng.random() < manners
    if row["kind"] == "harmless":
        if not good:
            return f"{name} {RUDE[language]}"
        return f"{REFUSAL[language]}{f' , {ADVICE[language]}' if ending else ''}"
    kind = KIND_WORDS[language]
    if good:
        right = list(KIND_WORDS[own]).index(row["verb"])
        word = list(kind.values())[right]
    else:
        word = _one_of(rng, tuple(kind.values()))
    return f"{word} {name}{f' , {CLOSING[language]}' if ending else ''}"


def _request_text(rng: random.Random, row: Row, *, manners: float, own: float) -> str:
    language = _habit(rng, row["language"], own=own)(rng)
    thought = NEED[language].format(name=row["name"])
    return f" <think> {thought} </think> <answer> {_words(rng, row, manners=manners)} </answer>"


# --------------------------------------------------------------------------- texts


def base_rows(
    num: int,
    *,
    seed: int,
    kinds: Sequence[Kind] = ("math", "code", "math", "helpful", "math", "code", "math", "harmless"),
    give_up: float = 0.85,
    persistent: float = 0.15,
    manners: float = 0.4,
    own: float = 0.5,
    summed: float = 0.15,
) -> Sequence[dict[str, Any]]:
    """`num` texts `{"prompt", "answer"}` of a weak base, to training problems of `rows`.

    After each miss a text gives up with probability `give_up`, but for a `persistent` share of
    them. A share `own` speaks the language of the problem throughout, and a share `summed` of
    right answers sums up. Answers to requests have each good part with probability `manners`.

    Raises:
      ValueError: a share out of its range, or as `rows`.
    """
    shares = {
        "give_up": give_up,
        "persistent": persistent,
        "manners": manners,
        "own": own,
        "summed": summed,
    }
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}")
    problems = rows("train", num=num, seed=seed, kinds=kinds)

    def make(index: int) -> dict[str, Any]:
        row = problems[index]
        rng = random.Random(f"small world text {seed} {index}")
        if row["kind"] in REQUESTS:
            answer = _request_text(rng, row, manners=manners, own=own)
        else:
            answer = _search(
                rng, row, give_up=give_up, persistent=persistent, own=own, summed=summed
            )
        return {"prompt": prompt(row), "answer": answer}

    return LazyRows(num, make)


def general_rows(num: int, *, seed: int, manners: float = 0.6) -> Sequence[dict[str, Any]]:
    """`num` texts that answer requests tolerably, in the language that they came in.

    As the data of R1's third stage that are not about reasoning.
    """
    return base_rows(num, seed=seed, kinds=REQUESTS, manners=manners, own=1.0)


def compared_rows(
    kind: Kind, num: int, *, seed: int, noise: float = 0.05
) -> Sequence[dict[str, Any]]:
    """`num` pairs `{"prompt", "chosen", "rejected"}` of answers to requests of a kind.

    What is better is what `r1jax.rewards.small_world.quality` says, but for a share `noise`, where
    it is the other way round. Of helpful pairs only what follows the thinking is given, of
    harmless ones the whole answer, as R1's reward models read them.
    """
    problems = rows("train", num=num, seed=seed, kinds=(kind,))

    def make(index: int) -> dict[str, Any]:
        row = problems[index]
        rng = random.Random(f"small world pair {seed} {index}")
        while True:
            texts = [_request_text(rng, row, manners=0.5, own=0.5) for _ in range(2)]
            scores = [quality(row, text) for text in texts]
            if scores[0] != scores[1]:
                break
        if (scores[0] > scores[1]) == (rng.random() < noise):
            texts.reverse()
        chosen, rejected = (judged_part(kind, text) for text in texts)
        return {"prompt": prompt(row), "chosen": chosen, "rejected": rejected}

    return LazyRows(num, make)


# --------------------------------------------------------------------------- cold start


def readable_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Answers to math and code made easy to read: a pass over the rows of a `Build` stage.

    The thinking is translated to the language of the problem, with a dictionary, and a summary in
    that language follows it. In R1 another model did this; what it does not understand (here: an
    answer with no thinking or no result) is dropped.
    """
    found = []
    for row in rows:
        answer = _readable(row["row"], row["answer"])
        if answer is not None:
            changed = {"answer": answer, "accuracy": None, "num_tokens": None}
            found.append({**row, **changed, "original": row["answer"]})
    return found


def _readable(row: Row, answer: str) -> str | None:
    inside = re.fullmatch(r"\s*<think>.*</think>\s*<answer>(.*)</answer>\s*", answer, re.DOTALL)
    if inside is None:
        return None
    language = row["language"]
    thought, result = f" {reasoning(answer).strip()} ", inside[1].strip()
    for name, ours in WORDS[language].items():
        for other in LANGUAGES:
            thought = thought.replace(f" {WORDS[other][name]} ", f" {ours} ")
    summary = f"{WORDS[language]['so it fits']} ."
    return f" <think>{thought}</think> {summary} <answer> {result} </answer>"


# --------------------------------------------------------------------------- randomness


def _one_of(rng: random.Random, choices: Sequence[Any]) -> Any:
    return choices[countdown.below(rng, len(choices))]
