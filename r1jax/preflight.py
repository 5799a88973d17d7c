"""What a run would stumble over late, found before it begins: its data, prompts and functions.

`python -m r1jax.train --config FILE --check` does this and leaves; every run does it first.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from r1jax import comparison, dataset, schedules, settings
from r1jax.data import tokenizer as tokenizers
from r1jax.inputs import open_sources, other_weights
from r1jax.local import Local
from r1jax.loops import rl, supervised
from r1jax.models import lora
from r1jax.reward_model import RewardModel
from r1jax.rewards.weighted import Batched
from r1jax.settings import Build, Built, Compare, Sampled, Trained
from r1jax.types import Batch

# As chat templates mark turns: <|im_start|>, and DeepSeek's, whose bars are full-width.
MARK = re.compile(r"<[|｜][^<>|｜\s]+[|｜]>")


def check(cfg: settings.Run) -> list[str]:
    """Reads every source and the first prompts. What was found, a line for each stage.

    A stage that waits for the rows of another is looked at when it begins; the files that it reads
    beside them are opened now.

    Raises:
      ValueError: the tokenizer has no end token, or more tokens than the embedding has rows; a
        source is empty or cannot be read; a prompt or a text is too long; another run is missing.
    """
    tokenizer = cfg.tokenizer()
    tokenizers.check(tokenizer)
    if len(tokenizer) > cfg.model.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, model.vocab_size is {cfg.model.vocab_size}"
        )
    found = [f"tokenizer: {len(tokenizer):,} tokens for {cfg.model.vocab_size:,} rows of weights"]
    for place, stage in enumerate(cfg.stages):
        check_others(cfg, place)
        waits = [one.stage for one in settings.inside(stage, Built)]
        stage = stage if waits else read_once(stage)
        if waits:
            found.append(f"{stage.name}: waits for the rows of {', '.join(waits)}")
        else:
            found.append(f"{stage.name}: {check_stage(stage, tokenizer)}")
            found += [f"note: {stage.name}: {one}" for one in broken_marks(stage, tokenizer)]
        try:
            open_sources(stage if waits else stage.passes if isinstance(stage, Build) else ())
        except ValueError as error:
            raise ValueError(f"{stage.name}: {error}") from None
    return found


def read_once(stage: settings.Stage) -> settings.Stage:
    """The stage with sources that keep what they read: files may be large."""
    if isinstance(stage, settings.Reinforce):
        train, test = cache(stage.task.train), cache(stage.task.test)
        return replace(stage, task=replace(stage.task, train=train, test=test))
    return replace(stage, source=cache(stage.source))


def check_others(cfg: settings.Run, place: int) -> None:
    """Raises ValueError if a model that the stage asks, beside the one it trains, is not there."""
    stage = cfg.stages[place]
    if isinstance(stage, Build) and isinstance(stage.answers, Sampled) and stage.answers.run:
        other_weights(stage.answers)
    if isinstance(stage, Trained) and stage.teacher is not None:
        other_weights(stage.teacher)
    if isinstance(stage, Trained) and stage.lora is not None:
        check_lora(cfg.model, stage.name, stage.lora)
    heads = [one.name for one in cfg.stages[:place] if getattr(one, "head", None) is not None]
    for model in settings.inside(stage, RewardModel):
        if model.run is not None:
            other_weights(model)
        elif model.stage not in heads:
            raise ValueError(
                f"stage {stage.name} needs the reward model {model.stage!r}, which must be a "
                f"stage before it with a head: {', '.join(heads) or 'there is none'}"
            )
    for model in settings.inside(stage, Local):
        if not Path(model.folder).is_dir():
            raise ValueError(f"{stage.name}: no such folder: {model.folder}")


def check_lora(model: settings.Decoder, stage: str, asked: settings.Lora) -> None:
    """Raises ValueError if the model lacks a weight that a stage is to adapt."""
    try:
        lora.adapter_leaves(model, rank=asked.rank, targets=asked.targets)
    except ValueError as error:
        raise ValueError(f"{stage}.lora.targets: {error}") from None


def check_stage(stage: settings.Stage, tokenizer: Any) -> str:
    """What the stage's sources hold, in words.

    Raises:
      ValueError: they, or its first prompts, cannot be used.
    """
    if isinstance(stage, settings.Supervised):
        return supervised.check(stage, tokenizer)
    if isinstance(stage, settings.Reinforce):
        found = rl.check(stage, tokenizer)
        check_functions(stage)
        return found
    if isinstance(stage, Compare):
        return comparison.check(stage, tokenizer)
    return dataset.check(stage, tokenizer)


def check_functions(cfg: settings.Reinforce) -> None:
    """Raises ValueError if the loss lacks what it reads, or the reward cannot be asked.

    The loss is traced with what a batch of this stage has. A judge is not asked, and a reward model
    is not loaded.
    """
    known = cfg.reference != "none" or cfg.teacher is not None
    token = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    place = jax.ShapeDtypeStruct((1, 2), jnp.int32)
    batch = Batch(
        tokens=place,
        position=place,
        segment=place,
        mask=jax.ShapeDtypeStruct((1, 2), jnp.bool_),
        weight=token,
        num_tokens=jax.ShapeDtypeStruct((), jnp.float32),
        advantage=token,
        logp_rollout=token,
        logp_old=token,
        logp_ref=token if known else None,
        entropy=token,
    )
    with settings.located(f"{cfg.name}.loss"):
        jax.eval_shape(schedules.resolve(cfg.loss, 1, adapted=0.0), token, batch)
    if not any(settings.inside(cfg.reward, Batched)):
        row = cfg.task.train()[0]
        with settings.located(f"{cfg.name}.reward, row 0, no answer", row):
            value = schedules.resolve(cfg.reward, 1)(row, "")
        if value is not None and not isinstance(value, Real):
            raise ValueError(f"{cfg.name}.reward must give a number or None, got {value!r}")


def broken_marks(stage: settings.Stage, tokenizer: Any) -> Iterator[str]:
    """Marks of a chat template in the stage's first prompt that are no tokens of the tokenizer.

    The model would read them as a few signs that it never saw at these places.
    """
    for mark in sorted(set(MARK.findall(first_text(stage)))):
        size = len(tokenizer.encode(mark, add_special_tokens=False))
        if size > 1:
            yield f"{mark} in its prompts is no token of this tokenizer but {size}"


def first_text(stage: settings.Stage) -> str:
    """What the model is shown of the stage's first row; empty where no prompt is made of it."""
    if isinstance(stage, settings.Reinforce):
        return settings.prompt_of(stage.task, stage.task.train()[0], stage.name)
    row = stage.source()[0]
    if isinstance(stage, settings.Supervised):
        return "".join(row[name] for name in ("prompt", "answer") if isinstance(row.get(name), str))
    return "" if stage.prompt is None else stage.prompt(row)
