"""What a run shows while it runs: a live display on a terminal, plain lines elsewhere."""

import math
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Protocol, TextIO

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
    unit: str
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
    unit: str = "step",
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Show]:
    """Gives `show(step, values, warnings)`: a live display on a terminal, elsewhere plain lines.

    Plain lines are ASCII, flushed one by one, and say a warning once while it lasts. `start` is
    the step that a resumed stage goes on from, `unit` what a step is called; `stream` is standard
    error unless given.
    """
    out: TextIO = stream or sys.stderr
    state = _Progress(stage=stage, unit=unit, total=total_steps, step=start, clock=clock)
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


def sparkline(values: Sequence[float], columns: int = SPARK_COLUMNS) -> str:
    """A curve of at most `columns` block characters; each is the mean of its share of the values.

    The lowest mean is the lowest block. Values that are not finite are left out.
    """
    values = [value for value in values if math.isfinite(value)]
    columns = min(len(values), columns)
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

    console = Console(file=stream)
    lock = threading.Lock()  # rich redraws from a thread of its own, twice a second

    def display() -> Any:
        with lock:
            return _display(state, console.width)

    with Live(
        console=console,
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


def _display(state: _Progress, width: int) -> Any:
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
    title = Text.assemble(
        (state.stage, "bold"), f"  {state.unit} {state.step:,} of {state.total:,}"
    )
    bar = ProgressBar(total=max(state.total, 1), completed=state.step)
    head.add_row(title, bar, "" if left is None else f"{duration(left)} left")

    body = Table.grid(padding=(0, 2, 0, 0))
    body.add_column(no_wrap=True, min_width=10)
    body.add_column(no_wrap=True, justify="right", min_width=8)
    body.add_column()
    columns = max(0, min(SPARK_COLUMNS, width - 22))  # beside the name and the value
    for name, form in SHOWN.items():
        if past := state.past.get(name):
            body.add_row(f"  {name}", f"{past[-1]:{form}}", Text(sparkline(past, columns), "cyan"))
    for part, speed in _speeds({name: past[-1] for name, past in state.past.items()}):
        body.add_row(f"  {part}", speed, "tokens/s")
    if state.tests:
        step, values = state.tests[-1]
        share, _, interval = _held_out(values).partition(" ")
        note = f"{interval} at step {step:,}".strip()
        if len(state.tests) > 1:
            first_step, first = state.tests[0]
            note += f"; {first['test/accuracy']:.1%} at step {first_step:,}"
        body.add_row("  held-out", Text(share, "bold"), Text(note))
    warnings = Table.grid(padding=(0, 1, 0, 0))
    warnings.add_column(no_wrap=True, style="bold yellow")
    warnings.add_column()
    for text in state.warnings:
        warnings.add_row("warning", Text(text))
    return Group(head, body, warnings, "")
