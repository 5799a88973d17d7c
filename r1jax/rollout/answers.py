"""Between texts and the engine's arrays: prompts in, answers out."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from r1jax.types import Prompts, Rollout


def encode_prompts(
    tokenizer: Any, texts: Sequence[str], *, max_prompt: int, index: Sequence[int]
) -> Prompts:
    """Host arrays of the prompts' token ids, padded to `max_prompt`. `index` goes into the keys.

    Raises:
      ValueError: a prompt has no tokens, or more than `max_prompt`.
    """
    encoded = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    tokens = np.zeros((len(texts), max_prompt), np.int32)
    for i, ids in enumerate(encoded):
        if not 1 <= len(ids) <= max_prompt:
            raise ValueError(
                f"prompt {texts[i][:60]!r} has {len(ids)} tokens, "
                f"engine.max_prompt allows 1 to {max_prompt}"
            )
        tokens[i, : len(ids)] = ids
    length = np.asarray([len(ids) for ids in encoded], np.int32)
    return Prompts(tokens=tokens, length=length, index=np.asarray(index, np.int32))


def decode_answers(tokenizer: Any, rollout: Rollout) -> list[str]:
    """The text of each answer of a rollout on the host, without end and padding tokens."""
    ids = [
        row[:length].tolist()
        for row, length in zip(rollout.answer, rollout.answer_length, strict=True)
    ]
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids that end an answer.

    Raises:
      ValueError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__} has no end token "
            f"(eos_token): no answer could end"
        )
    return (tokenizer.eos_token_id,)


def to_host(rollout: Rollout) -> Rollout:
    """The rollout as numpy arrays; waits for the device."""
    return jax.tree.map(np.asarray, jax.device_get(rollout))
