"""R1-Zero at its published size: GRPO with rule rewards from DeepSeek-V3-Base, nothing before it.

    python -m r1jax.train --config configs/r1_zero.py

Variants: `r1_zero.py:qwen_32b`, the same from Qwen2.5-32B; `r1_zero.py:tiny`, on two CPU cores in
some ten minutes, from random weights, in the world of `r1jax.data.small_world`. What it shows, with
figures in BENCHMARKS.md: accuracy and the length of thinking rise together, and reflections with
them, while the languages stay mixed. All that follows is about the full size.

Needs: models/DeepSeek-V3-Base (or models/Qwen2.5-32B), a folder from a hub; data/r1_zero.jsonl with
`question`, `verifier` ("math" or "code") and what that rule needs (`answer`; `tests`);
data/aime24.jsonl. The published problems (26K math, 17K code, 22K STEM, 15K logic) are not public.

Hardware: 64 x 8 H800 of 80 GB, as published. How the model was split over them in RL is not; the
mesh here is ours. By `--check 512` each holds 67 GB while it samples and 50 GB in updates,
activations within a layer apart. For the 32B 64 H100 of 80 GB (ours; `--check 64`: 57 GB).

Hours: 198 published (x 512 = 101K GPU hours, $202K at the $2 that the paper reckons an H800 hour
at: `price`). For the 32B no hardware is published. An estimate: 12 * N * T FLOPs (N weights; 2 N a
token for each of sampling and reference, 8 N for an update that recomputes activations), N =
32.8e9, T = 625 * 8,192 answers of 8,000 tokens, an assumed mean: 1.6e22, or 235 hours on 64 H100 at
30% of 989 TFLOP/s.

Published (arXiv:2501.12948v2, section 2.3 and supplement F): AIME 2024 pass@1 from 15.6 to 77.9,
86.7 by voting. From Qwen2.5-32B, after more than 10K steps, 47.0; the distilled 32B has 72.6.

Not yet run at this size.

Numbers: arXiv:2501.12948v2, section 2.1; for the 32B supplement B.4.1, with the rate of
Qwen2.5-32B-Zero, 1e-6; another of 2e-6 is given for R1-Zero's recipe on a Qwen of 32B. A published
step is one update of 512 answers; a step here is a rollout of 8,192, hence the divisions by 16.
10,400 updates are 1.6 epochs, which makes 208K problems; published are 80K, and nothing says why.
Not published, and therefore as everywhere in this project: the clip (0.2), the sum over tokens (the
mean of GRPO's paper), Adam's betas and the weight decay. Not published, and ours: the longest
prompt, slots, workers, rows at a time, and how often is evaluated (by one answer a problem) and
saved.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from r1jax.algos.advantages import grpo
from r1jax.algos.kl import k3
from r1jax.algos.losses import cross_entropy, policy_loss
from r1jax.algos.weights import sequence_mean, token_mean
from r1jax.data import eval_sets, small_world
from r1jax.data.sources import jsonl
from r1jax.data.templates import r1_zero
from r1jax.data.tokenizer import from_folder
from r1jax.models.zoo import MODELS
from r1jax.rewards import small_world as scores
from r1jax.rewards.dispatch import by_verifier
from r1jax.rewards.format import think_answer
from r1jax.rewards.prose import observe
from r1jax.rewards.weighted import weighted
from r1jax.schedules import Steps
from r1jax.settings import (
    Checkpoints,
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

UPDATES = 16  # of one rollout
LONG, LONGER = 32_768, 65_536  # tokens of an answer before step 8.2k and from it on
MAX_PROMPT = 2048


def config() -> Run:
    """R1-Zero: 10,400 updates."""
    folder = "models/DeepSeek-V3-Base"
    return Run(
        name="r1_zero",
        model=replace(MODELS["deepseek-v3-671b"], dtype="bfloat16", remat="layer"),
        tokenizer=partial(from_folder, folder),
        weights=folder,
        stages=(rl(),),
        mesh=Mesh(data=1, expert=64, tensor=8),
        price=2.0,  # an H800, as in table 7 of the supplement
    )


def prompt(row: Mapping[str, Any]) -> str:
    """The paper's template, Table 1."""
    return r1_zero(row["question"])


