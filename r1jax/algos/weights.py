"""What each token counts for in the sum that is the loss.

Each takes the mask of ALL answers of one update, True on the tokens that the policy chose, and
gives weights for a plain sum. They run on the host, on numpy arrays, before answers are packed:
that is why the gradient depends neither on packing nor on micro-batches. A row without tokens
gets no weight, but counts as an answer.
"""

import numpy as np
from jaxtyping import Bool, Float


def sequence_mean(mask: Bool[np.ndarray, "B A"]) -> Float[np.ndarray, "B A"]:
    """1 / (B * tokens of the answer): the mean over answers of their mean over tokens.

    A token of a long answer counts for less than one of a short answer.

    Source: GRPO, DeepSeekMath, arXiv:2402.03300, eq. 3.
    """
    mask = np.asarray(mask, bool)
    tokens = np.maximum(mask.sum(axis=1, keepdims=True), 1)
    return (mask / (tokens * max(len(mask), 1))).astype(np.float32)


def sequence_sum(mask: Bool[np.ndarray, "B A"]) -> Float[np.ndarray, "B A"]:
    """1 / B: the mean over answers of the sum over their tokens.

    Source: DeepSeek-R1, arXiv:2501.12948, eq. 1, which has no 1 / tokens, with a ratio by token.
    """
    mask = np.asarray(mask, bool)
    return (mask / max(len(mask), 1)).astype(np.float32)


def token_mean(mask: Bool[np.ndarray, "B A"]) -> Float[np.ndarray, "B A"]:
    """1 / (tokens of all answers): the mean over tokens, whichever answer they are in.

    Source: DAPO, arXiv:2503.14476; TRL's "dapo", and its "bnpo" with one batch to an update.
    """
    mask = np.asarray(mask, bool)
    return (mask / max(mask.sum(), 1)).astype(np.float32)


def constant_budget(mask: Bool[np.ndarray, "B A"], *, budget: int) -> Float[np.ndarray, "B A"]:
    """1 / (B * budget): tokens count the same in every answer and in every update.

    `budget` is a constant number of tokens, as a rule the longest answer that is allowed.

    Raises:
      ValueError: `budget` < 1.

    Source: Dr. GRPO, arXiv:2503.20783.
    """
    if budget < 1:
        raise ValueError(f"budget must be >= 1 token, got {budget}")
    mask = np.asarray(mask, bool)
    return (mask / (budget * max(len(mask), 1))).astype(np.float32)
