"""A reward that is the weighted sum of others, with its parts kept for the log.

`score_many` scores all answers of a rollout: rules may run in a pool of processes, and a judge is
asked about all at once. `score` scores one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any, TypeVar

from r1jax.schedules import Number, Schedule, bounds

T = TypeVar("T")
Row = Mapping[str, Any]
Reward = Callable[[Row, str], float | None]
Scored = tuple[float | None, dict[str, float]]  # a reward and its parts


@dataclass(frozen=True)
class Batched:
    """A reward that takes many answers at a time, as a judge does: (rows, answers) -> rewards."""

    many: Callable[[Sequence[Row], Sequence[str]], Sequence[float | None]]

    def __call__(self, row: Row, answer: str) -> float | None:
        return self.many([row], [answer])[0]


@dataclass(frozen=True)
class Weighted:
    """A reward function made by `weighted`."""

    terms: Mapping[str, tuple[Number, Reward]]

    def __call__(self, row: Row, answer: str) -> float | None:
        """The weighted sum; None if any part could not be judged."""
        return self.total(self.parts(row, answer))

    def parts(self, row: Row, answer: str) -> dict[str, float]:
        """Each part before its weight; those that could not be judged are left out.

        Raises:
          ValueError: a part is not a finite number.
        """
        judged = {name: _number(name, part(row, answer)) for name, (_, part) in self.terms.items()}
        return {name: value for name, value in judged.items() if value is not None}

    def total(self, parts: Mapping[str, float]) -> float | None:
        """The weighted sum of `parts`; None if one is missing."""
        if len(parts) < len(self.terms):
            return None
        return sum(_weight(name, term[0]) * parts[name] for name, term in self.terms.items())


def weighted(**terms: tuple[Number, Reward]) -> Weighted:
    """A reward that adds up others: `weighted(accuracy=(1.0, accuracy), format=(0.2, tags))`.

    A weight may be a schedule: `schedules.resolve` gives the reward of a step, and only that one
    can be computed.

    An answer that one of them cannot judge (None) is not judged at all: the sum of the rest would
    count that part as 0, which is a verdict.

    Raises:
      ValueError: no terms, or one that is not (a finite weight, a function).
    """
    if not terms:
        raise ValueError("weighted needs at least one term, as in accuracy=(1.0, function)")
    for name, term in terms.items():
        if not (
            isinstance(term, tuple)
            and len(term) == 2
            and isinstance(term[0], Real | Schedule)
            and all(map(math.isfinite, bounds(term[0])))
            and callable(term[1])
        ):
            raise ValueError(f"weighted: {name} must be (weight, function), got {term!r}")
    return Weighted(terms)


def known_accuracy(
    reward: Reward, accuracy: Reward
) -> Callable[[tuple[float | None, Mapping[str, float]]], float | None] | None:
    """How an accuracy is read off what `score_many` gives; None where the reward does not hold it.

    It does where it is that very function, or one of its terms is.
    """
    if reward is accuracy:
        return lambda scored: scored[0]
    terms = reward.terms if isinstance(reward, Weighted) else {}
    name = next((name for name, (_, part) in terms.items() if part is accuracy), None)
    return None if name is None else lambda scored: scored[1].get(name)


def part_names(reward: Reward) -> tuple[str, ...]:
    """The names of the parts that `score_many` gives, in the order of the terms of `weighted`."""
    return tuple(reward.terms) if isinstance(reward, Weighted) else ()


def one_by_one(
    function: Callable[[Row, str], T], rows: Sequence[Row], answers: Sequence[str]
) -> list[T | None]:
    """The function's value for each row and answer, computed here. `Pool.map` does it elsewhere."""
    return [function(row, answer) for row, answer in zip(rows, answers, strict=True)]


def score_many(
    reward: Reward,
    rows: Sequence[Row],
    answers: Sequence[str],
    *,
    each: Callable[..., Sequence[Any]] = one_by_one,
) -> list[Scored]:
    """The reward of each answer and its parts, which are {} for any but a `weighted` reward.

    Answer i is to rows[i]. A reward is None if it could not be judged.

    `Batched` rewards are asked once for all answers, in threads of their own. Meanwhile
    `each(function, rows, answers)` computes the others: here, or in `r1jax.rewards.pool`. What it
    gives up on (None in the place of a value) is a reward of None without parts.

    Raises:
      ValueError: a reward, or a part of it, is not a finite number; a `Batched` reward gives
        another number of values than there are answers; or an answer is no text.
    """
    _check_text(answers)
    whole = not isinstance(reward, Weighted)
    terms: dict[str, tuple[Number, Reward]] = (
        {"reward": (1.0, reward)} if whole else dict(reward.terms)
    )
    batched = {name: term for name, (_, term) in terms.items() if isinstance(term, Batched)}
    rules = {name: term for name, term in terms.items() if name not in batched}
    with ThreadPoolExecutor(max_workers=max(1, len(batched))) as threads:
        asked = {name: threads.submit(term.many, rows, answers) for name, term in batched.items()}
        judged = each(partial(_parts, rules), rows, answers) if rules else [{}] * len(answers)
        found = {name: future.result() for name, future in asked.items()}
    for name, values in found.items():
        if len(values) != len(answers):
            raise ValueError(f"{name} must give {len(answers)} values, got {len(values)}")
    scored: list[Scored] = []
    for i, parts in enumerate(judged):
        if parts is None:
            scored.append((None, {}))
            continue
        every = {name: found[name][i] if name in found else parts.get(name) for name in terms}
        numbers = {name: _number(name, value) for name, value in every.items()}
        kept = {name: value for name, value in numbers.items() if value is not None}
        if whole:
            scored.append((kept.get("reward"), {}))
        else:
            scored.append((Weighted(terms).total(kept), kept))
    return scored


def score(reward: Reward, row: Row, answer: str) -> Scored:
    """The reward of one answer and its parts, as `score_many` gives them."""
    return score_many(reward, [row], [answer])[0]


def _parts(terms: Mapping[str, tuple[Number, Reward]], row: Row, answer: str) -> dict[str, float]:
    return Weighted(terms).parts(row, answer)


def _weight(name: str, weight: Number) -> float:
    if isinstance(weight, Schedule):
        raise ValueError(f"the weight of {name} is a schedule: resolve it for a step first")
    return weight


def _check_text(answers: Sequence[str]) -> None:
    for place, answer in enumerate(answers):
        if not isinstance(answer, str):
            raise ValueError(f"answer {place} must be text (str), got {type(answer).__name__}")


def _number(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must give a finite number or None, got {value!r}")
    return float(value)
