"""Training on given texts: pretraining, SFT, and later distillation, with another loss."""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from r1jax import metrics, settings, sharding
from r1jax.data.packing import packed_batches
from r1jax.loops import auxiliary
from r1jax.loops.batches import cut
from r1jax.loops.run import Context, check_finite, end_step, resumed, to_floats
from r1jax.loops.step import make_objective, make_update
from r1jax.state import init_state, last_learning_rate
from r1jax.types import Batch, Params

FIRST = 256  # rows that are looked at before a run begins


def train(cfg: settings.Supervised, context: Context, params: Params) -> Params:
    """The weights after `cfg.steps` updates from `params`; goes on where a checkpoint ends."""
    optimizer = cfg.optimizer(cfg.steps)
    objective = make_objective(context.run.model, cfg.loss, extra=cfg.auxiliary)
    settle = partial(auxiliary.balanced, context.run.model, cfg.auxiliary)
    update = make_update(objective, optimizer, settle=settle)
    stream = packed_batches(
        cfg.source(),
        lambda rows: encode_rows(context.tokenizer, rows),
        batch_rows=cfg.batch_rows,
        row_length=cfg.row_length,
        seed=context.run.seed,
        on_prompt=cfg.on_prompt,
    )
    fresh = init_state(params, optimizer)
    with (
        resumed(context, cfg, fresh) as (store, state, done),
        metrics.progress(cfg.steps, stage=cfg.name, start=done) as show,
    ):
        began, tokens = time.monotonic(), 0.0
        for step in range(done + 1, cfg.steps + 1):
            fields = stream.batch(step - 1)
            batch = Batch(**fields)
            micro = [sharding.put(b, context.mesh, "batch") for b in cut(batch, cfg.micro_rows)]
            state, measured = update(state, micro)
            tokens += float((fields["segment"] > 0).sum())
            if step % cfg.log_every == 0 or step == cfg.steps:
                values = to_floats(measured)
                check_finite(values, cfg.name, step)
                rate = last_learning_rate(state.opt_state)
                if rate is not None:
                    values["learning_rate"] = float(rate)
                now = time.monotonic()
                values["time/step"] = (now - began) / cfg.log_every
                values["time/update_tokens_per_s"] = tokens / (now - began)
                began, tokens = now, 0.0
                context.writer.write(cfg.name, step, values)
                show(step, values)
            end_step(context, cfg, store, state, step, {})
        return state.params


def check(cfg: settings.Supervised, tokenizer: Any) -> None:
    """Raises ValueError if there are no texts, or one of the first cannot be trained on."""
    rows = cfg.source()
    if not len(rows):
        raise ValueError(f"{cfg.name}: no texts to train on, the source has 0 rows")
    for i, (prompt, answer) in enumerate(encode_rows(tokenizer, rows[:FIRST])):
        size = len(prompt) + len(answer)
        if size > cfg.row_length:
            raise ValueError(
                f"{cfg.name}: row {i} has {size} tokens, row_length allows {cfg.row_length}"
            )


def encode_rows(tokenizer: Any, rows: Sequence[settings.Row]) -> list[tuple[list[int], list[int]]]:
    """(prompt ids, answer ids with the end token) of rows that hold both texts.

    Raises:
      ValueError: a row lacks one of them.
    """
    for row in rows:
        for name in ("prompt", "answer"):
            if name not in row:
                raise ValueError(f"a row has no field {name!r}; it has {', '.join(sorted(row))}")
    encode = lambda name: tokenizer([row[name] for row in rows], add_special_tokens=False)  # noqa: E731
    end = [tokenizer.eos_token_id]
    return [
        (prompt, answer + end)
        for prompt, answer in zip(
            encode("prompt")["input_ids"], encode("answer")["input_ids"], strict=True
        )
    ]
