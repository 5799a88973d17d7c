"""A run begins after the stages that another one has done."""

import json
from pathlib import Path

import pytest

from r1jax import manifest
from r1jax.reuse import same_stages, take_over

TEXT = [
    "base.loss: cross_entropy",
    "base.steps: 3",
    "mesh.data: -1",
    "model.dim: 8",
    'name: "a"',
    "rl.advantage: grpo",
    "rl.steps: 2",
    "seed: 0",
    "stages: base, rl",
]


def changed(*lines: str) -> list[str]:
    new = {line.partition(": ")[0]: line for line in lines}
    return [new.get(line.partition(": ")[0], line) for line in TEXT]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "a"
    for stage, step in (("base", 2), ("base", 3), ("rl", 1)):
        checkpoint = folder / "checkpoints" / stage / str(step)
        checkpoint.mkdir(parents=True)
        (checkpoint / "meta.json").write_text(f"{stage} {step}")
    (folder / "config.txt").write_text("".join(f"{line}\n" for line in TEXT))
    rows = [("base", 2), ("base", 3), ("rl", 0), ("rl", 1)]
    lines = [json.dumps({"stage": stage, "step": step}) + "\n" for stage, step in rows]
    (folder / "metrics.jsonl").write_text("".join(lines))
    (folder / "data" / "base").mkdir(parents=True)
    (folder / "data" / "base" / "rows.jsonl").write_text("{}\n")
    entries = {
        stage: manifest.Entry(name=stage, config=[], inputs={}, done=stage == "base")
        for stage in ("base", "rl")
    }
    manifest.write(folder, entries)
    return folder


def test_a_stage_that_was_saved_at_other_steps_is_the_same() -> None:
    saved = [*TEXT, "base.checkpoints.every: 5"]
    assert same_stages(TEXT, saved) == same_stages(saved, TEXT) == ["base", "rl"]
    assert same_stages(TEXT, changed("base.steps: 4")) == []


def test_checkpoints_and_logs_of_the_stages_that_are_done_and_the_same_are_copied(
    source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "b"
    text = changed('name: "b"', "rl.advantage: rloo", "mesh.data: 4")
    assert take_over(out, source, text) == ["base"]
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    expected = {f"checkpoints/base/{step}/meta.json" for step in (2, 3)}
    assert files == {*expected, "data/base/rows.jsonl", "manifest.json", "metrics.jsonl"}
    assert list(manifest.read(out)) == ["base"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [(row["stage"], row["step"]) for row in rows] == [("base", 2), ("base", 3)]


def test_a_stage_is_the_same_with_the_same_settings_model_and_seed() -> None:
    assert same_stages(TEXT, TEXT) == ["base", "rl"]
    assert same_stages(changed("rl.steps: 9"), TEXT) == ["base"]
    assert same_stages([*TEXT, "rl.new: 1"], TEXT) == ["base"]
    for line in ("base.loss: other", "model.dim: 9", "seed: 1"):
        assert same_stages(changed(line), TEXT) == []
    assert same_stages(changed("stages: rl, base"), TEXT) == []


def test_what_cannot_be_taken_over_is_one_line(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "b"
    with pytest.raises(ValueError, match=r"nothing in .*a can be .*: its first stage is another"):
        take_over(out, source, changed("seed: 1"))
    (source / "manifest.json").rename(tmp_path / "gone")
    with pytest.raises(ValueError, match="its stage base is not done"):
        take_over(out, source, TEXT)
    (source / "config.txt").unlink()
    with pytest.raises(ValueError, match=r"is no run folder: it has no config.txt"):
        take_over(out, source, TEXT)
    assert not out.exists()
