"""Every kind of stage in the smallest sizes.

A base, a data set sampled from it, SFT on it, a reward model, RL with it, a table.

SFT begins with the base again, RL with problems that the base got right now and then. After the
base, stages train adapters alone.
"""

from dataclasses import replace
from functools import partial

from r1jax.algos.advantages import by_source
from r1jax.algos.kl import k3
from r1jax.algos.losses import cross_entropy, policy_loss
from r1jax.algos.preferences import pairwise_loss
from r1jax.algos.weights import sequence_mean, token_mean
from r1jax.data import countdown, labelled, passes
from r1jax.data.duplicates import decontaminate, distinct
from r1jax.data.filters import right
from r1jax.data.tokenizer import tiny
from r1jax.models import heads
from r1jax.reward_model import RewardModel, scores
from r1jax.rewards.weighted import Batched, weighted
from r1jax.schedules import Adaptive
from r1jax.settings import (
    Build,
    Built,
    Checkpoints,
    Compare,
    Engine,
    Evaluation,
    Head,
    Lora,
    Reinforce,
    Run,
    Sampled,
    Supervised,
    Task,
    dense,
)
from r1jax.state import adamw

WORLD = {"counts": (3,), "low": 1, "high": 20, "operators": "+-"}
ENGINE = Engine(max_prompt=8, max_new=16, slots=4)


def even(row, answer):
    """Right about half of the time by chance, so that tests have rows of both kinds."""
    return float(len(answer.split()) % 2 == 0)


def short(row, answer):
    """A measure that is for problems with a small target only."""
    return float(len(answer) < 20) if row["target"] < 20 else None


def pairs():
    """Answers with a 1 are better than those with a 2."""
    prompts = [countdown.short_prompt(row) for row in countdown.rows("train", num=9, seed=3)]
    return [{"prompt": prompt, "chosen": " 1", "rejected": " 2"} for prompt in prompts]


def config() -> Run:
    held_out = partial(countdown.rows, "test", num=9, seed=2, **WORLD)
    task = Task(train=list, test=held_out, prompt=countdown.short_prompt, accuracy=even)
    base = Supervised(
        name="base",
        source=partial(countdown.attempts_rows, 50, seed=0, max_attempts=1, **WORLD),
        steps=3,
        batch_rows=4,
        row_length=32,
        micro_rows=4,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=1e-3),
        checkpoints=Checkpoints(every=1),
        log_every=1,
    )
    sampled = Build(
        name="sampled",
        source=partial(countdown.rows, "train", num=24, seed=1, **WORLD),
        prompt=countdown.short_prompt,
        answers=Sampled(engine=ENGINE),
        samples=2,
        accuracy=even,
        at_once=4,
        passes={
            "wrong": partial(passes.keep, where=right),
            "duplicates": distinct,
            "contaminated": partial(decontaminate, against=(held_out,), size=4),
        },
    )
    chosen = Build(
        name="chosen",
        source=Built(stage="sampled"),
        passes={"problems": passes.problems},
    )
    return Run(
        name="pipeline",
        model=dense(vocab_size=128, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16),
        tokenizer=tiny,
        stages=(
            base,
            sampled,
            Supervised(
                name="sft",
                begin="base",
                source=Built(stage="sampled"),
                steps=3,
                batch_rows=4,
                row_length=32,
                micro_rows=4,
                loss=cross_entropy,
                optimizer=partial(adamw, learning_rate=1e-3),
                lora=Lora(rank=2, scale=2.0),
                evaluation=Evaluation(task=task, engine=ENGINE, rows=8, every=2),
                checkpoints=Checkpoints(every=1),
                log_every=1,
            ),
            chosen,
            Supervised(
                name="judge",
                begin="base",
                source=pairs,
                texts=labelled.pairs,
                steps=3,
                batch_rows=4,
                row_length=32,
                micro_rows=4,
                loss=pairwise_loss,
                weight=sequence_mean,
                head=Head(score=heads.rewards, leaves=heads.reward_leaves),
                optimizer=partial(adamw, learning_rate=1e-3),
                lora=Lora(rank=1),
                checkpoints=Checkpoints(every=1),
                log_every=1,
            ),
            Reinforce(
                name="rl",
                begin="sft",
                task=replace(task, train=Built(stage="chosen")),
                order="given",
                steps=3,
                prompts=4,
                group=2,
                engine=ENGINE,
                reward=weighted(
                    even=(1.0, even),
                    judge=(
                        0.1,
                        Batched(
                            partial(
                                scores,
                                model=RewardModel(stage="judge"),
                                prompt=countdown.short_prompt,
                            )
                        ),
                    ),
                ),
                advantage=partial(by_source, weight=(1.0, 0.1)),
                loss=partial(
                    policy_loss,
                    clip_low=0.2,
                    clip_high=0.2,
                    kl=k3,
                    kl_weight=Adaptive(first=0.1, target=0.001),
                ),
                weight=token_mean,
                optimizer=partial(adamw, learning_rate=1e-2),
                lora=Lora(rank=2, targets=("qkv", "out", "down")),
                reference="start",
                row_length=32,
                micro_rows=4,
                evaluate_every=3,
                evaluate_rows=8,
                checkpoints=Checkpoints(every=1),
            ),
            Compare(
                name="table",
                models={"before": "base", "after": "rl"},
                source=held_out,
                prompt=countdown.short_prompt,
                engine=ENGINE,
                samples=2,
                measures={"even": even, "short": short},
            ),
        ),
    )
