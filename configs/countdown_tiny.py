"""R1-Zero on a laptop: Countdown with three numbers, from random weights, on two CPU cores.

    make train          or: python -m r1jax.train --config configs/countdown_tiny.py

A base of 0.35M weights is pretrained on text that tries, fails and gives up too early. Then GRPO
with a rule reward, and nothing else, teaches it to go on searching.
"""

from functools import partial

from r1jax.algos.advantages import grpo
from r1jax.algos.losses import cross_entropy, policy_loss
from r1jax.algos.weights import token_mean
from r1jax.data import countdown
from r1jax.data.tokenizer import tiny
from r1jax.rewards.countdown import accuracy, answer_key, observe
from r1jax.settings import Checkpoints, Engine, Reinforce, Run, Supervised, Task, dense
from r1jax.state import adamw

WORLD = {"counts": (3,), "low": 1, "high": 20, "operators": "+-"}


def config() -> Run:
    """The base, then GRPO."""
    return Run(
        name="countdown_tiny",
        model=dense(
            vocab_size=128,
            dim=96,
            num_layers=3,
            num_heads=4,
            num_kv_heads=4,
            mlp_dim=256,
            bias=True,
            scan=False,
            sums="float64",
        ),
        tokenizer=tiny,
        stages=(base(), rl()),
    )


def base() -> Supervised:
    """Pretraining on texts that compute and judge well but give up too early."""
    return Supervised(
        name="base",
        source=partial(
            countdown.attempts_rows,
            400_000,
            seed=0,
            **WORLD,
            give_up=0.85,
            persistent=0.15,
            max_attempts=11,
        ),
        steps=1200,
        batch_rows=32,
        row_length=144,
        micro_rows=8,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        on_prompt=False,
        checkpoints=Checkpoints(every=200),
    )


def rl() -> Reinforce:
    """GRPO with the accuracy reward alone."""
    return Reinforce(
        name="rl",
        task=Task(
            train=partial(countdown.rows, "train", num=200_000, seed=1, **WORLD),
            test=partial(countdown.rows, "test", num=512, seed=2, **WORLD),
            prompt=countdown.short_prompt,
            accuracy=accuracy,
            observe=observe,
            vote=answer_key,
        ),
        steps=80,
        prompts=32,
        group=8,
        engine=Engine(max_prompt=8, max_new=136, slots=64),
        reward=accuracy,
        advantage=grpo,
        loss=partial(policy_loss, clip_low=0.2, clip_high=0.28),
        weight=token_mean,
        optimizer=partial(adamw, learning_rate=1e-4, warmup=5),
        row_length=144,
        micro_rows=8,
        reference="start",  # for the KL in the log: the loss does not use it
        evaluate_every=20,
        evaluate_rows=512,
        checkpoints=Checkpoints(every=20),
    )
