"""Sky-T1-32B-Preview at its published size: SFT on 17k verified long answers, and nothing else.

    python -m r1jax.train --config configs/sky_t1.py

The default trains on the published data set. Variant: `sky_t1.py:rebuilt` makes it anew first: a
teacher answers, another model puts the answers into one form, tests and gold answers verify them.

`tiny` is that on two CPU cores, with the model in runs/countdown_tiny as the teacher (`make train`
makes it) and the base that it began with as the student, as QwQ-32B and Qwen2.5-32B are one
family:

    python -m r1jax.train --config configs/sky_t1.py:tiny --after runs/countdown_tiny

(Without `--after` it makes the student's base itself.) Three kinds of problems, 5 : 10 : 1; 1,800
verified answers of the teacher; three epochs of SFT and nothing else. Shown: SFT alone lifts the
student. The report's table of costs has the seconds and the tokens of data building and of SFT
apart. The figures are in BENCHMARKS.md.

All that follows is about the full size.

Needs: models/Qwen2.5-32B-Instruct; data/sky_t1_17k.jsonl, the rows of NovaSky-AI/Sky-T1_data_17k
(`system`, `conversations`). For `rebuilt`: data/apps_taco.jsonl (`question`, `verifier` "code",
`tests`), data/numina.jsonl (`question`, `verifier` "math", `answer`; AIME, MATH and Olympiad),
data/still2.jsonl (`prompt`, `answer`), QwQ-32B-Preview served at localhost:8000 and the model that
rewrites at localhost:8001.

Hardware: 8 H100 of 80 GB, as published, with ZeRO-3 and offload to the host. There is no offload
here: by `--check` each of 8 would hold 87 GB, each of 16 44 GB. So 16 are needed.

Hours: 19 on 8 H100 published, about $450, which makes the `price` of one for an hour $2.96.
Rewriting took about $100 more. An estimate from FLOPs, 8 * N * T with N = 32.8e9 and T = 3 * 17,000
* 5,461 tokens (a mean length that we assume): 7.3e19, 6.4 hours at 40% of 8 x 989 TFLOP/s.

Published (README): MATH-500 86.4, AIME 2024 43.3, GPQA-Diamond 56.8, LiveCodeBench easy, medium and
hard 86.3, 56.8 and 17.9.

Not yet run at this size.

Numbers: github.com/NovaSky-AI/SkyThought, recipes/sky-t1-preview, and
skythought/train/LLaMA-Factory/examples/train_full/qwen2_full_sft.yaml: 3 epochs, rate 1e-5 along a
cosine to 0, warm-up 0.1, batch 1 x 12 x 8 GPUs = 96, length 16,384; Adam's b2 is its trainer's
default. The batch is of 96 samples; here it is of packed rows, 32 of which hold as many samples if
their mean is 5,461 tokens. Ours: the words to the model that rewrites and the system's words in
`rebuilt`, one answer of the teacher to each problem there, workers, rows at a time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from r1jax.algos.losses import cross_entropy
from r1jax.data import countdown, tokenizer
from r1jax.data.duplicates import distinct
from r1jax.data.eval_sets import BOXED
from r1jax.data.filters import right
from r1jax.data.passes import keep, keep_best, mix, rewrite, verify
from r1jax.data.sources import LazyRows, jsonl
from r1jax.models.zoo import MODELS
from r1jax.rewards.countdown import accuracy, answer_key, observe
from r1jax.rewards.dispatch import by_verifier
from r1jax.rewards.endpoint import Endpoint, ask
from r1jax.settings import (
    Build,
    Built,
    Checkpoints,
    Engine,
    Evaluation,
    Mesh,
    Run,
    Sampled,
    Supervised,
    Task,
    Taught,
    dense,
)
from r1jax.state import adamw

FOLDER = "models/Qwen2.5-32B-Instruct"
NUM_SAMPLES, EPOCHS, BATCH = 17_000, 3, 96
STEPS = EPOCHS * NUM_SAMPLES // BATCH
TAGS = (
    "<|begin_of_thought|>",
    "<|end_of_thought|>",
    "<|begin_of_solution|>",
    "<|end_of_solution|>",
)

TEACHER = Endpoint(
    address="http://localhost:8000/v1",
    model="QwQ-32B-Preview",
    max_new=16_384,
    seconds=3600.0,
    cache="data/sky_t1_replies",
)
REWRITER = Endpoint(
    address="http://localhost:8001/v1",
    model="gpt-4o-mini",
    max_new=16_384,
    seconds=600.0,
    cache="data/sky_t1_rewrites",
)


def config() -> Run:
    """SFT on the published 17k."""
    return Run(
        name="sky_t1",
        # The instruction-tuned model differs from its base in these two.
        model=replace(
            MODELS["qwen2.5-32b"],
            norm_eps=1e-6,
            max_length=32_768,
            dtype="bfloat16",
            remat="layer",
        ),
        tokenizer=partial(tokenizer.from_folder, FOLDER),
        weights=FOLDER,
        stages=(sft(),),
        mesh=Mesh(data=1, fsdp=-1, tensor=4),
        price=2.96,  # $450 for 19 hours of 8 H100
    )


def sft() -> Supervised:
    """Three passes over the samples."""
    return Supervised(
        name="sft",
        source=published,
        steps=STEPS,
        batch_rows=32,
        row_length=16_384,
        micro_rows=4,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=1e-5, warmup=STEPS // 10, final=0.0, b2=0.999),
        checkpoints=Checkpoints(every=100),
    )


# --------------------------------------------------------------------------- texts


def chat(system: str, user: str) -> str:
    """Qwen's chat template up to the answer."""
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def published() -> LazyRows:
    """The published samples as rows to train on."""
    rows = jsonl("data/sky_t1_17k.jsonl", need=("system", "conversations"))
    return LazyRows(len(rows), lambda i: sample(rows[i]), rows.files)


