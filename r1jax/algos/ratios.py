"""How much likelier one policy makes the tokens than another: by token, or by sequence.

A ratio takes the log-ratios of tokens, and gives the log of what a loss is to be multiplied by.
The corrections make weights of the ratio of trainer to sampler, which have the same parameters
but not the same arithmetic. No gradient flows through those.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax.algos.segments import sequence_mean, sequence_sum
from r1jax.types import Batch

Ratio = Callable[[Float[Array, "B T"], Batch], Float[Array, "B T"]]

# exp of more than 88 is inf in float32, and inf * 0 is nan. Between policies that are one rollout
# apart a log-ratio of 20 (5e8 times as likely) never happens in earnest; verl has the same bound.
MAX_LOG_RATIO = 20.0


def by_token(log_ratio: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
    """Each token's own ratio, as in PPO and GRPO."""
    return log_ratio


def by_sequence(log_ratio: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
    """The geometric mean of the ratios of a sequence's tokens, at each of them.

    Source: GSPO, arXiv:2507.18071, eq. 7: s_i = (pi(y_i) / pi_old(y_i)) ** (1 / |y_i|).
    """
    return sequence_mean(log_ratio, batch)


def by_sequence_per_token(log_ratio: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
    """`by_sequence` in value; its gradient goes to each token alone.

    So advantages may differ from token to token. Where they do not, loss and gradient are those
    of `by_sequence`, if the weights are equal within a sequence.

    Source: GSPO-token, arXiv:2507.18071, eq. 14: s_it = sg(s_i) * pi(y_it) / sg(pi(y_it)).
    """
    mean = jax.lax.stop_gradient(sequence_mean(log_ratio, batch))
    return mean + log_ratio - jax.lax.stop_gradient(log_ratio)


def by_product(log_ratio: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
    """The ratio of the whole sequences, at each of their tokens: unbiased, of high variance."""
    return sequence_sum(log_ratio, batch)


def exponential(log_ratio: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """exp, its argument held within MAX_LOG_RATIO of 0."""
    return jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO))


# --------------------------------------------------------------------------- sampler and trainer


def truncated(batch: Batch, *, cap: float = 2.0, ratio: Ratio = by_token) -> Float[Array, "B T"]:
    """min(trainer / sampler, cap): what the policy's loss at a token is multiplied by.

    Raises:
      ValueError: the batch lacks `logp_old` or `logp_rollout`.

    Source: F. Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL
    Training" (2025); cap 2.0 as in TRL's paper index.
    """
    return jnp.minimum(_trainer_over_sampler(batch, ratio), cap)


def masked(
    batch: Batch, *, low: float = 0.5, high: float = 5.0, ratio: Ratio = by_token
) -> Float[Array, "B T"]:
    """trainer / sampler where it is within [low, high], and 0 elsewhere.

    With `ratio=by_sequence` or `by_product` whole sequences are left out.

    Raises:
      ValueError: the batch lacks `logp_old` or `logp_rollout`.

    Source: IcePop, arXiv:2510.18855; 0.5 and 5 are its bounds.
    """
    value = _trainer_over_sampler(batch, ratio)
    return jnp.where((value >= low) & (value <= high), value, 0.0)


def _trainer_over_sampler(batch: Batch, ratio: Ratio) -> Float[Array, "B T"]:
    if batch.logp_old is None or batch.logp_rollout is None:
        raise ValueError("a correction needs both logp_old and logp_rollout in the batch")
    return exponential(ratio(batch.logp_old - batch.logp_rollout, batch))
