"""What a run measures: written line by line, read back, cut back on resume.

JAX is never imported here; numpy and tensorboardX only inside the functions that use them.
"""

import json
import math
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from r1jax import tensorboard

METRICS = "metrics.jsonl"
SAMPLES = "samples.jsonl"
TABLE = "table.json"  # of a stage that compares models
MACHINE = "machine.json"
TENSORBOARD = "tensorboard"
ELAPSED = "time/elapsed"

# JSON has no such numbers. `null` would not tell an overflow from a 0/0, so they are strings.
NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# --------------------------------------------------------------------------- files


def append(path: Path, data: bytes) -> None:
    """Adds `data` to the end of the file: all of it, or nothing and an OSError that names it."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(file).st_size
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
        except OSError as error:
            # A nearly full disk takes the first part of a line and refuses the rest.
            with suppress(OSError):
                os.ftruncate(file, size)
            raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(file)


def replace(path: Path, data: bytes) -> None:
    """Makes `data` the file's whole content, so that a reader sees the old or the new, never half.

    Raises:
      OSError: It names the file; what was there before is left as it was.
    """
    new = path.with_name(f".{path.name}.new")
    try:
        new.unlink(missing_ok=True)
        append(new, data)
        os.replace(new, path)
    except OSError as error:
        with suppress(OSError):
            new.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from None


def _keep_head(path: Path, keep: Callable[[bytes], bool]) -> None:
    """Truncates the file before the first line that is half-written or not to be kept."""
    if not path.exists():
        return
    end = 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n") or not keep(line):
                break
            end += len(line)
    if end < path.stat().st_size:
        os.truncate(path, end)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file, one a line; a last line without an end is left out."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.endswith(b"\n"):
                yield _record(line, f"{path}, line {number}")


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:
        record = None
    if not isinstance(record, dict) or not {"stage", "step"} <= record.keys():
        raise ValueError(f"{where}: expected a JSON object with a stage and a step")
    return record


def _plain(value: Any) -> Any:
    """`value` as JSON can hold it; numbers of numpy and JAX become Python's, to the last bit."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if hasattr(value, "item"):  # a number of numpy or JAX
        value = value.item()
    if isinstance(value, int):
        return value
    number = float(value)
    return number if math.isfinite(number) else str(number)


def _line(stage: str, step: int, values: Mapping[str, Any]) -> bytes:
    record = {"stage": stage, "step": int(step), **_plain(values)}
    text = json.dumps(record, ensure_ascii=False, allow_nan=False)
    # A lone surrogate in an answer has no UTF-8; backslashreplace writes it as JSON's own escape.
    return text.encode("utf-8", "backslashreplace") + b"\n"


# --------------------------------------------------------------------------- writing


