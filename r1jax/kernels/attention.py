"""Attention over packed rows, and of one new token over its cache."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

MASKED = -1e30  # finite, so that a row without any visible key gives no nan

QUERY_BLOCK = 128  # keys after a block's last query are never multiplied


def packed_attention(
    q: Float[Array, "B T K R H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment: Int[Array, "B T"],
) -> Float[Array, "B T K R H"]:
    """Causal softmax attention in which a token sees only its own segment.

    Scores are scaled by 1/sqrt(H); scores and softmax are float32. Queries go in blocks against
    the keys up to the block's end, about half of the T x T products.
    """
    length, head = q.shape[1], q.shape[-1]
    blocks = -(-length // QUERY_BLOCK)
    size = -(-length // blocks)
    q = (q * head**-0.5).transpose(0, 2, 3, 1, 4)  # [B, K, R, T, H]
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [B, K, H, S], [B, K, S, H]
    index = jnp.arange(length)
    outs = []
    for start in range(0, length, size):
        end = min(start + size, length)
        see = (segment[:, start:end, None] == segment[:, None, :end]) & (
            index[None, start:end, None] >= index[None, None, :end]
        )
        score = jnp.einsum(
            "bkrth,bkhs->bkrts",
            q[:, :, :, start:end],
            k[..., :end],
            preferred_element_type=jnp.float32,
        )
        score = jnp.where(see[:, None, None], score, MASKED)
        weight = jax.nn.softmax(score, axis=-1).astype(v.dtype)
        outs.append(jnp.einsum("bkrts,bksh->bkrth", weight, v[:, :, :end]))
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)


def decode_attention(
    q: Float[Array, "B K R H"],
    keys: Sequence[Float[Array, "B K H _"]],
    values: Sequence[Float[Array, "B K _ H"]],
    visible: Bool[Array, "B S"],
) -> Float[Array, "B K R H"]:
    """Softmax attention of one query per row over cached pieces, S keys in all.

    Pieces stay apart, as joining them would copy the cache at every token. Keys lie with the
    position last and values with the head last: both products then read memory in order.
    """
    q = q * q.shape[-1] ** -0.5
    score = jnp.concatenate(
        [jnp.einsum("bkrh,bkhs->bkrs", q, k, preferred_element_type=jnp.float32) for k in keys],
        axis=-1,
    )
    score = jnp.where(visible[:, None, None], score, MASKED)
    weight = jax.nn.softmax(score, axis=-1).astype(q.dtype)
    out, start = jnp.zeros_like(q), 0
    for v in values:
        end = start + v.shape[2]
        out = out + jnp.einsum("bkrs,bksh->bkrh", weight[..., start:end], v)
        start = end
    return out
