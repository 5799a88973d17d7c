"""Accuracy against tokens: a curve for each way to spend tokens on the same problems."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from r1jax import restore, settings
from r1jax.evaluate import sampled
from r1jax.evaluate.judging import Judged, measure, verdicts
from r1jax.metrics import Estimate, estimate
from r1jax.rewards.dispatch import by_verifier
from r1jax.search.beam import beam_search
from r1jax.search.budget import Forcing, budget_forcing
from r1jax.search.paths import (
    Force,
    Found,
    Meter,
    Path,
    Sample,
    Value,
    by_likelihood,
    by_rollouts,
    metered,
    metered_value,
)
from r1jax.search.tree import tree_search

# Strategies of one pool of answers, by the measure that says what k of them are worth.
POOLED = {"plain": "pass", "majority": "maj", "weighted": "weighted", "best": "best"}
SEARCHES = ("direct", "cut", "wait", "beam", "guided", "tree")
STRATEGIES = (*POOLED, *SEARCHES)
SCORED = {"weighted", "best", "guided", "tree"}  # need a scorer


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How much each strategy may spend. A size is a number of answers, a beam's width, a tree's
    rounds or a number of waits; a budget is tokens of thinking."""

    sizes: Sequence[int]
    budgets: Sequence[int]
    branch: int  # continuations of a path
    step: str  # the text that ends a step
    forcing: Forcing  # its budget and waits are those of a size
    rollouts: int  # ways to finish a path whose scores are its value in `tree`; 0: its own score


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The problems and the model, as strategies want them."""

    rows: Sequence[settings.Row]
    task: settings.Task
    roots: Sequence[Path]
    direct: Sequence[Path] | None  # prompts for the answer alone; None: thinking is closed at once
    sample: Callable[[str], Sample]  # a strategy's own, by its name: it has random keys of its own
    force: Force
    value: Value | None


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a strategy got and spent, as means over problems."""

    strategy: str
    size: int
    accuracy: Estimate
    sampled: float  # tokens
    read: float  # tokens of prompts and answers so far, before each continuation
    scored: float  # tokens of the texts given to the scorer
    cut: float  # share of the answers handed in that ran out of room

    def record(self) -> dict[str, Any]:
        """The point as one flat JSON object."""
        mean, low, high, problems = self.accuracy
        found = {"accuracy": mean, "low": low, "high": high, "problems": problems}
        rest = {name: value for name, value in asdict(self).items() if name != "accuracy"}
        return {**rest, **found}


Points = list[Point]
Records = list[dict[str, Any]]


def check(names: Sequence[str], plan: Plan, *, scored: bool) -> None:
    """Passes if the strategies can be run.

    Raises:
      ValueError: one is unknown, or needs a scorer that there is not, or budgets.
    """
    for name in names:
        if name not in STRATEGIES:
            raise ValueError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}")
        if name in SCORED and not scored:
            raise ValueError(f"--strategy {name} needs a scorer: --score RUN or MODULE:FUNCTION")
    if "cut" in names and not plan.budgets:
        raise ValueError("--strategy cut needs --budgets")


def run(asked: Asked, names: Sequence[str], plan: Plan) -> Iterator[tuple[Points, Records]]:
    """Points of the strategies' curves, with every answer that was seen on the way, as they come:
    first all that one pool of answers gives, then one by one.

    Raises:
      ValueError: as the strategies; `weighted` with scores below 0.
    """
    pooled = [name for name in names if name in POOLED]
    if pooled:
        yield _pool(asked, pooled, plan)
    for name in names:
        for size in () if name in POOLED else _sizes(name, plan):
            meter = Meter()
            found = _search(asked, name, size, plan, meter)
            point, records = _judged(asked, name, size, found, meter)
            yield [point], records


def _sizes(name: str, plan: Plan) -> Sequence[int]:
    return {"direct": [0], "cut": plan.budgets}.get(name, plan.sizes)


# --------------------------------------------------------------------------- one pool of answers


def _pool(asked: Asked, names: Sequence[str], plan: Plan) -> tuple[Points, Records]:
    """Draws as many answers to each problem as the largest size, for all sizes and strategies.

    What k of them are worth is an exact mean over sets of k, and their cost the pool's share.
    """
    meter = Meter()
    num = max(plan.sizes)
    groups = metered(asked.sample("pool"), meter)(asked.roots, samples=num, turn=0)
    scores: list[float | None] = [None] * (num * len(groups))
    if asked.value is not None and SCORED & set(names):
        scored = metered_value(asked.value, meter)
        scores = list(scored([path for group in groups for path in group]))
    problems = []
    for i, (row, group) in enumerate(zip(asked.rows, groups, strict=True)):
        answers = [restore.Answer(p.text, len(p.tokens), p.finished) for p in group]
        judged = sampled.judge(asked.task, row, answers)
        own = scores[i * num : (i + 1) * num]
        problems.append([replace(j, score=score) for j, score in zip(judged, own, strict=True)])
    measured = measure(problems, sorted({1, *plan.sizes}))
    cut = sum(path.cut for group in groups for path in group) / (num * len(groups))
    share = 1 / (num * len(groups))
    points = []
    for name in names:
        for size in plan.sizes if name != "plain" else [1]:
            key = f"{POOLED[name]}@{size}" if size > 1 else "pass@1"
            if key not in measured:
                raise ValueError(
                    f"--strategy {name} cannot be measured: it needs "
                    f"{'scores >= 0 and ' if name == 'weighted' else ''}answers that have votes"
                )
            point = Point(
                strategy=name,
                size=size,
                accuracy=measured[key],
                sampled=meter.sampled * share * size,
                read=meter.read / len(groups),
                scored=meter.scored * share * size * (name in SCORED),
                cut=cut,
            )
            points.append(point)
    return points, _pool_records(asked, problems)


