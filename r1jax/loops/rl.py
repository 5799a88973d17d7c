"""Reinforcement learning: sample answers, score them, turn rewards into advantages, update."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import monitors, schedules, settings
from r1jax.loops.evaluation import Sample, check_problems, due, make_evaluation, make_sample
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
    part_columns,
    score_answers,
    together,
)
from r1jax.loops.stream import shuffled
from r1jax.progress import progress
from r1jax.rollout.answers import concatenate, stop_tokens, take, to_host
from r1jax.types import Limits, Params, Rollout


def train(
    cfg: settings.Reinforce,
    context: Context,
    params: Params,
    *,
    scorer: Scorer,
    teacher: Teacher | None = None,
) -> Params:
    """The weights after `cfg.steps` rollouts from `params`; goes on where a checkpoint ends."""
    rows = cfg.task.train()
    order = (
        shuffled(len(rows), seed=context.run.seed) if cfg.order == "shuffled" else in_order(rows)
    )
    sample = make_sample(cfg.task, cfg.engine, cfg.group, context)
    held_out = settings.evaluation_of(cfg)
    assert held_out is not None
    evaluate = make_evaluation(held_out, cfg.name, context, scorer)
    learner, fresh = begin(cfg, context, params, teacher=teacher)

    with (
        resumed(context, cfg, fresh, best="test/accuracy") as (store, state, done),
        progress(cfg.steps, stage=cfg.name, start=done) as show,
    ):
        if done == 0:
            measured = evaluate(learner.sampled(state.params), 0)
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
                learner.sampled(state.params),
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
                "time/update_tokens": float(rollout.answer_length.sum() * cfg.epochs),
            }
            check_finite(values, context.writer, cfg.name, step)
            if due(held_out, step, cfg.steps):
                values |= evaluate(learner.sampled(state.params), step)
            context.writer.write(cfg.name, step, values)
            few = cfg.log_samples
            log_samples(
                cfg.name, cfg.task, context.writer, found, step=step, split="train", count=few
            )
            recent = [*recent[-monitors.STEPS :], values]
            show(step, values, monitors.warnings(recent))
            tests = {name: v for name, v in values.items() if name == "test/accuracy"}
            end_step(context, cfg, store, state, step, tests)
        last = learner.sampled(state.params)
        return {name: last[name] for name in params}  # a critic's head is left behind


def check(cfg: settings.Reinforce, tokenizer: Any) -> str:
    """What the problems are, in words.

    Raises:
      ValueError: there are none, or one of them cannot be asked.
    """
    stop_tokens(tokenizer)
    count = max(cfg.prompts, cfg.evaluate_rows)
    found = []
    for split, source in (("train", cfg.task.train), ("test", cfg.task.test)):
        name = f"{cfg.name}.task.{split}"
        said = check_problems(cfg.task, source(), cfg.engine, tokenizer, name, count=count)
        found.append(f"{split}: {said}")
    return "; ".join(found)


def in_order(rows: Sequence[settings.Row]) -> Callable[[int], int]:
    """The endless order of a curriculum: the rows as they are, again and again."""
    return lambda i: i % len(rows)


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
        parts = part_columns(scored.parts, scorer.parts)
        rollout = rollout.replace(reward=scored.reward, parts=parts)
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
        "time/rollout_tokens": float(tokens),
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
