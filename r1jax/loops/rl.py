"""Reinforcement learning: sample answers, score them, turn rewards into advantages, update."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import metrics, monitors, schedules, settings, sharding
from r1jax.data.packing import shuffled
from r1jax.loops.learning import begin, improve, look_again, temperature_at
from r1jax.loops.objectives import Teacher
from r1jax.loops.run import Context, Scorer, check_finite, end_step, resumed, stream_key
from r1jax.loops.scoring import (
    Collected,
    Scored,
    answer_means,
    given_up_since,
    keep_groups,
    log_samples,
    means,
    score_answers,
    together,
)
from r1jax.progress import progress
from r1jax.rollout.answers import concatenate, encode_prompts, stop_tokens, take, to_host
from r1jax.rollout.engine import make_engine
from r1jax.types import Limits, Params, Rollout

Sample = Callable[..., Rollout]  # (params, rows, index, key, limits=None)


def train(
    cfg: settings.Reinforce,
    context: Context,
    params: Params,
    *,
    scorer: Scorer,
    teacher: Teacher | None = None,
) -> Params:
    """The weights after `cfg.steps` rollouts from `params`; goes on where a checkpoint ends."""
    rows, held_out = cfg.task.train(), cfg.task.test()[: cfg.evaluate_rows]
    order = (
        shuffled(len(rows), seed=context.run.seed) if cfg.order == "shuffled" else in_order(rows)
    )
    sample = make_sample(cfg, cfg.group, cfg.engine.sampling, context)
    evaluate = make_evaluation(cfg, held_out, context, scorer)
    learner, fresh = begin(cfg, context, params, teacher=teacher)

    with (
        resumed(context, cfg, fresh, best="test/accuracy") as (store, state, done),
        progress(cfg.steps, stage=cfg.name, start=done) as show,
    ):
        if done == 0:
            measured = evaluate(state.params, 0)
            context.writer.write(cfg.name, 0, measured)
            show(0, measured)
        recent: list[Mapping[str, float]] = []
        for step in range(done + 1, cfg.steps + 1):
            began = time.monotonic()
            if cfg.reference == "moving" and step > 1 and (step - 1) % cfg.reference_every == 0:
                state = state.replace(reference=jax.tree.map(jnp.copy, state.params))
            found = collect_answers(
                cfg,
                context,
                state.params,
                lambda i: rows[order(i)],
                partial(sample, limits=limits_at(cfg, step)),
                scorer,
                step,
            )
            ready = time.monotonic()
            rollout, said = look_again(cfg, context, found.rollout, state, learner, step)
            state, values = improve(cfg, context, rollout, said, state, learner, step)
            finished = time.monotonic()
            values |= found.values | summary(cfg, rollout, found.scored)
            values |= {
                "time/update": finished - ready,
                "time/step": finished - began,
                "time/update_tokens_per_s": rollout.answer_length.sum() / (finished - ready),
            }
            check_finite(values, cfg.name, step)
            if step % cfg.evaluate_every == 0 or step == cfg.steps:
                values |= evaluate(state.params, step)
            context.writer.write(cfg.name, step, values)
            few = cfg.log_samples
            log_samples(cfg, context.writer, found, step=step, split="train", count=few)
            recent = [*recent[-monitors.STEPS :], values]
            show(step, values, monitors.warnings(recent))
            tests = {name: v for name, v in values.items() if name == "test/accuracy"}
            end_step(context, cfg, store, state, step, tests)
        return {name: state.params[name] for name in params}  # a critic's head is left behind


def check(cfg: settings.Reinforce, tokenizer: Any) -> None:
    """Raises ValueError if there are too few problems or one of the first cannot be asked."""
    stop_tokens(tokenizer)
    train, test = cfg.task.train(), cfg.task.test()
    for split, rows in (("train", train), ("test", test)):
        if not len(rows):
            raise ValueError(f"{cfg.name}.task.{split}: no problems, the source has 0 rows")
        first = rows[: max(cfg.prompts, cfg.evaluate_rows)]
        encode_prompts(
            tokenizer,
            [cfg.task.prompt(row) + cfg.task.prefill for row in first],
            max_prompt=cfg.engine.max_prompt,
            index=range(len(first)),
        )
        for row in first:
            cfg.task.accuracy(row, "")  # refuses a row that lacks what it needs


def in_order(rows: Sequence[settings.Row]) -> Callable[[int], int]:
    """The endless order of a curriculum: the rows as they are, again and again."""
    return lambda i: i % len(rows)


def make_sample(
    cfg: settings.Reinforce, group: int, sampling: settings.Sampling, context: Context
) -> Sample:
    """The function (params, rows, numbers of the rows, key, limits) -> rollout on the device.

    Without `limits` it is that of the engine's own settings.

    Raises:
      ValueError: the tokenizer has no end token; or, when called, a prompt is too long.
    """
    engine = make_engine(
        context.run.model,
        dataclasses.replace(cfg.engine, sampling=sampling),
        group=group,
        stop=stop_tokens(context.tokenizer),
    )
    generate = jax.jit(engine)

    def sample(
        params: Params,
        rows: Sequence[settings.Row],
        index: Sequence[int],
        key: jax.Array,
        limits: Limits | None = None,
    ) -> Rollout:
        prompts = encode_prompts(
            context.tokenizer,
            [cfg.task.prompt(row) + cfg.task.prefill for row in rows],
            max_prompt=cfg.engine.max_prompt,
            index=index,
        )
        given = [] if limits is None else [limits]
        return generate(params, sharding.put(prompts, context.mesh, "batch"), key, *given)

    return sample


def limits_at(cfg: settings.Reinforce, step: int) -> Limits:
    """The temperature and the longest answer of a step's rollout."""
    longest = cfg.engine.max_new if cfg.max_new is None else schedules.at(cfg.max_new, step)
    return Limits(
        temperature=np.float32(temperature_at(cfg, step)), max_new=np.int32(round(longest))
    )


