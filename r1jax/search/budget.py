"""Budget forcing: thinking that is cut at a budget, or made to go on."""

from collections.abc import Sequence
from dataclasses import dataclass

from r1jax.search.paths import Force, Found, Path, Sample


@dataclass(frozen=True, kw_only=True)
class Forcing:
    """How thinking ends and what is put in.

    `close` is the text whose first occurrence ends it; a token that holds it ends thinking.
    """

    close: str = "</think>"
    closing: str = "\n</think>\n\n"  # put in where thinking is cut at the budget
    wait: str = "Wait"  # put in where thinking is made to go on
    budget: int  # tokens of thinking at most, those put in included
    waits: int = 0  # times that thinking is made to go on, if the budget is not used up


def budget_forcing(
    sample: Sample, force: Force, roots: Sequence[Path], *, how: Forcing
) -> list[Found]:
    """For each problem one answer whose thinking has been cut at a budget or made longer.

    Where the model ends its thinking, or its answer, before the budget is used up, that end is
    taken away and `wait` put in, `waits` times at the most. Thinking that reaches the budget is cut
    there and `closing` put in: with a budget of 0, an answer without thinking. What follows is the
    model's own.

    Raises:
      ValueError: `budget` or `waits` < 0.

    Source: s1, arXiv:2501.19393, section 3.1.
    """
    if how.budget < 0 or how.waits < 0:
        raise ValueError(f"need budget and waits >= 0, got {how.budget} and {how.waits}")
    paths = list(roots)
    if how.budget == 0:
        paths = [force(path, how.closing) for path in paths]
    else:
        paths = _think(sample, force, paths, how)
    still = [i for i, path in enumerate(paths) if path.open]
    if still:
        ends = sample([paths[i] for i in still], samples=1, turn=how.waits + 1)
        for i, (end,) in zip(still, ends, strict=True):
            paths[i] = end
    return [Found(chosen=path, candidates=[path]) for path in paths]


def _think(sample: Sample, force: Force, roots: Sequence[Path], how: Forcing) -> list[Path]:
    """Paths whose thinking is over: closed, or the whole answer ended, or out of room."""
    paths, thinking = list(roots), list(range(len(roots)))
    for turn in range(how.waits + 1):
        if not thinking:
            break
        groups = sample(
            [paths[i] for i in thinking],
            samples=1,
            turn=turn,
            until=how.close,
            limit=how.budget,
        )
        going = []
        for i, (path,) in zip(thinking, groups, strict=True):
            over = len(path.tokens) - how.budget
            ended = path.finished or _closed(path, roots[i], how.close)
            if over > 0 or not (ended or path.cut):
                paths[i] = force(path, how.closing, drop=max(over, 0))
            elif ended and turn < how.waits:
                longer = force(path, how.wait, drop=1)
                full = len(longer.tokens) >= how.budget
                paths[i] = force(path, how.closing, drop=1) if full else longer
                going += [i] * (paths[i].open and not full)
            else:
                paths[i] = path
        thinking = going
    return paths


def _closed(path: Path, root: Path, close: str) -> bool:
    return close in path.text[len(root.text) :]
