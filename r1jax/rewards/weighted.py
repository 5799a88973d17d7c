"""A reward that is the weighted sum of others, with its parts kept for the log."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

Reward = Callable[[Mapping[str, Any], str], float | None]


@dataclass(frozen=True)
class Weighted:
    """A reward function made by `weighted`."""

    terms: Mapping[str, tuple[float, Reward]]

    def __call__(self, row: Mapping[str, Any], answer: str) -> float | None:
        """The weighted sum; None if any part could not be judged."""
        return self.total(self.parts(row, answer))

    def parts(self, row: Mapping[str, Any], answer: str) -> dict[str, float]:
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
        return sum(weight * parts[name] for name, (weight, _) in self.terms.items())


def weighted(**terms: tuple[float, Reward]) -> Weighted:
    """A reward that adds up others: `weighted(accuracy=(1.0, accuracy), format=(0.2, tags))`.

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
            and isinstance(term[0], Real)
            and math.isfinite(term[0])
            and callable(term[1])
        ):
            raise ValueError(f"weighted: {name} must be (weight, function), got {term!r}")
    return Weighted(terms)


def score(
    reward: Reward, row: Mapping[str, Any], answer: str
) -> tuple[float | None, dict[str, float]]:
    """The reward of an answer and its parts, which are {} for any but a `weighted` reward.

    The reward is None if it could not be judged.

    Raises:
      ValueError: the reward, or a part of it, is not a finite number.
    """
    if isinstance(reward, Weighted):
        parts = reward.parts(row, answer)
        return reward.total(parts), parts
    return _number("reward", reward(row, answer)), {}


def _number(name: str, value: float | None) -> float | None:
    if value is None:
        return None
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name} must give a finite number or None, got {value!r}")
    return float(value)
