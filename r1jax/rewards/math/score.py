r"""Scores answers to mathematical problems against a gold answer, in LaTeX or plain text.

Most answers are decided here in well under a millisecond, by exact arithmetic and by values at
points (`forms`, `compare`). What cannot be told so goes to math-verify (`verify`), which may hang
or eat all memory, and therefore runs in worker processes that are killed at a deadline.
"""

import atexit
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from numbers import Real
from typing import Any

from r1jax.rewards.math import compare, forms, verify
from r1jax.rewards.math.text import clean, final_answer
from r1jax.rewards.pool import Pool

SECONDS = 3.0  # of processor time, for math-verify and one answer; most take a tenth of one
WALL = 8.0  # times `seconds` by the clock: on a crowded machine they are many more
MEMORY = 2 << 30  # bytes of address space of a process that runs math-verify
NUM_WORKERS = max(1, min(4, os.cpu_count() or 1))

# A longer answer is right only if it is the gold answer's text.
MAX_LENGTH = 2_000
# What math-verify could only spend its time on: powers of powers, factorials of large numbers,
# numbers of hundreds of digits, deep brackets.
_ENDLESS = re.compile(
    r"(?:\^\s*\{?\s*\(?[^\s^{}]{0,20}){4}|\^\s*\{?\s*\d{5}|\d{5}\s*!|!\s*!\s*!|\d{400}"
    r"|(?:[({\[]\s*){30}|(?:\\(?:sqrt|frac)\s*\{?\s*){20}"
)


def accuracy(row: Mapping[str, Any], answer: str, *, seconds: float = SECONDS) -> float | None:
    r"""1.0 if the answer says the same as `row["answer"]`, else 0.0.

    What the answer says is found by `r1jax.rewards.math.text.final_answer`. The gold answer is a
    text or a number; a whole solution that ends in `\boxed{}` or `#### 18` counts as what it ends
    in. The same are:
      - numbers of one value: `0.5`, `1/2`, `\frac{1}{2}`, `50\%`, `5 \times 10^{-1}`, `1{,}000`
        and `1000`, `1\frac{1}{2}` and `3/2`, `twelve`, `三分之一`. A decimal of six digits or more
        is also the same as a fraction without end, or a root, that it rounds or cuts off.
      - values with and without a unit, a currency or a name: `5`, `5 cm`, `\$5`, `x = 5`. Two units
        of one kind are converted (`1 m` and `100 cm`), of two kinds differ; of units that are not
        known the number decides. `12\%` is the same as `12` and as `0.12`.
      - formulas of one value for all positive values of their variables; equations that are
        one up to a factor.
      - tuples and matrices in their order; intervals with the same ends, also as `2 < x \le 5`;
        lists, sets and unions in any order; `a \pm b` and its two values.
      - choices by their letter, and words but for case, articles and what follows them.

    None: the texts differ, and neither this module nor math-verify can read the gold answer.
    An answer that takes math-verify more than `seconds` of processor time, or crashes it, scores
    0.0.

    Raises:
      ValueError: the row has no `answer`, or it is no text or finite number, or empty; the answer
        is not a str.
      RuntimeError: math-verify is needed and cannot be started.
    """
    return accuracies([row], [answer], seconds=seconds)[0]


def accuracies(
    rows: Sequence[Mapping[str, Any]], answers: Sequence[str], *, seconds: float = SECONDS
) -> list[float | None]:
    """`accuracy` of each answer to the row beside it; what math-verify must see, at the same time.

    Raises:
      ValueError: as `accuracy`, or rows and answers are not equally many.
    """
    if len(rows) != len(answers):
        raise ValueError(f"need a row for each answer, got {len(rows)} and {len(answers)}")
    found: list[float | None] = []
    waiting: dict[tuple[str, str], list[int]] = {}  # equal answers are looked at once
    for place, (row, answer) in enumerate(zip(rows, answers, strict=True)):
        if not isinstance(answer, str):
            raise ValueError(f"an answer must be text (str), got {type(answer).__name__}")
        gold, text = gold_answer(row), final_answer(answer)
        verdict = False if text is None else decide(gold, text)
        if verdict is None and text is not None:
            cleaned = clean(text)
            if len(cleaned) <= MAX_LENGTH and not _ENDLESS.search(cleaned):
                waiting.setdefault((clean(gold), cleaned), []).append(place)
        found.append(float(verdict or False))
    if waiting:
        golds, texts = zip(*waiting, strict=True)
        limits = {"seconds": WALL * seconds, "cpu_seconds": seconds}
        verdicts = pool().map(verify.compared, golds, texts, **limits)
        for (gold, _), places, verdict in zip(waiting, waiting.values(), verdicts, strict=True):
            unreadable = verdict == "unreadable" and not _readings(gold)
            for place in places:
                found[place] = None if unreadable else float(verdict == "same")
    return found


def gold_answer(row: Mapping[str, Any]) -> str:
    """The text of a row's gold answer: `18` of 18, of 18.0 and of a solution that ends in it.

    Raises:
      ValueError: there is none, or it is no text or finite number, or empty.
    """
    if "answer" not in row:
        raise ValueError(f"row has no field 'answer'; it has {', '.join(map(str, row)) or 'none'}")
    gold = row["answer"]
    if isinstance(gold, Real) and not isinstance(gold, bool):
        if isinstance(gold, int):
            return str(gold)
        number = float(gold)
        if math.isfinite(number):
            return str(int(number)) if number.is_integer() else repr(number)
    text = gold if isinstance(gold, str) else ""
    if "####" in text or "\\boxed" in text:
        text = final_answer(text) or ""
    if not text.strip():
        raise ValueError(f"a row's answer must be a text or a finite number, got {gold!r:.80}")
    return text


def decide(gold: str, answer: str) -> bool | None:
    """Whether two answers say the same, told without math-verify; None if it cannot be."""
    if answer.strip() == gold.strip():
        return True
    if len(answer) > MAX_LENGTH + 2 * len(gold):
        return False
    (gold, squeezed), (answer, same) = _cleaned(gold), _cleaned(answer)
    if not answer:
        return False
    if squeezed == same:
        return True
    readings = _readings(answer)
    if not readings and not re.search(r"[^\W\d_]", answer):
        return False  # broken numbers and brackets, which math-verify would guess at
    return compare.same(_readings(gold), readings)


# A text is compared with many: with each other answer to its problem, where they vote.
@lru_cache(maxsize=4096)
def _readings(text: str) -> forms.Readings:
    return forms.read(text)


@lru_cache(maxsize=4096)
def _cleaned(text: str) -> tuple[str, str]:
    """A text cleaned, and without white space but where it parts two numbers or words."""
    text = clean(text)
    return text, re.sub(r"(?<![0-9A-Za-z])\s+|\s+(?![0-9A-Za-z])", "", text)


@cache
def pool() -> Pool:
    """The workers of this process that run math-verify. None is started before it is needed."""
    made = Pool(workers=NUM_WORKERS, seconds=SECONDS, memory=MEMORY, warm=verify.warm)

    def leave_to_parent() -> None:
        atexit.unregister(made.close)
        pool.cache_clear()

    atexit.register(made.close)
    os.register_at_fork(after_in_child=leave_to_parent)
    return made
