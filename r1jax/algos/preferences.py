"""Losses on labelled or compared texts: reward models, and DPO with its relatives.

The two texts of a pair lie in one row and share a number in `pair`; `target` is 1 on the better
one and 0 on the worse. A pair's loss stands at each of its tokens and counts by their weights:
with `weights.sequence_mean` over all texts of an update it is the mean over pairs (and over texts
for losses of single texts), however they are packed and cut into micro-batches. Metrics are
weighted in the same way.

A reward model scores a text at its last masked token; scores elsewhere are not read.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax.algos.critics import binary_cross_entropy
from r1jax.algos.losses import Metrics, Scalar, only_masked, weighted_sum
from r1jax.algos.segments import last_token, sequence_mean, sequence_sum, sum_by
from r1jax.types import Batch

# --------------------------------------------------------------------------- reward models


def pairwise_loss(
    score: Float[Array, "B T"], batch: Batch, *, margin: float = 0.0
) -> tuple[Scalar, Metrics]:
    """-log sigmoid(score of the better text - score of the worse - margin), of each pair.

    Metrics: as `dpo`, of the scores.

    Raises:
      ValueError: the batch lacks `pair` or `target`.

    Source: Bradley and Terry (1952); InstructGPT, arXiv:2203.02155, eq. 1; R1's helpfulness
    reward; `margin` as in Llama 2, arXiv:2307.09288.
    """
    score, batch = only_masked(score, batch)
    gap = _better_minus_worse(jnp.where(last_token(batch), score, 0.0), batch)
    return _pair_loss(-jax.nn.log_sigmoid(gap - margin), gap, batch)


def pointwise_loss(score: Float[Array, "B T"], batch: Batch) -> tuple[Scalar, Metrics]:
    """Cross-entropy between a text's label in [0, 1] and the sigmoid of its score.

    Metrics: `loss`; `accuracy`, the share of texts on the right side of one half.

    Raises:
      ValueError: the batch lacks `target`.

    Source: R1's safety reward, arXiv:2501.12948: safe or unsafe, each text alone.
    """
    score, batch = only_masked(score, batch)
    if batch.target is None:
        raise ValueError("pointwise_loss needs labels, got target=None in the batch")
    whole = sequence_sum(jnp.where(last_token(batch), score, 0.0), batch)
    loss = weighted_sum(binary_cross_entropy(whole, batch.target), batch)
    right = (whole > 0) == (batch.target > 0.5)
    return loss, {"loss": loss, "accuracy": weighted_sum(right.astype(jnp.float32), batch)}


# --------------------------------------------------------------------------- pairs


def dpo(
    logp: Float[Array, "B T"], batch: Batch, *, beta: float = 0.1, smoothing: float = 0.0
) -> tuple[Scalar, Metrics]:
    """-log sigmoid(beta * h), h = log-ratio to the reference of the better text - of the worse.

    A text's log-ratio is the sum over its tokens of logp - logp_ref. `smoothing` is the
    probability that a label is the wrong way round: (1 - s) * loss(h) + s * loss(-h).

    Metrics: `loss`; `margin`, the mean of beta * h; `accuracy`, the share of pairs where it is
    above 0.

    Raises:
      ValueError: the batch lacks `pair`, `target` or `logp_ref`.

    Source: DPO, arXiv:2305.18290, eq. 7; smoothing: E. Mitchell, "A note on DPO with noisy
    preferences" (2023).
    """
    logp, batch = only_masked(logp, batch)
    gap = beta * _better_minus_worse(_log_ratio(logp, batch), batch)
    straight, reverse = -jax.nn.log_sigmoid(gap), -jax.nn.log_sigmoid(-gap)
    return _pair_loss((1.0 - smoothing) * straight + smoothing * reverse, gap, batch)


def ipo(logp: Float[Array, "B T"], batch: Batch, *, beta: float = 0.1) -> tuple[Scalar, Metrics]:
    """(h - 1 / (2 * beta))^2 with h as in `dpo`: the gap is drawn to a size, not without end.

    Metrics: as `dpo`.

    Raises:
      ValueError: as `dpo`.

    Source: IPO, arXiv:2310.12036, eq. 17, its tau called beta. (TRL takes means over tokens in
    the place of sums, and says that the authors' results are of that form.)
    """
    logp, batch = only_masked(logp, batch)
    gap = _better_minus_worse(_log_ratio(logp, batch), batch)
    return _pair_loss(jnp.square(gap - 0.5 / beta), beta * gap, batch)


def orpo(logp: Float[Array, "B T"], batch: Batch, *, weight: float = 0.1) -> tuple[Scalar, Metrics]:
    """Surprise at the better text + weight * -log sigmoid(log odds of better - of worse).

    With m the mean of a text's log-probabilities its odds are exp(m) / (1 - exp(m)), and the
    surprise is -m. No reference is needed.

    Metrics: as `dpo`, of the log odds; `surprise`, the first term.

    Raises:
      ValueError: the batch lacks `pair` or `target`.

    Source: ORPO, arXiv:2403.07691, eq. 6-7; weight 0.1 as it trains Mistral.
    """
    logp, batch = only_masked(logp, batch)
    mean = sequence_mean(logp, batch)
    # A text of probability 1 has infinite odds: held just below.
    log_odds = mean - jnp.log(-jnp.expm1(jnp.minimum(mean, -1e-6)))
    gap = _better_minus_worse(jnp.where(last_token(batch), log_odds, 0.0), batch)
    # The pair's weight is on both texts, so the surprise at the better one is too.
    surprise = -_sum_over_pair(jnp.where(last_token(batch), mean, 0.0) * _label(batch), batch)
    loss, metrics = _pair_loss(surprise - weight * jax.nn.log_sigmoid(gap), gap, batch)
    return loss, {**metrics, "surprise": weighted_sum(surprise, batch)}


def simpo(
    logp: Float[Array, "B T"], batch: Batch, *, beta: float = 2.0, gamma: float = 1.0
) -> tuple[Scalar, Metrics]:
    """-log sigmoid(beta * (mean logp of the better text - of the worse) - gamma).

    No reference is needed. Some settings give gamma / beta: `gamma` here is the margin itself.

    Metrics: as `dpo`, of beta * the gap of the means.

    Raises:
      ValueError: the batch lacks `pair` or `target`.

    Source: SimPO, arXiv:2405.14734, eq. 6.
    """
    logp, batch = only_masked(logp, batch)
    mean = jnp.where(last_token(batch), sequence_mean(logp, batch), 0.0)
    gap = beta * _better_minus_worse(mean, batch)
    return _pair_loss(-jax.nn.log_sigmoid(gap - gamma), gap, batch)


# --------------------------------------------------------------------------- single texts


def kto(
    logp: Float[Array, "B T"],
    batch: Batch,
    *,
    beta: float = 0.1,
    desirable: float = 1.0,
    undesirable: float = 1.0,
) -> tuple[Scalar, Metrics]:
    """How far a text's log-ratio to the reference is from the right side of the reference point.

    desirable   * (1 - sigmoid(beta * (r - z)))   where target is 1
    undesirable * (1 - sigmoid(beta * (z - r)))   where target is 0

    with r the sum over the text's tokens of logp - logp_ref, and z = `batch.kl_estimate`, the
    number that `kto_reference_point` gives for the whole update. No gradient flows through z.

    Metrics: `loss`; `accuracy`, the share of texts on their side of z.

    Raises:
      ValueError: the batch lacks `target`, `logp_ref` or `kl_estimate`.

    Source: KTO, arXiv:2402.01306.
    """
    logp, batch = only_masked(logp, batch)
    if batch.target is None or batch.kl_estimate is None:
        raise ValueError("kto needs target and kl_estimate in the batch")
    ratio = sequence_sum(_log_ratio(logp, batch), batch)
    gap = beta * (ratio - jax.lax.stop_gradient(batch.kl_estimate))
    good = batch.target > 0.5
    loss = jnp.where(good, desirable * jax.nn.sigmoid(-gap), undesirable * jax.nn.sigmoid(gap))
    total = weighted_sum(loss, batch)
    right = ((gap > 0) == good).astype(jnp.float32)
    return total, {"loss": total, "accuracy": weighted_sum(right, batch)}


def kto_reference_point(logp: Float[Array, "B T"], batch: Batch) -> tuple[Scalar, Scalar]:
    """The sum over a batch's texts of their log-ratios to the reference, and how many they are.

    The texts are answers to OTHER prompts, put behind each prompt: an estimate of the KL, which
    costs one pass of the model. Added up over the micro-batches, z = max(0, sum / number).

    Raises:
      ValueError: the batch lacks `logp_ref`.

    Source: KTO, arXiv:2402.01306.
    """
    logp, batch = only_masked(logp, batch)
    return _log_ratio(logp, batch).sum(), last_token(batch).sum().astype(jnp.float32)


# --------------------------------------------------------------------------- sums


def _log_ratio(logp: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
    if batch.logp_ref is None:
        raise ValueError("the loss needs the reference's log-probs, got logp_ref=None")
    return logp - batch.logp_ref


def _label(batch: Batch) -> Float[Array, "B T"]:
    if batch.target is None:
        raise ValueError("a loss on pairs needs target in the batch: 1 better, 0 worse")
    return jnp.where(batch.target > 0.5, 1.0, 0.0)


def _sum_over_pair(x: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
    if batch.pair is None:
        raise ValueError("a loss on pairs needs pair in the batch, got None")
    return sum_by(jnp.where(batch.mask, x, 0.0), batch.pair)


def _better_minus_worse(x: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
    """At each token of a pair: the sum of x over its better text less that over its worse."""
    return _sum_over_pair(jnp.where(_label(batch) > 0.5, x, -x), batch)


def _pair_loss(
    loss: Float[Array, "B T"], gap: Float[Array, "B T"], batch: Batch
) -> tuple[Scalar, Metrics]:
    total = weighted_sum(loss, batch)
    return total, {
        "loss": total,
        "margin": weighted_sum(gap, batch),
        "accuracy": weighted_sum((gap > 0).astype(jnp.float32), batch),
    }
