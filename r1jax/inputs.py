"""What a stage is made from, as digests: by them a run notices that an input has changed."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from r1jax import checkpoint, config, manifest, settings
from r1jax.data import eval_sets, files, sources
from r1jax.local import Local
from r1jax.parameters import folder_digest
from r1jax.reward_model import RewardModel
from r1jax.settings import FIRST, Build, Built, Compare, Sampled, Trained


def digests(
    cfg: settings.Stage,
    weights: str,
    entries: Mapping[str, manifest.Entry],
    first: str,
) -> dict[str, str]:
    """The SHA-256 of all that a stage is made from, by name."""
    found = {
        f"rows of {one.stage}": entries[one.stage].output["sha256"]
        for one in settings.inside(cfg, Built)
    }
    if isinstance(cfg, Build) and isinstance(cfg.answers, Sampled) and cfg.answers.run:
        found["weights of another run"] = sources.file_digest(other_weights(cfg.answers))
    elif isinstance(cfg, Compare):
        for one in cfg.models.values():
            known = first if one == FIRST else entries[one].output["sha256"]
            found[f"weights of {one}"] = known
    elif not isinstance(cfg, Build) or isinstance(cfg.answers, Sampled):
        known = first if weights == FIRST else entries[weights].output["sha256"]
        found[f"weights of {weights}" if weights != FIRST else FIRST] = known
    if isinstance(cfg, Trained) and cfg.teacher is not None:
        found["weights of the teacher"] = sources.file_digest(other_weights(cfg.teacher))
    for model in settings.inside(cfg, RewardModel):
        if model.run is None:
            found[f"reward model {model.stage}"] = entries[str(model.stage)].output["sha256"]
    found |= of_models(replace(cfg, passes={}) if isinstance(cfg, Build) else cfg)
    for name, source in source_fields(cfg).items():
        found[name] = sources.digest(source())
    if isinstance(cfg, Build):
        read = {str(file): sources.file_digest(file) for file in files_in(cfg.passes)}
        read |= of_models(cfg.passes)
        found |= {f"{manifest.PASSES}{name}": digest for name, digest in read.items()}
    return found


def of_models(setting: Any) -> dict[str, str]:
    """Digests of the reward models, and judges on this machine, that a setting's functions ask."""
    found = {}
    for model in settings.inside(setting, RewardModel):
        if model.run is None:
            continue  # the run's own: its digest is in the manifest
        stage = f", stage {model.stage}" if model.stage else ""
        sums = other_weights(model)
        found[f"weights of reward model {model.run}{stage}"] = sources.file_digest(sums)
    for model in settings.inside(setting, Local):
        found[f"weights of judge {model.folder}"] = folder_digest(Path(model.folder))
    return found


def files_in(setting: Any) -> Iterator[Path]:
    """The files that a setting names: an evaluation set, say. Of a folder given as a Path, all."""
    for kind in (str, Path):
        for name in settings.inside(setting, kind):
            if os.path.isfile(name):  # Path.is_file raises for a text too long to be a name
                yield Path(name)
            elif kind is Path and os.path.isdir(name):
                yield from (file for file in sorted(Path(name).rglob("*")) if file.is_file())


# What reads rows from files, wherever a setting names it.
READERS = (sources.jsonl, sources.parquet, sources.hub_folder, files.rows, eval_sets.load)


def open_sources(setting: Any) -> None:
    """Opens each source of rows from a file that a setting names, those of its passes too.

    Raises:
      ValueError: one of them cannot be read.
    """
    for part in settings.inside(setting, partial):
        if part.func in READERS:
            part()
        else:
            open_sources((part.args, part.keywords))


def source_fields(cfg: settings.Stage) -> dict[str, Callable[[], settings.Rows]]:
    """The sources of a stage that are no other stage's."""
    if isinstance(cfg, settings.Reinforce):
        found = {"task.train": cfg.task.train, "task.test": cfg.task.test}
    else:
        found = {"source": cfg.source}
        if isinstance(cfg, settings.Supervised) and cfg.evaluation is not None:
            found["evaluation.task.test"] = cfg.evaluation.task.test
    return {
        name: source for name, source in found.items() if not any(settings.inside(source, Built))
    }


def other_weights(answers: Sampled | settings.Teacher | RewardModel) -> Path:
    """The sums of the newest checkpoint of another run, which a stage asks or learns from.

    Raises:
      ValueError: there is none.
    """
    assert answers.run is not None
    folder = Path(answers.run)
    spec, overrides = config.saved(folder)
    stages = [stage.name for stage in config.check(spec, overrides).stages]
    chosen = [answers.stage] if answers.stage else reversed(stages)
    for name in chosen:
        path = folder / "checkpoints" / name
        if path.is_dir() and (steps := checkpoint.numbers(path)):
            return path / str(steps[-1]) / checkpoint.SUMS
    raise ValueError(f"{folder} has no checkpoint of {answers.stage or 'any stage'}")
