"""Distances from a student's distribution over the next token to a teacher's.

Functions of logits, one number per position, in nats. The logits of a batch are never stored: a
loop computes some positions of both models at a time, takes their divergence, and hands all of
them to `distillation_loss` as [B, T]. The vocabulary must be whole and the same in both; `top_k`
then looks at no more than a teacher shows that gives its likeliest tokens alone.

On the teacher's texts, or given ones, this is distillation from logits; on the student's own
samples it is on-policy distillation, which `advantages.on_policy_distillation` does without the
teacher's logits. Training on texts that the teacher wrote is `losses.cross_entropy`.

Source: Hinton et al., arXiv:1503.02531; GKD, arXiv:2306.13649.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from r1jax.algos.losses import Metrics, Scalar, weighted_sum
from r1jax.types import Batch

Divergence = Callable[..., Float[Array, "*P"]]


def forward_kl(
    student: Float[Array, "*P V"], teacher: Float[Array, "*P V"], *, temperature: float = 1.0
) -> Float[Array, "*P"]:
    """KL(teacher || student): the student is to cover all that the teacher may say.

    Both distributions are softmax(logits / temperature). Its gradient is smaller by about
    temperature^2, which nothing here makes up for.
    """
    return _kl(_log_probs(teacher, temperature), _log_probs(student, temperature))


def reverse_kl(
    student: Float[Array, "*P V"], teacher: Float[Array, "*P V"], *, temperature: float = 1.0
) -> Float[Array, "*P"]:
    """KL(student || teacher): the student is to say nothing that the teacher would not."""
    return _kl(_log_probs(student, temperature), _log_probs(teacher, temperature))


def jensen_shannon(
    student: Float[Array, "*P V"],
    teacher: Float[Array, "*P V"],
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Float[Array, "*P"]:
    """beta * KL(teacher || mix) + (1 - beta) * KL(student || mix), bounded.

    mix = beta * teacher + (1 - beta) * student. Divided by `beta` it goes to `forward_kl` as
    beta goes to 0, and divided by 1 - beta to `reverse_kl` as beta goes to 1.

    Raises:
      ValueError: `beta` is not between 0 and 1.

    Source: GKD, arXiv:2306.13649, eq. 1.
    """
    if not 0 < beta < 1:
        raise ValueError(f"beta must be between 0 and 1, got {beta}")
    p, q = _log_probs(teacher, temperature), _log_probs(student, temperature)
    possible = (p > -jnp.inf) | (q > -jnp.inf)  # logaddexp of two -inf has a nan gradient
    mix = jnp.logaddexp(
        jnp.where(possible, p, 0.0) + jnp.log(beta), jnp.where(possible, q, 0.0) + jnp.log1p(-beta)
    )
    return beta * _kl(p, mix) + (1.0 - beta) * _kl(q, mix)


def top_k(
    student: Float[Array, "*P V"],
    teacher: Float[Array, "*P V"],
    *,
    k: int,
    of: Divergence = forward_kl,
    temperature: float = 1.0,
) -> Float[Array, "*P"]:
    """The divergence `of`, where only the teacher's k likeliest tokens are told apart.

    The rest of the vocabulary is one outcome more, in both models with the sum of its tokens'
    probabilities. So the student learns how much to leave to the rest, and not how to share that
    out: there it keeps its own proportions. (With the k made to sum to 1 instead, nothing would
    hold the student's rest down.) It is never more than the divergence of the whole, and the same
    where the rest is one token. Of tokens equally likely at the edge those of lower id are taken.
    `temperature` is of the whole vocabulary's softmax, before the rest is summed.

    Raises:
      ValueError: `k` is not in [1, V).

    Source: Tail-Aware Top-k OPD, arXiv:2608.14728, there of the reverse KL; that teachers cut to
    their k without a rest are biased: arXiv:2503.16870.
    """
    vocabulary = teacher.shape[-1]
    if not 1 <= k < vocabulary:
        raise ValueError(f"k must be in [1, {vocabulary}), the vocabulary's size, got {k}")
    p, q = _log_probs(teacher, temperature), _log_probs(student, temperature)
    chosen = jax.lax.top_k(p, k)[1]
    return of(_with_rest(q, chosen), _with_rest(p, chosen))


def distillation_loss(divergence: Float[Array, "B T"], batch: Batch) -> tuple[Scalar, Metrics]:
    """The weighted sum of the divergences at the masked tokens. Metrics: `loss`.

    divergence[b, t] is of the distributions from which token t was to be chosen.
    """
    loss = weighted_sum(divergence, batch)
    return loss, {"loss": loss}


def _with_rest(logp: Float[Array, "*P V"], chosen: Int[Array, "*P k"]) -> Float[Array, "*P k+1"]:
    """Log-probabilities of the chosen tokens and, last, of all the others together."""
    taken = jnp.put_along_axis(jnp.zeros(logp.shape, bool), chosen, True, axis=-1, inplace=False)
    # Not log(1 - sum): where the rest has next to nothing that has no correct digit.
    rest = jax.nn.logsumexp(jnp.where(taken, -jnp.inf, logp), axis=-1, keepdims=True)
    return jnp.concatenate([jnp.take_along_axis(logp, chosen, axis=-1), rest], axis=-1)


def _log_probs(logits: Float[Array, "*P V"], temperature: float) -> Float[Array, "*P V"]:
    # In float32: in bfloat16 the differences of two close models have no digit left.
    return jax.nn.log_softmax(logits.astype(jnp.float32) / temperature, axis=-1)


def _kl(p: Float[Array, "*P V"], q: Float[Array, "*P V"]) -> Float[Array, "*P"]:
    """KL of distributions given by their logs; a token of probability 0 under p adds nothing."""
    possible = p > -jnp.inf
    gap = jnp.where(possible, p, 0.0) - jnp.where(possible, q, 0.0)
    return jnp.sum(jnp.exp(p) * gap, axis=-1)
