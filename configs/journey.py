"""Journey learning at its published size: SFT on 327 samples that show failed attempts too.

    python -m r1jax.train --config configs/journey.py
    python -m r1jax.train --config configs/journey.py:shortcut
    python -m r1jax.report runs/journey runs/journey_shortcut

First the base learns the form from right solutions, one pass. The default then learns from the
whole way: wrong steps, how they were found out, and back. `shortcut` learns from the right path
alone, to the same problems. (The paper goes on with DPO, which is not here.)

`tiny` and `tiny_shortcut` are that on two CPU cores, from the base of countdown_tiny.py:

    python -m r1jax.train --config configs/journey.py:tiny --after runs/countdown_tiny
    python -m r1jax.train --config configs/journey.py:tiny_shortcut --after runs/countdown_tiny

(Without `--after` each makes the base itself.) The base answers 512 problems eight times. To each
that it got right once, one text is made: of its failed attempts and then the right one, or of the
right one alone. Shown: at equal problems and updates the whole way ends higher. Its student goes on
until it is right; that of the shortcut tries less often and takes wrong results for right ones.
The figures are in BENCHMARKS.md. All that follows is about the full size.

Needs: models/deepseek-math-7b-base; data/prm800k.jsonl, one right solution to each of 6,998
problems of PRM800K; data/journey.jsonl (the data set GAIR/o1-journey) and data/shortcut.jsonl; all
with `prompt` and `answer`. The paper makes the 327 from trees over PRM800K, searched depth first
with backtracking, and tells the search as one long thought.

Hardware is not published; 8 H100 of 80 GB here (`--check 8`: 18 GB on each). Hours, an estimate:
8 * N * T FLOPs, N = 6.9e9, T = 6,998 * 400 + 3 * 327 * 2,000 = 4.8e6 tokens (mean lengths that we
assume): 2.6e17, a minute and a half at 40% of 8 x 989 TFLOP/s; loading and saving take longer.

Published (arXiv:2410.18982, MATH-500): after the first stage 29.0, with the shortcut 34.8, with the
journey 42.8; where the first stage has 120k samples of Abel instead, 37.2, 38.6 and 47.0.

Not yet run at this size.

Numbers: the project's account of its training (gair-nlp.github.io/walnut-plan): 6,998 samples once,
then 327 three times. Rate, batch and length are not published: those here are ours.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from r1jax.algos.losses import cross_entropy
from r1jax.data import countdown, tokenizer
from r1jax.data.passes import keep, retell
from r1jax.data.sources import jsonl
from r1jax.rewards.countdown import accuracy, answer_key, observe
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
    dense,
)
from r1jax.state import adamw

BATCH, LENGTH = 8, 4096  # packed rows in an update, and tokens in a row
RIGHT, WHOLE = 400, 2_000  # tokens of a right path and of a whole way, in the mean: assumed


def config() -> Run:
    """SFT on the whole way to an answer."""
    folder = "models/deepseek-math-7b-base"
    return Run(
        name="journey",
        model=dense(  # as in its config.json
            vocab_size=102_400,
            dim=4096,
            num_layers=30,
            num_heads=32,
            num_kv_heads=32,
            mlp_dim=11_008,
            max_length=4096,
            tied=False,
            dtype="bfloat16",
            remat="layer",
        ),
        tokenizer=partial(tokenizer.from_folder, folder),
        weights=folder,
        stages=(form(), sft("data/journey.jsonl", tokens=WHOLE)),
        mesh=Mesh(data=1, fsdp=-1),
    )


def shortcut() -> Run:
    """The same, on the right path alone."""
    stages = (form(), sft("data/shortcut.jsonl", tokens=RIGHT))
    return replace(config(), name="journey_shortcut", stages=stages)


def form() -> Supervised:
    """Right solutions, once: how an answer looks."""
    return passes("form", "data/prm800k.jsonl", tokens=6_998 * RIGHT)


def sft(file: str, *, tokens: int) -> Supervised:
    """Three passes over 327 samples, so that both learn from as many problems."""
    return passes("sft", file, tokens=3 * 327 * tokens)


def passes(name: str, file: str, *, tokens: int) -> Supervised:
    """SFT on so many tokens of a file, again and again from its start."""
    return Supervised(
        name=name,
        source=partial(jsonl, file, need=("prompt", "answer")),
        steps=tokens // (BATCH * LENGTH),
        batch_rows=BATCH,
        row_length=LENGTH,
        micro_rows=BATCH,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=1e-5, warmup=5, final=0.1),
    )


# --------------------------------------------------------------------------- tiny

WORLD = {"counts": (3,), "low": 1, "high": 20, "operators": "+-"}
ENGINE = Engine(max_prompt=8, max_new=136, slots=64)


def tiny() -> Run:
    """A base, texts of the whole way, SFT on them."""
    return tiny_run("journey_tiny", countdown.journey)


def tiny_shortcut() -> Run:
    """The same, on the right path alone."""
    return tiny_run("journey_tiny_shortcut", countdown.shortcut)


def tiny_run(name: str, tell: Callable[..., str]) -> Run:
    """SFT on texts that `tell` makes of the base's own answers: as many updates for both."""
    return Run(
        name=name,
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
        stages=(tiny_base(), tiny_texts(tell), tiny_sft()),
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


def tiny_texts(tell: Callable[..., str]) -> Build:
    """The base's answers to 512 problems, eight to each, made into one text for each problem."""
    return Build(
        name="texts",
        source=partial(countdown.rows, "train", num=512, seed=3, **WORLD),
        prompt=countdown.short_prompt,
        answers=Sampled(engine=ENGINE),
        samples=8,
        accuracy=accuracy,
        passes={
            "careless": partial(keep, where=careful),
            "told": partial(retell, tell=tell),
        },
    )


def careful(row: Mapping[str, Any]) -> bool:
    """Whether the sums, the verdicts and the use of the numbers in an answer are all right."""
    seen = observe(row["row"], row["answer"])
    return all(seen.get(name) == 1.0 for name in ("right_sums", "right_verdicts", "right_numbers"))


def tiny_sft() -> Supervised:
    """A hundred updates, and held-out accuracy before and after."""
    return Supervised(
        name="sft",
        source=Built(stage="texts"),
        steps=100,
        batch_rows=8,
        row_length=144,
        micro_rows=8,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=1e-3, warmup=5, final=0.1),
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
        ),
        checkpoints=Checkpoints(every=20),
    )
