r"""SimpleRL at its published size: PPO on 8K problems of MATH from Qwen2.5-Math-7B.

    python -m r1jax.train --config configs/simple_rl.py

The default is SimpleRL-Zero. Variants: `simple_rl` (8K long answers of QwQ are learned first) and
`zoo` (the later SimpleRL-Zoo: GRPO from Qwen2.5-7B).

Needs: models/Qwen2.5-Math-7B (`zoo`: models/Qwen2.5-7B); data/math_lv3to5_8k.jsonl with `question`,
`answer` and `verifier`; data/math500.jsonl; for `simple_rl` also data/qwq_8k.jsonl with `prompt`
and `answer`. The last was never released, nor was the code of its stage.

Hardware: 4 x 8 H100 of 80 GB, as published.

Hours: 36 published for 120 steps ("good by step 60"). By arithmetic, at most 24 * N * 8,192 * 4,024
FLOPs a rollout (N = 7.6e9; 2 N a token for each of sampling, old policy, reference and value, 8 N
for each of two updates that recompute activations): 6.0e18, 11 minutes at 30% of 32 x 989 TFLOP/s,
if all answers had the full length.

Published (README of branch v0, l. 30-39; AIME 2024, MATH-500, AMC, Minerva, OlympiadBench, mean):
    base                    16.7  52.4  52.5  12.9  16.4   30.2
    base + 8K MATH SFT       3.3  54.6  22.5  32.7  19.6   26.5
    Qwen2.5-Math-7B-Instruct 13.3 79.8  50.6  34.6  40.7   43.8
    SimpleRL-Zero           33.3  77.2  62.5  33.5  37.6   48.8
    SimpleRL                26.7  82.4  62.5  39.7  43.3   50.9
One problem of AIME is 3.3 points: its differences are noise in a single run.

Not yet run at this size.

Numbers: github.com/hkust-nlp/simpleRL-reason, branch v0,
train/examples/script/train_ppo_qwen_base_math_lv35_new.sh; for `zoo` the main branch,
train_grpo_math_tune_ray.sh and README. Not in them: slots, rows and the mesh, which are ours.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from r1jax.algos import advantages, critics, losses, weights
from r1jax.algos.kl import k1, k3
from r1jax.data import eval_sets
from r1jax.data.sources import jsonl
from r1jax.data.tokenizer import from_folder
from r1jax.models import heads
from r1jax.models.zoo import MODELS
from r1jax.rewards.math import accuracy
from r1jax.rewards.prose import observe
from r1jax.rewards.simple_rl import simple_rl as score
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
)
from r1jax.state import adamw

NUM_PROBLEMS = 8_000
PENALTY = {"lam": 0.95, "kl": k1, "kl_weight": 0.01}  # KL in the reward of each token


def config() -> Run:
    """SimpleRL-Zero: RL from the base."""
    return from_math_7b("simple_rl_zero", ppo())


def simple_rl() -> Run:
    """SimpleRL: long answers first, then the same RL."""
    return from_math_7b("simple_rl", long_answers(), ppo())


def from_math_7b(name: str, *stages: Supervised | Reinforce) -> Run:
    """A run from Qwen2.5-Math-7B, whose 4,096 positions hold 1,024 + 3,000 tokens."""
    folder = "models/Qwen2.5-Math-7B"
    return Run(
        name=name,
        model=replace(MODELS["qwen2.5-math-7b"], dtype="bfloat16", remat="layer"),
        tokenizer=partial(from_folder, folder),
        weights=folder,
        stages=stages,
        mesh=Mesh(data=1, fsdp=-1),
    )


def prompt(row: Mapping[str, Any]) -> str:
    """The template qwen25-math-cot."""
    return (
        f"<|im_start|>system\n{eval_sets.BOXED}<|im_end|>\n"
        f"<|im_start|>user\n{row['question']}<|im_end|>\n<|im_start|>assistant\n"
    )


TASK = Task(
    train=partial(jsonl, "data/math_lv3to5_8k.jsonl", need=("question", "answer")),
    test=partial(eval_sets.load, "math500", "data/math500.jsonl"),
    prompt=prompt,
    accuracy=accuracy,
    observe=observe,
)


def ppo() -> Reinforce:
    """PPO: 1,024 problems x 8 answers, in 64 updates of 128; 120 such steps.

    Reward: 1 right, -0.5 wrong, -1 without a box. The script also asks for 20 passes over the
    problems, which would be 156 steps.
    """
    return Reinforce(
        name="rl",
        task=TASK,
        steps=120,
        prompts=1024,
        group=8,
        engine=Engine(
            max_prompt=1024, max_new=3000, slots=1024, sampling=Sampling(temperature=0.6)
        ),
        reward=partial(score, accuracy=accuracy),
        advantage=partial(advantages.ppo, **PENALTY),
        loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2),
        weight=weights.sequence_mean,
        optimizer=partial(adamw, learning_rate=5e-7),
        critic=Critic(
            score=heads.values,
            leaves=heads.value_leaves,
            fill=critics.as_value,
            target=partial(advantages.value_targets, **PENALTY),
            loss=partial(critics.value_loss, clip=0.2),
            measure={"explained_variance": critics.explained_variance},
            optimizer=partial(adamw, learning_rate=9e-6),
        ),
        old="trainer",
        reward_workers=16,
        minibatches=64,
        row_length=4096,
        micro_rows=32,
        reference="start",
        evaluate_every=4,
        evaluate_rows=500,
        evaluate_sampling=Sampling(temperature=0.0),
        checkpoints=Checkpoints(every=4),
    )


def long_answers() -> Supervised:
    """SFT on 8K long answers. Its numbers are not published: rate, passes and rows are ours.

    An answer must fit the base's 4,096 positions, as the RL stage's answers do.
    """
    return Supervised(
        name="sft",
        source=partial(jsonl, "data/qwq_8k.jsonl", need=("prompt", "answer")),
        steps=3 * NUM_PROBLEMS // 64,  # 3 passes where a row is one long answer
        batch_rows=64,
        row_length=4096,
        micro_rows=32,
        loss=losses.cross_entropy,
        optimizer=partial(adamw, learning_rate=1e-5, warmup=10, final=0.1),
    )


def zoo() -> Run:
    """SimpleRL-Zoo's GRPO: right or wrong, KL of 1e-4 in the loss, answers of up to 8,192 tokens.

    Batch and length are those of the README (the script's defaults: 256 and 3,072). The number of
    steps is ours.
    """
    folder = "models/Qwen2.5-7B"
    stage = replace(
        ppo(),
        steps=120,
        engine=Engine(max_prompt=1024, max_new=8192, slots=1024),
        reward=accuracy,
        advantage=advantages.grpo,
        loss=partial(
            losses.policy_loss,
            clip_low=0.2,
            clip_high=0.2,
            kl=k3,
            kl_weight=1e-4,
            entropy_weight=0.001,
        ),
        weight=weights.token_mean,  # not published
        critic=None,
        minibatches=4,  # of 256 problems
        row_length=9216,
        evaluate_sampling=Sampling(temperature=1.0, top_p=0.95),
    )
    return Run(
        name="simple_rl_zoo",
        model=replace(MODELS["qwen2.5-7b"], dtype="bfloat16", remat="layer"),
        tokenizer=partial(from_folder, folder),
        weights=folder,
        stages=(stage,),
        mesh=Mesh(data=1, fsdp=-1),
    )
