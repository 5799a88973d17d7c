"""r1jax.progress: a live display on a terminal, plain lines elsewhere."""

import io
import math
import os
import pty
import threading

import pytest

from r1jax import progress


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


STEP = {
    "loss": 0.01,
    "reward": 0.5,
    "accuracy": 0.4,
    "length": 52.25,
    "grad_norm": 1.0,
    "time/rollout_tokens_per_s": 12400.4,
    "time/update_tokens_per_s": 9800.0,
}
TEST = {"test/accuracy": 0.375, "test/accuracy_low": 0.313, "test/accuracy_high": 0.43}


def test_where_there_is_no_terminal_each_step_is_a_plain_line():
    clock, stream = Clock(), io.StringIO()
    with progress.progress(100, stage="rl", stream=stream, clock=clock) as show:
        show(0, TEST)
        for step in (1, 2, 3):
            clock.now += 50 if step == 1 else 2  # the first step compiles
            show(step, STEP)
    numbers = "loss 0.0100  reward 0.500  accuracy 40.0%  length 52.2"
    numbers += "  tokens/s rollout 12,400 update 9,800  held-out 37.5% [31.3%, 43.0%]"
    assert stream.getvalue().splitlines() == [
        "rl 0/100  held-out 37.5% [31.3%, 43.0%]",
        f"rl 1/100  {numbers}",
        f"rl 2/100  {numbers}  3 min 16 s left",
        f"rl 3/100  {numbers}  3 min 14 s left",
    ]


def test_the_pace_of_a_resumed_stage_is_that_of_its_own_steps():
    clock, stream = Clock(), io.StringIO()
    with progress.progress(1000, stage="rl", start=900, stream=stream, clock=clock) as show:
        for step in (901, 902, 1000):
            clock.now += 1
            show(step, {"loss": 0.0})
    first, second, last = stream.getvalue().splitlines()
    assert "left" not in first and second.endswith("1 min 38 s left") and "left" not in last


def test_a_warning_is_printed_once_while_it_lasts_and_again_when_it_returns():
    stream = io.StringIO()
    with progress.progress(9, stage="rl", stream=stream, clock=Clock()) as show:
        for step, warnings in enumerate(([], ["bad"], ["bad", "worse"], [], ["bad"]), 1):
            show(step, {"loss": 0.0}, warnings)
            show(step, TEST)  # an evaluation says nothing about warnings
    said = [line for line in stream.getvalue().splitlines() if "warning" in line]
    assert said == ["rl warning: bad", "rl warning: worse", "rl warning: bad"]


def test_plain_lines_are_flushed_one_by_one_and_are_ascii():
    class Stream(io.StringIO):
        flushed = ""

        def flush(self):
            self.flushed = self.getvalue()

    stream = Stream()
    with progress.progress(9, stage="rl", stream=stream) as show:
        show(1, {"loss": math.nan}, ["entropy \u2264 0.02 \x1b[31m"])
        assert stream.flushed.count("\n") == 2
    assert stream.flushed.isascii()


def test_a_terminal_gets_a_live_display(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = in_terminal()
    assert "\x1b[" in text  # it moves the cursor
    assert "\x1b[?25h" in text  # and gives it back
    for part in ("step 2 of 4", "reward", "0.500", "40.0%", "12,400", "9,800", "tokens/s"):
        assert part in text
    for part in ("37.5%", "[31.3%, 43.0%] at step 2; 10.0% at step 0", "[b] is cut off"):
        assert part in text


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch, term: str
):
    monkeypatch.setenv("TERM", term)
    text = in_terminal()
    assert "\x1b" not in text and "rl 1/4  loss 0.0100" in text


def in_terminal() -> str:
    """What a terminal of its own is sent during two steps and two evaluations."""
    master, slave = pty.openpty()
    received = []

    def receive() -> None:
        try:
            while data := os.read(master, 4096):
                received.append(data)
        except OSError:  # the other end has been closed
            pass

    reader = threading.Thread(target=receive)
    reader.start()
    with (
        open(slave, "w", encoding="utf-8") as stream,
        progress.progress(4, stage="rl", stream=stream) as show,
    ):
        show(0, {"test/accuracy": 0.1})
        show(1, STEP)
        show(2, STEP, ["[b] is cut off"])
        show(2, TEST)
    reader.join(10)
    os.close(master)
    return b"".join(received).decode()


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (161, "2 min 41 s"),
        (3599.7, "1 h 00 min"),
        (11_220, "3 h 07 min"),
    ],
)
def test_durations_are_written_for_people(seconds: float, text: str):
    assert progress.duration(seconds) == text


def test_a_sparkline_shows_the_course_of_all_values():
    assert progress.sparkline([]) == ""
    assert progress.sparkline([5.0, 5.0]) == "▁▁"
    assert progress.sparkline([0.0, math.nan, 7.0, 3.0]) == "▁█▄"
    assert progress.sparkline([0.0, 2.0, 7.0, 7.0], columns=2) == "▁█"
    assert progress.sparkline([1.0, 2.0], columns=0) == ""
    ramp = progress.sparkline(list(range(2400)))
    assert len(ramp) == 24 and sorted(ramp) == list(ramp) and {*ramp} == {*progress.SPARK}
