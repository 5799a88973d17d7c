"""Scores answers to Countdown: make the target from the given numbers, each used exactly once.

An expression is read by a small parser over exact fractions. Nothing that a model wrote is ever
executed, and since the numbers in it are compared with the given ones before any arithmetic, the
time taken is linear in the length of the answer, whatever it says.
"""

import operator
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

OPEN, CLOSE = "<answer>", "</answer>"

_CHARACTERS = re.compile(r"[0-9+\-*/()\s]*")
_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_PRINTED = str.maketrans("×÷−", "*/-")
_NEGATE = "negate"
_RANK = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2, _NEGATE: 3}


def accuracy(row: Mapping[str, Any], answer: str) -> float:
    """1.0 if the answer's last expression makes the row's target, else 0.0.

    The expression is the text between the last complete pair of `<answer>` and `</answer>`; it
    may span lines. It must use every one of `row["numbers"]` exactly once and its exact value must
    be `row["target"]`. It may hold + - * / and round brackets, also × ÷ − as printed in books, a
    sign before a number or bracket (`-3 + 8`), and one trailing `= N` if N is the target. All
    else (powers, decimals, `2(3)`, words, digits of other scripts) is a wrong answer.

    Raises:
      ValueError: the row has no `numbers` or no `target`, or they are not whole numbers.
    """
    numbers, target = _problem(row)
    text = last_answer(answer)
    return float(text is not None and _result_of(text, numbers, target) == target)


def tiny_zero(row: Mapping[str, Any], answer: str) -> float:
    """TinyZero's score: 1.0 right, 0.1 an `<answer>` that is not right, 0.0 no `<answer>`.

    The published rule is kept, with what surprises in it:
      - Only the last line of the answer is searched, so an `<answer>` that spans lines, or any
        line break after it, scores 0. On that line the last match of `<answer>(.*?)</answer>`
        counts, whose text begins at the earliest `<answer>` that is still open.
      - The prompt says that each number can be used once; the score demands all of them.
      - The value may miss the target by less than 1e-5.
      - No `=`, no × ÷ −.
    TinyZero gives the text to Python's `eval`, where `2 ** 3`, `7 // 2` and `1.5` have values.
    They have none here, and score 0.1: the task allows + - * / only.

    Raises:
      ValueError: as `accuracy`.

    Source: github.com/Jiayi-Pan/TinyZero, verl/utils/reward_score/countdown.py.
    """
    numbers, target = _problem(row)
    line = answer.rpartition("\n")[2]
    text = None
    start = line.find(OPEN)
    while start >= 0:
        end = line.find(CLOSE, start)
        if end < 0:
            break
        text = line[start + len(OPEN) : end]
        start = line.find(OPEN, end)
    if text is None:
        return 0.0
    if not text.isascii() or re.search(r"(?<![0-9])0+[1-9]", text):  # Python reads neither
        return 0.1
    value = _value(text, numbers)
    near = value is not None and abs(value - target) < Fraction(1, 100_000)
    return 1.0 if near else 0.1


def honesty(row: Mapping[str, Any], answer: str) -> float:
    """1.0 for a right answer, 0.0 for one that claims nothing, -1.0 for a wrong claim.

    A claim is an `<answer>` with a digit in it: `none`, or no answer at all, claims nothing.

    Raises:
      ValueError: as `accuracy`.
    """
    if accuracy(row, answer):
        return 1.0
    claim = last_answer(answer)
    return -float(claim is not None and any(sign.isdigit() for sign in claim))


def answer_key(row: Mapping[str, Any], answer: str) -> str | None:
    """What the answer votes for in a majority vote: `value 9`, or its text if that has no value.

    Expressions that `accuracy` can evaluate (they use every given number exactly once) vote
    together if their values are equal, so `7 + 5 - 3` and `5 - 3 + 7` are one vote. Anything else
    votes for its own text, white space removed: a majority may well agree on what is wrong. Thus
    answers with one key are all right or all wrong. None: no `<answer>`, or an empty one.

    Raises:
      ValueError: as `accuracy`.
    """
    numbers, target = _problem(row)
    text = last_answer(answer)
    if text is None:
        return None
    value = _result_of(text, numbers, target)
    # A text without white space never equals a text with a space in it.
    return "".join(text.split()) or None if value is None else f"value {value}"


def observe(row: Mapping[str, Any], answer: str) -> dict[str, float]:
    """How the answer was looked for, read off the text of `r1jax.data.countdown.attempts_rows`.

    Only what comes before the first `<answer>` is read. An attempt is the text that ends in a
    verdict, `yes` or `no`; its result is the number before the verdict.
      attempts        number of verdicts
      reflections     number of verdicts `no`
      give_ups        1.0 if the text says `give up`, else 0.0
      wrong_give_ups  the same where the problem can be solved. Every generated problem can, so
                      this differs only for a row that says `"solvable": False`.
      right_sums      share of the stated sums (`a + b = c`, and so for - * /) that are right
      right_verdicts  share of the verdicts that are right: `yes` if the attempt's result is the
                      target, `no` if it is not, however it was come by
      right_numbers   share of the attempts that use every given number exactly once
    A share of nothing is left out of the dict.

    Raises:
      ValueError: as `accuracy`.
    """
    numbers, target = _problem(row)
    text = answer.partition(OPEN)[0]
    *tries, _ = re.split(r"\b(yes|no)\b", text)
    attempts = list(zip(tries[::2], tries[1::2], strict=True))
    gave_up = float(re.search(r"\bgive up\b", text) is not None)
    seen = {
        "attempts": float(len(attempts)),
        "reflections": float(sum(verdict == "no" for _, verdict in attempts)),
        "give_ups": gave_up,
        "wrong_give_ups": gave_up * (row.get("solvable") is not False),
    }
    shares = {
        "right_sums": [_right(*sum_.groups()) for sum_ in _SUM.finditer(text)],
        "right_verdicts": [
            (_result(steps) == str(target)) == (verdict == "yes") for steps, verdict in attempts
        ],
        "right_numbers": [_operands(steps) == _sorted(numbers) for steps, _ in attempts],
    }
    return seen | {name: sum(right) / len(right) for name, right in shares.items() if right}


