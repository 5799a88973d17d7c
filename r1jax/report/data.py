"""What a run's folder holds, and what follows from it: evaluations, cost, answers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from r1jax import metrics
from r1jax.data.files import records
from r1jax.fields import by_path, lines_of
from r1jax.metrics import ELAPSED
from r1jax.report.charts import number

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """What a run's folder holds."""

    folder: Path
    name: str
    stages: Mapping[str, Sequence[Row]]  # rows of metrics.jsonl
    settings: Mapping[str, str]  # config.txt
    origin: Mapping[str, Any]  # config.json: variant, overrides, commit
    machine: Mapping[str, Any]


def load(folder: str | Path) -> RunData:
    """Reads a run's folder. All but metrics.jsonl may be missing.

    Raises:
      ValueError: There is no such folder, or no metrics.jsonl in it, or a file is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    if not (folder / metrics.METRICS).is_file():
        raise ValueError(f"{folder} is no run folder: it has no {metrics.METRICS}")
    rows = metrics.read(folder)
    config = folder / "config.txt"
    return RunData(
        folder=folder,
        name=folder.resolve().name,
        stages={name: list(group) for name, group in groupby(rows, lambda row: row["stage"])},
        settings=by_path(lines_of(config)) if config.is_file() else {},
        origin=_json(folder / "config.json"),
        machine=_json(folder / metrics.MACHINE),
    )


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_bytes())
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return record


class Evaluations(NamedTuple):
    """The first and the last evaluation on held-out problems, of the last stage that has any."""

    stage: str
    first: Row
    last: Row


def evaluations(run: RunData) -> Evaluations | None:
    """None where there was none, or none of whose answers any could be judged."""
    for stage, rows in reversed(list(run.stages.items())):
        if found := [row for row in rows if math.isfinite(row.get("test/accuracy", math.nan))]:
            return Evaluations(stage, found[0], found[-1])
    return None


def interval(row: Row) -> str:
    """`[42.6%, 55.1%]`, of an evaluation's accuracy; "" where no interval was measured."""
    if "test/accuracy_low" not in row or "test/accuracy_high" not in row:
        return ""
    return f"[{row['test/accuracy_low']:.1%}, {row['test/accuracy_high']:.1%}]"


def unfinished(run: RunData) -> str | None:
    """What is still to be done, as config.txt says, or None."""
    names = [name for name in run.settings.get("stages", "").split(", ") if name]
    if not names:
        return None
    for name in names:
        rows, planned = run.stages.get(name, ()), int(run.settings.get(f"{name}.steps", "0"))
        done = rows[-1]["step"] if rows else 0
        # The last row of a stage may be that of step `planned` - 1, where steps count from 0.
        if done + 1 < planned and not any(later in run.stages for later in _after(names, name)):
            return f"stage {name} is at step {done:,} of {planned:,}"
    return None


def _after(names: Sequence[str], name: str) -> Sequence[str]:
    return names[list(names).index(name) + 1 :]


