"""R1-Distill at its published sizes: SFT alone on the 800k samples that R1's third stage made.

    python -m r1jax.train --config configs/r1_distill.py:qwen_7b

Variants: `qwen_15b`, `qwen_7b` (the default), `qwen_14b`, `qwen_32b`, `llama_8b`, `llama_70b`; and
`tiny`, `tiny_once` and `tiny_32`, on two CPU cores, after `configs/r1.py:tiny`: a smaller student
learns from the tiny R1, and beside it, from the same base, by RL of as much compute. Each ends in a
table of both. What comes out depends on what the base has seen (BENCHMARKS.md, three seeds): where
it has seen no second attempt (`tiny_once`), RL has nothing to strengthen and distillation is ahead;
where it has, and only gives up too early (`tiny`), RL is. Readability is distillation's in both.
All that follows is about the published sizes.

Needs: the base's folder under models/, with the tokenizer's special tokens of R1-Distill;
data/r1_800k.jsonl with `prompt` and `answer`, such as data/mixed/rows.jsonl in the run of
configs/r1.py. The published samples are not public.

Hardware, hours and cost are not published. An estimate: 8 * N * T FLOPs (6 N a token and 2 N for
activations that are recomputed), T = 2 * 804,745 * 5,355 = 8.6e9 tokens, at 40% of 989 TFLOP/s:

    weights   FLOPs     H100 of 80 GB   hours
    1.5B      1.1e20    8               9
    7.6B      5.3e20    16              23
    8.0B      5.5e20    16              24
    14.8B     1.0e21    32              22
    32.8B     2.3e21    64              25
    70.6B     4.9e21    128             27

By `--check` with these numbers each GPU holds 7 to 33 GB, activations within a layer apart.

Published (arXiv:2501.12948v2, supplement; AIME 2024, pass@1 and cons@64): 1.5B 28.9 and 52.7, 7B
55.5 and 83.3, 14B 69.7 and 80.0, 32B 72.6 and 83.3, Llama 8B 50.4 and 80.0, 70B 70.0 and 86.7.

Not yet run at this size.

Numbers: the same, B.4.3 and table 6: learning rates of each student, 2 to 3 epochs (here 2), batch
64, length 32,768, cosine to a tenth. Whether the 64 are samples or packed rows is not published:
here they are packed rows, as DeepSeek-V3's SFT packs its samples. No warm-up is published, none is
used; Adam's betas and the weight decay are not published either, and this project's.
"""

from dataclasses import replace
from functools import partial

from r1jax.algos.advantages import grpo
from r1jax.algos.losses import cross_entropy, policy_loss
from r1jax.algos.weights import token_mean
from r1jax.data import small_world
from r1jax.data.filters import right
from r1jax.data.passes import keep
from r1jax.data.sources import jsonl
from r1jax.data.tokenizer import from_folder
from r1jax.models.zoo import MODELS
from r1jax.rewards import small_world as small
from r1jax.settings import (
    Build,
    Built,
    Checkpoints,
    Compare,
    Engine,
    Mesh,
    Reinforce,
    Run,
    Sampled,
    Supervised,
    Task,
    dense,
)
from r1jax.state import adamw

NUM_SAMPLES, MEAN_TOKENS = 804_745, 5_355
EPOCHS, BATCH, LENGTH = 2, 64, 32_768
STEPS = EPOCHS * NUM_SAMPLES * MEAN_TOKENS // (BATCH * LENGTH)


def config() -> Run:
    """The 7B student."""
    return qwen_7b()


def qwen_15b() -> Run:
    """R1-Distill-Qwen-1.5B."""
    return student("qwen_15b", "Qwen2.5-Math-1.5B", 1e-4, at_once=8)


def qwen_7b() -> Run:
    """R1-Distill-Qwen-7B."""
    return student("qwen_7b", "Qwen2.5-Math-7B", 8e-5, at_once=16)


def qwen_14b() -> Run:
    """R1-Distill-Qwen-14B."""
    return student("qwen_14b", "Qwen2.5-14B", 7e-5, at_once=32)


def qwen_32b() -> Run:
    """R1-Distill-Qwen-32B."""
    return student("qwen_32b", "Qwen2.5-32B", 6e-5, at_once=64)


def llama_8b() -> Run:
    """R1-Distill-Llama-8B."""
    return student("llama_8b", "Llama-3.1-8B", 5e-5, at_once=16)


def llama_70b() -> Run:
    """R1-Distill-Llama-70B, whose base is an instruction-tuned model."""
    return student("llama_70b", "Llama-3.3-70B-Instruct", 2e-5, at_once=64, tensor=2)


