"""Which prompts and which tokens an update learns from. On the host, on numpy arrays.

Prompts: `has_signal` and `within_band` say which groups are worth an update. Tokens: a choice of
them is (rollout) -> [B, A], True where a token counts; see `advantages.on_tokens`.
"""

import numpy as np
from jaxtyping import Bool, Float

from r1jax.types import Rollout

# --------------------------------------------------------------------------- prompts


def has_signal(reward: Float[np.ndarray, " B"], group: int) -> Bool[np.ndarray, " N"]:
    """True for groups with at least two different rewards; nan (could not be judged) is no reward.

    In any other group all advantages are 0.

    Raises:
      ValueError: B is not a multiple of `group`.

    Source: DAPO's dynamic sampling, arXiv:2503.14476, eq. 11.
    """
    rewards = _groups(reward, group)
    judged = ~np.isnan(rewards)
    highest = np.where(judged, rewards, -np.inf).max(axis=1)
    return highest > np.where(judged, rewards, np.inf).min(axis=1)


def within_band(
    accuracy: Float[np.ndarray, " B"], group: int, *, low: float = 0.2, high: float = 0.8
) -> Bool[np.ndarray, " N"]:
    """True for groups whose mean accuracy is in [low, high]; nan is left out of the mean.

    A group of which nothing could be judged is out.

    Raises:
      ValueError: B is not a multiple of `group`.

    Source: PRIME, arXiv:2502.01456: prompts too easy or too hard are filtered, 0.2
    to 0.8 in its scripts.
    """
    accuracies = _groups(accuracy, group)
    judged = ~np.isnan(accuracies)
    # In float64: a mean of float32 numbers may fall beside a bound that it should meet.
    total = np.where(judged, accuracies, 0).sum(axis=1, dtype=np.float64)
    mean = total / np.maximum(judged.sum(axis=1), 1)
    slack = 1e-6
    return judged.any(axis=1) & (mean >= low - slack) & (mean <= high + slack)


# --------------------------------------------------------------------------- tokens


def top_entropy(rollout: Rollout, *, share: float = 0.2) -> Bool[np.ndarray, "B A"]:
    """True on the `share` of a rollout's tokens at which the policy was least sure.

    Those are the tokens whose entropy is at least the (1 - share) quantile over all tokens of
    all answers; with ties there may be more.

    Raises:
      ValueError: the rollout has no entropy, or `share` is not in (0, 1].

    Source: arXiv:2506.01939: the top 20% carry the learning.
    """
    if rollout.entropy is None:
        raise ValueError("top_entropy needs the tokens' entropies, got entropy=None")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    mask = _tokens(rollout)
    if not mask.any():
        return mask
    entropy = np.asarray(rollout.entropy)
    return mask & (entropy >= np.quantile(entropy[mask], 1 - share))


def finished(rollout: Rollout) -> Bool[np.ndarray, "B A"]:
    """True on the tokens of answers that ended by themselves: DAPO's overlong filtering.

    Source: DAPO, arXiv:2503.14476, section 3.4.
    """
    return _tokens(rollout) & np.asarray(rollout.finished)[:, None]


def _tokens(rollout: Rollout) -> Bool[np.ndarray, "B A"]:
    columns = np.arange(rollout.answer.shape[1])
    return columns[None, :] < np.asarray(rollout.answer_length)[:, None]


def _groups(x: Float[np.ndarray, " B"], group: int) -> Float[np.ndarray, "N G"]:
    if group < 1 or len(x) % group:
        raise ValueError(f"need whole groups, got B={len(x)}, group={group}")
    return np.asarray(x).reshape(-1, group)
