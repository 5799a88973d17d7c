"""Heads beside the language model's: one number a token (value), one a sequence (reward).

A critic's score is (cfg, params, states, batch) -> [B, T], where states[:, t] is the decoder's
final hidden state before token t: `values` and `logps` are two. A reward model's, `rewards`, has
read the token: states[:, t] is the state after it.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from r1jax import settings
from r1jax.kernels.logprob import token_logp
from r1jax.models import decoder
from r1jax.sharding import Leaf, zeros
from r1jax.types import Batch, Params


def scalar_leaves(cfg: settings.Decoder) -> Params:
    """Weights of a head that gives one number. They start at 0: a new critic says 0 of all."""
    return {"scale": Leaf((cfg.dim,), (None,), zeros), "bias": Leaf((), (), zeros)}


def value_leaves(cfg: settings.Decoder) -> Params:
    """What `values` has beside a decoder's weights."""
    return {"value": scalar_leaves(cfg)}


def values(
    cfg: settings.Decoder, params: Params, states: Float[Array, "B T D"], batch: Batch
) -> Float[Array, "B T"]:
    """The return that is expected before each token is known: PPO's value network."""
    del cfg, batch
    return token_scores(params["value"], states)


def reward_leaves(cfg: settings.Decoder) -> Params:
    """What `rewards` has beside a decoder's weights."""
    return {"reward": scalar_leaves(cfg)}


def rewards(
    cfg: settings.Decoder, params: Params, states: Float[Array, "B T D"], batch: Batch
) -> Float[Array, "B T"]:
    """A reward model's score after each token, from the states AFTER the tokens."""
    del cfg, batch
    return token_scores(params["reward"], states)


def logps(
    cfg: settings.Decoder, params: Params, states: Float[Array, "B T D"], batch: Batch
) -> Float[Array, "B T"]:
    """Log-probability of each token at temperature 1: PRIME's implicit process reward model."""
    head, sums = decoder.head(cfg, params), decoder.sums(cfg)
    return token_logp(states, head, batch.tokens, sums=sums)[0]


def token_scores(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "..."]:
    """One number a token, float32: a value head's estimate at each state."""
    scale = params["scale"].astype(jnp.float32)
    score = jnp.einsum("...d,d->...", hidden.astype(jnp.float32), scale)
    return score + params["bias"].astype(jnp.float32)


def sequence_scores(
    params: Params,
    hidden: Float[Array, "B T D"],
    segment: Int[Array, "B T"],
    *,
    max_segments: int,
) -> Float[Array, "B S"]:
    """One number a sequence: the score at its last token. 0 where a row has fewer sequences.

    `segment` counts from 1 in each row, 0 being padding; entry s is of segment s + 1, and
    sequences after the first `max_segments` of a row are left out.
    """
    following = jnp.pad(segment[:, 1:], ((0, 0), (0, 1)))
    last = (following != segment) & (segment > 0)
    member = segment[..., None] == 1 + jnp.arange(max_segments).reshape(1, 1, max_segments)
    picked = jnp.where(member & last[..., None], token_scores(params, hidden)[..., None], 0.0)
    return jnp.sum(picked, axis=1)
