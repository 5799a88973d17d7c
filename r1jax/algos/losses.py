"""Losses: log-probabilities and a packed `Batch` in, a scalar and a dict of scalars out.

A loss is a plain sum over tokens: `batch.weight` carries the normaliser. So the losses, the
metrics and the gradients of the micro-batches of an update add up to those of the whole update.
Metrics are sums over the masked tokens divided by `batch.num_tokens`, the count over the whole
update; added up over its micro-batches they are means over tokens.

Where `batch.mask` is False nothing is read: `logp` there may be anything, nan included, and gets
a gradient of exactly 0.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax.algos.kl import k3
from r1jax.types import Batch

Scalar = Float[Array, ""]
Kl = Callable[[Float[Array, "B T"], Float[Array, "B T"]], Float[Array, "B T"]]

# exp of more than 88 is inf in float32, and inf * 0 is nan. Between policies that are one rollout
# apart a log-ratio of 20 (5e8 times as likely) never happens in earnest; verl has the same bound.
MAX_LOG_RATIO = 20.0


def policy_loss(
    logp: Float[Array, "B T"],
    batch: Batch,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    kl: Kl | None = None,
    kl_weight: float = 0.0,
) -> tuple[Scalar, dict[str, Scalar]]:
    """The clipped policy loss of PPO and GRPO, and its metrics.

    sum(weight * (-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
                  + kl_weight * kl(logp, logp_ref)))

    with ratio = exp(logp - logp_old), token by token. Where a batch has no `logp_old`, the
    sampler's `logp_rollout` stands for it. `clip_low` >= 1 never clips from below (R1 trains with
    10 for both). `kl` is one of `r1jax.algos.kl`.

    Metrics: `loss`; `ratio`, its mean; `clipped`, the share of tokens where the clip is active,
    that is, whose policy gradient is 0; `kl_old`, k3 to the old policy; and `kl`, k3 to the
    reference, where there is one.

    Raises:
      ValueError: the batch lacks `advantage`, both of `logp_old` and `logp_rollout`, or
        `logp_ref` where `kl` is given; or `kl_weight` without `kl`.

    Source: PPO, arXiv:1707.06347; GRPO, arXiv:2402.03300, eq. 3; two bounds: DAPO,
    arXiv:2503.14476.
    """
    old = batch.logp_rollout if batch.logp_old is None else batch.logp_old
    if batch.advantage is None or old is None:
        raise ValueError("policy_loss needs advantage and logp_old or logp_rollout in the batch")
    if kl is None and kl_weight:
        raise ValueError(f"kl_weight={kl_weight} needs kl, e.g. r1jax.algos.kl.k3")
    if kl is not None and batch.logp_ref is None:
        raise ValueError("kl needs the reference's log-probs, got logp_ref=None in the batch")

    # Masked before use, not only in the sums: they alone would leave gradients of 0 * nan.
    logp = jnp.where(batch.mask, logp, 0.0)
    ratio = jnp.exp(jnp.clip(logp - old, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    kept = ratio * batch.advantage
    bounded = jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * batch.advantage
    token_loss = -jnp.minimum(kept, bounded)
    metrics = {
        "ratio": mean_over_tokens(ratio, batch),
        "clipped": mean_over_tokens(bounded < kept, batch),
        "kl_old": mean_over_tokens(k3(logp, old), batch),
    }
    if batch.logp_ref is not None:
        metrics["kl"] = mean_over_tokens(k3(logp, batch.logp_ref), batch)
        if kl is not None:
            token_loss = token_loss + kl_weight * kl(logp, batch.logp_ref)
    loss = weighted_sum(token_loss, batch)
    return loss, {"loss": loss, **metrics}


def cross_entropy(logp: Float[Array, "B T"], batch: Batch) -> tuple[Scalar, dict[str, Scalar]]:
    """Minus the weighted sum of log-probabilities; in nats per token where weights are 1 / tokens.

    Metrics: `loss`.
    """
    loss = weighted_sum(-logp, batch)
    return loss, {"loss": loss}


def weighted_sum(x: Float[Array, "B T"], batch: Batch) -> Scalar:
    """The sum over the masked tokens of weight * x."""
    weight = jnp.where(batch.mask, batch.weight, 0.0)
    return jnp.sum(weight * jnp.where(batch.mask, x, 0.0))


def mean_over_tokens(x: Array, batch: Batch) -> Scalar:
    """The sum of x over this batch's masked tokens, divided by the update's number of tokens."""
    total = jnp.sum(jnp.where(batch.mask, x.astype(jnp.float32), 0.0))
    return total / jnp.maximum(batch.num_tokens, 1.0)  # no tokens at all: 0
