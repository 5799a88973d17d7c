"""What strategies pass around: answers in the making, what continues them, what scores them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Path:
    """A problem's prompt and an answer to it so far."""

    problem: int  # the problem's number; goes into random keys
    prompt: str
    prompt_length: int = 0  # tokens
    text: str = ""  # of the answer
    tokens: tuple[int, ...] = ()  # of the answer, also those that were put in
    logp: float = 0.0  # sum of the sampled tokens' log-probabilities
    finished: bool = False  # ended by its end token
    cut: bool = False  # has no room to go on

    @property
    def open(self) -> bool:
        """Whether it can be continued."""
        return not (self.finished or self.cut)


class Sample(Protocol):
    """Continues paths: for each, in order, `samples` continuations, all in flight together.

    `paths` are open. A continuation goes on to the end of the answer or, with `until`, to the end
    of the first token whose text holds that; at most `limit` tokens. `turn` goes into the random
    keys: what comes of a path depends on it, on the problem's number and on the path's place among
    those of its problem, but on no other problem. A continuation that has no more room is `cut`.
    """

    def __call__(
        self,
        paths: Sequence[Path],
        *,
        samples: int,
        turn: int,
        until: str | None = None,
        limit: int | None = None,
    ) -> list[list[Path]]: ...


class Force(Protocol):
    """The path less its last `drop` tokens and with `text` put in behind: open again if it fits."""

    def __call__(self, path: Path, text: str, *, drop: int = 0) -> Path: ...


Score = Callable[[Sequence[str], Sequence[str]], Sequence[float]]  # (prompts, answers)
Value = Callable[[Sequence[Path]], Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a strategy hands in for one problem, and all whole answers that it chose from."""

    chosen: Path
    candidates: Sequence[Path]


# --------------------------------------------------------------------------- values


def by_text(score: Score) -> Value:
    """A scorer of texts, such as a reward model or a rule, as a value of paths."""

    def value(paths: Sequence[Path]) -> Sequence[float]:
        found = score([path.prompt for path in paths], [path.text for path in paths])
        return checked(found, len(paths))

    return value


def by_likelihood(paths: Sequence[Path]) -> list[float]:
    """The mean log-probability of each path's tokens: what beam search keeps without a scorer."""
    return [path.logp / max(len(path.tokens), 1) for path in paths]


def by_rollouts(sample: Sample, value: Value, *, samples: int, turn: int = 1 << 20) -> Value:
    """The mean value of `samples` ways to finish a path: what it is worth without a process model.

    `turn` is one that the search does not come to, so that its own continuations are others.

    Source: Math-Shepherd, arXiv:2312.08935.
    """

    def estimate(paths: Sequence[Path]) -> list[float]:
        still = [path for path in paths if path.open]
        ways = iter(sample(still, samples=samples, turn=turn) if still else [])
        groups = [next(ways) if path.open else [path] for path in paths]
        values = iter(value([end for group in groups for end in group]))
        return [sum(next(values) for _ in group) / len(group) for group in groups]

    return estimate


def as_probability(score: Score) -> Score:
    """Scores that are log odds, such as a reward model's, as numbers from 0 to 1."""

    def squashed(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        # tanh does not overflow where exp does.
        return [0.5 + 0.5 * math.tanh(value / 2) for value in score(prompts, answers)]

    return squashed


def checked(values: Sequence[float], count: int) -> list[float]:
    """The scores as floats.

    Raises:
      ValueError: there are not `count` of them, or one is not finite.
    """
    found = [float(value) for value in values]
    if len(found) != count or not all(map(math.isfinite, found)):
        raise ValueError(f"a scorer must give {count} finite numbers, got {found!r:.80}")
    return found


# --------------------------------------------------------------------------- cost


@dataclass(kw_only=True)
class Meter:
    """Tokens that a strategy has used so far, over all problems."""

    sampled: int = 0
    read: int = 0  # prompts and answers so far, read again before each continuation
    scored: int = 0  # in texts given to a scorer
    by_problem: dict[int, int] = field(default_factory=dict)  # sampled


def metered(sample: Sample, meter: Meter) -> Sample:
    """`sample`, whose tokens are counted, also those of continuations that are dropped later."""

    def counted(
        paths: Sequence[Path],
        *,
        samples: int,
        turn: int,
        until: str | None = None,
        limit: int | None = None,
    ) -> list[list[Path]]:
        found = sample(paths, samples=samples, turn=turn, until=until, limit=limit)
        for path, group in zip(paths, found, strict=True):
            new = sum(len(longer.tokens) - len(path.tokens) for longer in group)
            meter.sampled += new
            meter.read += path.prompt_length + len(path.tokens)
            meter.by_problem[path.problem] = meter.by_problem.get(path.problem, 0) + new
        return found

    return counted


def metered_value(value: Value, meter: Meter) -> Value:
    """`value`, whose texts are counted: each time a path is scored it is read whole."""

    def counted(paths: Sequence[Path]) -> Sequence[float]:
        meter.scored += sum(path.prompt_length + len(path.tokens) for path in paths)
        return value(paths)

    return counted


def distinct(paths: Sequence[Path]) -> list[Path]:
    """The first of each set of paths with the same tokens, in order."""
    found: dict[tuple[int, ...], Path] = {}
    for path in paths:
        found.setdefault(path.tokens, path)
    return list(found.values())
