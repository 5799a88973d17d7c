"""What a critic learns: PPO's value network, and PRIME's implicit process reward model.

Each is a loss as in `r1jax.algos.losses`, whose first argument is what the critic says of each
token, [B, T], and that reads nothing where the mask is False; what it is to learn from a rollout;
and what its words are to an advantage function: `rollout.value` or `rollout.process`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from r1jax.algos.advantages import penalised_reward, per_token
from r1jax.algos.losses import (
    Metrics,
    Number,
    Scalar,
    mean_over_tokens,
    only_masked,
    weighted_sum,
)
from r1jax.algos.segments import sequence_sum
from r1jax.types import Batch, Rollout

# --------------------------------------------------------------------------- value network


def value_loss(
    value: Float[Array, "B T"], batch: Batch, *, clip: Number | None = 0.2
) -> tuple[Scalar, Metrics]:
    """Half the squared error to the return, the larger of two: as it is, and with a step cut.

    sum(weight * max((value - target)^2, (cut - target)^2) / 2),
    cut = clip(value, value_old - clip, value_old + clip)

    With `clip=None` it is the plain squared error. `target` are the returns and `value_old` what
    the critic said before the first update.

    Metrics: `loss`; `value`, the mean; `value_clipped`, the share of tokens without gradient.

    Raises:
      ValueError: the batch lacks `target`, or `value_old` where there is a clip.

    Source: PPO's first implementation (openai/baselines, ppo2); the paper has the plain error.
    """
    value, batch = only_masked(value, batch)
    if batch.target is None:
        raise ValueError("value_loss needs the returns, got target=None in the batch")
    error = jnp.square(value - batch.target)
    clipped = jnp.zeros_like(batch.mask)
    if clip is not None:
        if batch.value_old is None:
            raise ValueError("value_loss with a clip needs value_old in the batch, got None")
        # Not value_old + clip(value - value_old): rounded, that is not the value within the bounds.
        cut = jnp.clip(value, batch.value_old - clip, batch.value_old + clip)
        bounded = jnp.square(cut - batch.target)
        clipped = bounded > error
        error = jnp.maximum(error, bounded)
    loss = weighted_sum(0.5 * error, batch)
    return loss, {
        "loss": loss,
        "value": mean_over_tokens(value, batch),
        "value_clipped": mean_over_tokens(clipped, batch),
    }


def as_value(
    rollout: Rollout, score: Float[np.ndarray, "B A"], first: Float[np.ndarray, "B A"] | None
) -> Rollout:
    """The rollout with the critic's scores as values; what its first weights say is not read."""
    del first
    return rollout.replace(value=score)


def explained_variance(
    value: Float[Array, "B A"], target: Float[Array, "B A"], mask: Bool[Array, "B A"]
) -> Scalar:
    """1 - var(target - value) / var(target) over the masked tokens of a whole rollout.

    1 is a perfect critic, 0 one that is no better than a constant, below 0 a worse one. Where the
    targets do not vary there is nothing to explain, and it is 0.
    """
    spread = _variance(target, mask)
    rest = _variance(target - value, mask)
    return jnp.where(spread > 0, 1.0 - rest / jnp.where(spread > 0, spread, 1.0), 0.0)


# --------------------------------------------------------------------------- process rewards


def implicit_prm_loss(
    logp: Float[Array, "B T"], batch: Batch, *, beta: float = 0.05
) -> tuple[Scalar, Metrics]:
    """Cross-entropy between the outcome of an answer and sigmoid(beta * its summed log-ratio).

    sum(weight * bce(target, sigmoid(beta * sum_t(logp_t - logp_ref_t))))

    `target` is the answer's outcome, 0 to 1, at each of its tokens; weights that add up to
    1 / answers in every answer (`weights.sequence_mean`) make it the mean over answers. A model
    trained so gives beta * (logp - logp_ref) as the reward of each token.

    Metrics: `loss`; `accuracy`, by weight the share of answers on the right side of one half.

    Raises:
      ValueError: the batch lacks `target` or `logp_ref`.

    Source: PRIME, arXiv:2502.01456; beta 0.05 in its released scripts.
    """
    logp, batch = only_masked(logp, batch)
    if batch.target is None or batch.logp_ref is None:
        raise ValueError("implicit_prm_loss needs target and logp_ref in the batch")
    score = beta * sequence_sum(logp - batch.logp_ref, batch)
    loss = weighted_sum(binary_cross_entropy(score, batch.target), batch)
    right = (score > 0) == (batch.target > 0.5)
    return loss, {"loss": loss, "accuracy": weighted_sum(right.astype(jnp.float32), batch)}


def as_process(
    rollout: Rollout,
    score: Float[np.ndarray, "B A"],
    first: Float[np.ndarray, "B A"] | None,
    *,
    beta: float = 0.05,
) -> Rollout:
    """The rollout with beta * (score - first) as the reward of each token.

    Both are log-probabilities of the tokens, of the process reward model as it is and as it began;
    an answer's rewards add up to beta * the log-ratio of the whole answer.

    Raises:
      ValueError: the first weights' log-probabilities were not kept.

    Source: PRIME, arXiv:2502.01456.
    """
    if first is None:
        raise ValueError("as_process needs the critic's first weights: reference=True")
    return rollout.replace(process=beta * (score - first))


def outcomes(rollout: Rollout) -> Float[Array, "B A"]:
    """The reward of an answer at each of its tokens, to be learned; nan if it was not judged.

    Raises:
      ValueError: the rollout has no rewards.
    """
    return per_token(penalised_reward(rollout), rollout)


def binary_cross_entropy(
    score: Float[Array, "..."], target: Float[Array, "..."]
) -> Float[Array, "..."]:
    """-target * log(sigmoid(score)) - (1 - target) * log(1 - sigmoid(score))."""
    return jax.nn.softplus(score) - target * score


def _variance(x: Float[Array, "B A"], mask: Bool[Array, "B A"]) -> Scalar:
    count = jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    x = jnp.where(mask, x, 0.0)
    gap = jnp.where(mask, x - x.sum() / count, 0.0)
    # Equal numbers may miss their mean by an ulp.
    low = jnp.where(mask, x, jnp.inf).min()
    high = jnp.where(mask, x, -jnp.inf).max()
    return jnp.where(high > low, jnp.square(gap).sum() / count, 0.0)
