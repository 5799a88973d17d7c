"""The smallest reward model: texts that end in "yes" are better than those that end in "no"."""

from functools import partial

from r1jax.algos import preferences, weights
from r1jax.data import labelled
from r1jax.data.tokenizer import tiny
from r1jax.models import heads
from r1jax.settings import Checkpoints, Head, Run, Supervised, dense
from r1jax.state import adamw


def made_up(num, *, first=0):
    """Pairs (prompt, chosen, rejected) that differ in one word; none comes twice."""
    texts = [(f"make {1 + i % 60} from 1 2", f" {1 + i // 60} + 2 = 5") for i in range(first, num)]
    return [
        {"prompt": prompt, "chosen": text + " yes", "rejected": text + " no"}
        for prompt, text in texts
    ]


def config() -> Run:
    return Run(
        name="preference",
        model=dense(vocab_size=128, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16),
        tokenizer=tiny,
        stages=(
            Supervised(
                name="preference",
                source=partial(made_up, 64),
                texts=labelled.pairs,
                steps=30,
                batch_rows=4,
                row_length=64,
                micro_rows=2,
                head=Head(score=heads.rewards, leaves=heads.reward_leaves),
                loss=preferences.pairwise_loss,
                weight=weights.sequence_mean,
                optimizer=partial(adamw, learning_rate=1e-2),
                checkpoints=Checkpoints(every=30),
                log_every=1,
            ),
        ),
    )
