"""Estimates of KL(policy || reference) from tokens that the policy sampled.

Each takes the log-probabilities of the sampled tokens under both models and gives one number per
token. Its mean over samples estimates the KL; its gradient is another matter, and differs:

  in a loss     the gradient of k1 has mean 0: as a loss term k1 adds noise and nothing else. That
                of k2 has the gradient of KL(policy || reference) as its mean; that of k3 (GRPO)
                the gradient of KL(reference || policy), the other direction.
  in a reward   no gradient flows through the estimate, and k1 gives the gradient of
                KL(policy || reference).

That is for samples of the policy itself; after several updates on one rollout it holds roughly.
Multiplied by the ratio pi / pi_old with its gradient (`policy_loss(kl_unbiased=True)`), k1 and k3
are unbiased for samples of the old policy, and in a loss their gradient is that of
KL(policy || reference).

Source: J. Schulman, "Approximating KL divergence" (2020), for the three estimates; DeepSeek-V3.2,
arXiv:2512.02556, for the ratio.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def k1(logp: Float[Array, "..."], logp_ref: Float[Array, "..."]) -> Float[Array, "..."]:
    """log(policy / reference): unbiased, of either sign."""
    return logp - logp_ref


def k2(logp: Float[Array, "..."], logp_ref: Float[Array, "..."]) -> Float[Array, "..."]:
    """Half the squared log-ratio: biased, never negative."""
    return 0.5 * jnp.square(logp - logp_ref)


def k3(logp: Float[Array, "..."], logp_ref: Float[Array, "..."]) -> Float[Array, "..."]:
    """reference / policy - log(reference / policy) - 1: unbiased, never negative.

    It grows as reference / policy: one token that the policy has all but given up can outweigh
    all the others. Nothing is clamped here.

    Source: DeepSeekMath, arXiv:2402.03300, eq. 4.
    """
    gap = logp_ref - logp
    # Not exp(gap) - 1: where the two models nearly agree it has no correct digit left.
    return jnp.expm1(gap) - gap