def collect_answers(
    cfg: settings.Reinforce,
    context: Context,
    params: Params,
    row: Callable[[int], settings.Row],
    sample: Sample,
    scorer: Scorer,
    step: int,
) -> Collected:
    """Samples and scores the answers of a step.

    Without `cfg.select` that is one round of `cfg.prompts` prompts. With it, prompts that it
    drops are replaced by those of further rounds, `cfg.rounds` at the most: there may be fewer
    prompts in the end, but at least one round is kept if nothing was selected at all. A step reads
    the same rows however many rounds it takes, so that resuming needs no state.
    """
    kept_rows, rollouts, found = [], [], []
    scorer = schedules.resolve(scorer, step)  # weights of rewards may change
    before = scorer.given_up()
    timed = {"sample": 0.0, "score": 0.0}
    tokens, slot_steps, asked = 0, 0, 0
    for turn in range(cfg.rounds):
        began = time.monotonic()
        first = ((step - 1) * cfg.rounds + turn) * cfg.prompts
        index = range(first, first + cfg.prompts)
        rows = [row(i) for i in index]
        key = stream_key(context.run.seed, f"{cfg.name}/rollout", step)
        rollout = to_host(sample(params, rows, index, key))
        sampled = time.monotonic()
        scored = score_answers(cfg.task, context.tokenizer, rollout, rows, scorer)
        rollout = rollout.replace(reward=scored.reward)
        timed["sample"] += sampled - began
        timed["score"] += time.monotonic() - sampled
        tokens += int(rollout.answer_length.sum())
        slot_steps += int(rollout.slot_steps)
        asked += cfg.prompts
        kept = np.ones(cfg.prompts, bool)
        if cfg.select is not None:
            kept = np.asarray(cfg.select(scored.reward, cfg.group), bool)
            kept &= np.cumsum(kept) <= cfg.prompts - len(kept_rows)
            if not kept.any() and not kept_rows and turn == cfg.rounds - 1:
                kept = np.ones(cfg.prompts, bool)
        if kept.any():
            kept_rows += [one for one, keep in zip(rows, kept, strict=True) if keep]
            rollouts.append(take(rollout, kept))
            found.append(keep_groups(scored, kept))
        if len(kept_rows) == cfg.prompts:
            break
    values = {
        "time/rollout": timed["sample"],
        "time/score": timed["score"],
        "time/rollout_tokens_per_s": tokens / timed["sample"],
        "slots_busy": tokens / slot_steps,
        "kept": len(kept_rows) / asked,
        **given_up_since(before, scorer),
    }
    return Collected(
        rows=kept_rows, rollout=concatenate(rollouts), scored=together(found), values=values
    )


def summary(cfg: settings.Reinforce, rollout: Rollout, scored: Scored) -> dict[str, float]:
    """Means over a rollout's answers. What an answer could not be judged on is left out.

    The reward, and the share of groups whose rewards are all equal, are nan where no answer could
    be judged.
    """
    judged = [group[~np.isnan(group)] for group in scored.reward.reshape(-1, cfg.group)]
    rewards = np.concatenate(judged)
    equal = [bool(np.all(group == group[0])) for group in judged if len(group)]
    values = {
        "reward": float(np.mean(rewards)) if len(rewards) else math.nan,
        "unjudged": 1 - len(rewards) / len(scored.reward),
        "equal_groups": float(np.mean(equal)) if equal else math.nan,
        "decode_steps": float(rollout.decode_steps),
        **answer_means(rollout, scored),
    }
    if rollout.drafted is not None:
        values["drafts_accepted"] = float(rollout.accepted / max(rollout.drafted, 1))
    values |= {f"reward/{name}": value for name, value in means(scored.parts).items()}
    return values


def make_evaluation(
    cfg: settings.Reinforce,
    rows: Sequence[settings.Row],
    context: Context,
    scorer: Scorer,
) -> Callable[[Params, int], dict[str, float]]:
    """The function (params, step) -> metrics of one answer to each held-out problem.

    The same random numbers every time, so that two evaluations differ by the weights alone.
    """
    engine = dataclasses.replace(cfg.engine, keep_routing=False)
    without = dataclasses.replace(cfg, engine=engine)
    sample = make_sample(without, 1, cfg.evaluate_sampling, context)
    key = stream_key(context.run.seed, f"{cfg.name}/evaluate", 0)

    def evaluate(params: Params, step: int) -> dict[str, float]:
        began = time.monotonic()
        rollout = to_host(sample(params, rows, range(len(rows)), key))
        now, before = schedules.resolve(scorer, max(step, 1)), scorer.given_up()
        scored = score_answers(cfg.task, context.tokenizer, rollout, rows, now)
        found = Collected(rows=list(rows), rollout=rollout, scored=scored)
        log_samples(cfg, context.writer, found, step=step, split="test", count=len(rows))
        right = [a for a in scored.accuracy if a is not None]
        low, high = metrics.bootstrap_interval(right) if right else (math.nan, math.nan)
        values = {**answer_means(rollout, scored), "accuracy_low": low, "accuracy_high": high}
        values |= given_up_since(before, scorer)
        values = {f"test/{name}": value for name, value in values.items()}
        return values | {"time/evaluate": time.monotonic() - began}

    return evaluate
