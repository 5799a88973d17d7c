"""Attention over packed rows, and of one new token over its cache."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from r1jax.kernels.sums import Sums, as_they_come
from r1jax.kernels.tiles import MASKED, TILE, tile_attention

QUERY_BLOCK = 64  # keys after a block's last query are never multiplied


def packed_attention(
    q: Float[Array, "B T K R H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment: Int[Array, "B T"],
    prompt: Int[Array, "B T"] | None = None,
    *,
    sums: Sums = as_they_come,
) -> Float[Array, "B T K R H"]:
    """Causal softmax attention in which a token sees its own segment and its segment's prompt.

    `prompt` names the segment, to the left in the same row, that this token's segment continues; 0
    for none. The columns of a segment stand together; padding, segment 0, gets anything finite.
    Scores are scaled by 1/sqrt(H); scores and softmax are float32, summed over keys by `sums`.

    On CPUs tiles of keys that nothing may see are left out, so that work grows with what is seen
    and not with the square of a row. Elsewhere, in rows of one tile, and where `sums` must not
    depend on tiles, every key up to a block's end is multiplied.
    """
    q = q * q.shape[-1] ** -0.5
    prompt = jnp.zeros_like(segment) if prompt is None else prompt
    blocks = partial(block_attention, sums)
    if sums is not as_they_come or q.shape[1] <= TILE:
        return blocks(q, k, v, segment, prompt)
    return jax.lax.platform_dependent(q, k, v, segment, prompt, cpu=tile_attention, default=blocks)


def block_attention(
    sums: Sums, q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, prompt: jax.Array
) -> Float[Array, "B T K R H"]:
    """Queries in blocks against all keys up to a block's end, about half of the T x T products."""
    length = q.shape[1]
    q = q.transpose(0, 2, 3, 1, 4)  # [B, K, R, T, H]
    k, v = k.transpose(0, 2, 3, 1), v.transpose(0, 2, 1, 3)  # [B, K, H, S], [B, K, S, H]
    index = jnp.arange(length)
    outs = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        own = prompt[:, start:end, None]
        see = segment[:, start:end, None] == segment[:, None, :end]
        see |= (own == segment[:, None, :end]) & (own > 0)
        see &= index[None, start:end, None] >= index[None, None, :end]
        block = q[:, :, :, start:end], k[..., :end], v[:, :, :end], see
        outs.append(attend_block(sums, *block))
    return jnp.concatenate(outs, axis=3).transpose(0, 3, 1, 2, 4)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_block(
    sums: Sums,
    q: Float[Array, "B K R T H"],
    k: Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    see: Bool[Array, "B T S"],
) -> Float[Array, "B K R T H"]:
    """softmax(q k, over what each query may see) v. Its gradient keeps the softmax's weights."""
    return _block_forward(sums, q, k, v, see)[0]


def _block_forward(
    sums: Sums, q: jax.Array, k: jax.Array, v: jax.Array, see: jax.Array
) -> tuple[jax.Array, Any]:
    score = jnp.einsum("bkrth,bkhs->bkrts", q, k, preferred_element_type=jnp.float32)
    score = jnp.where(see[:, None, None], score, MASKED)
    part = jnp.exp(score - jnp.max(score, axis=-1, keepdims=True))
    out, total = sums(_weigh, part, v)
    return out.astype(v.dtype), (q, k, v, part, total, out)


def _weigh(part: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    total = jnp.sum(part, axis=-1, keepdims=True)
    out = jnp.einsum(
        "bkrts,bksh->bkrth", part.astype(v.dtype), v, preferred_element_type=part.dtype
    )
    return out / total, total


def _block_backward(sums: Sums, saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    del sums  # a gradient needs no such care
    q, k, v, part, total, out = saved
    weight = part / total
    of_weight = jnp.einsum("bkrth,bksh->bkrts", grad, v, preferred_element_type=jnp.float32)
    shift = jnp.sum(grad.astype(jnp.float32) * out, axis=-1, keepdims=True)
    of_score = (weight * (of_weight - shift)).astype(q.dtype)
    of_q = jnp.einsum("bkrts,bkhs->bkrth", of_score, k)
    of_k = jnp.einsum("bkrth,bkrts->bkhs", q, of_score)
    of_v = jnp.einsum("bkrts,bkrth->bksh", weight.astype(v.dtype), grad)
    return of_q, of_k, of_v, None


attend_block.defvjp(_block_forward, _block_backward)


def decode_attention(
    q: Float[Array, "B K R H"],
    keys: Sequence[Float[Array, "B K H _"]],
    values: Sequence[Float[Array, "B K _ H"]],
    visible: Bool[Array, "B S"] | Bool[Array, "B R S"],
    *,
    sums: Sums = as_they_come,
) -> Float[Array, "B K R H"]:
    """Softmax attention over cached pieces, S keys in all, of a row's one token or of several.

    A key-value head's R queries see the same keys, or each what `visible` says of it.

    Pieces stay apart, as joining them would copy the cache at every token. Keys lie with the
    position last and values with the head last: both products then read memory in order. Keys are
    summed over by `sums`.
    """
    q = q * q.shape[-1] ** -0.5
    score = jnp.concatenate(
        [jnp.einsum("bkrh,bkhs->bkrs", q, k, preferred_element_type=jnp.float32) for k in keys],
        axis=-1,
    )
    see = visible[:, None, None] if visible.ndim == 2 else visible[:, None]
    score = jnp.where(see, score, MASKED)
    part = jnp.exp(score - jnp.max(score, axis=-1, keepdims=True))

    def weigh(part: jax.Array, *values: jax.Array) -> jax.Array:
        out, start = jnp.zeros(q.shape, part.dtype), 0
        for v in values:
            end = start + v.shape[2]
            piece = part[..., start:end].astype(v.dtype)
            out += jnp.einsum("bkrs,bksh->bkrh", piece, v, preferred_element_type=part.dtype)
            start = end
        return out / jnp.sum(part, axis=-1, keepdims=True)

    return sums(weigh, part, *values).astype(q.dtype)