class Writer:
    """Appends to a run's logs. It keeps no file open, so there is nothing to close or to lose."""

    def __init__(self, folder: Path, clock: Callable[[], float]) -> None:
        self._folder = folder
        self._clock = clock
        self._events: dict[str, Path] = {}  # stage -> this process's TensorBoard file
        rows = read(folder) if (folder / METRICS).exists() else []
        self._start = clock() - max((row.get(ELAPSED, 0.0) for row in rows), default=0.0)

    def elapsed(self) -> float:
        """Seconds since the run began; a restart goes on from the last line that was kept."""
        return self._clock() - self._start

    def write(self, stage: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds one line to metrics.jsonl, names sorted, and the same numbers to TensorBoard.

        `time/elapsed` is added here. A number reads back bit for bit; nan and the infinities
        are written as the strings "nan", "inf" and "-inf", which `read` turns back.

        Raises:
          ValueError: `values` holds a name that is taken: stage, step or time/elapsed.
          OSError: It could not be written; it names the file, which keeps its whole lines.
        """
        if taken := {"stage", "step", ELAPSED} & values.keys():
            raise ValueError(f"metric name {sorted(taken)[0]!r} is taken: the writer sets it")
        values = {**values, ELAPSED: round(self.elapsed(), 3)}
        values = {name: values[name] for name in sorted(values)}
        scalars = tensorboard.scalars(int(step), values)
        append(self._folder / METRICS, _line(stage, step, values))
        if stage not in self._events:
            folder = self._folder / TENSORBOARD / stage
            folder.mkdir(parents=True, exist_ok=True)
            self._events[stage], beginning = tensorboard.new_file(folder, purge_step=int(step))
            append(self._events[stage], beginning)
        append(self._events[stage], scalars)

    def samples(self, stage: str, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Adds one line to samples.jsonl for each answer; all of them, or an OSError and none."""
        lines = [_line(stage, step, sample) for sample in samples]
        append(self._folder / SAMPLES, b"".join(lines))


def open_writer(
    folder: str | Path,
    *,
    machine: Mapping[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Writer:
    """A writer for the run in `folder`, which is made where needed.

    Half-written last lines, left by a kill, are dropped first. machine.json notes the machine
    for the report: its cores, its processor, and what the caller adds as `machine`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (METRICS, SAMPLES):
        append(folder / name, b"")
        _keep_head(folder / name, lambda line: True)
    facts = {**_machine(), **(machine or {})}
    replace(folder / MACHINE, json.dumps(_plain(facts), indent=1).encode() + b"\n")
    return Writer(folder, clock)


def rewind(folder: str | Path, *, stages: Sequence[str], stage: str, step: int) -> None:
    """Cuts both logs back to what they were at `step` of `stage`, as if no more had been run.

    Goes from the logs: lines of `stage` with a greater step, all lines of the stages after it
    in `stages`, and a half-written last line. Logs only grow, so these lines are a file's end
    and it is truncated, which is atomic and works on a full disk. TensorBoard's files stay;
    the next writer marks in a new one which of their steps no longer count.

    Raises:
      ValueError: `stage`, or a stage named in a log, is not in `stages`; or a line is damaged.
    """
    if stage not in stages:
        raise ValueError(f"stage {stage!r} is not one of {list(stages)}")
    last = (list(stages).index(stage), step)
    for name in (METRICS, SAMPLES):
        path = Path(folder) / name

        def keep(line: bytes, path: Path = path) -> bool:
            record = _record(line, str(path))
            if record["stage"] not in stages:
                raise ValueError(
                    f"{path}: holds stage {record['stage']!r}, not one of {list(stages)}"
                )
            return (list(stages).index(record["stage"]), record["step"]) <= last

        _keep_head(path, keep)


def _machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    with suppress(OSError):  # Linux alone has this file
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    affinity = getattr(os, "sched_getaffinity", None)  # what we may use; absent on macOS
    cores = len(affinity(0)) if affinity else os.cpu_count()
    return {"cores": cores, "processor": processor, "python": platform.python_version()}


# --------------------------------------------------------------------------- reading


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl in the order written; a half-written last line is left out.

    Raises:
      FileNotFoundError: There is no metrics.jsonl.
      ValueError: A line is damaged; it is named.
    """
    path = Path(folder) / METRICS
    rows = []
    for number, row in enumerate(_records(path), 1):
        for name, value in row.items():
            if name != "stage" and isinstance(value, str):
                if value not in NOT_FINITE:
                    raise ValueError(
                        f"{path}, line {number}: {name} must be a number, got {value!r}"
                    )
                row[name] = NOT_FINITE[value]
        rows.append(row)
    return rows


def read_samples(folder: str | Path) -> Iterator[dict[str, Any]]:
    """The answers of samples.jsonl, one at a time; none where there is no such file."""
    path = Path(folder) / SAMPLES
    return _records(path) if path.exists() else iter(())


def bootstrap_interval(
    values: Sequence[float], *, seed: int = 0, level: float = 0.95, draws: int = 2000
) -> tuple[float, float]:
    """Low and high end of the percentile bootstrap interval of the mean; the same every time.

    Where all values are equal, both ends are that value: no resampling can then show doubt.

    Raises:
      ValueError: `values` is empty, or `level` is not between 0 and 1.

    Source: Efron, Bootstrap methods: another look at the jackknife, Ann. Statist. 7(1), 1979.
    """
    import numpy as np

    sample = np.asarray(values, np.float64)
    if sample.ndim != 1 or not sample.size:
        raise ValueError(f"need a list of at least one value, got shape {sample.shape}")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    rng = np.random.Generator(np.random.PCG64(seed))
    means = [sample[rng.integers(sample.size, size=sample.size)].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class Estimate(NamedTuple):
    """A mean over problems and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float
    problems: int


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of one value a problem, with its interval. Raises as `bootstrap_interval`."""
    low, high = bootstrap_interval(values)
    return Estimate(sum(values) / len(values), low, high, len(values))
