"""The train command as a user runs it: to the end, killed and resumed, and with bad input."""

import json
import random
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DEBUG = ROOT / "configs" / "debug.py"


Begin = Callable[..., Any]  # (out, *sets, config=DEBUG) -> the command's process


@pytest.fixture(scope="module")
def begin(start_train: Callable[..., Any]) -> Begin:
    """The train command into a folder, which runs on."""

    def begin(out: Path, *sets: str, config: Path = DEBUG) -> Any:
        options = [word for one in sets for word in ("--set", one)]
        return start_train("--config", config, "--out", out, *options)

    return begin


@pytest.fixture(scope="module")
def train(begin: Begin) -> Begin:
    """The same to its end."""

    def train(*arguments: Any, **keywords: Any) -> Any:
        process = begin(*arguments, **keywords)
        assert process.wait() is not None, "it runs for ever"
        return process

    return train


def result(out: Path) -> tuple[list[dict], list[str], dict[str, bytes]]:
    """Metrics without times, samples, and the last weights' files of each stage."""
    metrics = [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in (out / "metrics.jsonl").read_text().splitlines()
    ]
    samples = (out / "samples.jsonl").read_text().splitlines()
    weights = {}
    for stage in ("base", "rl"):
        steps = [p for p in (out / "checkpoints" / stage).iterdir() if p.name.isdecimal()]
        last = max(steps, key=lambda p: int(p.name))
        arrays = read_arrays(last)
        weights |= {f"{stage}/{last.name}/{name}": value for name, value in arrays.items()}
    return metrics, samples, weights


def read_arrays(step: Path) -> dict[str, bytes]:
    import jax
    import numpy as np
    from orbax.checkpoint import v1 as ocp

    with warnings.catch_warnings():  # orbax warns that arrays go where they were saved
        warnings.simplefilter("ignore", UserWarning)
        tree = ocp.load(step / "arrays")
    return {
        jax.tree_util.keystr(path): np.asarray(x).tobytes()
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture(scope="module")
def straight(made_once: Callable[..., Path], train: Begin) -> Path:
    """The debug run, never stopped."""

    def make(out: Path) -> None:
        done = train(out)
        assert done.returncode == 0, done.stderr

    return made_once("debug run", make)


def test_a_run_leaves_everything_that_people_look_at(straight: Path) -> None:
    metrics, samples, _ = result(straight)
    assert [(row["stage"], row["step"]) for row in metrics] == [
        *(("base", step) for step in (2, 4, 6)),
        *(("rl", step) for step in range(7)),
    ]
    assert [row["step"] for row in metrics if "test/accuracy" in row] == [0, 3, 6]
    assert all(row["gap"] <= 1e-5 for row in metrics if "gap" in row)
    assert {"kl", "entropy", "reward/format", "attempts"} <= metrics[-1].keys()
    assert len(samples) == 3 * 16 + 6 * 4
    assert "<svg" in (straight / "report.html").read_text()
    assert list((straight / "tensorboard" / "rl").iterdir())
    lines = (straight / "config.txt").read_text().splitlines()
    assert lines[-2].startswith("tokenizer") and lines[-1] == "weights: None"  # all of it


def test_killed_at_random_moments_it_ends_with_the_same_bits(
    straight: Path, tmp_path: Path, begin: Begin
) -> None:
    out = tmp_path / "run"
    moments = random.Random(0)
    # Tracing the programs takes seconds, a step a few milliseconds.
    longest, kills, finished = 6.0, 0, False
    while not kills or not finished:
        if finished:  # in less than that: a fast machine
            shutil.rmtree(out)
            longest, finished = longest / 2, False
        process = begin(out)
        code = process.wait(moments.uniform(longest / 6, longest) if kills < 4 else 300.0)
        if code is None:
            process.signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            kills += 1
        else:
            assert code == 0, process.stderr
            finished = True
    assert result(out) == result(straight)


def test_sigterm_saves_and_leaves_with_code_75_and_the_same_command_goes_on(
    straight: Path, tmp_path: Path, begin: Begin, train: Begin
) -> None:
    out = tmp_path / "run"
    process = begin(out)
    metrics = out / "metrics.jsonl"
    while not metrics.exists() or '"base", "step": 2' not in metrics.read_text():
        assert process.wait(0.01) is None, process.stderr
    process.signal(signal.SIGTERM)
    assert process.wait(120.0) == 75, process.stderr
    assert "the same command goes on" in process.stderr
    assert train(out).returncode == 0
    assert result(out) == result(straight)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_is_used(
    straight: Path, tmp_path: Path, train: Begin
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    newest = out / "checkpoints" / "rl" / "6"
    largest = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-7])
    done = train(out)
    assert done.returncode == 0, done.stderr
    named = [line for line in done.stderr.splitlines() if " is damaged (" in line]
    assert len(named) == 1
    assert "checkpoint 6" in named[0]
    assert "using 4" in named[0]
    assert result(out) == result(straight)


