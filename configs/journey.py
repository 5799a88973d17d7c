"""Journey learning at its published size: SFT on 327 samples that show failed attempts too.

    python -m r1jax.train --config configs/journey.py
    python -m r1jax.train --config configs/journey.py:shortcut
    python -m r1jax.report runs/journey runs/journey_shortcut

The default learns from the whole way: wrong steps, how they were found out, and back. `shortcut`
learns from the right path alone, to the same problems.

Needs: models/deepseek-math-7b-base; data/journey.jsonl and data/shortcut.jsonl with `prompt` and
`answer`. The paper makes the first from trees over PRM800K, searched depth first with backtracking,
and tells the search as one long thought.

Hardware: 8 GPUs of 80 GB (ours; 16 bytes a weight are 111 GB). Hours, an estimate: 8 * N * T FLOPs,
N = 6.9e9, T = 3 * 327 * 2,000 tokens (a mean length that we assume): 1.1e17, half a minute at 40%
of 8 x 989 TFLOP/s; loading and saving take longer.

Published (abstract of arXiv:2410.18982): 8 points of MATH more than shortcut learning.

Not yet run at this size.

Numbers: the abstract has the 327 samples. Rate, passes, batch and length are not published in it:
those here are ours.
"""

from dataclasses import replace
from functools import partial

from r1jax.algos.losses import cross_entropy
from r1jax.data.sources import jsonl
from r1jax.data.tokenizer import from_folder
from r1jax.settings import Mesh, Run, Supervised, dense
from r1jax.state import adamw

NUM_SAMPLES, EPOCHS, BATCH = 327, 3, 8  # a batch of packed rows


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
        tokenizer=partial(from_folder, folder),
        weights=folder,
        stages=(sft("data/journey.jsonl"),),
        mesh=Mesh(data=1, fsdp=-1),
    )


def shortcut() -> Run:
    """The same, on the right path alone."""
    return replace(config(), name="journey_shortcut", stages=(sft("data/shortcut.jsonl"),))


def sft(file: str) -> Supervised:
    """As many updates for both, so that they see as many problems, not as many tokens."""
    return Supervised(
        name="sft",
        source=partial(jsonl, file, need=("prompt", "answer")),
        steps=EPOCHS * NUM_SAMPLES // BATCH,
        batch_rows=BATCH,
        row_length=4096,
        micro_rows=BATCH,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=1e-5, warmup=5, final=0.1),
    )
