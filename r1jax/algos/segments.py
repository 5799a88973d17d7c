"""Sums over the sequences that share a packed row, given back at each of their tokens.

A number that belongs to a whole sequence is written at every one of its tokens: then the weights
of tokens, which add up to the weight of their sequence, serve for losses of sequences too.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from r1jax.types import Batch


def sum_by(x: Float[Array, "B T"], ids: Int[Array, "B T"]) -> Float[Array, "B T"]:
    """At each token the sum of x over the tokens of its row with the same id, from 0 to T."""

    def one_row(x: Float[Array, " T"], ids: Int[Array, " T"]) -> Float[Array, " T"]:
        return jax.ops.segment_sum(x, ids, num_segments=len(x) + 1)[ids]

    return jax.vmap(one_row)(x, ids)


def sequence_sum(x: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
    """The sum of x over the masked tokens of each sequence; no other token is read."""
    return sum_by(jnp.where(batch.mask, x, 0.0), batch.segment)


def sequence_mean(x: Float[Array, "B T"], batch: Batch) -> Float[Array, "B T"]:
    """The mean of x over the masked tokens of each sequence; 0 for one without any."""
    count = sum_by(batch.mask.astype(x.dtype), batch.segment)
    return sequence_sum(x, batch) / jnp.maximum(count, 1.0)


def last_token(batch: Batch) -> Bool[Array, "B T"]:
    """True on the last masked token of each sequence."""

    def one_row(mask: Array, position: Array, ids: Array) -> Array:
        place = jnp.where(mask, position, -1)
        last = jax.ops.segment_max(place, ids, num_segments=len(mask) + 1)[ids]
        return position == last

    return jax.vmap(one_row)(batch.mask, batch.position, batch.segment)