def test_a_finished_run_is_not_done_again(straight: Path, tmp_path: Path, train: Begin) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    before = (out / "metrics.jsonl").read_bytes()
    assert train(out).returncode == 0
    assert (out / "metrics.jsonl").read_bytes() == before


CONFIG = """
from dataclasses import replace
from functools import partial
from pathlib import Path
import importlib.util

from r1jax.data.sources import jsonl
from r1jax.settings import Run

spec = importlib.util.spec_from_file_location("debug", {debug!r})
debug = importlib.util.module_from_spec(spec)
spec.loader.exec_module(debug)


def no_end_token():
    tokenizer = debug.tiny()
    tokenizer.eos_token = None
    return tokenizer


def config() -> Run:
    run = debug.config()
    base, rl = run.stages
    return replace(run, {change})
"""


def with_change(folder: Path, change: str) -> Path:
    """A config like the debug one but for `change`."""
    file = folder / "changed.py"
    file.write_text(CONFIG.format(debug=str(DEBUG), change=change))
    return file


def refused(done: Any, *words: str) -> None:
    """One clear line, no traceback, a code that is not 0."""
    assert done.returncode not in (0, 75)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in errors[0], errors[0]


def test_settings_that_cannot_be_are_one_line_and_leave_nothing_behind(
    tmp_path: Path, train: Begin
) -> None:
    out = tmp_path / "run"
    refused(train(out, config=tmp_path / "none.py"), "none.py")
    refused(train(out, "rl.grop=3"), "rl.grop", "group")
    refused(train(out, "rl.group=many"), "int", "many")
    refused(train(out, "rl.group=1"), "group must be >= 2", "got 1")
    assert not out.exists()


def test_a_prompt_longer_than_allowed_is_one_line(tmp_path: Path, train: Begin) -> None:
    done = train(tmp_path / "run", "rl.engine.max_prompt=4")
    refused(done, "make", "max_prompt", "4")


def test_a_tokenizer_without_an_end_token_is_one_line(tmp_path: Path, train: Begin) -> None:
    config = with_change(tmp_path, "tokenizer=no_end_token")
    refused(train(tmp_path / "run", config=config), "no end token")


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ("", ("rows.jsonl", "no rows")),
        ('{"numbers": [1, 2]}\n', ("rows.jsonl:1", "target")),
        ('{"numbers": [1, 2], "target": 3}\n{"numb', ("rows.jsonl:2", "JSON")),
    ],
)
def test_data_that_cannot_be_used_is_one_line(
    tmp_path: Path, train: Begin, rows: str, words: tuple[str, ...]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(rows)
    source = f"partial(jsonl, {str(file)!r}, need=('numbers', 'target'))"
    config = with_change(tmp_path, f"stages=(replace(rl, task=replace(rl.task, train={source})),)")
    refused(train(tmp_path / "run", config=config), *words)


def test_a_folder_of_another_config_is_left_alone(
    straight: Path, tmp_path: Path, train: Begin
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    refused(train(out, "rl.prompts=8"), "another config", "rl.prompts is 4 there and 8 here")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    straight: Path, tmp_path: Path, train: Begin
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    out = small / "run"
    try:
        refused(train(out), "No space left on device")
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)
        assert train(out).returncode == 0
        assert result(out) == result(straight)
    finally:
        subprocess.run(["umount", str(small)], check=True)
