"""Reinforcement learning: sample answers, score them, turn rewards into advantages, update."""

import dataclasses
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import metrics, monitors, settings, sharding
from r1jax.data.packing import collect, shuffled
from r1jax.loops.batches import pack_answers
from r1jax.loops.run import Context, Score, check_finite, end_step, resumed, stream_key, to_floats
from r1jax.loops.step import make_logp, make_update
from r1jax.rollout.answers import decode_answers, encode_prompts, stop_tokens, to_host
from r1jax.rollout.engine import make_engine
from r1jax.state import init_state, last_learning_rate
from r1jax.types import Params, Rollout, TrainState

Sample = Callable[[Params, Sequence[settings.Row], Sequence[int], jax.Array], Rollout]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the host found out about the answers of a rollout, B of each."""

    answers: list[str]  # the prefill included
    reward: np.ndarray  # float32; nan: could not be judged
    parts: list[Mapping[str, float]]
    accuracy: list[float | None]
    seen: list[Mapping[str, float]]  # what `task.observe` counts


def train(cfg: settings.Reinforce, context: Context, params: Params, *, score: Score) -> Params:
    """The weights after `cfg.steps` rollouts from `params`; goes on where a checkpoint ends."""
    updates = cfg.steps * cfg.minibatches * cfg.epochs
    optimizer = cfg.optimizer(updates)
    temperature = cfg.engine.sampling.temperature or 1.0
    update = make_update(context.run.model, cfg.loss, optimizer, temperature=temperature)
    logp_of = make_logp(context.run.model, temperature=temperature)
    rows, held_out = cfg.task.train(), cfg.task.test()[: cfg.evaluate_rows]
    order = shuffled(len(rows), seed=context.run.seed)
    sample = make_sample(cfg, cfg.group, cfg.engine.sampling, context)
    evaluate = make_evaluation(cfg, held_out, context, score)
    fresh = init_state(params, optimizer, reference=cfg.reference != "none")

    with (
        resumed(context, cfg, fresh, best="test/accuracy") as (store, state, done),
        metrics.progress(cfg.steps, stage=cfg.name, start=done) as show,
    ):
        if done == 0:
            found = evaluate(state.params, 0)
            context.writer.write(cfg.name, 0, found)
            show(0, found)
        recent: list[Mapping[str, float]] = []
        for step in range(done + 1, cfg.steps + 1):
            began = time.monotonic()
            if cfg.reference == "moving" and step > 1 and (step - 1) % cfg.reference_every == 0:
                state = state.replace(reference=jax.tree.map(jnp.copy, state.params))
            index = range((step - 1) * cfg.prompts, step * cfg.prompts)
            chosen = [rows[order(i)] for i in index]
            key = stream_key(context.run.seed, f"{cfg.name}/rollout", step)
            rollout = to_host(sample(state.params, chosen, index, key))
            sampled = time.monotonic()
            rollout, scored, ready = judge(cfg, context, rollout, chosen, score, state, logp_of)
            state, values = improve(cfg, context, rollout, state, update, step)
            values |= summary(cfg, rollout, scored)
            finished = time.monotonic()
            values |= {
                "time/rollout": sampled - began,
                "time/score": ready - sampled,
                "time/update": finished - ready,
                "time/step": finished - began,
                "time/rollout_tokens_per_s": rollout.answer_length.sum() / (sampled - began),
                "time/update_tokens_per_s": rollout.answer_length.sum() / (finished - ready),
            }
            check_finite(values, cfg.name, step)
            if step % cfg.evaluate_every == 0 or step == cfg.steps:
                values |= evaluate(state.params, step)
            context.writer.write(cfg.name, step, values)
            log_samples(cfg, context, step, "train", chosen, rollout, scored, cfg.log_samples)
            recent = [*recent[-monitors.STEPS :], values]
            show(step, values, monitors.warnings(recent))
            tests = {name: v for name, v in values.items() if name == "test/accuracy"}
            end_step(context, cfg, store, state, step, tests)
        return state.params


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


def make_sample(
    cfg: settings.Reinforce, group: int, sampling: settings.Sampling, context: Context
) -> Sample:
    """The function (params, rows, numbers of the rows, key) -> rollout on the device.

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
        params: Params, rows: Sequence[settings.Row], index: Sequence[int], key: jax.Array
    ) -> Rollout:
        prompts = encode_prompts(
            context.tokenizer,
            [cfg.task.prompt(row) + cfg.task.prefill for row in rows],
            max_prompt=cfg.engine.max_prompt,
            index=index,
        )
        return generate(params, sharding.put(prompts, context.mesh, "batch"), key)

    return sample


