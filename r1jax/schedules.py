"""Numbers that change with the step, as data: a config holds them and prints them.

Wherever a schedule is allowed a plain number is one that stays. Steps count from 1, so
`Steps(values=(32768, 65536), starts=(8200,))` is 65,536 from step 8,200 on (R1-Zero's jump in
length). A schedule is a function of the step alone, so that resuming needs no state.

`at` gives the number at a step, `bounds` its extremes, `resolve` a copy of a record or a partial
with all its schedules so replaced, and `arguments` those that are arguments of a partial, to be
passed to it traced: a number that changes inside of a compiled program would compile it anew.

`Adaptive` stands beside them, for the weight of a KL term alone: where it is depends on the KL
that was measured. So it is part of the state of training, which is saved; who has it passes it to
`resolve` and `arguments` as `adapted`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Steps:
    """values[0] at first, values[i] from step starts[i - 1] on."""

    values: tuple[float, ...]
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.values) != len(self.starts) + 1:
            raise ValueError(
                f"values must be one more than starts, got {len(self.values)} "
                f"and {len(self.starts)}"
            )
        _check_finite("values", *self.values)
        if any(b <= a for a, b in zip(self.starts, self.starts[1:], strict=False)):
            raise ValueError(f"starts must increase, got {self.starts}")

    def __call__(self, step: int) -> float:
        return self.values[sum(step >= start for start in self.starts)]


@dataclass(frozen=True, kw_only=True)
class Linear:
    """`first` until step `begin`, `last` from step `end` on, a straight line between."""

    first: float
    last: float
    end: int
    begin: int = 1

    def __post_init__(self) -> None:
        _check_ramp(self)

    def __call__(self, step: int) -> float:
        share = _share(self, step)
        return (1 - share) * self.first + share * self.last


@dataclass(frozen=True, kw_only=True)
class Cosine:
    """`first` until step `begin`, `last` from step `end` on, half a cosine wave between."""

    first: float
    last: float
    end: int
    begin: int = 1

    def __post_init__(self) -> None:
        _check_ramp(self)

    def __call__(self, step: int) -> float:
        share = _share(self, step)
        if share in (0, 1):  # exact at both ends
            return self.last if share else self.first
        return self.last + (self.first - self.last) * (1 + math.cos(math.pi * share)) / 2


@dataclass(frozen=True, kw_only=True)
class Adaptive:
    """The weight of a KL term that moves to hold the KL to the reference near `target`.

    It is `first` at step 1 and then what `after` makes of it. The KL is that of a step's rollout,
    the mean over tokens of log(policy / reference), in nats a token, as other KLs in the log are.
    (Ziegler et al. have nats an answer; their answers all have one length.)
    """

    first: float
    target: float  # nats a token
    gain: float = 0.1
    bound: float = 0.2

    def __post_init__(self) -> None:
        for name, value in (("first", self.first), ("target", self.target), ("gain", self.gain)):
            if not 0 < value < math.inf:
                raise ValueError(f"{name} must be > 0 and finite, got {value}")
        if not 0 < self.bound <= 1 or self.gain * self.bound >= 1:
            raise ValueError(
                f"bound must be in (0, 1] and gain * bound < 1, "
                f"got {self.bound} and gain {self.gain}"
            )

    def after(self, weight: float, kl: float) -> float:
        """The weight of the next step: larger if `kl` came out above `target`.

        weight * (1 + gain * clip(kl / target - 1, -bound, bound)): with the defaults it changes
        by at most 2% a step.

        Source: Ziegler et al., arXiv:1909.08593, section 2.2, K = 0.1 and the clip at 0.2.
        """
        error = min(max(kl / self.target - 1, -self.bound), self.bound)
        return weight * (1 + self.gain * error)


Schedule = Steps | Linear | Cosine
Number = float | Schedule


def at(number: Number, step: int) -> float:
    """The number at a step; a plain number is itself."""
    return number(step) if isinstance(number, Schedule) else number


def bounds(number: Number) -> tuple[float, float]:
    """The least and the greatest that a number is at any step."""
    if not isinstance(number, Schedule):
        return number, number
    values = number.values if isinstance(number, Steps) else (number.first, number.last)
    return min(values), max(values)


def resolve(value: T, step: int, *, adapted: float | None = None) -> T:
    """`value` with every schedule inside it replaced by its number at `step`.

    Looks into records (frozen dataclasses), mappings, lists, tuples and arguments of
    `functools.partial`; all else, other functions too, stays what it is. Without a schedule the
    very same object is given back. An `Adaptive` becomes `adapted`.
    """
    return _resolved(value, step, adapted)


def arguments(
    function: Callable[..., Any], step: int, *, adapted: float | None = None
) -> dict[str, float]:
    """The numbers at `step` of those keyword arguments of a partial that are schedules.

    They override the schedules when passed: `function(x, **arguments(function, step))`. For a
    function that is no partial there are none. An `Adaptive` is at `adapted`.
    """
    given = function.keywords if isinstance(function, partial) else {}
    return {
        name: _resolved(value, step, adapted)
        for name, value in given.items()
        if isinstance(value, Schedule | Adaptive)
    }


def adaptive(setting: Any) -> Adaptive | None:
    """The adaptive weight in a setting, wherever it stands there; None if there is none.

    Raises:
      ValueError: there are two that differ: one number is adapted.
    """
    found = list(dict.fromkeys(inside(setting, Adaptive)))
    if len(found) > 1:
        raise ValueError(f"only one adaptive weight can be kept, got {found[0]} and {found[1]}")
    return found[0] if found else None


def inside(value: Any, kind: type[T]) -> Iterator[T]:
    """Every `kind` in a setting: in records, in tuples and mappings, in arguments of a partial."""
    if isinstance(value, kind):
        yield value
    elif isinstance(value, partial):
        yield from inside(value.args, kind)
        yield from inside(value.keywords, kind)
    elif isinstance(value, Mapping):
        yield from inside(tuple(value.values()), kind)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from inside(item, kind)
    elif is_dataclass(value) and not isinstance(value, type):
        yield from inside([getattr(value, one.name) for one in fields(value)], kind)


def _resolved(value: Any, step: int, adapted: float | None) -> Any:
    if isinstance(value, Schedule):
        return value(step)
    if isinstance(value, Adaptive):
        if adapted is None:
            raise ValueError(f"{value} is only for the weight of a KL term in a Reinforce stage")
        return adapted
    if isinstance(value, partial):
        parts = (value.func, value.args, value.keywords)
        new = tuple(_resolved(part, step, adapted) for part in parts)
        if all(a is b for a, b in zip(new, parts, strict=True)):
            return value
        return partial(new[0], *new[1], **new[2])
    if isinstance(value, Mapping):
        items = {name: _resolved(item, step, adapted) for name, item in value.items()}
        return items if any(items[name] is not item for name, item in value.items()) else value
    if isinstance(value, list | tuple):
        new = [_resolved(item, step, adapted) for item in value]
        same = all(a is b for a, b in zip(new, value, strict=True))
        return value if same else type(value)(new)
    if is_dataclass(value) and not isinstance(value, type):
        held = {field.name: getattr(value, field.name) for field in fields(value) if field.init}
        new = {name: _resolved(item, step, adapted) for name, item in held.items()}
        changed = {name: item for name, item in new.items() if item is not held[name]}
        return replace(value, **changed) if changed else value
    return value


def _share(ramp: Linear | Cosine, step: int) -> float:
    """How far the step is from `begin` (0) to `end` (1)."""
    return min(max((step - ramp.begin) / (ramp.end - ramp.begin), 0), 1)


def _check_ramp(ramp: Linear | Cosine) -> None:
    _check_finite("first and last", ramp.first, ramp.last)
    if ramp.end <= ramp.begin:
        raise ValueError(f"end must be after begin={ramp.begin}, got {ramp.end}")


def _check_finite(name: str, *numbers: float) -> None:
    if not all(math.isfinite(number) for number in numbers):
        raise ValueError(f"{name} must be finite, got {numbers}")
