"""TinyZero: Countdown from a base, by PPO with a rule reward. At its published size, and tiny.

    python -m r1jax.train --config configs/tiny_zero.py

The default is Qwen2.5-3B with PPO, the run that is best known. Variants, `tiny_zero.py:qwen_7b`:
`qwen_05b`, `qwen_15b`, `qwen_7b` (other sizes), `instruct` (the instruction-tuned 3B, with its chat
template), `grpo` and `prime` (3B, other algorithms).

Needs: models/Qwen2.5-3B (and so on), folders from a hub; data/countdown.parquet, the training file
of the data set Jiayi-Pan/Countdown-Tasks-3to4, with the columns `nums` and `target`.

Hardware: 1 GPU up to 1.5B, 2 for 3B, as published; of which kind is not, here of 80 GB. For 7B 4
(ours). By `--check` with these numbers each holds 22 GB (0.5B), 63 (1.5B), 60 (3B) and 77 (7B) in
PPO.

Hours, an estimate: a rollout costs at most 24 * N * 256 * 1,280 FLOPs (N weights; 2 N a token for
each of sampling, old policy, reference and value, 8 N for each of two updates that recompute
activations), which is 2.4e16 for 3B: 41 s on 2 H100 at 30% of 989 TFLOP/s. All 19,200 rollouts, 15
epochs, would be 220 hours if all answers had the full length. Published: the moment can be seen
"for < $30". Of hours and of a GPU's price nothing is published, so `price` is not set.

Published: 3B and more learn to search and to verify; 0.5B "fails to learn reasoning" (README of
github.com/Jiayi-Pan/TinyZero). No accuracies are published there.

Not yet run at this size.

Tiny, from random weights on two CPU cores, a few minutes each: `tiny_16`, `tiny_32`, `tiny_64` and
`tiny`, which differ in their width alone, `tiny_instruct`, and `tiny_grpo` and `tiny_prime`.

    python -m r1jax.train --config configs/tiny_zero.py:tiny_16
    python -m r1jax.train --config configs/tiny_zero.py:tiny_instruct --after runs/tiny_zero_tiny
    python -m r1jax.report runs/tiny_zero_tiny*

They are to show that accuracy rises with size and the smallest only guesses, that the base and an
instruction-tuned model end close, and PPO, GRPO and PRIME too. BENCHMARKS.md has what came of it:
all but that PRIME, which ends close in `countdown_tiny.py`, ends lower with the few answers to a
problem here.

Source of all published numbers: scripts/train_tiny_zero.sh, verl/trainer/config/ppo_trainer.yaml,
verl/workers/fsdp_workers.py (AdamW) and examples/data_preprocess/countdown.py of that repository.
It has no script for GRPO and PRIME. Ours: workers, slots, rows at a time, and that a held-out
problem is answered greedily.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from r1jax.algos import advantages, critics, losses, selection, weights
from r1jax.algos.kl import k1, k3
from r1jax.data import countdown, eval_sets
from r1jax.data.sources import LazyRows
from r1jax.data.tokenizer import from_folder
from r1jax.data.tokenizer import tiny as tiny_tokenizer
from r1jax.models import heads
from r1jax.models.zoo import MODELS
from r1jax.rewards import countdown as countdown_rewards
from r1jax.rewards.countdown import accuracy, answer_key, tiny_zero
from r1jax.rewards.prose import observe
from r1jax.settings import (
    Checkpoints,
    Critic,
    Engine,
    Mesh,
    Reinforce,
    Run,
    Sampling,
    Supervised,
    Task,
    dense,
)
from r1jax.state import adamw

DATA = "data/countdown.parquet"
TRAIN, TEST = 327_680, 1_024  # rows
PROMPTS, EPOCHS = 256, 15

PENALTY = {"kl": k1, "kl_weight": 0.001}  # in the reward of each token
ADAMW = {"b2": 0.999, "weight_decay": 0.01}  # of its trainer


def config() -> Run:
    """PPO from Qwen2.5-3B."""
    return qwen("3B", name="tiny_zero")


def qwen_05b() -> Run:
    """The smallest: it only guesses."""
    return qwen("0.5B", name="tiny_zero_05b")


def qwen_15b() -> Run:
    """PPO from Qwen2.5-1.5B."""
    return qwen("1.5B", name="tiny_zero_15b")


def qwen_7b() -> Run:
    """PPO from Qwen2.5-7B."""
    return qwen("7B", name="tiny_zero_7b")


def qwen(size: str, *, name: str, stage: Reinforce | None = None, tuned: str = "") -> Run:
    """A run from one size of Qwen2.5; `tuned` is the end of the folder's name."""
    folder = f"models/Qwen2.5-{size}{tuned}"
    return Run(
        name=name,
        model=replace(MODELS[f"qwen2.5-{size.lower()}"], dtype="bfloat16", remat="layer"),
        tokenizer=partial(from_folder, folder),
        weights=folder,
        stages=(stage or ppo(),),
        mesh=Mesh(data=1, fsdp=-1),
    )