def judge(
    cfg: settings.Reinforce,
    context: Context,
    rollout: Rollout,
    rows: Sequence[settings.Row],
    score: Score,
    state: TrainState,
    logp_of: Callable[..., jax.Array],
) -> tuple[Rollout, Scored, float]:
    """The rollout with rewards and, where there is a reference, its log-probabilities.

    The device works on the reference while the host scores.
    """
    waiting = None
    if state.reference is not None:
        everything = np.arange(len(rollout.answer))
        none = np.zeros_like(rollout.logp_rollout)
        packing, batches = pack_answers(
            rollout,
            everything,
            {"weight": none},
            row_length=cfg.row_length,
            micro_rows=cfg.micro_rows,
        )
        logps = [logp_of(state.reference, sharding.put(b, context.mesh, "batch")) for b in batches]
        waiting = packing, logps
    scored = score_answers(cfg, context, rollout, rows, score)
    rollout = rollout.replace(reward=scored.reward)
    if waiting is not None:
        packing, logps = waiting
        logp = collect(
            packing,
            np.concatenate(jax.device_get(logps)),
            answer_length=rollout.answer_length,
            width=rollout.answer.shape[1],
        )
        rollout = rollout.replace(logp_ref=logp)
    return rollout, scored, time.monotonic()


def score_answers(
    cfg: settings.Reinforce,
    context: Context,
    rollout: Rollout,
    rows: Sequence[settings.Row],
    score: Score,
) -> Scored:
    """Decodes and scores every answer; answer i belongs to rows[i // G]."""
    answers = [cfg.task.prefill + text for text in decode_answers(context.tokenizer, rollout)]
    group = len(answers) // len(rows)
    pairs = [(rows[i // group], answer) for i, answer in enumerate(answers)]
    judged = [score(row, answer) for row, answer in pairs]
    observe = cfg.task.observe
    return Scored(
        answers=answers,
        reward=np.asarray([np.nan if r is None else r for r, _ in judged], np.float32),
        parts=[parts for _, parts in judged],
        accuracy=[cfg.task.accuracy(row, answer) for row, answer in pairs],
        seen=[observe(row, answer) if observe else {} for row, answer in pairs],
    )


def improve(
    cfg: settings.Reinforce,
    context: Context,
    rollout: Rollout,
    state: TrainState,
    update: Callable[..., tuple[TrainState, dict[str, jax.Array]]],
    step: int,
) -> tuple[TrainState, dict[str, float]]:
    """All updates on one rollout: `cfg.epochs` passes over random minibatches.

    `gap` is of the first update, when sampler and trainer have the same weights.
    """
    advantage = np.asarray(cfg.advantage(rollout), np.float32)
    mask = np.arange(rollout.answer.shape[1])[None] < rollout.answer_length[:, None]
    per_token = {"advantage": advantage, "logp_rollout": rollout.logp_rollout}
    if rollout.logp_ref is not None:
        per_token["logp_ref"] = rollout.logp_ref
    history = []
    for epoch in range(cfg.epochs):
        order = np.arange(len(mask))
        if cfg.minibatches > 1:
            order = np.random.default_rng([context.run.seed, step, epoch]).permutation(len(mask))
        for part in np.split(order, cfg.minibatches):
            part = np.sort(part)
            extras = {name: values[part] for name, values in per_token.items()}
            _, batches = pack_answers(
                rollout,
                part,
                {**extras, "weight": cfg.weight(mask[part])},
                row_length=cfg.row_length,
                micro_rows=cfg.micro_rows,
            )
            placed = [sharding.put(b, context.mesh, "batch") for b in batches]
            state, measured = update(state, placed)
            history.append(measured)
    found = [to_floats(measured) for measured in history]
    values = {name: float(np.mean([f[name] for f in found])) for name in found[0]}
    values["gap"] = found[0]["gap"]
    rate = last_learning_rate(state.opt_state)
    if rate is not None:
        values["learning_rate"] = float(rate)
    return state, values


def summary(cfg: settings.Reinforce, rollout: Rollout, scored: Scored) -> dict[str, float]:
    """Means over a rollout's answers. What an answer could not be judged on is left out."""
    groups = scored.reward.reshape(-1, cfg.group)
    values = {
        "reward": float(np.nanmean(scored.reward)) if not np.isnan(groups).all() else 0.0,
        "unjudged": float(np.isnan(scored.reward).mean()),
        "equal_groups": float(np.mean(np.nanmax(groups, 1) == np.nanmin(groups, 1))),
        "decode_steps": float(rollout.decode_steps),
        "slots_busy": float(rollout.answer_length.sum() / rollout.slot_steps),
        **answer_means(rollout, scored),
    }
    values |= {f"reward/{name}": value for name, value in means(scored.parts).items()}
    return values


def answer_means(rollout: Rollout, scored: Scored) -> dict[str, float]:
    """Accuracy, length, share cut off, and what was observed, each a mean over the answers."""
    right = [a for a in scored.accuracy if a is not None]
    return {
        "accuracy": float(np.mean(right)) if right else 0.0,
        "length": float(rollout.answer_length.mean()),
        "cut": float(1 - rollout.finished.mean()),
        **means(scored.seen),
    }


def means(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each name's mean over the records that have it."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            found[name].append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def make_evaluation(
    cfg: settings.Reinforce,
    rows: Sequence[settings.Row],
    context: Context,
    score: Score,
) -> Callable[[Params, int], dict[str, float]]:
    """The function (params, step) -> metrics of one answer to each held-out problem.

    The same random numbers every time, so that two evaluations differ by the weights alone.
    """
    sample = make_sample(cfg, 1, cfg.evaluate_sampling, context)
    key = stream_key(context.run.seed, f"{cfg.name}/evaluate", 0)

    def evaluate(params: Params, step: int) -> dict[str, float]:
        began = time.monotonic()
        rollout = to_host(sample(params, rows, range(len(rows)), key))
        scored = score_answers(cfg, context, rollout, rows, score)
        log_samples(cfg, context, step, "test", rows, rollout, scored, len(rows))
        right = [a for a in scored.accuracy if a is not None]
        low, high = metrics.bootstrap_interval(right) if right else (0.0, 0.0)
        values = {**answer_means(rollout, scored), "accuracy_low": low, "accuracy_high": high}
        values = {f"test/{name}": value for name, value in values.items()}
        return values | {"time/evaluate": time.monotonic() - began}

    return evaluate


def log_samples(
    cfg: settings.Reinforce,
    context: Context,
    step: int,
    split: str,
    rows: Sequence[settings.Row],
    rollout: Rollout,
    scored: Scored,
    count: int,
) -> None:
    """Writes the first `count` answers to samples.jsonl, prompts and scores with them."""
    group = len(scored.answers) // len(rows)
    context.writer.samples(
        cfg.name,
        step,
        [
            {
                "split": split,
                "row": rows[i // group],
                "prompt": cfg.task.prompt(rows[i // group]),
                "answer": scored.answers[i],
                "reward": None if np.isnan(scored.reward[i]) else float(scored.reward[i]),
                "parts": scored.parts[i],
                "accuracy": scored.accuracy[i],
                "finished": bool(rollout.finished[i]),
                "length": int(rollout.answer_length[i]),
            }
            for i in range(min(count, len(scored.answers)))
        ],
    )
