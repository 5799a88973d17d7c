"""The background of R1, in small: SFT, a reward model of few preferences, and PPO against it.

    python -m r1jax.train --config configs/rlhf.py  (perhaps --after runs/tiny_zero_tiny_64)
    python -m r1jax.train --config configs/rlhf.py:free --after runs/rlhf
    python -m r1jax.train --config configs/rlhf.py:iterated --after runs/rlhf
    python -m r1jax.evaluate.pairs runs/rlhf runs/rlhf/data/held_out/rows.jsonl --stage reward
    python -m r1jax.evaluate.wins runs/rlhf runs/rlhf_free --part truth
    python -m r1jax.evaluate.wins runs/rlhf_iterated --stage ppo_again --part truth

From random weights on two CPU cores, in some five to twenty minutes each. There is no full size
here: InstructGPT published neither its data nor its models, and nothing is invented.

The world: problems of Countdown, and a reader who likes a right answer best, none next, and a wrong
claim least (`rewards.countdown.honesty`). The base is that of `tiny_zero.py:tiny_64`, which gives
up early; SFT is on texts that do so a little less. Wrong claims are rare in them. Answers of that
model to some hundred problems are compared by the reader's rule; a reward model learns the pairs;
PPO then has the reward model alone, with a KL penalty (`config`) or without (`free`); `iterated`
makes pairs, a reward model and a policy once more, with answers of the first policy compared too.

It is to show: how often the reward model agrees with the reader on pairs that it has not seen; that
PPO's answers are preferred to those of the SFT model; and that the reward model is a measure that
can be fooled: without the penalty its score goes on rising while the reader's falls, with it less.
BENCHMARKS.md has what came of it, with other weights of the penalty too.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from r1jax.algos import advantages, critics, losses, preferences, weights
from r1jax.algos.kl import k1
from r1jax.data import countdown, labelled, passes
from r1jax.data.tokenizer import tiny
from r1jax.models import heads
from r1jax.reward_model import RewardModel, scores
from r1jax.rewards.countdown import accuracy, answer_key, honesty, observe
from r1jax.rewards.weighted import Batched, weighted
from r1jax.settings import (
    Build,
    Built,
    Checkpoints,
    Critic,
    Engine,
    Head,
    Reinforce,
    Run,
    Sampled,
    Supervised,
    Task,
    dense,
)
from r1jax.state import adamw

WORLD = {"counts": (3,), "low": 1, "high": 20, "operators": "+-"}
ATTEMPTS = partial(countdown.attempts_rows, **WORLD, persistent=0.15, max_attempts=7)
KL = 0.3  # of a nat, in units of the reward model's score
ENGINE = Engine(max_prompt=8, max_new=88, slots=64)


def config() -> Run:
    """Base, SFT, pairs, reward model, PPO with a KL penalty."""
    return Run(
        name="rlhf",
        model=dense(
            vocab_size=128,
            dim=64,
            num_layers=3,
            num_heads=4,
            num_kv_heads=4,
            mlp_dim=192,
            bias=True,
            scan=False,
            sums="float64",
        ),
        tokenizer=tiny,
        stages=(
            base(),
            sft(),
            compared("pairs", partial(countdown.rows, "train", num=400, seed=5, **WORLD)),
            compared("held_out", partial(countdown.rows, "test", num=400, seed=6, **WORLD)),
            reward(),
            ppo(KL),
        ),
    )


def free() -> Run:
    """The same without the penalty."""
    run = config()
    return replace(run, name="rlhf_free", stages=(*run.stages[:-1], ppo(0.0)))


def iterated() -> Run:
    """A second round: answers of the first one's policy are compared too, and PPO begins anew.

    As in Llama 2 (arXiv:2307.09288) and in Anthropic's online RLHF (arXiv:2204.05862): preferences
    are collected anew where the policy has gone.
    """
    run = config()
    problems = partial(countdown.rows, "train", num=400, seed=7, **WORLD)
    again = compared("pairs_again", problems, of="ppo", others=Built(stage="pairs"))
    rounds = again, reward("reward_again", "pairs_again"), ppo(KL, "ppo_again", "reward_again")
    return replace(run, name="rlhf_iterated", stages=(*run.stages, *rounds))


def base() -> Supervised:
    """Pretraining on texts that compute and judge well but give up too early."""
    return Supervised(
        name="base",
        source=partial(ATTEMPTS, 400_000, seed=0, give_up=0.85),
        steps=1200,
        batch_rows=32,
        row_length=96,
        micro_rows=8,
        loss=losses.cross_entropy,
        optimizer=partial(adamw, learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        checkpoints=Checkpoints(every=400),
    )


def sft() -> Supervised:
    """Demonstrations: texts that give up somewhat later."""
    return replace(
        base(),
        name="sft",
        source=partial(ATTEMPTS, 2_000, seed=3, give_up=0.7),
        steps=40,
        optimizer=partial(adamw, learning_rate=3e-4, warmup=5, final=0.1),
    )


def compared(name: str, problems: Any, *, of: str = "sft", others: Built | None = None) -> Build:
    """Four answers of a stage's model to each problem; the best and the worst are a pair.

    With `others`, as many of another stage's pairs are mixed in.
    """
    steps = {"pairs": partial(passes.pairs, reward=honesty)}
    if others:
        steps["others"] = partial(passes.mix, others=others, ratio=(1, 1))
    return Build(
        name=name,
        source=problems,
        prompt=countdown.short_prompt,
        answers=Sampled(engine=ENGINE, stage=of),
        samples=4,
        accuracy=accuracy,
        passes=steps,
        at_once=200,
    )


def reward(name: str = "reward", pairs: str = "pairs") -> Supervised:
    """The reward model: the SFT model with a head."""
    return Supervised(
        name=name,
        begin="sft",
        source=Built(stage=pairs),
        texts=labelled.pairs,
        steps=60,
        batch_rows=8,
        row_length=192,  # both answers of a pair lie in one row
        micro_rows=4,
        loss=preferences.pairwise_loss,
        weight=weights.sequence_mean,
        head=Head(score=heads.rewards, leaves=heads.reward_leaves),
        optimizer=partial(adamw, learning_rate=3e-4, warmup=5),
        checkpoints=Checkpoints(every=60),
    )


def ppo(kl_weight: float, name: str = "ppo", model: str = "reward") -> Reinforce:
    """PPO with the reward model's score; the reader's is only logged."""
    penalty = {"kl": k1, "kl_weight": kl_weight} if kl_weight else {}
    asked = partial(scores, model=RewardModel(stage=model), prompt=countdown.short_prompt)
    return Reinforce(
        name=name,
        begin="sft",
        task=Task(
            train=partial(countdown.rows, "train", num=200_000, seed=1, **WORLD),
            test=partial(countdown.rows, "test", num=512, seed=2, **WORLD),
            prompt=countdown.short_prompt,
            accuracy=accuracy,
            observe=read,
            vote=answer_key,
        ),
        steps=60,
        prompts=64,
        group=4,
        engine=ENGINE,
        reward=weighted(score=(1.0, Batched(asked)), truth=(0.0, honesty)),
        advantage=partial(advantages.ppo, **penalty),
        loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2),
        weight=weights.token_mean,
        optimizer=partial(adamw, learning_rate=1e-4, warmup=5),
        critic=Critic(
            score=heads.values,
            leaves=heads.value_leaves,
            fill=critics.as_value,
            target=partial(advantages.value_targets, **penalty),
            loss=partial(critics.value_loss, clip=0.5),
            measure={"explained_variance": critics.explained_variance},
            optimizer=partial(adamw, learning_rate=5e-4, warmup=5),
            warmup=4,
        ),
        row_length=96,
        micro_rows=8,
        reference="start",
        evaluate_every=20,
        evaluate_rows=512,
        checkpoints=Checkpoints(every=20),
    )


def read(row: Mapping[str, Any], answer: str) -> dict[str, float]:
    """How the answer was searched for, and what the reader thinks of it."""
    return {**observe(row, answer), "truth": honesty(row, answer)}
