"""Held-out problems, answered by the weights of a stage while it trains."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from r1jax import metrics, schedules, settings, sharding
from r1jax.data.sources import LazyRows
from r1jax.data.tokenizer import encode
from r1jax.loops.run import Context, Scorer, stream_key
from r1jax.loops.scoring import (
    Collected,
    answer_means,
    given_up_since,
    log_samples,
    score_answers,
)
from r1jax.rollout.answers import encode_prompts, stop_tokens, to_host
from r1jax.rollout.engine import make_engine
from r1jax.types import Limits, Params, Rollout

AT_ONCE = 4096  # prompts that are looked at together
Sample = Callable[..., Rollout]  # (params, rows, index, key, limits=None)


def make_evaluation(
    cfg: settings.Evaluation, stage: str, context: Context, scorer: Scorer
) -> Callable[[Params, int], dict[str, float]]:
    """The function (params, step) -> metrics of one answer to each held-out problem.

    The same random numbers every time, so that two evaluations of a stage differ by the weights
    alone.
    """
    rows = cfg.task.test()[: cfg.rows]
    sample = make_sample(cfg.task, cfg.engine, 1, context)
    key = stream_key(context.run.seed, f"{stage}/evaluate", 0)

    def evaluate(params: Params, step: int) -> dict[str, float]:
        began = time.monotonic()
        rollout = to_host(sample(params, rows, range(len(rows)), key))
        now, before = schedules.resolve(scorer, max(step, 1)), scorer.given_up()
        scored = score_answers(cfg.task, context.tokenizer, rollout, rows, now)
        found = Collected(rows=list(rows), rollout=rollout, scored=scored)
        log_samples(
            stage, cfg.task, context.writer, found, step=step, split="test", count=len(rows)
        )
        right = [a for a in scored.accuracy if a is not None]
        low, high = metrics.bootstrap_interval(right) if right else (math.nan, math.nan)
        values = {**answer_means(rollout, scored), "accuracy_low": low, "accuracy_high": high}
        values |= given_up_since(before, scorer)
        values = {f"test/{name}": value for name, value in values.items()}
        tokens = float(rollout.answer_length.sum())
        seconds = time.monotonic() - began
        return values | {"time/evaluate": seconds, "time/evaluate_tokens": tokens}

    return evaluate


def due(cfg: settings.Evaluation, step: int, steps: int) -> bool:
    """Whether the weights after `step` of `steps` updates are to be evaluated."""
    return step in (0, steps) or (cfg.every > 0 and step % cfg.every == 0)


def check(cfg: settings.Evaluation, tokenizer: Any, name: str) -> str:
    """What the problems are, in words.

    Raises:
      ValueError: there are none, one cannot be asked, or no answer can end.
    """
    stop_tokens(tokenizer)
    return check_problems(cfg.task, cfg.task.test(), cfg.engine, tokenizer, name, count=cfg.rows)


def check_problems(
    task: settings.Task,
    rows: settings.Rows,
    engine: settings.Engine,
    tokenizer: Any,
    name: str,
    *,
    count: int,
) -> str:
    """How many problems there are, and how long their prompts, in words.

    Of rows that are made on demand the first `count` are looked at, and whether an answer can be
    judged by these alone.

    Raises:
      ValueError: there are no problems, or one of them cannot be asked.
    """
    longest = 0
    if not len(rows):
        raise ValueError(f"{name}: no problems, the source has 0 rows")
    made = isinstance(rows, LazyRows) and not rows.files
    for start in range(0, count if made else len(rows), AT_ONCE):
        some = rows[start : min(start + AT_ONCE, count) if made else start + AT_ONCE]
        prompts = [
            settings.prompt_of(task, row, f"{name}, row {start + i}") for i, row in enumerate(some)
        ]
        index = range(len(some))
        found = encode_prompts(tokenizer, prompts, max_prompt=engine.max_prompt, index=index)
        longest = max(longest, int(found.length.max()))
        if tokenizer.unk_token_id is not None and np.any(found.tokens == tokenizer.unk_token_id):
            for prompt in prompts:
                encode(tokenizer, prompt)  # refuses a text that has no token
    for i, row in enumerate(rows[:count]):
        with settings.located(f"{name}, row {i}, no answer", row):
            task.accuracy(row, "")  # refuses a row that lacks what it needs
    return f"{len(rows):,} problems, prompts of at most {longest:,} of {engine.max_prompt:,} tokens"


def make_sample(
    task: settings.Task, engine: settings.Engine, group: int, context: Context
) -> Sample:
    """The function (params, rows, numbers of the rows, key, limits) -> rollout on the device.

    Without `limits` it is that of the engine's own settings.

    Raises:
      ValueError: the tokenizer has no end token; or, when called, a prompt is too long.
    """
    stop = stop_tokens(context.tokenizer)
    generate = jax.jit(make_engine(context.run.model, engine, group=group, stop=stop))

    def sample(
        params: Params,
        rows: Sequence[settings.Row],
        index: Sequence[int],
        key: jax.Array,
        limits: Limits | None = None,
    ) -> Rollout:
        prompts = encode_prompts(
            context.tokenizer,
            [task.prompt(row) + task.prefill for row in rows],
            max_prompt=engine.max_prompt,
            index=index,
        )
        given = [] if limits is None else [limits]
        return generate(params, sharding.put(prompts, context.mesh, "batch"), key, *given)

    return sample
