"""Open-R1 at its published size: its three steps, and its recipes for small models.

    python -m r1jax.train --config configs/open_r1.py

Step 1 distils R1: the default is SFT of OpenR1-Distill-7B on Mixture-of-Thoughts, and
`open_r1.py:corpus` makes such a corpus first. Step 2, pure RL, is `zero`; step 3, `multi_stage`, is
SFT and then RL. Open-R1 has not finished steps 2 and 3: their problems and numbers here are those
of its demonstration with R1-Distill-Qwen-1.5B, but for answers of 4,096 tokens, which are ours. The
demonstrations are variants too: `grpo_distill` (R1-Distill-Qwen-1.5B), `grpo_instruct` and
`grpo_code` (Qwen2.5-1.5B-Instruct).

`tiny` is all three steps, one after another in one run, on two CPU cores, with the model in
runs/countdown_tiny (`make train` makes it) in the place of R1, and the base that it began with:

    python -m r1jax.train --config configs/open_r1.py:tiny --after runs/countdown_tiny

(Without `--after` it makes the base itself.) Stages: `corpus` and `sft`, `zero` from the base,
`multi_stage` from `sft`. Shown: the three steps run.
The figures are in BENCHMARKS.md. All that follows is about the full size.

Needs: models/Qwen2.5-Math-7B-RoPE-300k and others as named below, under models/;
data/mixture_of_thoughts.jsonl with `prompt` and `answer`, the data set open-r1/Mixture-of-Thoughts
in its chat template; data/math_problems.jsonl (`question`, `answer`, `verifier`), such as the
93,733 of open-r1/OpenR1-Math-220k, default; data/code_problems.jsonl and data/code_test.jsonl
(`question`, `tests`, `verifier`, `code_language` "python"); data/math500.jsonl; for `corpus`
DeepSeek-R1 served at localhost:8000.

Hardware: a node of 8 H100 of 80 GB, as published. By `--check 8` each holds at most 26 GB in SFT
and 45 GB in RL with the 7B, activations within a layer apart.

Hours are not published. An estimate for SFT: 8 * N * T FLOPs (6 N a token, 2 N for activations that
are recomputed), N = 7.6e9, T = 5 * 349,317 * 6,144 tokens (a mean length that we assume): 6.5e20,
57 hours at 40% of 8 x 989 TFLOP/s. Of GRPO: 10 * N * T (2 N to sample, 8 N to learn), at most 10 *
1.5e9 * 512 * 2,560 = 2.0e16 a step with the 1.5B, 8 s at 30%, 7 hours for 2,929 steps; with the 7B
of `zero` and `multi_stage` 10 * 7.6e9 * 512 * 4,608 = 1.8e17, 76 s and 61 hours.

Published (README): OpenR1-Distill-7B has AIME 2024 52.7, MATH-500 89.0, GPQA-Diamond 52.8,
LiveCodeBench 39.4.

Not yet run at this size.

Numbers: github.com/huggingface/open-r1, recipes/OpenR1-Distill-7B/sft/config_distill.yaml,
recipes/DeepSeek-R1-Distill-Qwen-1.5B/grpo/config_demo.yaml, config_demo.yaml and
config_demo_code.yaml of recipes/Qwen2.5-1.5B-Instruct/grpo, recipes/dataset_filtering,
src/open_r1/rewards.py and scripts/decontaminate.py. A batch is what a GPU takes times the steps
that are accumulated times the GPUs: 2 * 8 * 8 samples in SFT, 16 * 4 * 8 answers in GRPO, but 16 *
4 * 7 in `grpo_code`, whose eighth GPU samples. The recipe does not pack samples; here 24 packed
rows hold 128 of them if their mean is 6,144 tokens. Left to its trainer there, and ours: the clip
(0.2), the mean over an answer's tokens, no KL but in `grpo_code`; Adam's b2 is the trainer's
default. Ours too: slots, workers, rows at a time, evaluations.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from r1jax.algos.advantages import grpo
from r1jax.algos.kl import k3
from r1jax.algos.losses import cross_entropy, policy_loss
from r1jax.algos.weights import sequence_mean
from r1jax.data import countdown, eval_sets, tokenizer
from r1jax.data.duplicates import decontaminate, distinct
from r1jax.data.filters import right
from r1jax.data.passes import keep, keep_pass_rate, problems
from r1jax.data.sources import jsonl
from r1jax.models.zoo import MODELS
from r1jax.rewards import code, math
from r1jax.rewards import countdown as numbers
from r1jax.rewards.endpoint import Endpoint, ask
from r1jax.rewards.format import open_r1, open_r1_tag_count, tag_count, think_answer
from r1jax.rewards.prose import observe
from r1jax.rewards.weighted import weighted
from r1jax.settings import (
    FIRST,
    Build,
    Built,
    Checkpoints,
    Decoder,
    Engine,
    Evaluation,
    Mesh,
    Reinforce,
    Run,
    Sampled,
    Sampling,
    Stage,
    Supervised,
    Task,
    Taught,
    dense,
)
from r1jax.state import adamw

# The system's words of the recipes.
SYSTEM = (
    "You are a helpful AI Assistant that provides well-reasoned and detailed responses. You first "
    "think about the reasoning process as an internal monologue and then provide the user with the "
    "answer. Respond in the following format: <think>\n...\n</think>\n<answer>\n...\n</answer>"
)
R1 = Endpoint(
    address="http://localhost:8000/v1",
    model="deepseek-r1",
    temperature=0.6,
    max_new=32_768,
    seconds=3600.0,
    cache="data/open_r1_replies",
)
MATH = partial(jsonl, "data/math_problems.jsonl", need=("question", "answer"))
CODE = partial(jsonl, "data/code_problems.jsonl", need=("question", "tests", "code_language"))
MATH_500 = partial(eval_sets.load, "math500", "data/math500.jsonl")


def run(name: str, folder: str, model: Decoder, *stages: Stage) -> Run:
    """A run from the weights of a folder under models/."""
    return Run(
        name=f"open_r1_{name}",
        model=replace(model, dtype="bfloat16", remat="layer"),
        tokenizer=partial(tokenizer.from_folder, f"models/{folder}"),
        weights=f"models/{folder}",
        stages=stages,
        mesh=Mesh(data=1, fsdp=-1),
    )


def chat(row: Mapping[str, Any]) -> str:
    """Qwen's chat template up to the answer, with the recipes' words of the system."""
    return (
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{row['question']}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


# --------------------------------------------------------------------------- step 1: distil


def config() -> Run:
    """OpenR1-Distill-7B: SFT on Mixture-of-Thoughts, 350k samples, 5 epochs."""
    return run("distill_7b", "Qwen2.5-Math-7B-RoPE-300k", long_7b(), sft())


def long_7b() -> Decoder:
    """Qwen2.5-Math-7B with a rotary base of 300,000, for 32,768 tokens."""
    return replace(MODELS["qwen2.5-math-7b"], rope_theta=300_000.0, max_length=32_768)


def sft() -> Supervised:
    """5 epochs, 4e-5 along a cosine to a tenth, warm-up 0.03, gradients cut at a norm of 0.2."""
    steps = 5 * 349_317 // 128
    return Supervised(
        name="sft",
        source=partial(jsonl, "data/mixture_of_thoughts.jsonl", need=("prompt", "answer")),
        steps=steps,
        batch_rows=24,
        row_length=32_768,
        micro_rows=8,
        loss=cross_entropy,
        optimizer=partial(
            adamw,
            learning_rate=4e-5,
            warmup=3 * steps // 100,
            final=0.1,
            max_grad_norm=0.2,
            b2=0.999,
        ),
        checkpoints=Checkpoints(every=200),
    )


def corpus() -> Run:
    """Step 1 with a corpus of its own: R1's answers, verified, without what the tests contain.

    Published: 8-grams, and two to four answers to a problem of OpenR1-Math. The student is asked in
    GRPO's words; those of OpenR1-Distill-7B are others.
    """
    made = Build(
        name="corpus",
        source=MATH,
        prompt=chat,
        answers=Taught(complete=partial(ask, endpoint=R1), messages=to_r1),
        samples=2,
        accuracy=math.accuracy,
        reward_workers=8,
        passes={
            "wrong": partial(keep, where=right),
            "duplicates": distinct,
            "contaminated": partial(decontaminate, against=(MATH_500,), size=8),
        },
    )
    stage = replace(sft(), source=Built(stage="corpus"))
    return run("corpus", "Qwen2.5-Math-7B-RoPE-300k", long_7b(), made, stage)


def to_r1(row: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    """What R1 is asked: no system, as its README has it, and the instruction first, as Open-R1."""
    return [{"role": "user", "content": f"{eval_sets.BOXED}\n\n{row['question']}"}]


# --------------------------------------------------------------------------- step 2: RL


def rl(*, max_new: int, learning_rate: float, temperature: float, final: float = 0.1) -> Reinforce:
    """GRPO, once through 93,733 math problems: 16 answers to each of 32; accuracy, format and tags;
    a cosine after a warm-up of 0.1."""
    steps = 93_733 // 32
    return Reinforce(
        name="rl",
        task=Task(train=MATH, test=MATH_500, prompt=chat, accuracy=math.accuracy, observe=observe),
        steps=steps,
        prompts=32,
        group=16,
        engine=Engine(
            max_prompt=512,
            max_new=max_new,
            slots=512,
            sampling=Sampling(temperature=temperature),
        ),
        reward=weighted(
            accuracy=(1.0, math.accuracy),
            format=(1.0, open_r1),
            tags=(1.0, open_r1_tag_count),
        ),
        advantage=grpo,
        loss=partial(policy_loss, clip_low=0.2, clip_high=0.2),
        weight=sequence_mean,
        optimizer=partial(
            adamw, learning_rate=learning_rate, warmup=steps // 10, final=final, b2=0.999
        ),
        reward_workers=8,
        row_length=512 + max_new,
        micro_rows=16,
        evaluate_every=100,
        evaluate_rows=500,
        checkpoints=Checkpoints(every=100),
    )


def zero() -> Run:
    """Step 2: pure RL from the base that step 1 begins with, on problems that it sometimes solves:
    of eight answers at temperature 0.7 a share of 0.1 to 0.6 is right, as in filter_dapo.yaml."""
    stage = rl(max_new=4096, learning_rate=1e-6, temperature=0.7)
    fit = Build(
        name="problems",
        source=MATH,
        prompt=chat,
        answers=Sampled(engine=stage.engine, stage=FIRST),
        samples=8,
        accuracy=math.accuracy,
        reward_workers=8,
        passes={
            "pass rate": partial(keep_pass_rate, least=0.1, most=0.6),
            "problems": problems,
        },
    )
    stage = replace(stage, task=replace(stage.task, train=Built(stage="problems")))
    return run("zero", "Qwen2.5-Math-7B-RoPE-300k", long_7b(), fit, stage)


def grpo_distill() -> Run:
    """The demonstration: GRPO from R1-Distill-Qwen-1.5B, with its own chat template."""
    model = replace(MODELS["qwen2.5-math-1.5b"], max_length=131_072, tied=False)
    stage = rl(max_new=2048, learning_rate=1e-6, temperature=0.7)
    stage = replace(stage, task=replace(stage.task, prompt=deepseek_chat))
    return run("grpo_distill", "DeepSeek-R1-Distill-Qwen-1.5B", model, stage)


def deepseek_chat(row: Mapping[str, Any]) -> str:
    """DeepSeek's chat template up to the answer: as in the recipe, no tag of thinking ends it."""
    return f"<｜begin▁of▁sentence｜>{SYSTEM}<｜User｜>{row['question']}<｜Assistant｜>"