def sample(row: Mapping[str, Any]) -> dict[str, str]:
    """One exchange: what was asked and what was answered.

    Raises:
      ValueError: a row holds something else.
    """
    turns = row["conversations"]
    if len(turns) != 2:
        raise ValueError(f"a sample of Sky-T1 has one question and one answer, got {len(turns)}")
    return {"prompt": chat(row["system"], turns[0]["value"]), "answer": turns[1]["value"]}


def prompt(row: Mapping[str, Any]) -> str:
    """What the student is asked; the system's words are ours."""
    return chat(f"Think first, between {TAGS[0]} and {TAGS[1]}, then answer.", row["question"])


def to_teacher(row: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    """What QwQ is asked."""
    ending = f"\n\n{BOXED}" if row["verifier"] == "math" else ""
    return [{"role": "user", "content": row["question"] + ending}]


def to_rewriter(row: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    """What puts an answer into the form with four tags."""
    asked = (
        f"Put the following solution into this form and change none of its thoughts: {TAGS[0]} the "
        f"whole reasoning, step by step {TAGS[1]} {TAGS[2]} the final solution {TAGS[3]}"
    )
    return [{"role": "user", "content": f"{asked}\n\n{row['answer']}"}]


def formed(reply: str) -> str | None:
    """A reply that has each tag once and in order; None for any other."""
    places = [reply.find(tag) for tag in TAGS]
    once = all(reply.count(tag) == 1 for tag in TAGS)
    return reply.strip() if once and places == sorted(places) else None


# --------------------------------------------------------------------------- the data, anew


def rebuilt() -> Run:
    """5k code, 10k math and 1k science answers, then the same SFT."""
    mixed = Build(
        name="mixed",
        source=Built(stage="code"),
        passes={
            "math": partial(mix, others=Built(stage="math"), ratio=(5, 10)),
            "science": partial(
                mix,
                others=partial(jsonl, "data/still2.jsonl", need=("prompt", "answer")),
                ratio=(15, 1),
            ),
        },
    )
    stages = (
        verified("code", "data/apps_taco.jsonl"),
        verified("math", "data/numina.jsonl"),
        mixed,
        replace(sft(), source=Built(stage="mixed")),
    )
    return replace(config(), name="sky_t1_rebuilt", stages=stages)


def verified(name: str, file: str) -> Build:
    """Answers of the teacher, in one form, that their rule finds right."""
    return Build(
        name=name,
        source=partial(jsonl, file, need=("question", "verifier")),
        prompt=prompt,
        answers=Taught(complete=partial(ask, endpoint=TEACHER), messages=to_teacher),
        accuracy=by_verifier,
        reward_workers=8,
        passes={
            "form": partial(
                rewrite,
                complete=partial(ask, endpoint=REWRITER),
                messages=to_rewriter,
                read=formed,
            ),
            # As published, after the change of form, which may spoil an answer.
            "verified": partial(verify, accuracy=by_verifier),
            "wrong": partial(keep, where=right),
            "best": keep_best,
            "duplicates": distinct,
        },
    )


# --------------------------------------------------------------------------- tiny

WORLD = {"counts": (3,), "low": 1, "high": 20, "operators": "+-"}
ENGINE = Engine(max_prompt=8, max_new=136, slots=64)
TINY_EPOCHS, TINY_STEPS = 3, 75  # some 1,800 answers of 60 tokens, 32 rows of 144 in an update


def tiny() -> Run:
    """A base, 5 : 10 : 1 verified answers of a teacher to three kinds of problems, SFT on them."""
    mixed = Build(
        name="mixed",
        source=Built(stage="low"),
        passes={
            "any": partial(mix, others=Built(stage="any"), ratio=(5, 10)),
            "high": partial(mix, others=Built(stage="high"), ratio=(15, 1)),
        },
    )
    stages = (
        tiny_base(),
        taught("low", num=750, seed=3, target_high=9),
        taught("any", num=1500, seed=4),
        taught("high", num=150, seed=5, target_low=30),
        mixed,
        tiny_sft(),
    )
    return Run(
        name="sky_t1_tiny",
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
        tokenizer=tokenizer.tiny,
        stages=stages,
    )


def tiny_base() -> Supervised:
    """The base of countdown_tiny.py: it computes and judges well but gives up too early."""
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
        checkpoints=Checkpoints(every=200),
    )


def taught(name: str, *, num: int, seed: int, **kind: int) -> Build:
    """Answers of the teacher to problems of one kind, one each, that their rule finds right."""
    return Build(
        name=name,
        source=partial(countdown.rows, "train", num=num, seed=seed, **(WORLD | kind)),
        prompt=countdown.short_prompt,
        answers=Sampled(engine=ENGINE, run="runs/countdown_tiny", stage="rl"),
        accuracy=accuracy,
        passes={"wrong": partial(keep, where=right), "duplicates": distinct},
        at_once=256,
    )


def tiny_sft() -> Supervised:
    """Three passes, along a cosine with a warm-up of 0.1, as published."""
    return Supervised(
        name="sft",
        source=Built(stage="mixed"),
        steps=TINY_STEPS,
        batch_rows=32,
        row_length=144,
        micro_rows=8,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=1e-3, warmup=TINY_STEPS // 10, final=0.0),
        evaluation=Evaluation(
            task=Task(
                train=partial(countdown.rows, "train", num=200_000, seed=1, **WORLD),
                test=partial(countdown.rows, "test", num=512, seed=2, **WORLD),
                prompt=countdown.short_prompt,
                accuracy=accuracy,
                observe=observe,
                vote=answer_key,
            ),
            engine=ENGINE,
            rows=512,
            every=TINY_STEPS // TINY_EPOCHS,
        ),
        checkpoints=Checkpoints(every=TINY_STEPS // TINY_EPOCHS),
    )
