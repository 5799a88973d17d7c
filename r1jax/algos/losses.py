"""Losses: log-probabilities and a packed `Batch` in, a scalar and a dict of scalars out.

A loss is a plain sum over tokens: `batch.weight` carries the normaliser. So the losses, the
metrics and the gradients of the micro-batches of an update add up to those of the whole update.
Metrics are sums over the masked tokens divided by `batch.num_tokens`, the count over the whole
update; added up over its micro-batches they are means over tokens.

Where `batch.mask` is False nothing is read: `logp` there may be anything, nan included, and gets
a gradient of exactly 0.

Losses of the policy are here; others, of the same form, in `critics`, `preferences` and
`distillation`. A number such as `kl_weight` may be traced, so that it can change without a new
program being compiled.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax.algos import ratios
from r1jax.algos.kl import k3
from r1jax.algos.ratios import Ratio
from r1jax.types import Batch

Scalar = Float[Array, ""]
Metrics = dict[str, Scalar]
Number = float | Float[Array, ""]
Kl = Callable[[Float[Array, "B T"], Float[Array, "B T"]], Float[Array, "B T"]]
Correction = Callable[[Batch], Float[Array, "B T"]]

PER_TOKEN = (  # the fields of a batch that hold a number for each masked token
    "weight",
    "advantage",
    "logp_rollout",
    "logp_old",
    "logp_ref",
    "entropy",
    "value_old",
    "target",
)


def policy_loss(
    logp: Float[Array, "B T"],
    batch: Batch,
    *,
    ratio: Ratio = ratios.by_token,
    clip_low: Number = 0.2,
    clip_high: Number = 0.2,
    clip_dual: float | None = None,
    correction: Correction | None = None,
    kl: Kl | None = None,
    kl_weight: Number = 0.0,
    kl_unbiased: bool = False,
    entropy_weight: Number = 0.0,
) -> tuple[Scalar, Metrics]:
    """The clipped policy loss of PPO and GRPO, and its metrics.

    sum(weight * (-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
                  + kl_weight * kl(logp, logp_ref) - entropy_weight * entropy))

    with ratio = exp(logp - logp_old), token by token, or what `ratio` makes of the log-ratios
    (one of `r1jax.algos.ratios`; `by_sequence` is GSPO). Where a batch has no `logp_old`, the
    sampler's `logp_rollout` stands for it. `clip_low` >= 1 never clips from below (R1 trains with
    10 for both). With `clip_dual` the loss of a token of negative advantage is at most
    clip_dual * |A|. `correction`, `ratios.truncated` or `ratios.masked`, multiplies the clipped
    term. `kl` is one of `r1jax.algos.kl`; `kl_unbiased` multiplies it by exp(logp - logp_old),
    through which gradient flows.

    Metrics: `loss`; `ratio`, its mean; `clipped`, the share of tokens where a clip is active,
    that is, whose policy gradient is 0; `kl_old`, k3 to the old policy; `kl`, k3 to the
    reference, where there is one; `correction`, its mean, where there is one.

    Raises:
      ValueError: the batch lacks `advantage`, both of `logp_old` and `logp_rollout`, `logp_ref`
        where `kl` is given, what `correction` needs, or `entropy` where it has a weight;
        `kl_weight` or `kl_unbiased` without `kl`; or `clip_dual` <= 1.

    Source: PPO, arXiv:1707.06347; GRPO, arXiv:2402.03300, eq. 3; two bounds: DAPO,
    arXiv:2503.14476; dual clip: arXiv:1912.09729.
    """
    if clip_dual is not None and clip_dual <= 1:
        raise ValueError(f"clip_dual must be > 1 (or None), got {clip_dual}")
    logp, batch = only_masked(logp, batch)
    old, advantage = _needed(batch, "policy_loss")
    value = ratios.exponential(ratio(logp - old, batch))
    kept = value * advantage
    bounded = jnp.clip(value, 1.0 - clip_low, 1.0 + clip_high) * advantage
    objective = jnp.minimum(kept, bounded)
    clipped = bounded < kept
    if clip_dual is not None:
        floor = clip_dual * advantage
        clipped |= (advantage < 0) & (objective < floor)
        objective = jnp.where(advantage < 0, jnp.maximum(objective, floor), objective)
    metrics = {"ratio": mean_over_tokens(value, batch), "clipped": mean_over_tokens(clipped, batch)}
    return _whole_loss(
        logp,
        batch,
        -objective,
        metrics,
        correction=correction,
        kl=kl,
        kl_weight=kl_weight,
        kl_unbiased=kl_unbiased,
        entropy_weight=entropy_weight,
    )


def cispo(
    logp: Float[Array, "B T"],
    batch: Batch,
    *,
    clip_low: Number = 1.0,
    clip_high: Number = 4.0,
    correction: Correction | None = None,
    kl: Kl | None = None,
    kl_weight: Number = 0.0,
    kl_unbiased: bool = False,
    entropy_weight: Number = 0.0,
) -> tuple[Scalar, Metrics]:
    """The policy gradient weighted with clipped ratios: no token loses its gradient.

    sum(weight * (-sg(clip(ratio, 1 - clip_low, 1 + clip_high)) * A * logp + ...))

    with no gradient through the ratio. All else is as in `policy_loss`, whose value this loss
    does not have: near the old policy it has the same gradient. `clipped` is the share of tokens
    whose ratio is outside the bounds. The default has no lower bound, as in the paper, and an
    upper one of 5.

    Raises:
      ValueError: as `policy_loss`.

    Source: CISPO, MiniMax-M1, arXiv:2506.13585, eq. 4-5; ratios up to 5: ScaleRL,
    arXiv:2510.13786.
    """
    logp, batch = only_masked(logp, batch)
    old, advantage = _needed(batch, "cispo")
    value = ratios.exponential(jax.lax.stop_gradient(logp - old))
    bounded = jnp.clip(value, 1.0 - clip_low, 1.0 + clip_high)
    metrics = {
        "ratio": mean_over_tokens(value, batch),
        "clipped": mean_over_tokens(bounded != value, batch),
    }
    return _whole_loss(
        logp,
        batch,
        -bounded * advantage * logp,
        metrics,
        correction=correction,
        kl=kl,
        kl_weight=kl_weight,
        kl_unbiased=kl_unbiased,
        entropy_weight=entropy_weight,
    )


def cross_entropy(logp: Float[Array, "B T"], batch: Batch) -> tuple[Scalar, Metrics]:
    """Minus the weighted sum of log-probabilities; in nats per token where weights are 1 / tokens.

    On a teacher's texts this is sequence distillation. Metrics: `loss`.
    """
    loss = weighted_sum(-logp, batch)
    return loss, {"loss": loss}


def only_masked(x: Float[Array, "B T"], batch: Batch) -> tuple[Float[Array, "B T"], Batch]:
    """x, and the batch, with 0 for all numbers off the mask.

    Before they are used, and not only in the sums: that would leave gradients of 0 * nan, which
    sums over a sequence then hand to all its tokens.
    """
    zeroed = {
        name: jnp.where(batch.mask, value, 0.0)
        for name in PER_TOKEN
        if (value := getattr(batch, name)) is not None
    }
    return jnp.where(batch.mask, x, 0.0), replace(batch, **zeroed)


def weighted_sum(x: Float[Array, "B T"], batch: Batch) -> Scalar:
    """The sum over the masked tokens of weight * x."""
    weight = jnp.where(batch.mask, batch.weight, 0.0)
    return jnp.sum(weight * jnp.where(batch.mask, x, 0.0))


def mean_over_tokens(x: Array, batch: Batch) -> Scalar:
    """The sum of x over this batch's masked tokens, divided by the update's number of tokens."""
    total = jnp.sum(jnp.where(batch.mask, x.astype(jnp.float32), 0.0))
    return total / jnp.maximum(batch.num_tokens, 1.0)  # no tokens at all: 0


def _needed(batch: Batch, name: str) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """The old policy's log-probabilities and the advantages."""
    old = batch.logp_rollout if batch.logp_old is None else batch.logp_old
    if batch.advantage is None or old is None:
        raise ValueError(f"{name} needs advantage and logp_old or logp_rollout in the batch")
    return old, batch.advantage


