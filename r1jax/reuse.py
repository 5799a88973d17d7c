"""Stages that another run has done, taken over instead of being done again."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from r1jax import manifest, metrics
from r1jax.fields import by_path, lines_of
from r1jax.settings import ONLY_KEPT

OWN = ("name", "stages", "mesh", "price")  # may differ: they change nothing that a stage makes


def take_over(folder: Path, source: Path, text: Sequence[str]) -> list[str]:
    """Makes `folder` what it would be, had its run stopped after the stages that it shares.

    Those are the first ones that the run in `source` has done with the same settings, model,
    tokenizer and seed: what they made and their logs are copied, so that the time they took counts
    here too, and their entries in the manifest. `text` is of the new run, from `config.describe`.
    Gives the names of the stages.

    Raises:
      ValueError: `source` holds no run, or there is no such stage.
    """
    file = source / "config.txt"
    if not file.is_file():
        raise ValueError(f"{source} is no run folder: it has no config.txt")
    stages = same_stages(text, lines_of(file))
    entries = manifest.read(source)
    done = []
    for stage in stages:
        if stage not in entries or not entries[stage].done:
            break
        done.append(stage)
    if not done:
        raise ValueError(
            f"nothing in {source} can be taken over: "
            + (f"its stage {stages[0]} is not done" if stages else "its first stage is another")
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in (metrics.METRICS, metrics.SAMPLES):
        if (source / name).is_file():
            lines = (source / name).read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]  # it may be running
            kept = [line for line in whole if json.loads(line)["stage"] in done]
            metrics.replace(folder / name, b"".join(kept))
    for stage in done:
        for kind in ("checkpoints", "data"):
            copy = folder / kind / stage
            shutil.rmtree(copy, ignore_errors=True)
            if (source / kind / stage).is_dir():
                shutil.copytree(source / kind / stage, copy)
    manifest.write(folder, {stage: entries[stage] for stage in done})
    return done


def same_stages(here: Sequence[str], there: Sequence[str]) -> list[str]:
    """The first stages that two runs, printed by `config.describe`, have in common."""
    one, other = by_path(here), by_path(there)
    names = [each["stages"].split(", ") for each in (one, other)]
    every = {*names[0], *names[1], *OWN}

    def part(settings: dict[str, str], stage: str | None) -> dict[str, str]:
        first = {path: path.partition(".")[0] for path in settings}
        if stage is None:  # what belongs to no stage
            return {path: value for path, value in settings.items() if first[path] not in every}
        kept = tuple(f"{stage}.{name}" for name in ONLY_KEPT)
        own = {path: value for path, value in settings.items() if first[path] == stage}
        return {path: value for path, value in own.items() if not path.startswith(kept)}

    if part(one, None) != part(other, None):
        return []
    same = []
    for ours, theirs in zip(*names, strict=False):
        if ours != theirs or part(one, ours) != part(other, ours):
            break
        same.append(ours)
    return same