TOKENS = {"sampled": "tokens sampled", "learned": "tokens trained on"}  # of a Cost -> heading


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds that a stage took, and what for. What is left is scoring, compiling and saving.

    Tokens are those of answers that were sampled, also for data and on held-out problems, and
    those that went through updates; 0 where the log has none.
    """

    stage: str
    step: int | None = None
    seconds: float
    training: float = 0.0
    rollout: float = 0.0
    building: float = 0.0  # of data
    evaluation: float = 0.0
    sampled: float = 0.0  # tokens
    learned: float = 0.0  # tokens, each as often as it was trained on

    @property
    def inference(self) -> float:
        return self.rollout + self.building + self.evaluation

    @property
    def other(self) -> float:
        return max(0.0, self.seconds - self.training - self.inference)


def costs(run: RunData) -> list[Cost]:
    """Each stage's time, in order.

    Of a stage with rollouts the updates are training; all of another one is, unless it builds data
    or compares models. Where not every step of a stage with rollouts has a row, rollouts and
    training are 0.
    """
    found, before = [], 0.0
    for stage, rows in run.stages.items():
        end = max((row[ELAPSED] for row in rows if ELAPSED in row), default=before)
        seconds, step = end - before, rows[-1]["step"]
        before = end
        spent = {"evaluation": _sum(rows, "time/evaluate")}
        timed = [row for row in rows if "time/rollout" in row and "time/update" in row]
        kind = run.settings.get(stage)
        if kind in ("Build", "Compare"):
            spent = {"building" if kind == "Build" else "evaluation": seconds}
        elif not timed:
            spent["training"] = seconds - spent["evaluation"]
        elif len(timed) >= step:
            spent["rollout"] = _sum(timed, "time/rollout")
            spent["training"] = _sum(timed, "time/update")
        sampled = _sum(rows, "time/rollout_tokens") + _sum(rows, "time/evaluate_tokens")
        learned = _sum(rows, "time/update_tokens")
        tokens = {"sampled": sampled, "learned": learned}
        found.append(Cost(stage=stage, step=step, seconds=seconds, **spent, **tokens))
    return found


def _sum(rows: Sequence[Row], name: str) -> float:
    return sum(row.get(name, 0.0) for row in rows)


def afterwards(run: RunData) -> Cost | None:
    """The time of the evaluations that `r1jax.evaluate` left in the run's folder; None: of none.

    Raises:
      ValueError: A file is damaged.
    """
    folder = run.folder / "evaluations"
    first = [records(file)[0] for file in sorted(folder.glob("*.curves.jsonl"))]
    summaries = [_json(file) for file in sorted(folder.glob("*.json"))]
    seconds = sum(each.get(ELAPSED, 0.0) for each in (*first, *summaries))
    if not seconds:
        return None
    return Cost(stage="evaluated afterwards", seconds=seconds, evaluation=seconds)


def total(found: Sequence[Cost]) -> Cost:
    """The sum of some costs."""
    names = (
        *("seconds", "training", "rollout", "building", "evaluation"),
        *("sampled", "learned"),
    )
    sums = {name: sum(getattr(each, name) for each in found) for name in names}
    return Cost(stage="all", **sums)


class Devices(NamedTuple):
    """What a run had to compute with, as machine.json says: of several machines, the last."""

    count: float
    name: str  # of one
    price: float | None  # of one for an hour, in dollars

    def hours(self, seconds: float) -> float:
        """Of all devices together."""
        return seconds / 3600 * self.count

    def dollars(self, seconds: float) -> str:
        """What they cost, or "" if there is no price."""
        if self.price is None:
            return ""
        cost = self.hours(seconds) * self.price
        return f"${cost:,.2f}" if cost >= 0.1 else f"${number(cost)}"


def devices(run: RunData) -> Devices | None:
    """The accelerators, or a CPU's cores; None if no machine.json says."""
    price = run.settings.get("price", "None")
    name = "device" if "devices" in run.machine and run.machine.get("device") != "cpu" else "core"
    count = run.machine.get("devices" if name == "device" else "cores")
    return Devices(count, name, None if price == "None" else float(price)) if count else None


def pairs(folder: Path, stage: str) -> list[tuple[Row, Row]]:
    """Each held-out problem's first answer at the stage's first and at its last evaluation."""
    first: dict[str, Row] = {}
    last: dict[str, Row] = {}
    first_step = last_step = None
    for sample in metrics.read_samples(folder):
        if sample["stage"] != stage or sample.get("split") != "test":
            continue
        first_step = sample["step"] if first_step is None else first_step
        if sample["step"] != last_step:
            last_step, last = sample["step"], {}
        problem = json.dumps(sample.get("row"), sort_keys=True)
        if sample["step"] == first_step:
            first.setdefault(problem, sample)
        last.setdefault(problem, sample)
    if first_step == last_step:
        return []
    return [(first[problem], last[problem]) for problem in first if problem in last]
