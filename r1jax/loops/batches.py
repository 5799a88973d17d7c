"""From a rollout on the host to the micro-batches of an update."""

from collections.abc import Mapping

import jax
import numpy as np

from r1jax.data.packing import RolloutPacking, pack_rollout, place_rollouts
from r1jax.types import Batch, Rollout


def pack_answers(
    rollout: Rollout,
    which: np.ndarray,
    extras: Mapping[str, np.ndarray],
    *,
    row_length: int,
    micro_rows: int,
) -> tuple[RolloutPacking, list[Batch]]:
    """Answers `which` of a rollout (host arrays), packed, as micro-batches of `micro_rows` rows.

    A prompt is computed once for all of its answers that lie in one row. `extras` are per-token
    fields of Batch, [len(which), A]; `weight` must be one of them.
    """
    group = len(rollout.answer) // len(rollout.prompt)
    packing = pack_rollout(
        rollout.prompt_length,
        rollout.answer_length[which],
        row_length,
        prompt_of=which // group,
    )
    fields = place_rollouts(
        packing,
        prompt=rollout.prompt,
        answer=rollout.answer[which],
        extras=extras,
        num_rows=-(-packing.answers.num_rows // micro_rows) * micro_rows,
    )
    return packing, cut(Batch(**fields), micro_rows)


def cut(batch: Batch, micro_rows: int) -> list[Batch]:
    """The batch's rows, `micro_rows` at a time."""
    rows = batch.tokens.shape[0]
    return [
        jax.tree.map(lambda x, i=i: x if x.ndim == 0 else x[i : i + micro_rows], batch)
        for i in range(0, rows, micro_rows)
    ]
