"""Beam search over steps of reasoning."""

from collections.abc import Sequence

from r1jax.search.paths import Found, Path, Sample, Value, distinct


def beam_search(
    sample: Sample,
    value: Value,
    roots: Sequence[Path],
    *,
    width: int,
    branch: int,
    until: str,
) -> list[Found]:
    """For each problem the best whole answer of a beam that keeps the `width` best paths.

    At first width * branch continuations of the prompt are drawn, later `branch` of each path that
    is kept and can go on. A continuation is one step: to the end of the first token that holds
    `until`, or the end of the answer. Equal paths count once. Whole answers stay in the beam as
    long as their value keeps them there, and the search of a problem is over when the beam holds
    nothing else. Ties go to the earlier path. If no path of the beam came to an end by itself, the
    best that ran out of room is handed in.

    With `value` a process model this is step-wise beam search (arXiv:2408.03314, section 5.1);
    with `by_likelihood` it is plain beam search over steps.

    Raises:
      ValueError: `width` or `branch` < 1.
    """
    if width < 1 or branch < 1:
        raise ValueError(f"need width and branch >= 1, got {width} and {branch}")
    beams: dict[int, list[tuple[float, Path]]] = {root.problem: [(0.0, root)] for root in roots}
    seen: dict[int, list[Path]] = {root.problem: [] for root in roots}
    turn = 0
    while going := [path for beam in beams.values() for _, path in beam if path.open]:
        groups = sample(going, samples=branch if turn else width * branch, turn=turn, until=until)
        new = {problem: [] for problem in beams}
        for path, group in zip(going, groups, strict=True):
            new[path.problem] += group
        new = {problem: distinct(paths) for problem, paths in new.items()}
        values = iter(value([path for paths in new.values() for path in paths]))
        for problem, paths in new.items():
            whole = [(score, path) for score, path in beams[problem] if not path.open]
            ranked = [*whole, *((next(values), path) for path in paths)]
            ranked.sort(key=lambda pair: -pair[0])
            beams[problem] = ranked[:width]
            seen[problem] += [path for path in paths if not path.open]
        turn += 1
    return [_found(beams[root.problem], seen[root.problem]) for root in roots]


def _found(beam: Sequence[tuple[float, Path]], candidates: Sequence[Path]) -> Found:
    finished = [path for _, path in beam if path.finished]
    return Found(chosen=(finished or [path for _, path in beam])[0], candidates=candidates)