def student(name: str, base: str, learning_rate: float, *, at_once: int, tensor: int = 1) -> Run:
    """SFT of one base, `at_once` rows at a time: one on each of its GPUs, or on `tensor` of them.

    Qwen2.5-Math is trained beyond its 4,096 positions with its own rotary base; the length is only
    what is written on export, that of the published students.
    """
    folder = f"models/{base}"
    model = MODELS[base.lower().removesuffix("-instruct")]
    return Run(
        name=f"r1_distill_{name}",
        model=replace(model, max_length=131_072, dtype="bfloat16", remat="layer"),
        tokenizer=partial(from_folder, folder),
        weights=folder,
        stages=(
            Supervised(
                name="sft",
                source=partial(jsonl, "data/r1_800k.jsonl", need=("prompt", "answer")),
                steps=STEPS,
                batch_rows=BATCH,
                row_length=LENGTH,
                micro_rows=at_once,
                loss=cross_entropy,
                optimizer=partial(adamw, learning_rate=learning_rate, final=0.1),
                checkpoints=Checkpoints(every=200),
            ),
        ),
        mesh=Mesh(data=1, fsdp=-1, tensor=tensor),
    )


# --------------------------------------------------------------------------- tiny

KINDS = ("math", "math", "math", "code")
ENGINE = Engine(max_prompt=8, max_new=144, slots=64)


def tiny() -> Run:
    """A student of a third of the tiny R1's weights: distilled, and by RL."""
    return of_width(64, name="r1_distill_tiny")


def tiny_once() -> Run:
    """The same student from a base that never saw a second attempt, with three times the updates;
    RL has 700 steps for as much compute, as its answers are short."""
    run = of_width(64, name="r1_distill_tiny_once")
    base, samples, distilled, rl, table = run.stages
    once = partial(small_world.base_rows, 400_000, seed=0, give_up=1.0, persistent=0.0)
    longer = replace(distilled, steps=900), replace(rl, steps=700)
    return replace(run, stages=(replace(base, source=once), samples, *longer, table))


def tiny_32() -> Run:
    """A student of an eleventh of them."""
    return of_width(32, name="r1_distill_tiny_32")


def of_width(width: int, *, name: str) -> Run:
    """Two layers of a width, heads of 16."""
    return Run(
        name=name,
        model=dense(
            vocab_size=224,
            dim=width,
            num_layers=2,
            num_heads=width // 16,
            num_kv_heads=width // 16,
            mlp_dim=width * 5 // 2,
            bias=True,
            scan=False,
            sums="float64",
        ),
        tokenizer=small_world.small_tokenizer,
        stages=(tiny_base(), tiny_samples(), tiny_sft(), tiny_rl(), tiny_table()),
    )


def tiny_base() -> Supervised:
    """The texts of the tiny R1's base."""
    return Supervised(
        name="base",
        source=partial(small_world.base_rows, 400_000, seed=0),
        steps=1600,
        batch_rows=32,
        row_length=152,
        micro_rows=16,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        checkpoints=Checkpoints(every=400),
    )


def tiny_samples() -> Build:
    """Right answers of the tiny R1."""
    return Build(
        name="samples",
        source=partial(small_world.rows, "train", num=4000, seed=9, kinds=KINDS),
        prompt=small_world.prompt,
        answers=Sampled(engine=ENGINE, run="runs/r1_tiny", stage="rl_all"),
        samples=2,
        accuracy=small.accuracy,
        passes={"wrong": partial(keep, where=right)},
    )


def tiny_sft() -> Supervised:
    """SFT of the student's base on them, and nothing else."""
    return Supervised(
        name="distilled",
        source=Built(stage="samples"),
        begin="base",
        steps=300,
        batch_rows=32,
        row_length=152,
        micro_rows=16,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=1e-3, warmup=10, final=0.1),
        checkpoints=Checkpoints(every=100),
    )


def tiny_rl() -> Reinforce:
    """RL of the student's base, for about the compute of distillation; BENCHMARKS.md counts it."""
    return Reinforce(
        name="rl",
        begin="base",
        task=Task(
            train=partial(small_world.rows, "train", num=200_000, seed=1, kinds=KINDS),
            test=partial(small_world.rows, "test", num=512, seed=2, kinds=KINDS),
            prompt=small_world.prompt,
            accuracy=small.accuracy,
            observe=small.observe,
        ),
        steps=100,
        prompts=32,
        group=8,
        engine=ENGINE,
        reward=small.accuracy,
        advantage=grpo,
        loss=partial(policy_loss, clip_low=0.2, clip_high=0.28),
        weight=token_mean,
        optimizer=partial(adamw, learning_rate=1e-4, warmup=5),
        row_length=152,
        micro_rows=16,
        evaluate_every=25,
        evaluate_rows=512,
        checkpoints=Checkpoints(every=25),
    )


def tiny_table() -> Compare:
    """The student before, by RL and distilled."""
    return Compare(
        name="table",
        models={"base": "base", "RL": "rl", "distilled": "distilled"},
        source=partial(small_world.rows, "test", num=896, seed=8, kinds=KINDS),
        prompt=small_world.prompt,
        engine=ENGINE,
        measures={"reasoning": small.reasoned, "readability": small.readable},
    )