def _pool_records(asked: Asked, problems: Sequence[Sequence[Judged]]) -> Records:
    records = []
    for row, root, problem in zip(asked.rows, asked.roots, problems, strict=True):
        for j, answer in enumerate(problem):
            vote = None if answer.vote is None else str(answer.vote)
            where = {"strategy": "pool", "problem": root.problem, "sample": j}
            about = {"row": dict(row), "prompt": root.prompt}
            records.append({**where, **about, **asdict(answer), "vote": vote})
    return records


# --------------------------------------------------------------------------- searches


def _search(asked: Asked, name: str, size: int, plan: Plan, meter: Meter) -> list[Found]:
    sample = metered(asked.sample(f"{name}-{size}"), meter)
    beam = {"width": size, "branch": plan.branch, "until": plan.step}
    if name == "beam":
        return beam_search(sample, by_likelihood, asked.roots, **beam)
    if name in ("guided", "tree"):
        assert asked.value is not None
        value = metered_value(asked.value, meter)
        if name == "guided":
            return beam_search(sample, value, asked.roots, **beam)
        if plan.rollouts:
            value = by_rollouts(sample, value, samples=plan.rollouts)
        return tree_search(
            sample, value, asked.roots, rounds=size, branch=plan.branch, until=plan.step
        )
    if name == "direct" and asked.direct is not None:
        groups = sample(asked.direct, samples=1, turn=0)
        return [Found(chosen=path, candidates=[path]) for (path,) in groups]
    how = {
        "direct": replace(plan.forcing, budget=0, waits=0),
        "cut": replace(plan.forcing, budget=size, waits=0),
        "wait": replace(plan.forcing, waits=size),
    }[name]
    return budget_forcing(sample, asked.force, asked.roots, how=how)


def _judged(
    asked: Asked, name: str, size: int, found: Sequence[Found], meter: Meter
) -> tuple[Point, Records]:
    chosen = [each.chosen for each in found]
    values = _accuracies(asked, range(len(found)), chosen)
    right = [value for value in values if value is not None]
    if not right:
        raise ValueError(f"--strategy {name}: none of its {len(found)} answers could be judged")
    point = Point(
        strategy=name,
        size=size,
        accuracy=estimate(right),
        sampled=meter.sampled / len(found),
        read=meter.read / len(found),
        scored=meter.scored / len(found),
        cut=sum(path.cut for path in chosen) / len(found),
    )
    places = [i for i, each in enumerate(found) for _ in each.candidates]
    paths = [path for each in found for path in each.candidates]
    records = []
    for i, path, value in zip(places, paths, _accuracies(asked, places, paths), strict=True):
        where = {"strategy": name, "size": size, "problem": path.problem}
        about = {"row": dict(asked.rows[i]), "prompt": path.prompt, "chosen": path is chosen[i]}
        answer = {"answer": asked.task.prefill + path.text, "length": len(path.tokens)}
        end = {"finished": path.finished, "accuracy": value}
        tokens = {"tokens": meter.by_problem.get(path.problem, 0)}
        records.append({**where, **about, **answer, **end, **tokens})
    return point, records


def _accuracies(
    asked: Asked, places: Sequence[int], paths: Sequence[Path]
) -> Sequence[float | None]:
    rows = [asked.rows[i] for i in places]
    texts = [asked.task.prefill + path.text for path in paths]
    if asked.task.accuracy is by_verifier:
        return verdicts(rows, texts)
    return [asked.task.accuracy(row, text) for row, text in zip(rows, texts, strict=True)]


# --------------------------------------------------------------------------- for people


HEAD = f"{'strategy':10}{'size':>6}{'tokens':>10}{'accuracy':>10}   95% interval"


def line(point: Point) -> str:
    """The point in a line for people, below HEAD."""
    mean, low, high, _ = point.accuracy
    return (
        f"{point.strategy:10}{point.size:6}{point.sampled:10,.1f}{mean:10.1%}   "
        f"{low:.1%} to {high:.1%}"
    )


def lines(points: Sequence[Point], about: Mapping[str, Any]) -> Records:
    """One record a point, with what all have in common."""
    return [{**about, **point.record()} for point in points]
