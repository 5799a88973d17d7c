"""Log-probabilities of given tokens from hidden states, without storing the logits of a batch."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from r1jax.kernels.sums import Sums, as_they_come

CHUNK = 2**24  # logits alive at once


def log_softmax(
    logits: Float[Array, "... V"], *, sums: Sums = as_they_come
) -> Float[Array, "... V"]:
    """Log-probabilities of float32 logits, summed over the vocabulary by `sums`."""
    highest = jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True))
    part = jnp.exp(logits - highest)
    total = sums(lambda x: jnp.sum(x, axis=-1, keepdims=True), part)
    return logits - highest - jnp.log(total)


def token_logp(
    hidden: Float[Array, "B T D"],
    head: Float[Array, "V D"],
    tokens: Int[Array, "B T"],
    *,
    temperature: float | jax.Array = 1.0,
    sums: Sums = as_they_come,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each token after its hidden state, and the entropy there; float32, nats.

    The distribution is softmax(logits / temperature) over the whole vocabulary. Rows are cut
    along T into chunks of at most CHUNK logits, which backward computes again.
    """
    head = head.astype(hidden.dtype)

    def chunk(hidden: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = jnp.einsum("btd,vd->btv", hidden, head, preferred_element_type=jnp.float32)
        logits = logits / temperature
        every = log_softmax(logits, sums=sums)
        chosen = jnp.take_along_axis(every, tokens[..., None], axis=-1)[..., 0]
        return chosen, -jnp.sum(jnp.exp(every) * every, axis=-1)

    return in_pieces(chunk, hidden, tokens, logits=tokens.size * head.shape[0])


def in_pieces(function: Callable[..., Any], *rows: Shaped[Array, "B T ..."], logits: int) -> Any:
    """function(*rows), numbers of tokens, [B, T], where the whole would need `logits` logits.

    If those are more than CHUNK, rows are cut along T, and backward computes the pieces again.
    """
    batch, length = rows[0].shape[:2]
    pieces = math.ceil(logits / CHUNK)
    if pieces <= 1:
        return function(*rows)
    size = -(-length // pieces)
    pad = (-length) % size

    def cut(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0)

    found = jax.lax.map(lambda xs: jax.checkpoint(function)(*xs), tuple(map(cut, rows)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length], found)
