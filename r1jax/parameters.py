"""The weights of a run's stages: those that it begins with, and those that checkpoints hold.

What a stage with adapters gives to whoever asks, a later stage, an evaluation, a teacher's student
or an export, are merged weights: those of the stage it began with, and its adapters added.
"""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from r1jax import checkpoint, manifest, settings, sharding
from r1jax.data import sources
from r1jax.loops.adapters import LORA
from r1jax.loops.run import stream_key
from r1jax.models import decoder, hf, hf_config, lora
from r1jax.settings import FIRST, Trained
from r1jax.types import Params

PIECE = 32 * 2**20  # bytes of each end of a file of weights that are looked at


class Loaded(NamedTuple):
    """A checkpoint's weights."""

    step: int
    params: Params  # of a decoder, float32 on the mesh
    adapters: lora.Adapters | None = None  # those merged in them; None: none were trained


def load(
    run: settings.Run,
    folder: Path,
    stage: str,
    mesh: jax.sharding.Mesh,
    *,
    which: int | Literal["last", "best"],
) -> Loaded:
    """The weights that a stage had at one step, its adapters merged.

    Raises:
      ValueError: there is no such checkpoint, or it is damaged or of another model; of adapters,
        also if that holds for the weights they are added to, or those have changed.
    """
    cfg = {one.name: one for one in run.stages}[stage]
    asked = cfg.lora if isinstance(cfg, Trained) else None
    leaves = decoder.leaves(run.model)
    if asked is not None:
        leaves = {LORA: lora.adapter_leaves(run.model, rank=asked.rank, targets=asked.targets)}
    like = {"params": sharding.abstract(leaves, mesh)}
    saved = checkpoint.load(folder / "checkpoints" / stage, which, like)
    params = saved.state["params"]
    if asked is None:
        return Loaded(saved.step, params)
    base = load_base(run, folder, cfg, mesh)
    whole = lora.merge(base, params[LORA], scale=asked.scale, dtype=jnp.float32)
    whole = jax.tree.map(lambda w: w.astype(jnp.float32), whole)
    return Loaded(saved.step, whole, params[LORA])


def load_base(
    run: settings.Run, folder: Path, stage: settings.Stage, mesh: jax.sharding.Mesh
) -> Params:
    """The weights that stay while a stage trains its adapters.

    Raises:
      ValueError: they are missing or damaged, or others than when the stage began.
    """
    name, entry = weights_of(run, stage), manifest.read(folder).get(stage.name)
    if name == FIRST:
        found, what = first_params(run, mesh, dtype=None), FIRST
        now = first_digest(run)
    else:
        step = steps_of(run, name)
        found = load(run, folder, name, mesh, which=step).params
        now = sources.file_digest(folder / "checkpoints" / name / str(step) / checkpoint.SUMS)
        what = f"weights of {name}"
    if entry is not None and entry.inputs[what] != now:
        raise ValueError(
            f"{folder}: the adapters of {stage.name} belong to other {what} than there are now"
        )
    return found


def steps_of(run: settings.Run, stage: str) -> int:
    """The number of the last checkpoint of a stage that is done."""
    return {one.name: one.steps for one in run.stages if isinstance(one, Trained)}[stage]


def weights_of(run: settings.Run, stage: settings.Stage) -> str:
    """The stage whose weights a stage uses, or "weights" for those that the run begins with."""
    for named in settings.named_weights(stage):
        if named is not None:
            return named
    before = run.stages[: run.stages.index(stage)]
    trained = [one.name for one in before if isinstance(one, Trained)]
    return trained[-1] if trained else FIRST


def first_params(
    cfg: settings.Run, mesh: jax.sharding.Mesh, *, dtype: str | None = "float32"
) -> Params:
    """The weights that the run begins with, on the mesh: the folder's that `cfg.weights` names,
    in `dtype` (None: in that of the files), else random ones, float32.

    Raises:
      ValueError: the folder cannot be loaded, or holds another model than `cfg.model`.
    """
    if cfg.weights is None:
        key = stream_key(cfg.seed, "init", 0)
        return sharding.init(decoder.leaves(cfg.model), key, mesh)
    model = cfg.model
    found = hf_config.read(Path(cfg.weights) / "config.json")
    how = {"remat": model.remat, "scan": model.scan, "dtype": model.dtype}
    if replace(found, **how, max_length=model.max_length, num_mtp=model.num_mtp) != model:
        raise ValueError(
            f"{cfg.weights} holds another model than the run's; "
            f"r1jax.models.hf_config.read gives the settings that fit"
        )
    loaded, params = hf.load(cfg.weights, dtype=dtype, mesh=mesh)
    if not model.num_mtp:
        params.pop("mtp", None)
    elif loaded.num_mtp != model.num_mtp:
        raise ValueError(f"{cfg.weights} has {loaded.num_mtp} prediction modules of the run's")
    return params


def first_digest(cfg: settings.Run) -> str:
    """By which a run notices that the weights it begins with have changed.

    Random weights follow from the settings: it is that of no files.
    """
    return folder_digest(None if cfg.weights is None else Path(cfg.weights))


def folder_digest(folder: Path | None) -> str:
    """A SHA-256 of the names and sizes of a folder's files, and of 32 MiB at each end of them.

    To read all of a large model would take minutes at every start.
    """
    found = hashlib.sha256()
    files = sorted(f for f in folder.iterdir() if f.is_file()) if folder else []
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.name} {size}\n".encode())
        with file.open("rb") as opened:
            found.update(opened.read(PIECE))
            opened.seek(max(size - PIECE, 0))
            found.update(opened.read(PIECE))
    return found.hexdigest()