# --------------------------------------------------------------------------- problems


def problems(first: int, last: int) -> Sequence[dict[str, Any]]:
    """Rows of the published file, from `first` up to, not including, `last`."""
    return eval_sets.load("countdown", DATA)[first:last]


def chat_prompt(row: Mapping[str, Any]) -> str:
    """The prompt for instruction-tuned models, as published."""
    asked = eval_sets.SETS["countdown"].prompt(row)
    return (
        "<|im_start|>system\nYou are a helpful assistant. You first thinks about the reasoning "
        "process in the mind and then provides the user with the answer.<|im_end|>\n"
        f"<|im_start|>user\n {asked}<|im_end|>\n<|im_start|>assistant\n"
    )


TASK = Task(
    train=partial(problems, 0, TRAIN),
    test=partial(problems, TRAIN, TRAIN + TEST),
    prompt=countdown.tiny_zero_prompt,
    prefill=countdown.TINY_ZERO_PREFILL,
    accuracy=accuracy,
    observe=observe,
    vote=answer_key,
)


# --------------------------------------------------------------------------- algorithms


def ppo() -> Reinforce:
    """PPO with a value network: one answer to each of 256 problems, 4 updates.

    In earlier versions of the script an update was of 128 answers, not of 64.
    """
    return Reinforce(
        name="rl",
        task=TASK,
        steps=EPOCHS * TRAIN // PROMPTS,
        prompts=PROMPTS,
        group=1,
        engine=Engine(max_prompt=256, max_new=1024, slots=256),
        reward=tiny_zero,
        advantage=partial(advantages.ppo, **PENALTY),
        loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2, entropy_weight=0.001),
        weight=weights.token_mean,
        optimizer=partial(adamw, learning_rate=1e-6, **ADAMW),
        critic=Critic(
            score=heads.values,
            leaves=heads.value_leaves,
            fill=critics.as_value,
            target=partial(advantages.value_targets, **PENALTY),
            loss=partial(critics.value_loss, clip=0.5),
            measure={"explained_variance": critics.explained_variance},
            optimizer=partial(adamw, learning_rate=1e-5, **ADAMW),
        ),
        old="trainer",
        reward_workers=8,
        minibatches=4,
        row_length=1280,
        micro_rows=8,
        reference="start",
        evaluate_every=100,
        evaluate_rows=TEST,
        evaluate_sampling=Sampling(temperature=0.0),  # ours; not in the script
        checkpoints=Checkpoints(every=100),
    )


def instruct() -> Run:
    """The same from Qwen2.5-3B-Instruct: the README's ablation."""
    prefill = countdown.TINY_ZERO_PREFILL.removeprefix(" ")
    stage = replace(ppo(), task=replace(TASK, prompt=chat_prompt, prefill=prefill))
    return qwen("3B", name="tiny_zero_instruct", stage=stage, tuned="-Instruct")


def grpo() -> Run:
    """GRPO with as many answers in a rollout. Published are clip, KL and rates, as PPO's; the four
    answers to a problem are ours."""
    stage = replace(by_grpo(ppo()), steps=EPOCHS * TRAIN // 64)
    return qwen("3B", name="tiny_zero_grpo", stage=stage)


def by_grpo(stage: Reinforce) -> Reinforce:
    """A stage of PPO by GRPO: four answers to a problem, as many in all."""
    return replace(
        stage,
        prompts=stage.prompts // 4,
        group=4,
        advantage=advantages.grpo,
        loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2, kl=k3, kl_weight=0.001),
        weight=weights.sequence_mean,
        critic=None,
    )


def prime() -> Run:
    """PRIME with the numbers of its own script (training/examples/run_prime_main.sh of
    github.com/PRIME-RL/PRIME) but for the batch, which is TinyZero's. It is told right or wrong:
    an outcome of 0.1 for a form would be a lesson in forms."""
    second = partial(adamw, learning_rate=1e-6, max_grad_norm=10.0, **ADAMW)
    stage = replace(
        by_prime(ppo(), optimizer=second),
        steps=EPOCHS * TRAIN // 64,
        optimizer=partial(adamw, learning_rate=5e-7, **ADAMW),
    )
    return qwen("3B", name="tiny_zero_prime", stage=stage)


def by_prime(stage: Reinforce, *, optimizer: Callable[..., Any]) -> Reinforce:
    """A stage of PPO by PRIME, whose process reward model learns with `optimizer`."""
    return replace(
        stage,
        prompts=stage.prompts // 4,
        group=4,
        reward=accuracy,
        # 5 is its rm_coef; leave-one-out for each source, returns with gamma 1, whitened.
        advantage=partial(advantages.prime, process_weight=5.0),
        loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2),
        reference="none",
        select=partial(selection.within_band, low=0.2, high=0.8),
        rounds=2,  # ours: its script asks for more prompts than it keeps
        minibatches=1,
        critic=Critic(
            score=heads.logps,
            fill=partial(critics.as_process, beta=0.05),
            target=critics.outcomes,
            loss=partial(critics.implicit_prm_loss, beta=0.05),
            weight=weights.sequence_mean,
            optimizer=optimizer,
            reference=True,
        ),
    )


