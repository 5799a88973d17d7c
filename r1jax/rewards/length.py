"""Rewards for an answer's length. How length is measured is a function that is passed in.

A rule sees a row and a text, and a text does not say how many tokens it was sampled as. So the
loop adds to the row what only the sampler knows of an answer:
  num_tokens        tokens that the policy chose for this answer, its end token included
  group_num_tokens  the same for every answer to this prompt, this one among them
With the second, a reward that compares an answer with its group is still a function of one answer.
"""

import math
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any

from r1jax.rewards.weighted import Reward

Measure = Callable[[Mapping[str, Any], str], float]

# --------------------------------------------------------------------------- measures


def tokens(row: Mapping[str, Any], answer: str) -> float:
    """The answer's number of tokens, `row["num_tokens"]`.

    Raises:
      ValueError: the row has no such field, or it is not a number >= 0.
    """
    return _count("num_tokens", row.get("num_tokens"))


def characters(row: Mapping[str, Any], answer: str) -> float:
    """The number of characters of the answer's text, tags and spaces among them."""
    return float(len(answer))


def words(row: Mapping[str, Any], answer: str) -> float:
    """The number of pieces of the answer's text between white space."""
    return float(len(answer.split()))


# --------------------------------------------------------------------------- rewards


def cosine(
    row: Mapping[str, Any],
    answer: str,
    *,
    accuracy: Reward,
    max_length: float,
    length: Measure = tokens,
    right: tuple[float, float] = (1.0, 0.5),
    wrong: tuple[float, float] = (-1.0, -0.5),
    exceeding: float | None = None,
) -> float | None:
    """A reward that goes along half a cosine from length 0 to `max_length`.

    `right` holds the values at these two lengths where `accuracy` is 1, `wrong` where it is less.
    With the defaults, Open-R1's, a right answer had better be short and a wrong one long: to
    think on is the better guess. None where `accuracy` cannot judge.

    From `max_length` on, the reward is `exceeding`, or else the curve's last value. There Open-R1
    lets the cosine rise again: a right answer of twice the length scores as much as an empty one.
    Its lengths are characters, `max_length` 1000; the paper's are tokens, right=(2, 1),
    wrong=(-10, 0), exceeding=-10.

    Raises:
      ValueError: `max_length` <= 0.

    Source: arXiv:2502.03373; `get_cosine_scaled_reward`, github.com/huggingface/open-r1.
    """
    if not max_length > 0:
        raise ValueError(f"max_length must be > 0, got {max_length}")
    verdict = accuracy(row, answer)
    if verdict is None:
        return None
    size = length(row, answer)
    if exceeding is not None and size >= max_length:
        return exceeding
    at_zero, at_end = right if verdict >= 1.0 else wrong
    progress = min(size / max_length, 1.0)
    return at_end + 0.5 * (at_zero - at_end) * (1.0 + math.cos(math.pi * progress))


def overlong(
    row: Mapping[str, Any],
    answer: str,
    *,
    max_length: float,
    buffer: float,
    factor: float = 1.0,
    length: Measure = tokens,
) -> float:
    """0.0 up to `max_length - buffer`, then down along a line to `-factor` at `max_length`.

    It stays there beyond, as in the paper's equation (verl goes on along the line; where answers
    are cut at `max_length` the two are one). DAPO: max_length=20480, buffer=4096, factor 1.

    Raises:
      ValueError: `buffer` is not in (0, `max_length`].

    Source: DAPO, arXiv:2503.14476, eq. 13.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must be in (0, max_length={max_length}], got {buffer}")
    excess = length(row, answer) - (max_length - buffer)
    return -factor * min(max(excess / buffer, 0.0), 1.0)


def kimi(row: Mapping[str, Any], answer: str, *, accuracy: Reward) -> float | None:
    """0.5 for the shortest answer of its group to -0.5 for the longest; at most 0 if wrong.

    0.5 - (length - shortest) / (longest - shortest), in tokens, the extremes being those of
    `row["group_num_tokens"]`. 0.0 for all where they are equal. None where `accuracy` cannot
    judge. It is added to the accuracy with a weight, which the paper raises from 0 in the course
    of training.

    Raises:
      ValueError: the row lacks `num_tokens` or `group_num_tokens`, or they are not counts.

    Source: Kimi k1.5, arXiv:2501.12599, section 2.3.3.
    """
    verdict = accuracy(row, answer)
    size = tokens(row, answer)
    group = row.get("group_num_tokens")
    if not isinstance(group, list | tuple) or not group:
        raise ValueError(
            f"kimi needs row['group_num_tokens'], the token counts of all answers to the prompt, "
            f"got {group!r}"
        )
    counts = [_count("group_num_tokens", count) for count in group]
    shortest, longest = min(counts), max(counts)
    if not shortest <= size <= longest:
        raise ValueError(
            f"num_tokens={size:g} is not among group_num_tokens, {shortest:g} to {longest:g}"
        )
    if verdict is None:
        return None
    if shortest == longest:
        return 0.0
    value = 0.5 - (size - shortest) / (longest - shortest)
    return value if verdict >= 1.0 else min(0.0, value)


def _count(name: str, value: object) -> float:
    if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
        raise ValueError(
            f"this reward needs row[{name!r}], a number >= 0 that the loop adds, got {value!r}"
        )
    return float(value)
