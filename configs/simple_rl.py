r"""SimpleRL: PPO on 8K problems of MATH from Qwen2.5-Math-7B. At its published size, and tiny.

    python -m r1jax.train --config configs/simple_rl.py

The default is SimpleRL-Zero. Variants: `simple_rl` (8K long answers of QwQ are learned first) and
`zoo` (the later SimpleRL-Zoo: GRPO from Qwen2.5-7B).

Needs: models/Qwen2.5-Math-7B (`zoo`: models/Qwen2.5-7B); data/math_lv3to5_8k.jsonl with `question`,
`answer` and `verifier`; data/math500.jsonl; for `simple_rl` also data/qwq_8k.jsonl with `prompt`
and `answer`. The last was never released, nor was the code of its stage.

Hardware: 4 x 8 H100 of 80 GB, as published (`--check 32`: 31 GB on each); `zoo` 2 x 8 (60 GB).

Hours: 36 published for 120 steps ("good by step 60"), so 47 for all 156; `zoo` about 15 for some
100 steps. No price is published. By arithmetic, at most 24 * N * 8,192 * 4,024 FLOPs a rollout (N =
7.6e9; 2 N a token for each of sampling, old policy, reference and value, 8 N for each of two
updates that recompute activations): 6.0e18, 11 minutes at 30% of 32 x 989 TFLOP/s, if all answers
had the full length.

Published (README of branch v0, l. 30-39; AIME 2024, MATH-500, AMC, Minerva, OlympiadBench, mean):
    base                    16.7  52.4  52.5  12.9  16.4   30.2
    base + 8K MATH SFT       3.3  54.6  22.5  32.7  19.6   26.5
    Qwen2.5-Math-7B-Instruct 13.3 79.8  50.6  34.6  40.7   43.8
    SimpleRL-Zero           33.3  77.2  62.5  33.5  37.6   48.8
    SimpleRL                26.7  82.4  62.5  39.7  43.3   50.9
One problem of AIME is 3.3 points: its differences are noise in a single run. SimpleRL-Zoo (README
of the main branch; GSM8K, MATH-500, Minerva, OlympiadBench, AIME 2024, AMC, mean):
    Qwen2.5-7B              88.2  64.6  25.7  30.1   3.3  30.0  40.3
    SimpleRL-Zoo            91.7  78.2  38.6  40.4  20.0  62.5  55.2

Not yet run at this size.

Tiny, from random weights on two CPU cores, a few minutes each:

    python -m r1jax.train --config configs/simple_rl.py:tiny
    python -m r1jax.train --config configs/simple_rl.py:tiny_long --after runs/simple_rl_tiny
    python -m r1jax.report runs/simple_rl_tiny runs/simple_rl_tiny_long

The base searches in words, or writes a program that nobody runs; the second variant learns long
searches before the same RL. They are to show that length falls, as programs go, and then rises, as
searches get longer, and that the warm start ends higher. The log has the share of answers with code
(`code_answers`) and the length of the others (`text_only_length`) apart. BENCHMARKS.md has what
came of it: the warm start ends higher in six runs of six; length falls first in some.

Published numbers: github.com/hkust-nlp/simpleRL-reason, branch v0,
train/examples/script/train_ppo_qwen_base_math_lv35_new.sh, with openrlhf/cli/train_ppo_ray_box.py
and openrlhf/trainer/ray/ppo_actor.py for what it leaves to defaults; for `zoo` the main branch,
train_grpo_math_tune_ray.sh and README. Not in them, and ours: slots, workers, rows, the mesh, and
how a held-out problem of v0 is answered (greedily). Not done: the script's normalising of rewards
(advantages are whitened), and the 16,000 tokens that `zoo` is evaluated with (8,192 here).
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from r1jax.algos import advantages, critics, losses, weights
from r1jax.algos.kl import k1, k3
from r1jax.data import countdown, eval_sets
from r1jax.data.sources import LazyRows, jsonl
from r1jax.data.tokenizer import WORDS, from_folder
from r1jax.data.tokenizer import tiny as tiny_tokenizer
from r1jax.models import heads
from r1jax.models.zoo import MODELS
from r1jax.rewards import countdown as countdown_rewards
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
    dense,
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


def zoo_prompt(row: Mapping[str, Any]) -> str:
    """The template qwen-boxed."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{row['question']}\n{eval_sets.BOXED}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def ppo() -> Reinforce:
    """PPO: 1,024 problems x 8 answers, in 64 updates of 128; 20 passes over the problems.

    Reward: 1 right, -0.5 wrong, -1 without a box. The authors stopped after 120 of these steps. The
    rates go along a cosine to a tenth, after a warm-up of 3% of all updates.
    """
    steps = 20 * NUM_PROBLEMS // 1024
    schedule = {"warmup": 3 * 64 * steps // 100, "final": 0.1}
    return Reinforce(
        name="rl",
        task=TASK,
        steps=steps,
        prompts=1024,
        group=8,
        engine=Engine(
            max_prompt=1024, max_new=3000, slots=1024, sampling=Sampling(temperature=0.6)
        ),
        reward=partial(score, accuracy=accuracy),
        advantage=partial(advantages.ppo, **PENALTY),
        loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2),
        weight=weights.sequence_mean,
        optimizer=partial(adamw, learning_rate=5e-7, **schedule),
        critic=Critic(
            score=heads.values,
            leaves=heads.value_leaves,
            fill=critics.as_value,
            target=partial(advantages.value_targets, **PENALTY),
            loss=partial(critics.value_loss, clip=0.2),
            measure={"explained_variance": critics.explained_variance},
            optimizer=partial(adamw, learning_rate=9e-6, **schedule),
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

    Batch and length are those of the README (the script's defaults: 256 and 3,072), and so are the
    steps, "approximately 100". AdamW is its trainer's.
    """
    folder = "models/Qwen2.5-7B"
    stage = replace(
        ppo(),
        task=replace(TASK, prompt=zoo_prompt),
        steps=100,
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
        weight=weights.token_mean,  # ours; neither the script nor the README says
        optimizer=partial(adamw, learning_rate=5e-7, b2=0.999, weight_decay=0.01),
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


# --------------------------------------------------------------------------- tiny

WORLD = {"counts": (3,), "low": 1, "high": 20, "operators": "+-"}


def tiny() -> Run:
    """SimpleRL-Zero from a base of 0.35M weights."""
    return Run(
        name="simple_rl_tiny",
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
        tokenizer=partial(tiny_tokenizer, words=(*WORDS, countdown.FENCE)),
        stages=(tiny_base(), tiny_ppo()),
    )


def tiny_long() -> Run:
    """SimpleRL: long searches first, then the same RL."""
    sft = replace(
        tiny_base(),
        name="sft",
        source=long_searches,
        steps=60,
        optimizer=partial(adamw, learning_rate=5e-4, warmup=5, final=0.1),
    )
    return replace(tiny(), name="simple_rl_tiny_long", stages=(tiny_base(), sft, tiny_ppo()))


def mixed_texts() -> LazyRows:
    """Searches that give up early, of six attempts at the most; two texts of five are programs."""
    searches = countdown.attempts_rows(
        400_000, seed=0, **WORLD, give_up=0.85, persistent=0.1, max_attempts=6
    )
    programs = countdown.listing_rows(400_000, seed=0, **WORLD, lines=12)
    return LazyRows(len(searches), lambda i: (programs if i % 5 < 2 else searches)[i])


def long_searches() -> list[dict[str, Any]]:
    """About 2,000 searches of up to eight attempts that end right."""
    rows = countdown.attempts_rows(
        2_400, seed=3, **WORLD, give_up=0.0, persistent=1.0, max_attempts=8
    )
    return [row for row in rows if "give up" not in row["answer"]]


def tiny_base() -> Supervised:
    """Pretraining."""
    return Supervised(
        name="base",
        source=mixed_texts,
        steps=2400,
        batch_rows=32,
        row_length=112,
        micro_rows=8,
        loss=losses.cross_entropy,
        optimizer=partial(adamw, learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        checkpoints=Checkpoints(every=400),
    )


def tiny_ppo() -> Reinforce:
    """The published PPO with larger rates, one update to a rollout; answer tags are the box."""
    stage = ppo()
    assert stage.critic is not None
    return replace(
        stage,
        task=Task(
            train=partial(countdown.rows, "train", num=200_000, seed=1, **WORLD),
            test=partial(countdown.rows, "test", num=512, seed=2, **WORLD),
            prompt=countdown.short_prompt,
            accuracy=countdown_rewards.accuracy,
            observe=written,
            vote=countdown_rewards.answer_key,
        ),
        steps=80,
        prompts=32,
        engine=Engine(max_prompt=8, max_new=104, slots=64),
        reward=partial(score, accuracy=countdown_rewards.accuracy, mark=countdown_rewards.OPEN),
        optimizer=partial(adamw, learning_rate=1e-4, warmup=5),
        critic=replace(
            stage.critic, optimizer=partial(adamw, learning_rate=5e-4, warmup=5), warmup=4
        ),
        old="sampler",
        reward_workers=0,
        minibatches=1,
        row_length=112,
        micro_rows=8,
        evaluate_every=20,
        evaluate_rows=512,
        evaluate_sampling=Sampling(),
        checkpoints=Checkpoints(every=20),
    )


def written(row: Mapping[str, Any], answer: str) -> dict[str, float]:
    """How the answer was searched for, and how much of it is a program, in names of `observe`.

    text_only_length   the tokens of an answer without one; left out where there is one, and where
                       the row does not say how many
    """
    before, fence, rest = answer.partition(countdown.FENCE)
    after = rest.partition(countdown.FENCE)[2]
    text = len(before) + len(after)
    seen = {
        **countdown_rewards.observe(row, answer),
        "text_characters": float(text),
        "code_share": 1 - text / max(len(answer), 1) if fence else 0.0,
        "code_answers": float(bool(fence)),
    }
    if not fence and "num_tokens" in row:
        seen["text_only_length"] = float(row["num_tokens"])
    return seen