# --------------------------------------------------------------------------- tiny

WORLD = {"counts": (3,), "low": 1, "high": 20, "operators": "+-"}
ATTEMPTS = partial(countdown.attempts_rows, **WORLD, persistent=0.15, max_attempts=7)


def tiny() -> Run:
    """The largest of the tiny ones: 0.37M weights."""
    return of_width(96, name="tiny_zero_tiny")


def tiny_64() -> Run:
    """0.17M weights."""
    return of_width(64, name="tiny_zero_tiny_64")


def tiny_32() -> Run:
    """0.04M weights."""
    return of_width(32, name="tiny_zero_tiny_32")


def tiny_16() -> Run:
    """0.01M weights."""
    return of_width(16, name="tiny_zero_tiny_16")


def tiny_instruct() -> Run:
    """The largest, which first learns to be asked in another way and to answer always."""
    run, stage = tiny(), tiny_ppo()
    sft = replace(
        tiny_base(),
        name="sft",
        source=instructed_rows,
        steps=60,
        optimizer=partial(adamw, learning_rate=5e-4, warmup=5, final=0.1),
    )
    rl = replace(stage, task=replace(stage.task, prompt=instructed_prompt))
    return replace(run, name="tiny_zero_tiny_instruct", stages=(tiny_base(), sft, rl))


def tiny_grpo() -> Run:
    """The largest by GRPO."""
    return replace(tiny(), name="tiny_zero_tiny_grpo", stages=(tiny_base(), by_grpo(tiny_ppo())))


def tiny_prime() -> Run:
    """The largest by PRIME, its process rewards with the weight of the outcome: with the published
    five times that it collapses here (BENCHMARKS.md)."""
    stage = by_prime(tiny_ppo(), optimizer=partial(adamw, learning_rate=2e-4, warmup=5))
    stage = replace(stage, advantage=advantages.prime)
    return replace(tiny(), name="tiny_zero_tiny_prime", stages=(tiny_base(), stage))


def of_width(width: int, *, name: str) -> Run:
    """Three layers of a width, heads of 16: texts that give up too early, then PPO."""
    return Run(
        name=name,
        model=dense(
            vocab_size=128,
            dim=width,
            num_layers=3,
            num_heads=width // 16,
            num_kv_heads=width // 16,
            mlp_dim=3 * width,
            bias=True,
            scan=False,
            sums="float64",
        ),
        tokenizer=tiny_tokenizer,
        stages=(tiny_base(), tiny_ppo()),
    )


def tiny_base() -> Supervised:
    """Pretraining."""
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


def tiny_ppo() -> Reinforce:
    """The published PPO with larger rates, one update to a rollout."""
    stage = ppo()
    assert stage.critic is not None
    return replace(
        stage,
        task=Task(
            train=partial(countdown.rows, "train", num=200_000, seed=1, **WORLD),
            test=partial(countdown.rows, "test", num=512, seed=2, **WORLD),
            prompt=countdown.short_prompt,
            accuracy=accuracy,
            observe=countdown_rewards.observe,
            vote=answer_key,
        ),
        steps=60,
        engine=Engine(max_prompt=8, max_new=88, slots=64),
        optimizer=partial(adamw, learning_rate=1e-4, warmup=5),
        critic=replace(
            stage.critic, optimizer=partial(adamw, learning_rate=5e-4, warmup=5), warmup=4
        ),
        old="sampler",
        reward_workers=0,
        minibatches=1,
        row_length=96,
        evaluate_every=20,
        evaluate_rows=512,
        evaluate_sampling=Sampling(),
        checkpoints=Checkpoints(every=20),
    )


def instructed_prompt(row: Mapping[str, Any]) -> str:
    """The prompt as a request, which ends with a full stop."""
    return f"{countdown.short_prompt(row)} ."


def instructed_rows() -> LazyRows:
    """Texts that try somewhat longer than the base's, and then answer with what they have."""
    rows = ATTEMPTS(20_000, seed=3, give_up=0.6)
    return LazyRows(len(rows), lambda i: instructed(rows[i]))


def instructed(row: Mapping[str, Any]) -> dict[str, Any]:
    """A text of the base as an instruction-tuned model would have it: the last attempt is the
    answer where the base gives up."""
    thought, gave_up, _ = row["answer"].partition(" give up </think>")
    if not gave_up:
        return {"prompt": f"{row['prompt']} .", "answer": row["answer"]}
    *_, last = thought.removesuffix(" no .").split(" no .")
    first, *steps = last.removeprefix(" <think>").split()
    # Each step is a sign, a number, an equals sign and the result.
    shown = [first, *(word for k, word in enumerate(steps) if k % 4 < 2)]
    answer = f"{thought} </think> <answer> {' '.join(shown)} </answer>"
    return {"prompt": f"{row['prompt']} .", "answer": answer}
