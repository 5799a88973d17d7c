"""What the host finds out about answers: rewards, accuracy, and what is worth logging."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from r1jax import metrics, settings
from r1jax.loops.run import Scorer
from r1jax.rollout.answers import decode_answers
from r1jax.types import Rollout


@dataclass(frozen=True, kw_only=True)
class Scored:
    """What the host found out about the answers of a rollout, B of each."""

    answers: list[str]  # the prefill included
    reward: np.ndarray  # float32; nan: could not be judged
    parts: list[Mapping[str, float]]
    accuracy: list[float | None]
    seen: list[Mapping[str, float]]  # what `task.observe` counts


@dataclass(frozen=True, kw_only=True)
class Collected:
    """N rows, the rollout of their answers, what the host knows of them, and metrics."""

    rows: list[settings.Row]
    rollout: Rollout
    scored: Scored
    values: dict[str, float] = field(default_factory=dict)


def score_answers(
    task: settings.Task,
    tokenizer: Any,
    rollout: Rollout,
    rows: Sequence[settings.Row],
    scorer: Scorer,
) -> Scored:
    """Decodes and scores every answer of a rollout on the host; answer i is to rows[i // G].

    Rewards see the row with two fields more: `num_tokens` of the answer, and
    `group_num_tokens`, those of all answers to the row.
    """
    answers = [task.prefill + text for text in decode_answers(tokenizer, rollout)]
    lengths = rollout.answer_length.reshape(len(rows), -1).tolist()
    every = [
        {**row, "num_tokens": length, "group_num_tokens": group}
        for row, group in zip(rows, lengths, strict=True)
        for length in group
    ]
    judged = scorer.reward(every, answers)
    if scorer.accuracy is None:
        accuracy = list(scorer.each(task.accuracy, every, answers))
    else:
        accuracy = [scorer.accuracy(one) for one in judged]
    seen = scorer.each(task.observe, every, answers) if task.observe else [None] * len(answers)
    return Scored(
        answers=answers,
        reward=np.asarray([np.nan if r is None else r for r, _ in judged], np.float32),
        parts=[parts for _, parts in judged],
        accuracy=accuracy,
        seen=[{} if found is None else found for found in seen],
    )


def part_columns(
    parts: Sequence[Mapping[str, float]], names: Sequence[str]
) -> Float[np.ndarray, "B S"] | None:
    """The parts of each answer's reward, one column for each name; None without names.

    A part that could not be judged is nan.
    """
    if not names:
        return None
    return np.asarray([[one.get(name, np.nan) for name in names] for one in parts], np.float32)


def keep_groups(scored: Scored, kept: Bool[np.ndarray, " N"]) -> Scored:
    """What was found out about the answers to the prompts that are kept."""
    which = np.flatnonzero(np.repeat(kept, len(scored.answers) // len(kept)))
    return Scored(
        answers=[scored.answers[i] for i in which],
        reward=scored.reward[which],
        parts=[scored.parts[i] for i in which],
        accuracy=[scored.accuracy[i] for i in which],
        seen=[scored.seen[i] for i in which],
    )


def together(found: Sequence[Scored]) -> Scored:
    """All of these, one after another."""
    return Scored(
        answers=[x for one in found for x in one.answers],
        reward=np.concatenate([one.reward for one in found]),
        parts=[x for one in found for x in one.parts],
        accuracy=[x for one in found for x in one.accuracy],
        seen=[x for one in found for x in one.seen],
    )


def answer_means(rollout: Rollout, scored: Scored) -> dict[str, float]:
    """Accuracy, length, share cut off, and what was observed, each a mean over the answers.

    An answer that could not be judged has no part in the accuracy, which is nan if none could.
    """
    right = [a for a in scored.accuracy if a is not None]
    return {
        "accuracy": float(np.mean(right)) if right else math.nan,
        "length": float(rollout.answer_length.mean()),
        "cut": float(1 - rollout.finished.mean()),
        **means(scored.seen),
    }


def given_up_since(before: Mapping[str, int], scorer: Scorer) -> dict[str, float]:
    """How many values were given up since `before`, by why."""
    return {name: float(count - before[name]) for name, count in scorer.given_up().items()}


def means(records: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each name's mean over the records that have it."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        for name, value in record.items():
            found[name].append(value)
    return {name: float(np.mean(values)) for name, values in found.items()}


def log_samples(
    stage: str,
    task: settings.Task,
    writer: metrics.Writer,
    found: Collected,
    *,
    step: int,
    split: str,
    count: int,
) -> None:
    """Writes the first `count` answers to samples.jsonl, prompts and scores with them."""
    rows, rollout, scored = found.rows, found.rollout, found.scored
    group = len(scored.answers) // len(rows)
    writer.samples(
        stage,
        step,
        [
            {
                "split": split,
                "row": rows[i // group],
                "prompt": task.prompt(rows[i // group]),
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
