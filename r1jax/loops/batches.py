"""From a rollout on the host to the micro-batches of an update."""

from collections.abc import Mapping

import jax
import numpy as np

from r1jax.data.packing import RolloutPacking, pack_rollout, place_choices, place_rollouts
from r1jax.types import Batch, Rollout


def pack_answers(
    rollout: Rollout,
    which: np.ndarray,
    extras: Mapping[str, np.ndarray],
    *,
    row_length: int,
    micro_rows: int,
    share_prompts: bool = True,
) -> tuple[RolloutPacking, list[Batch]]:
    """Answers `which` of a rollout (host arrays), packed, as micro-batches of `micro_rows` rows.

    A prompt is computed once for all of its answers that lie in one row; without `share_prompts`
    each answer has its own, in one segment with it. `extras` are per-token fields of Batch,
    [len(which), A]; `weight` must be one of them. A rollout's routing comes with its tokens.
    """
    owner = which // (len(rollout.answer) // len(rollout.prompt))
    of_prompts = {"prompt": rollout.prompt, "length": rollout.prompt_length}
    if rollout.prompt_choice is not None:
        of_prompts["choice"] = rollout.prompt_choice
    if not share_prompts:
        of_prompts = {name: values[owner] for name, values in of_prompts.items()}
        owner = np.arange(len(which))
    answer_length = rollout.answer_length[which]
    packing = pack_rollout(of_prompts["length"], answer_length, row_length, prompt_of=owner)
    num_rows = -(-packing.answers.num_rows // micro_rows) * micro_rows
    fields = place_rollouts(
        packing,
        prompt=of_prompts["prompt"],
        answer=rollout.answer[which],
        extras=extras,
        num_rows=num_rows,
    )
    if rollout.answer_choice is not None:
        fields["choice"] = place_choices(
            packing,
            prompt=of_prompts["choice"],
            answer=rollout.answer_choice[which],
            num_rows=num_rows,
        )
    if not share_prompts:  # prompts are segments 1, 3, ... and their answers 2, 4, ...
        fields["segment"] = (fields["segment"] + 1) // 2
        del fields["prompt"], fields["before"]
    return packing, cut(Batch(**fields), micro_rows)


def cut(batch: Batch, micro_rows: int) -> list[Batch]:
    """The batch's rows, `micro_rows` at a time."""
    rows = batch.tokens.shape[0]
    return [
        jax.tree.map(lambda x, i=i: x if x.ndim == 0 else x[i : i + micro_rows], batch)
        for i in range(0, rows, micro_rows)
    ]
