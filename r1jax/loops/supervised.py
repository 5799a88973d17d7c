"""Training on given texts: pretraining, SFT, preferences, reward models and distillation.

One loop: what differs is how rows are read (`texts`), what the loss is of (`head`, `divergence`)
and what it is told of the first weights (`reference`, `reference_point`).
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import settings, sharding
from r1jax.data import labelled
from r1jax.loops import adapters, auxiliary, evaluation, objectives
from r1jax.loops.batches import cut
from r1jax.loops.run import (
    Context,
    Scorer,
    check_finite,
    end_step,
    resumed,
    stream_key,
    to_floats,
)
from r1jax.loops.step import make_logp, make_update
from r1jax.loops.stream import Stream, packed_batches
from r1jax.progress import progress
from r1jax.state import init_state, last_learning_rate
from r1jax.types import Batch, Params, TrainState

FIRST = 256  # rows that are looked at before a run begins


def train(
    cfg: settings.Supervised,
    context: Context,
    params: Params,
    *,
    teacher: objectives.Teacher | None = None,
    scorer: Scorer | None = None,
) -> Params:
    """The weights after `cfg.steps` updates from `params`; goes on where a checkpoint ends.

    A head that learned with them is in the checkpoints only. `scorer` judges the answers of
    `cfg.evaluation`.
    """
    model = context.run.model
    optimizer = cfg.optimizer(cfg.steps)
    objective = objectives.of_stage(model, cfg, None if teacher is None else teacher.model)
    settle = partial(auxiliary.balanced, model, cfg.auxiliary)
    weights = adapters.of_stage(cfg, context, params)
    update = make_update(weights.objective(objective), optimizer, settle=settle)
    told = {**weights.told, **({} if teacher is None else {"teacher": teacher.params})}
    stream = make_stream(cfg, context)
    look = make_look(cfg, context, weights.whole)
    tested, evaluate = make_tests(cfg, context, scorer)
    best = None if cfg.evaluation is None else "test/accuracy"
    fresh = init_state(with_head(cfg, context, weights.first), optimizer, reference=cfg.reference)
    with (
        resumed(context, cfg, fresh, best=best) as (store, state, done),
        progress(cfg.steps, stage=cfg.name, start=done) as show,
    ):
        if done == 0 and tested(0):
            measured = evaluate(weights.merged(state.params), 0)
            context.writer.write(cfg.name, 0, measured)
            show(0, measured)
        began, tokens, last = time.monotonic(), 0.0, done
        for step in range(done + 1, cfg.steps + 1):
            fields = stream.batch(step - 1)
            texts = [] if cfg.reference_point is None else stream.texts(step - 1)
            state, measured = update(state, look(state, Batch(**fields), texts), **told)
            tokens += float((fields["segment"] > 0).sum())
            tests: dict[str, float] = {}
            if step % cfg.log_every == 0 or step == cfg.steps or tested(step):
                values = to_floats(measured)
                check_finite(values, context.writer, cfg.name, step)
                rate = last_learning_rate(state.opt_state)
                if rate is not None:
                    values["learning_rate"] = float(rate)
                seconds = time.monotonic() - began
                values["time/step"] = seconds / (step - last)
                values["time/update_tokens_per_s"] = tokens / seconds
                values["time/update_tokens"] = tokens
                tests = evaluate(weights.merged(state.params), step) if tested(step) else {}
                context.writer.write(cfg.name, step, values | tests)
                show(step, values | tests)
                began, tokens, last = time.monotonic(), 0.0, step
            scores = {name: value for name, value in tests.items() if name == best}
            end_step(context, cfg, store, state, step, scores)
        last = weights.merged(state.params)
        return {name: last[name] for name in params}


def check(cfg: settings.Supervised, tokenizer: Any) -> str:
    """What the texts are, in words.

    Raises:
      ValueError: there are none, or one of the first cannot be trained on.
    """
    rows = cfg.source()
    if not len(rows):
        raise ValueError(f"{cfg.name}: no texts to train on, the source has 0 rows")
    try:
        first = reader(cfg)(tokenizer, rows[:FIRST])
    except ValueError as error:
        raise ValueError(f"{cfg.name}: {error}") from None
    sizes = [labelled.size(texts) for texts in first]
    for i, size in enumerate(sizes):
        if size > cfg.row_length:
            raise ValueError(
                f"{cfg.name}: row {i} has {size} tokens, row_length allows {cfg.row_length}"
            )
    found = (
        f"{len(rows):,} rows, of which the first {len(sizes)} have {min(sizes):,} to "
        f"{max(sizes):,} of {cfg.row_length:,} tokens"
    )
    if cfg.evaluation is not None:
        said = evaluation.check(cfg.evaluation, tokenizer, f"{cfg.name}.evaluation.task.test")
        found = f"{found}; test: {said}"
    return found


def make_tests(
    cfg: settings.Supervised, context: Context, scorer: Scorer | None
) -> tuple[Callable[[int], bool], Callable[[Params, int], dict[str, float]]]:
    """After which steps held-out problems are answered, and the function that does it."""
    asked = cfg.evaluation
    if asked is None:
        return lambda step: False, lambda params, step: {}
    if scorer is None:
        raise ValueError(f"{cfg.name}: an evaluation needs a scorer")
    evaluate = evaluation.make_evaluation(asked, cfg.name, context, scorer)
    return partial(evaluation.due, asked, steps=cfg.steps), evaluate


def reader(cfg: settings.Supervised) -> Callable[..., list[labelled.Texts]]:
    """The function (tokenizer, rows) -> the texts of each row."""
    return labelled.answers if cfg.texts is None else cfg.texts


def make_stream(cfg: settings.Supervised, context: Context) -> Stream:
    """The packed batches of a stage."""
    return packed_batches(
        cfg.source(),
        partial(reader(cfg), context.tokenizer),
        batch_rows=cfg.batch_rows,
        row_length=cfg.row_length,
        seed=context.run.seed,
        size=labelled.size,
        place=partial(
            labelled.place,
            on_prompt=cfg.on_prompt,
            labelled=cfg.texts is not None,
            weight=cfg.weight,
        ),
    )


def with_head(cfg: settings.Supervised, context: Context, params: Params) -> Params:
    """What the stage trains, `params`, with the weights of its head beside."""
    if cfg.head is None:
        return params
    key = stream_key(context.run.seed, f"{cfg.name}/head", 0)
    leaves = cfg.head.leaves(context.run.model)
    return {**params, **sharding.init(leaves, key, context.mesh)}


def make_look(
    cfg: settings.Supervised, context: Context, whole: Callable[[Params], Params]
) -> Callable[[TrainState, Batch, Sequence[labelled.Texts]], list[Batch]]:
    """The function (state, batch, its texts) -> micro-batches on the devices, with `logp_ref` and
    `kl_estimate` where the stage's loss is told them. `whole` makes a model's weights of what the
    stage trains."""
    put = lambda batch: [  # noqa: E731
        sharding.put(b, context.mesh, "batch") for b in cut(batch, cfg.micro_rows)
    ]
    if not cfg.reference:
        return lambda state, batch, texts: put(batch)
    logp = make_logp(context.run.model)
    # Without labels, so that one program serves both kinds of batches.
    logp_of = lambda trained, b: logp(  # noqa: E731
        whole(trained), b.replace(target=None, pair=None)
    )[0]
    point = None if cfg.reference_point is None else jax.jit(cfg.reference_point)

    def reference_point(state: TrainState, texts: Sequence[labelled.Texts]) -> np.float32:
        total, count = 0.0, 0.0
        others = labelled.mismatched(texts, num_rows=cfg.batch_rows, row_length=cfg.row_length)
        for b in put(Batch(**others)):
            assert point is not None
            known = b.replace(logp_ref=logp_of(state.reference, b))
            found = point(logp_of(state.params, b), known)
            total, count = total + float(found[0]), count + float(found[1])
        return np.float32(max(0.0, total / max(count, 1.0)))

    def look(state: TrainState, batch: Batch, texts: Sequence[labelled.Texts]) -> list[Batch]:
        micro = [b.replace(logp_ref=logp_of(state.reference, b)) for b in put(batch)]
        if point is None:
            return micro
        estimate = jnp.asarray(reference_point(state, texts))
        return [b.replace(kl_estimate=estimate) for b in micro]

    return look
