"""What a run measures: written line by line, read back, cut back on resume, shown while it runs.

JAX is never imported here; numpy, rich and tensorboardX only inside the functions that use them.
"""

import json
import math
import os
import platform
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, TextIO

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


# --------------------------------------------------------------------------- progress

SPARK = "▁▂▃▄▅▆▇█"
SPARK_COLUMNS = 24
PACE_STEPS = 20  # the time left is judged from so many of the newest steps
SHOWN = {"loss": ".4f", "reward": ".3f", "accuracy": ".1%", "length": ".1f"}


class Show(Protocol):
    """Takes what was measured at one step, and the monitors' warnings as of then."""

    def __call__(
        self, step: int, values: Mapping[str, Any], warnings: Sequence[str] = ()
    ) -> None: ...


@dataclass(kw_only=True)
class _Progress:
    """What the display knows: each name's values so far, the evaluations, and the pace."""

    stage: str
    total: int
    step: int
    clock: Callable[[], float]
    past: dict[str, list[float]] = field(default_factory=dict)
    tests: list[tuple[int, Mapping[str, Any]]] = field(default_factory=list)
    warnings: Sequence[str] = ()
    pace: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=PACE_STEPS + 1))

    def add(self, step: int, values: Mapping[str, Any], warnings: Sequence[str]) -> None:
        for name, value in values.items():
            self.past.setdefault(name, []).append(float(value))
        if "test/accuracy" in values:
            self.tests.append((step, values))
        # The first step compiles: the pace counts from its end. An evaluation alone is no step.
        if any(not name.startswith(("test/", "time/")) for name in values):
            self.pace.append((self.clock(), step))
            self.warnings = warnings
        self.step = step

    def seconds_left(self) -> float | None:
        """None until two steps are known, and after the last."""
        if len(self.pace) < 2 or self.step >= self.total:
            return None
        (first_time, first), (last_time, last) = self.pace[0], self.pace[-1]
        left = (last_time - first_time) / (last - first) * (self.total - last)
        return max(0.0, left - (self.clock() - last_time))


@contextmanager
def progress(
    total_steps: int,
    *,
    stage: str,
    start: int = 0,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Show]:
    """Gives `show(step, values, warnings)`: a live display on a terminal, elsewhere plain lines.

    Plain lines are ASCII, flushed one by one, and say a warning once while it lasts. `start` is
    the step that a resumed stage goes on from; `stream` is standard error unless given.
    """
    out: TextIO = stream or sys.stderr
    state = _Progress(stage=stage, total=total_steps, step=start, clock=clock)
    if _is_live(out):
        with _live(state, out) as show:
            yield show
        return

    def show(step: int, values: Mapping[str, Any], warnings: Sequence[str] = ()) -> None:
        before = state.warnings
        state.add(step, values, warnings)
        lines = [_plain_line(state, values)]
        lines += [f"{stage} warning: {text}" for text in warnings if text not in before]
        text = "\n".join(lines).encode("ascii", "replace").decode()
        print(text, file=out, flush=True)

    yield show


def _is_live(stream: TextIO) -> bool:
    dumb = os.environ.get("TERM", "").lower() in ("", "dumb", "unknown")
    unicode = "utf" in (getattr(stream, "encoding", None) or "").lower()
    return stream.isatty() and unicode and not dumb


def duration(seconds: float) -> str:
    """A time for people: `48 s`, `2 min 41 s`, `3 h 07 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _held_out(values: Mapping[str, Any]) -> str:
    """`48.8% [42.6%, 55.1%]`, or the share alone where no interval was measured."""
    text = f"{values['test/accuracy']:.1%}"
    if "test/accuracy_low" in values and "test/accuracy_high" in values:
        text += f" [{values['test/accuracy_low']:.1%}, {values['test/accuracy_high']:.1%}]"
    return text


def _speeds(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Tokens a second of rollout and update, those that were measured."""
    names = {part: f"time/{part}_tokens_per_s" for part in ("rollout", "update")}
    return [(part, f"{values[name]:,.0f}") for part, name in names.items() if name in values]


def _plain_line(state: _Progress, values: Mapping[str, Any]) -> str:
    parts = [f"{state.stage} {state.step}/{state.total}"]
    parts += [f"{name} {values[name]:{form}}" for name, form in SHOWN.items() if name in values]
    if speeds := _speeds(values):
        parts.append("tokens/s " + " ".join(f"{part} {speed}" for part, speed in speeds))
    if state.tests:
        parts.append(f"held-out {_held_out(state.tests[-1][1])}")
    if (left := state.seconds_left()) is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def sparkline(values: Sequence[float]) -> str:
    """A curve of at most 24 block characters, lowest to highest; each the mean of its share."""
    values = [value for value in values if math.isfinite(value)]
    columns = min(len(values), SPARK_COLUMNS)
    ends = [len(values) * i // columns for i in range(columns + 1)] if columns else []
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    if high == low:
        return SPARK[0] * len(means)
    return "".join(SPARK[round((x - low) / (high - low) * (len(SPARK) - 1))] for x in means)


@contextmanager
def _live(state: _Progress, stream: TextIO) -> Iterator[Show]:
    from rich.console import Console
    from rich.live import Live

    lock = threading.Lock()  # rich redraws from a thread of its own, twice a second

    def display() -> Any:
        with lock:
            return _display(state)

    with Live(
        console=Console(file=stream),
        get_renderable=display,
        refresh_per_second=2,
        # Prints that go to this terminal appear above the display; others stay what they were.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
    ) as live:

        def show(step: int, values: Mapping[str, Any], warnings: Sequence[str] = ()) -> None:
            with lock:
                state.add(step, values, warnings)
            live.refresh()

        yield show


def _display(state: _Progress) -> Any:
    """The live display: a bar, then a row for each value, then the warnings."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    left = state.seconds_left()
    head = Table.grid(padding=(0, 2, 0, 0), expand=True)
    head.add_column(no_wrap=True)
    head.add_column(ratio=1)
    head.add_column(no_wrap=True, justify="right")
    title = Text.assemble((state.stage, "bold"), f"  step {state.step:,} of {state.total:,}")
    bar = ProgressBar(total=max(state.total, 1), completed=state.step)
    head.add_row(title, bar, "" if left is None else f"{duration(left)} left")

    body = Table.grid(padding=(0, 2, 0, 0))
    body.add_column(no_wrap=True, min_width=10)
    body.add_column(no_wrap=True, justify="right", min_width=8)
    body.add_column()
    for name, form in SHOWN.items():
        if past := state.past.get(name):
            body.add_row(f"  {name}", f"{past[-1]:{form}}", Text(sparkline(past), "cyan"))
    for part, speed in _speeds({name: past[-1] for name, past in state.past.items()}):
        body.add_row(f"  {part}", speed, "tokens/s")
    if state.tests:
        step, values = state.tests[-1]
        share, _, interval = _held_out(values).partition(" ")
        note = f"{interval} at step {step:,}".strip()
        if len(state.tests) > 1:
            first_step, first = state.tests[0]
            note += f"; {first['test/accuracy']:.1%} at step {first_step:,}"
        body.add_row("  held-out", Text(share, "bold"), note)
    warnings = [Text.assemble(("warning ", "bold yellow"), text) for text in state.warnings]
    return Group(head, body, *warnings)