def _whole_loss(
    logp: Float[Array, "B T"],
    batch: Batch,
    token_loss: Float[Array, "B T"],
    metrics: Metrics,
    *,
    correction: Correction | None,
    kl: Kl | None,
    kl_weight: Number,
    kl_unbiased: bool,
    entropy_weight: Number,
) -> tuple[Scalar, Metrics]:
    """The policy's term with the correction, the KL term and the entropy bonus; all metrics."""
    old, _ = _needed(batch, "the loss")
    metrics = {**metrics, "kl_old": mean_over_tokens(k3(logp, old), batch)}
    if correction is not None:
        factor = correction(batch)
        metrics["correction"] = mean_over_tokens(factor, batch)
        token_loss = factor * token_loss
    if batch.logp_ref is not None:
        metrics["kl"] = mean_over_tokens(k3(logp, batch.logp_ref), batch)
    if kl is None:
        if _given(kl_weight) or kl_unbiased:
            raise ValueError(f"kl_weight={kl_weight} needs kl, e.g. r1jax.algos.kl.k3")
    elif batch.logp_ref is None:
        raise ValueError("kl needs the reference's log-probs, got logp_ref=None in the batch")
    else:
        penalty = kl(logp, batch.logp_ref)
        if kl_unbiased:
            penalty = penalty * ratios.exponential(logp - old)
        token_loss = token_loss + kl_weight * penalty
    if _given(entropy_weight):
        if batch.entropy is None:
            raise ValueError("entropy_weight needs the policy's entropy, got None in the batch")
        token_loss = token_loss - entropy_weight * batch.entropy
    loss = weighted_sum(token_loss, batch)
    return loss, {"loss": loss, **metrics}


def _given(weight: Number) -> bool:
    """Whether a term is in the loss: a traced number may be 0 in one step and not in the next."""
    return not isinstance(weight, int | float) or weight != 0