def last_answer(text: str) -> str | None:
    """The text between the last `<answer>` that is closed and its `</answer>`, or None."""
    start = text.rfind(OPEN, 0, max(text.rfind(CLOSE), 0))
    if start < 0:
        return None
    start += len(OPEN)
    return text[start : text.index(CLOSE, start)]


def _problem(row: Mapping[str, Any]) -> tuple[list[int], int]:
    for field in ("numbers", "target"):
        if field not in row:
            raise ValueError(f"row has no field {field!r}; it has {', '.join(row) or 'none'}")
    try:
        numbers = [operator.index(number) for number in row["numbers"]]
        target = operator.index(row["target"])
    except TypeError:
        raise ValueError(
            f"a Countdown row needs whole numbers and a whole target, "
            f"got numbers={row['numbers']!r}, target={row['target']!r}"
        ) from None
    if not numbers or min(numbers) < 0:
        raise ValueError(f"numbers must be one or more numbers >= 0, got {row['numbers']!r}")
    return numbers, target


# --------------------------------------------------------------------------- expressions


def _result_of(text: str, numbers: Sequence[int], target: int) -> Fraction | None:
    """The value of what stands in the answer tags; None if `accuracy` cannot read it."""
    left, equals, right = text.translate(_PRINTED).partition("=")
    if equals and right.strip() != str(target):
        return None
    return _value(left, numbers)


def _value(text: str, numbers: Sequence[int]) -> Fraction | None:
    """The exact value of an expression that uses exactly `numbers`; None if it is not one."""
    if _CHARACTERS.fullmatch(text) is None:
        return None
    tokens = _TOKEN.findall(text)
    # Compared as text: Python refuses to read integers of more than 4,300 digits, zeros included.
    used = sorted(token.lstrip("0") or "0" for token in tokens if token.isdigit())
    if used != _sorted(numbers):
        return None
    try:
        return _evaluate(tokens)
    except ZeroDivisionError:
        return None


def _sorted(numbers: Sequence[int]) -> list[str]:
    return sorted(str(number) for number in numbers)


def _evaluate(tokens: Sequence[str]) -> Fraction | None:
    """The value of an expression in tokens; None if it is malformed.

    Two stacks and no recursion (Dijkstra's shunting yard), so brackets may be any number deep.

    Raises:
      ZeroDivisionError: it divides by zero.
    """
    values: list[Fraction] = []
    waiting: list[str] = []  # operators and open brackets
    need_operand = True
    for token in tokens:
        if need_operand:
            if token.isdigit():
                values.append(Fraction(int(token.lstrip("0") or "0")))
                need_operand = False
            elif token == "(":
                waiting.append(token)
            elif token == "-":
                waiting.append(_NEGATE)
            elif token != "+":
                return None
        elif token == ")":
            _apply(values, waiting, rank=1)
            if not waiting:
                return None
            waiting.pop()
        elif token in "+-*/":
            _apply(values, waiting, rank=_RANK[token])
            waiting.append(token)
            need_operand = True
        else:
            return None
    if need_operand:
        return None
    _apply(values, waiting, rank=1)
    return None if waiting else values[0]


def _apply(values: list[Fraction], waiting: list[str], *, rank: int) -> None:
    """Carries out the operators on top of `waiting` that bind at least as strongly as `rank`."""
    while waiting and _RANK[waiting[-1]] >= rank:
        symbol = waiting.pop()
        right = values.pop()
        if symbol == _NEGATE:
            values.append(-right)
        else:
            values.append(_OPERATORS[symbol](values.pop(), right))


_OPERATORS = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


# --------------------------------------------------------------------------- the tiny text

# Looked ahead at, because a sum's result is the next sum's first number: 3 + 5 = 8 + 7 = 15.
_SUM = re.compile(r"(?=(?<![0-9])([0-9]{1,9}) ([-+*/]) ([0-9]{1,9}) = ([0-9]{1,9})(?![0-9]))")


def _right(left: str, symbol: str, right: str, result: str) -> bool:
    a, b, c = int(left), int(right), int(result)
    if symbol == "/":
        return b != 0 and a == b * c
    return _OPERATORS[symbol](a, b) == c


def _result(steps: str) -> str | None:
    words = steps.split()
    return words[-1] if len(words) > 1 and words[-2] == "=" else None


def _operands(steps: str) -> list[str]:
    """The numbers that an attempt puts in: all but those after an equals sign."""
    words = steps.split()
    before = ["", *words]
    return sorted(
        word for last, word in zip(before, words, strict=False) if word.isdigit() and last != "="
    )
