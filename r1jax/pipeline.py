"""A run's stages in order. What a checkpoint shows as done is not done again."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax

from r1jax import metrics, settings, sharding
from r1jax.checkpoint import numbers
from r1jax.data import tokenizer as tokenizers
from r1jax.loops import rl, supervised
from r1jax.loops.run import Context, Scorer, stream_key
from r1jax.models import decoder, hf, hf_config
from r1jax.rewards.pool import open_pool
from r1jax.rewards.weighted import score_many
from r1jax.types import Params


def check(cfg: settings.Run) -> None:
    """Finds what a run would stumble over late: reads every source and the first prompts.

    Raises:
      ValueError: the tokenizer has no end token, or more tokens than the embedding has rows; a
        source is empty or cannot be read; a prompt or a text is too long.
    """
    tokenizer = cfg.tokenizer()
    tokenizers.check(tokenizer)
    if len(tokenizer) > cfg.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, model.vocab_size is {cfg.model.vocab_size}"
        )
    for stage in cfg.stages:
        if isinstance(stage, settings.Supervised):
            supervised.check(stage, tokenizer)
        else:
            rl.check(stage, tokenizer)


def run(
    cfg: settings.Run, folder: Path, *, text: Sequence[str], stopping: Callable[[], bool]
) -> Params:
    """The weights after the last stage. Everything on the way is in `folder`.

    Raises:
      Stopped: `stopping()` became true; the state is saved.
    """
    tokenizer = cfg.tokenizer()
    mesh = sharding.make_mesh(cfg.mesh)
    with jax.disable_jit(not cfg.jit), jax.set_mesh(mesh):
        context = Context(
            run=cfg,
            folder=folder,
            text=text,
            tokenizer=tokenizer,
            mesh=mesh,
            writer=metrics.open_writer(folder),
            stopping=stopping,
        )
        params = first_params(cfg, mesh)
        for stage in cfg.stages[begun(cfg, folder) :]:
            if isinstance(stage, settings.Supervised):
                params = supervised.train(stage, context, params)
            else:
                with open_pool(workers=stage.reward_workers, seconds=stage.reward_seconds) as pool:
                    reward = partial(score_many, stage.reward, each=pool.map)
                    scorer = Scorer(reward=reward, each=pool.map)
                    params = rl.train(stage, context, params, scorer=scorer)
        return params


def first_params(cfg: settings.Run, mesh: jax.sharding.Mesh) -> Params:
    """The weights that the first stage begins with, float32 on the mesh: the folder's that
    `cfg.weights` names, else random ones.

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
    loaded, params = hf.load(cfg.weights, dtype="float32", mesh=mesh)
    if not model.num_mtp:
        params.pop("mtp", None)
    elif loaded.num_mtp != model.num_mtp:
        raise ValueError(f"{cfg.weights} has {loaded.num_mtp} prediction modules of the run's")
    return params


def begun(cfg: settings.Run, folder: Path) -> int:
    """The number of the last stage that has a checkpoint; 0 if none has."""
    last = 0
    for i, stage in enumerate(cfg.stages):
        checkpoints = folder / "checkpoints" / stage.name
        if checkpoints.is_dir() and numbers(checkpoints):
            last = i
    return last
