"""What a run's folder holds, and what follows from it: evaluations, cost, answers."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from r1jax import metrics
from r1jax.fields import by_path, lines_of
from r1jax.metrics import ELAPSED

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


class StageCost(NamedTuple):
    """Seconds that a stage took, and how many of them its rollouts and updates."""

    stage: str
    step: int
    seconds: float
    rollout: float
    update: float


def costs(run: RunData) -> list[StageCost]:
    """Each stage's time. Rollout and update are 0 where not every step has a row."""
    found, before = [], 0.0
    for stage, rows in run.stages.items():
        end = max((row[ELAPSED] for row in rows if ELAPSED in row), default=before)
        timed = [row for row in rows if "time/rollout" in row and "time/update" in row]
        whole = len(timed) >= rows[-1]["step"]
        rollout = sum(row["time/rollout"] for row in timed) * whole
        update = sum(row["time/update"] for row in timed) * whole
        found.append(StageCost(stage, rows[-1]["step"], end - before, rollout, update))
        before = end
    return found


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
