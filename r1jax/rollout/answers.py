"""Between texts and the engine's arrays, prompts in, answers out; and rollouts on the host."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool

from r1jax.types import Prompts, Rollout

OF_PROMPTS = ("prompt", "prompt_length", "prompt_choice")
COUNTS = ("decode_steps", "slot_steps", "drafted", "accepted")  # one number for each device


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
    """The rollout as numpy arrays, without the empty prompts that filled it up; waits for devices.

    `decode_steps` is the longest device's; other counts are summed over devices.
    """
    rollout = jax.tree.map(np.asarray, jax.device_get(rollout))
    counts = {
        name: np.max(value) if name == "decode_steps" else np.sum(value, dtype=value.dtype)
        for name, value in vars(rollout).items()
        if name in COUNTS and value is not None
    }
    return take(rollout.replace(**counts), rollout.prompt_length > 0)


def take(rollout: Rollout, prompts: Bool[np.ndarray, " N"]) -> Rollout:
    """The chosen prompts of a rollout on the host, with all their answers.

    Counts of steps and drafts stay: the work was done for all of them.

    Raises:
      ValueError: there are not as many choices as prompts, or as many answers to each prompt.
    """
    if len(prompts) != len(rollout.prompt):
        raise ValueError(f"need a choice for each of {len(rollout.prompt)} prompts, got {prompts}")
    group, rest = divmod(len(rollout.answer), len(rollout.prompt))
    if rest:
        raise ValueError(
            f"need as many answers to each prompt, got B={len(rollout.answer)}, N={len(prompts)}"
        )
    answers = np.repeat(np.asarray(prompts, bool), group)
    fields = {
        name: value[prompts if name in OF_PROMPTS else answers]
        for name, value in vars(rollout).items()
        if value is not None and np.ndim(value)
    }
    return rollout.replace(**fields)


def fill_up(rollout: Rollout, prompts: int) -> Rollout:
    """The rollout on the host with empty prompts after its own, `prompts` in all.

    Answers to them have no tokens, their rewards are nan as of any that could not be judged, and
    `take` of the prompts that have a length gives the rollout back.

    Raises:
      ValueError: it has more prompts than that, or not as many answers to each.
    """
    own = len(rollout.prompt)
    group, rest = divmod(len(rollout.answer), own)
    if rest or own > prompts:
        raise ValueError(
            f"need as many answers to each of at most {prompts} prompts, "
            f"got B={len(rollout.answer)}, N={own}"
        )
    fields = {
        name: with_rows(
            value,
            prompts if name in OF_PROMPTS else prompts * group,
            value=np.nan if name in ("reward", "parts") else 0.0,
        )
        for name, value in vars(rollout).items()
        if value is not None and np.ndim(value)
    }
    return rollout.replace(**fields)


def with_rows(x: np.ndarray, rows: int, *, value: float = 0.0) -> np.ndarray:
    """The array with rows of one number after its own, `rows` in all."""
    return np.pad(
        x,
        [(0, rows - len(x)), *((0, 0),) * (x.ndim - 1)],
        constant_values=np.asarray(value, x.dtype),
    )


def concatenate(rollouts: Sequence[Rollout]) -> Rollout:
    """One rollout of all prompts, in order; answers are padded with 0 to the longest width.

    Counts are added up.

    Raises:
      ValueError: there is none, or a field is in some of them only.
    """
    if not rollouts:
        raise ValueError("need at least one rollout, got none")
    shapes = {jax.tree.structure(rollout) for rollout in rollouts}
    if len(shapes) > 1:
        raise ValueError("rollouts can be put together only if they have the same fields")
    return jax.tree.map(_joined, *rollouts)


def _joined(*parts: np.ndarray | np.generic) -> np.ndarray:
    arrays: list[np.ndarray] = [np.asarray(part) for part in parts]
    if not arrays[0].ndim:
        return np.asarray(np.stack(arrays).sum(axis=0, dtype=arrays[0].dtype))
    if arrays[0].ndim > 1:
        width = max(array.shape[1] for array in arrays)
        arrays = [
            np.pad(array, ((0, 0), (0, width - array.shape[1]), *((0, 0),) * (array.ndim - 2)))
            for array in arrays
        ]
    return np.concatenate(arrays)