def grpo_instruct() -> Run:
    """The demonstration from Qwen2.5-1.5B-Instruct, whose cosine ends at 0. Its temperature is not
    in the recipe: 1."""
    stage = rl(max_new=1024, learning_rate=2e-5, temperature=1.0, final=0.0)
    return run("grpo_instruct", "Qwen2.5-1.5B-Instruct", instructed(), stage)


def grpo_code() -> Run:
    """GRPO on programs: 500 steps, 14 answers, KL 0.01, the share of tests passed and the form."""
    steps = 500
    stage = rl(max_new=2048, learning_rate=5e-6, temperature=1.0)
    reward = weighted(accuracy=(1.0, code.passed_share), format=(0.1, open_r1))
    task = replace(
        stage.task,
        train=CODE,
        test=partial(jsonl, "data/code_test.jsonl", need=("question", "tests", "code_language")),
        accuracy=code.accuracy,
    )
    stage = replace(
        stage,
        task=task,
        steps=steps,
        group=14,
        reward=reward,
        engine=replace(stage.engine, max_prompt=1024, slots=448),
        loss=partial(policy_loss, clip_low=0.2, clip_high=0.2, kl=k3, kl_weight=0.01),
        optimizer=partial(adamw, learning_rate=5e-6, warmup=3 * steps // 100, final=0.1, b2=0.999),
        row_length=1024 + 2048,
        reference="start",
    )
    return run("grpo_code", "Qwen2.5-1.5B-Instruct", instructed(), stage)


def instructed() -> Decoder:
    """Qwen2.5-1.5B-Instruct, which is meant for fewer tokens than its base."""
    return replace(MODELS["qwen2.5-1.5b"], max_length=32_768)


# --------------------------------------------------------------------------- step 3: both


def multi_stage() -> Run:
    """Step 3: SFT on the distilled corpus, then RL."""
    stage = rl(max_new=4096, learning_rate=1e-6, temperature=0.7)
    return run("multi_stage", "Qwen2.5-Math-7B-RoPE-300k", long_7b(), sft(), stage)


# --------------------------------------------------------------------------- tiny

WORLD = {"counts": (3,), "low": 1, "high": 20, "operators": "+-"}
ENGINE = Engine(max_prompt=8, max_new=136, slots=64)
TASK = Task(
    train=partial(countdown.rows, "train", num=200_000, seed=1, **WORLD),
    test=partial(countdown.rows, "test", num=512, seed=2, **WORLD),
    prompt=countdown.short_prompt,
    accuracy=numbers.accuracy,
    observe=numbers.observe,
    vote=numbers.answer_key,
)


def tiny() -> Run:
    """A base; a corpus and SFT; RL from the base; RL from what SFT made."""
    zero = tiny_rl()
    stages = (
        tiny_base(),
        tiny_corpus(),
        tiny_sft(),
        replace(zero, name="zero", begin="base"),
        replace(zero, name="multi_stage", begin="sft"),
    )
    return Run(
        name="open_r1_tiny",
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


def tiny_corpus() -> Build:
    """Step 1: two answers of the teacher to each problem, verified. No problem is one of a test."""
    return Build(
        name="corpus",
        source=partial(countdown.rows, "train", num=512, seed=3, **WORLD),
        prompt=countdown.short_prompt,
        answers=Sampled(engine=ENGINE, run="runs/countdown_tiny", stage="rl"),
        samples=2,
        accuracy=numbers.accuracy,
        passes={"wrong": partial(keep, where=right), "duplicates": distinct},
        at_once=256,
    )


def tiny_sft() -> Supervised:
    """Step 1: some two passes over the corpus, settings as in `sft` but for rate and sizes."""
    return Supervised(
        name="sft",
        source=Built(stage="corpus"),
        steps=25,
        batch_rows=32,
        row_length=144,
        micro_rows=8,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=1e-3, warmup=2, final=0.1, max_grad_norm=0.2),
        evaluation=Evaluation(task=TASK, engine=ENGINE, rows=512),
        checkpoints=Checkpoints(every=25),
    )


def tiny_rl() -> Reinforce:
    """Steps 2 and 3: GRPO with Open-R1's rewards, its forms without the line breaks."""
    return Reinforce(
        name="rl",
        task=TASK,
        steps=40,
        prompts=32,
        group=8,
        engine=ENGINE,
        reward=weighted(
            accuracy=(1.0, numbers.accuracy),
            format=(1.0, think_answer),
            tags=(1.0, tag_count),
        ),
        advantage=grpo,
        loss=partial(policy_loss, clip_low=0.2, clip_high=0.2),
        weight=sequence_mean,
        optimizer=partial(adamw, learning_rate=1e-4, warmup=4, final=0.1),
        row_length=144,
        micro_rows=8,
        evaluate_every=20,
        evaluate_rows=512,
        checkpoints=Checkpoints(every=20),
    )