def rl() -> Reinforce:
    """512 problems x 16 answers, split at random into 16 updates."""
    return Reinforce(
        name="rl",
        task=Task(
            train=partial(jsonl, "data/r1_zero.jsonl", need=("question", "verifier")),
            test=partial(eval_sets.load, "aime", "data/aime24.jsonl"),
            prompt=prompt,
            accuracy=by_verifier,
            observe=observe,
        ),
        steps=10_400 // UPDATES,
        prompts=512,
        group=16,
        engine=Engine(
            max_prompt=MAX_PROMPT,
            max_new=LONGER,
            slots=384,
            sampling=Sampling(temperature=1.0),
            prefill_chunk=MAX_PROMPT,
            draft="coupled",  # the paper's rollout drafts with the prediction module
        ),
        # The jump is at step 8.2k, which is update 8 of rollout 513.
        max_new=Steps(values=(LONG, LONGER), starts=(8_200 // UPDATES + 1,)),
        reward=weighted(accuracy=(1.0, by_verifier), format=(1.0, think_answer)),
        advantage=grpo,
        loss=partial(policy_loss, kl=k3, kl_weight=0.001),
        weight=sequence_mean,
        optimizer=partial(adamw, learning_rate=3e-6),
        reward_workers=64,
        minibatches=UPDATES,
        row_length=MAX_PROMPT + LONGER,
        micro_rows=64,
        reference="moving",
        reference_every=400 // UPDATES,
        evaluate_every=400 // UPDATES,
        evaluate_rows=30,
        evaluate_sampling=Sampling(temperature=0.6, top_p=0.95),
        checkpoints=Checkpoints(every=400 // UPDATES),
    )


def qwen_32b() -> Run:
    """The paper's check that a smaller base gains less from RL than from distillation.

    Published: more than 10K steps, the rate, and 32,768 tokens throughout; all else is as above.
    """
    folder = "models/Qwen2.5-32B"
    stage = rl()
    stage = replace(
        stage,
        steps=10_000 // UPDATES,
        engine=replace(stage.engine, max_new=LONG, slots=256, draft="none"),
        max_new=None,
        optimizer=partial(adamw, learning_rate=1e-6),
        row_length=MAX_PROMPT + LONG,
        micro_rows=8,
    )
    return Run(
        name="r1_zero_qwen_32b",
        model=replace(MODELS["qwen2.5-32b"], dtype="bfloat16", remat="layer"),
        tokenizer=partial(from_folder, folder),
        weights=folder,
        stages=(stage,),
        mesh=Mesh(data=1, fsdp=-1, tensor=8),
    )


# --------------------------------------------------------------------------- tiny


def tiny() -> Run:
    """A weak base, then RL with rule rewards on sums and programs."""
    return Run(
        name="r1_zero_tiny",
        model=dense(
            vocab_size=224,
            dim=96,
            num_layers=3,
            num_heads=4,
            num_kv_heads=4,
            mlp_dim=256,
            bias=True,
            scan=False,
            sums="float64",
        ),
        tokenizer=small_world.small_tokenizer,
        stages=(tiny_base(), tiny_rl()),
    )


def tiny_base() -> Supervised:
    """Texts that compute and judge well, give up too early, and mix their languages."""
    return Supervised(
        name="base",
        source=partial(small_world.base_rows, 400_000, seed=0),
        steps=1600,
        batch_rows=32,
        row_length=152,
        micro_rows=8,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        checkpoints=Checkpoints(every=200),
    )


def tiny_rl() -> Reinforce:
    """The accuracy and format rewards alone; three sums to one program."""
    kinds = ("math", "math", "math", "code")
    return Reinforce(
        name="zero",
        begin="base",
        task=Task(
            train=partial(small_world.rows, "train", num=200_000, seed=1, kinds=kinds),
            test=partial(small_world.rows, "test", num=512, seed=2, kinds=kinds),
            prompt=small_world.prompt,
            accuracy=scores.accuracy,
            observe=scores.observe,
        ),
        steps=80,
        prompts=32,
        group=8,
        engine=Engine(max_prompt=8, max_new=144, slots=64),
        reward=weighted(accuracy=(1.0, scores.accuracy), format=(1.0, think_answer)),
        advantage=grpo,
        loss=partial(policy_loss, clip_low=0.2, clip_high=0.28),
        weight=token_mean,
        optimizer=partial(adamw, learning_rate=1e-4, warmup=5),
        row_length=152,
        micro_rows=8,
        reference="start",  # for the KL in the log: the loss does not use it
        evaluate_every=20,
        evaluate_rows=512,
        checkpoints=Checkpoints(every=20),
    )
