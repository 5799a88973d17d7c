"""r1jax.metrics: what is written reads back, survives kills and full disks, and can be seen."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from r1jax import metrics

STAGES = ("base", "rl")


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def lines(folder: Path, name: str = metrics.METRICS) -> list[str]:
    return (folder / name).read_text().splitlines()


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


# --------------------------------------------------------------------------- lines


@pytest.mark.parametrize(
    "value",
    [0.1, 1 / 3, 5e-324, -0.0, 1e308, 3, np.float32(0.1), np.float64(2) / 3, np.int64(2**53)],
)
def test_a_number_reads_back_bit_for_bit(tmp_path: Path, value: float):
    metrics.open_writer(tmp_path).write("rl", 1, {"loss": value})
    (row,) = metrics.read(tmp_path)
    assert struct.pack("<d", row["loss"]) == struct.pack("<d", value)


def test_numbers_that_are_not_finite_are_valid_json_and_read_back(tmp_path: Path):
    values = {"loss": math.nan, "kl": math.inf, "gap": np.float32(-math.inf)}
    metrics.open_writer(tmp_path).write("rl", 1, values)

    def refuse(name: str):
        raise AssertionError(f"{name} is not JSON")

    written = json.loads(lines(tmp_path)[0], parse_constant=refuse)
    assert (written["loss"], written["kl"], written["gap"]) == ("nan", "inf", "-inf")
    (row,) = metrics.read(tmp_path)
    assert math.isnan(row["loss"]) and row["kl"] == math.inf and row["gap"] == -math.inf


def test_a_line_begins_with_stage_and_step_and_then_sorts_its_names(tmp_path: Path):
    writer = metrics.open_writer(tmp_path, clock=Clock())
    writer.write("rl", 12, {"reward/format": 0.1, "loss": 0.25, "reward": 1.0})
    assert lines(tmp_path) == [
        '{"stage": "rl", "step": 12, "loss": 0.25, "reward": 1.0, "reward/format": 0.1, '
        '"time/elapsed": 0.0}'
    ]


@pytest.mark.parametrize("name", ["stage", "step", "time/elapsed"])
def test_a_metric_cannot_take_a_name_that_the_writer_sets(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match=f"'{name}' is taken"):
        metrics.open_writer(tmp_path).write("rl", 1, {name: 1.0})
    assert lines(tmp_path) == []


def test_samples_keep_text_of_any_kind_and_values_of_any_kind(tmp_path: Path):
    sample = {
        "row": {"numbers": [3, np.int64(4)], "target": 7},
        "answer": "3 + 4 = 7 \n 等等 \u2028 \ud800",
        "reward": np.float32(1.5),
        "parts": {"format": math.nan},
        "accuracy": None,
        "finished": np.bool_(True),
    }
    writer = metrics.open_writer(tmp_path)
    writer.samples("rl", 3, [sample, sample])
    writer.samples("rl", 4, [])
    first, second = metrics.read_samples(tmp_path)
    assert first == second
    assert first == {
        "stage": "rl",
        "step": 3,
        "row": {"numbers": [3, 4], "target": 7},
        "answer": sample["answer"],
        "reward": 1.5,
        "parts": {"format": "nan"},
        "accuracy": None,
        "finished": True,
    }
    assert first["finished"] is True


def test_a_folder_without_samples_has_none(tmp_path: Path):
    assert list(metrics.read_samples(tmp_path)) == []


# --------------------------------------------------------------------------- kills


@pytest.mark.parametrize("half", [b'{"stage": "rl", "st', b"\0\0\0", b'{"stage": "rl", "step": 9}'])
def test_a_half_written_last_line_is_not_read_and_the_next_writer_drops_it(
    tmp_path: Path, half: bytes
):
    metrics.open_writer(tmp_path).write("rl", 1, {"loss": 1.0})
    for name in (metrics.METRICS, metrics.SAMPLES):
        metrics.append(tmp_path / name, half)
    assert [row["step"] for row in metrics.read(tmp_path)] == [1]
    assert list(metrics.read_samples(tmp_path)) == []
    writer = metrics.open_writer(tmp_path)
    writer.write("rl", 2, {"loss": 2.0})
    writer.samples("rl", 2, [{"answer": ""}])
    assert [row["step"] for row in metrics.read(tmp_path)] == [1, 2]
    assert len(lines(tmp_path, metrics.SAMPLES)) == 1


@pytest.mark.parametrize("damage", ["{]", "[1, 2]", '{"stage": "rl"}'])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str):
    (tmp_path / metrics.METRICS).write_text('{"stage": "rl", "step": 1}\n' + damage + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        metrics.read(tmp_path)


def test_a_metric_that_is_no_number_is_named(tmp_path: Path):
    (tmp_path / metrics.METRICS).write_text('{"stage": "rl", "step": 1, "loss": "low"}\n')
    with pytest.raises(ValueError, match=r"line 1: loss must be a number, got 'low'"):
        metrics.read(tmp_path)


def run(folder: Path, *, base: range, rl: range) -> None:
    writer = metrics.open_writer(folder, clock=Clock())
    for stage, steps in (("base", base), ("rl", rl)):
        for step in steps:
            writer.write(stage, step, {"loss": step / 7})
            writer.samples(stage, step, [{"answer": f"{stage} {step} {i}"} for i in range(2)])


@pytest.mark.parametrize("stage, step", [("base", 0), ("base", 3), ("rl", 1), ("rl", 4)])
def test_a_run_that_is_rewound_and_goes_on_leaves_the_logs_of_one_that_never_stopped(
    tmp_path: Path, stage: str, step: int
):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        run(folder, base=range(1, 6), rl=range(5))
    for name in (metrics.METRICS, metrics.SAMPLES):
        metrics.append(killed / name, b'{"stage": "rl", "step": 5, "lo')
    metrics.rewind(killed, stages=STAGES, stage=stage, step=step)
    kept = [(row["stage"], row["step"]) for row in metrics.read(killed)]
    assert kept[-1:] == ([(stage, step)] if step else [])
    if stage == "base":
        run(killed, base=range(step + 1, 6), rl=range(5))
    else:
        run(killed, base=range(0), rl=range(step + 1, 5))
    for name in (metrics.METRICS, metrics.SAMPLES):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_rewinding_to_the_newest_step_or_twice_changes_nothing(tmp_path: Path):
    run(tmp_path, base=range(1, 3), rl=range(3))
    before = (tmp_path / metrics.METRICS).read_bytes()
    for _ in range(2):
        metrics.rewind(tmp_path, stages=STAGES, stage="rl", step=2)
    assert (tmp_path / metrics.METRICS).read_bytes() == before


def test_rewinding_an_empty_folder_does_nothing(tmp_path: Path):
    metrics.rewind(tmp_path, stages=STAGES, stage="rl", step=2)
    assert list(tmp_path.iterdir()) == []


def test_rewinding_names_a_stage_that_is_not_known(tmp_path: Path):
    run(tmp_path, base=range(1, 3), rl=range(3))
    before = (tmp_path / metrics.METRICS).read_bytes()
    with pytest.raises(ValueError, match=r"'sft' is not one of \['base', 'rl'\]"):
        metrics.rewind(tmp_path, stages=STAGES, stage="sft", step=2)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: holds stage 'base', not one of"):
        metrics.rewind(tmp_path, stages=["rl"], stage="rl", step=2)
    assert (tmp_path / metrics.METRICS).read_bytes() == before


def test_the_time_of_restarts_is_added_up(tmp_path: Path):
    clock = Clock()
    first = metrics.open_writer(tmp_path, clock=clock)
    clock.now += 60
    first.write("rl", 1, {"loss": 1.0})
    clock.now += 5
    first.write("rl", 2, {"loss": 1.0})
    metrics.rewind(tmp_path, stages=STAGES, stage="rl", step=1)
    clock.now = 7.0  # another boot, another clock
    second = metrics.open_writer(tmp_path, clock=clock)
    clock.now += 2.5
    assert second.elapsed() == 62.5
    second.write("rl", 2, {"loss": 1.0})
    assert [row["time/elapsed"] for row in metrics.read(tmp_path)] == [60.0, 62.5]


# --------------------------------------------------------------------------- full disks

FULL = """
import resource, sys
from r1jax import metrics
writer = metrics.open_writer(sys.argv[1])
writer.write("rl", 1, {"loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # files may grow to so many bytes
step = 1
try:
    while step < 1000:
        step += 1
        if sys.argv[2] == "samples":
            writer.samples("rl", step, [{"answer": "a" * 300}, {"answer": "b" * 300}])
        else:
            writer.write("rl", step, {f"metric_{i}": 1.0 for i in range(int(sys.argv[3]))})
except OSError as error:
    print(step, error.filename)
"""


@pytest.mark.parametrize(
    "kind, width, name",
    [
        ("samples", 0, metrics.SAMPLES),
        ("write", 20, metrics.METRICS),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_file_which_keeps_whole_lines(
    tmp_path: Path, kind: str, width: int, name: str
):
    done = python(FULL, str(tmp_path), kind, str(width))
    step, file = done.stdout.split()
    assert file == str(tmp_path / name), done.stderr
    text = (tmp_path / name).read_text()
    assert text.endswith("\n")
    assert [json.loads(line)["step"] for line in text.splitlines()][-1] == int(step) - 1
    assert done.stderr == "" and done.returncode == 0


def test_a_disk_that_fills_up_at_tensorboards_file_names_it_and_leaves_whole_records(
    tmp_path: Path,
):
    done = python(FULL, str(tmp_path), "write", "0")  # its records are longer than such lines
    step, file = done.stdout.split()
    assert file == str(tmp_path / "tensorboard/rl/events.out.tfevents.000000")
    assert events(Path(file))[-1].step == int(step) - 1
    assert done.stderr == "" and done.returncode == 0


def test_an_events_file_that_cannot_be_written_is_an_error_that_names_it(tmp_path: Path):
    writer = metrics.open_writer(tmp_path)
    (tmp_path / metrics.TENSORBOARD).write_text("in the way")
    with pytest.raises(OSError, match=r"tensorboard.rl"):
        writer.write("rl", 1, {"loss": 1.0})


def test_replace_leaves_the_old_content_where_the_new_does_not_fit(tmp_path: Path):
    file = tmp_path / "report.html"
    file.write_text("old")
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom r1jax import metrics\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))\n"
        "try:\n    metrics.replace(Path(sys.argv[1]), b'new' * 100)\n"
        "except OSError as error:\n    print(error.filename)\n"
    )
    assert python(code, str(file)).stdout.strip() == str(file)
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    metrics.replace(file, b"new")
    assert file.read_text() == "new"


# --------------------------------------------------------------------------- TensorBoard


def crc32c(data: bytes) -> int:
    """The definition, bit by bit: reflected polynomial 0x1EDC6F41 (RFC 3720, appendix B.4)."""
    register = 0xFFFFFFFF
    for byte in data:
        register ^= byte
        for _ in range(8):
            register = register >> 1 ^ (0x82F63B78 if register & 1 else 0)
    return register ^ 0xFFFFFFFF


def events(file: Path) -> list:
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore

    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        body, rest = data[12 : 12 + length], data[12 + length :]
        for part, stored in ((data[:8], data[8:12]), (body, rest[:4])):
            crc = crc32c(part)
            masked = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            assert struct.unpack("<I", stored) == (masked,)
        found.append(Event.FromString(body))
        data = rest[4:]
    return found


def test_tensorboard_gets_each_stage_apart_and_forgets_steps_that_are_run_again(tmp_path: Path):
    assert crc32c(b"123456789") == 0xE3069283  # the standard check value
    run(tmp_path, base=range(1, 3), rl=range(4))
    metrics.rewind(tmp_path, stages=STAGES, stage="rl", step=1)
    run(tmp_path, base=range(0), rl=range(2, 4))
    folder = tmp_path / metrics.TENSORBOARD
    files = sorted(str(file.relative_to(folder)) for file in folder.glob("*/*"))
    assert files == [
        "base/events.out.tfevents.000000",
        "rl/events.out.tfevents.000000",
        "rl/events.out.tfevents.000001",
    ]
    version, start, *rest = events(folder / files[2])
    assert version.file_version == "brain.Event:2"
    assert start.session_log.status == 1 and start.step == 2  # START: forget from step 2 on
    values = [{v.tag: v.simple_value for v in event.summary.value} for event in rest]
    assert [event.step for event in rest] == [2, 3]
    assert [value["loss"] for value in values] == pytest.approx([2 / 7, 3 / 7])
    assert values[0].keys() == {"loss", "time/elapsed"}


# --------------------------------------------------------------------------- intervals


def test_the_bootstrap_interval_is_the_normal_one_where_values_are_many():
    values = [1.0] * 400 + [0.0] * 600
    low, high = metrics.bootstrap_interval(values)
    half = 1.959964 * math.sqrt(0.4 * 0.6 / 1000)
    assert low == pytest.approx(0.4 - half, abs=0.003)
    assert high == pytest.approx(0.4 + half, abs=0.003)
    narrow_low, narrow_high = metrics.bootstrap_interval(values, level=0.5)
    half = 0.674490 * math.sqrt(0.4 * 0.6 / 1000)
    assert narrow_high - narrow_low == pytest.approx(2 * half, abs=0.003)


def test_the_bootstrap_interval_is_the_same_every_time_and_differs_by_seed():
    values = [0.3, 0.1, 0.9, 0.4, 0.75]
    assert metrics.bootstrap_interval(values) == metrics.bootstrap_interval(values)
    assert metrics.bootstrap_interval(values) != metrics.bootstrap_interval(values, seed=1)


def test_the_bootstrap_interval_of_equal_values_is_that_value():
    assert metrics.bootstrap_interval([0.25] * 9) == (0.25, 0.25)
    assert metrics.bootstrap_interval([1.0]) == (1.0, 1.0)


@pytest.mark.parametrize("values, level", [([], 0.95), ([1.0], 1.0), ([1.0], 0.0), ([[1.0]], 0.9)])
def test_the_bootstrap_interval_refuses_what_has_none(values: list, level: float):
    with pytest.raises(ValueError, match=r"need a list of|between 0 and 1"):
        metrics.bootstrap_interval(values, level=level)


# --------------------------------------------------------------------------- imports


def test_importing_metrics_monitors_and_report_loads_nothing_slow():
    code = (
        "import sys\nimport r1jax.metrics, r1jax.monitors, r1jax.report\n"
        "print(*{'jax', 'numpy', 'rich', 'tensorboardX', 'flax'} & sys.modules.keys())"
    )
    done = python(code)
    assert done.stdout.strip() == "" and done.returncode == 0, done.stderr
