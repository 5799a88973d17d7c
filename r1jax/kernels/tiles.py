"""Attention over packed rows on CPUs: a loop over those tiles of keys that something may see."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

MASKED = -1e30  # finite, so that a row without any visible key gives no nan

TILE = 64  # queries, and keys, that are multiplied at once


@jax.custom_vjp
def tile_attention(
    q: Float[Array, "B T K R H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segment: Int[Array, "B T"],
    prompt: Int[Array, "B T"],
) -> Float[Array, "B T K R H"]:
    """`packed_attention` of scaled queries; padding gets 0. B * T must be TILE or more.

    Tiles of queries and of keys begin where a segment or its prompt begins, at any column. Rows lie
    end to end; a loop visits the tiles of queries, one within it the tiles of keys they see.
    Softmax is kept up as tiles come, so only its normaliser is stored for the gradient, which makes
    the weights anew.

    Source: FlashAttention-2, arXiv:2307.08691.
    """
    return _tiles_forward(q, k, v, segment, prompt)[0]


class Tile(NamedTuple):
    """Where a tile of queries lies among the tokens of all rows, and which keys it may see."""

    start: jax.Array  # first query
    end: jax.Array  # past its last
    own: jax.Array  # where its segment begins
    prompt: jax.Array  # where its prompt begins
    prompt_end: jax.Array


def _tile_at(start: jax.Array, segment: jax.Array, prompt: jax.Array) -> tuple[Tile, jax.Array]:
    """The tile of queries that begins at a token, and where the next one begins."""
    length = segment.shape[1]
    row, column = start // length, start % length
    ids, index = segment[row], jnp.arange(length)
    same = ids == ids[column]
    before = ids == prompt[row, column]
    count = lambda x: jnp.sum(x, dtype=jnp.int32)  # noqa: E731
    earlier = count(same & (index < column))
    rest = start + count(same & (index >= column))
    asked = jnp.where(prompt[row, column] > 0, count(before), 0)
    first = row * length + jnp.argmax(before).astype(jnp.int32)
    end = jnp.minimum(start + TILE, rest)
    tile = Tile(start, end, start - earlier, first, first + asked)
    return tile, jnp.where(ids[column] > 0, end, rest)


def _num_keys(tile: Tile) -> tuple[jax.Array, jax.Array]:
    """How many tiles of keys the prompt has, and how many there are in all."""
    asked = -(-(tile.prompt_end - tile.prompt) // TILE)
    return asked, asked + -(-(tile.end - tile.own) // TILE)


def _key_tile(
    tile: Tile, i: jax.Array, num_tokens: int, per_kv: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where the i-th tile of keys is read, each key's column, and each query's past its last key.

    A tile at the end of the tokens is read from further left: what precedes it has columns that no
    query reaches. These numbers come apart from what uses them: fused into it, XLA on CPUs works
    them out again for every element.
    """
    asked, _ = _num_keys(tile)
    in_prompt = i < asked
    start = jnp.where(in_prompt, tile.prompt + i * TILE, tile.own + (i - asked) * TILE)
    end = jnp.minimum(start + TILE, jnp.where(in_prompt, tile.prompt_end, tile.end))
    at = jnp.minimum(start, num_tokens - TILE)
    key = at + jnp.arange(TILE)
    key = jnp.where((key >= start) & (key < end), key, num_tokens)
    query = jnp.minimum(tile.start, num_tokens - TILE) + jnp.arange(TILE)
    limit = jnp.where((query >= tile.start) & (query < tile.end), query + 1, 0)
    return jax.lax.optimization_barrier((at, key, jnp.repeat(limit, per_kv)))


def _by_head(x: jax.Array) -> jax.Array:
    """[B, T, K, ..., H] as [K, B * T, ..., H]."""
    x = x.reshape(-1, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)


def _tiles_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segment: jax.Array, prompt: jax.Array
) -> tuple[jax.Array, Any]:
    batch, length, kv, per_kv, head = q.shape
    num_tokens = batch * length
    wide, values = _by_head(q), _by_head(v)
    keys = k.transpose(2, 3, 0, 1).reshape(kv, head, num_tokens)
    cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=TILE, axis=1)

    def queries(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start, out, normal = carry
        tile, following = _tile_at(start, segment, prompt)
        query_at = jnp.minimum(start, num_tokens - TILE)
        some = cut(wide, query_at).reshape(kv, TILE * per_kv, head)

        def more(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            total, most, weight = carry
            key_at, key, limit = _key_tile(tile, i, num_tokens, per_kv)
            some_keys = jax.lax.dynamic_slice_in_dim(keys, key_at, TILE, axis=2)
            score = jnp.einsum("kqh,khs->kqs", some, some_keys, preferred_element_type=jnp.float32)
            score = jnp.where((key[None] < limit[:, None])[None], score, MASKED)
            higher = jnp.maximum(most, jnp.max(score, axis=-1, keepdims=True))
            part = jnp.exp(score - higher)
            shrink = jnp.exp(most - higher)
            added = jnp.einsum(
                "kqs,ksh->kqh",
                part.astype(v.dtype),
                cut(values, key_at),
                preferred_element_type=jnp.float32,
            )
            weight = weight * shrink + jnp.sum(part, axis=-1, keepdims=True)
            return total * shrink + added, higher, weight

        rows = kv, TILE * per_kv
        none = jnp.zeros((*rows, head)), jnp.full((*rows, 1), MASKED), jnp.zeros((*rows, 1))
        count = jnp.where(segment.reshape(-1)[start] > 0, _num_keys(tile)[1], 0)
        total, most, weight = jax.lax.fori_loop(0, count, more, none)
        index = query_at + jnp.arange(TILE)
        real = ((index >= tile.start) & (index < tile.end))[None, :, None, None]
        shape = kv, TILE, per_kv, -1
        weight = jnp.maximum(weight, 1e-30)  # 0 where nothing is seen
        done = (total / weight).reshape(shape)
        log = (most + jnp.log(weight)).reshape(shape)
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=query_at, axis=1)
        out = put(out, jnp.where(real, done.astype(out.dtype), cut(out, query_at)))
        normal = put(normal, jnp.where(real, log, cut(normal, query_at)))
        return following, out, normal

    empty = jnp.zeros_like(wide), jnp.zeros((kv, num_tokens, per_kv, 1))
    _, out, normal = jax.lax.while_loop(
        lambda carry: carry[0] < num_tokens, queries, (jnp.int32(0), *empty)
    )
    whole = jnp.moveaxis(out, 0, 1).reshape(q.shape)
    return whole, (wide, keys, values, segment, prompt, out, normal)


def _tiles_backward(saved: Any, grad: jax.Array) -> tuple[Any, ...]:
    wide, keys, values, segment, prompt, out, normal = saved
    kv, num_tokens, per_kv, head = wide.shape
    keys = keys.swapaxes(1, 2)
    of_out = _by_head(grad)
    shift = jnp.sum(of_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    cut = partial(jax.lax.dynamic_slice_in_dim, slice_size=TILE, axis=1)

    def queries(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        start, of_q, of_k, of_v = carry
        tile, following = _tile_at(start, segment, prompt)
        query_at = jnp.minimum(start, num_tokens - TILE)
        flat = lambda x: cut(x, query_at).reshape(kv, TILE * per_kv, -1)  # noqa: E731
        some, some_grad = flat(wide), flat(of_out)
        turned = jax.lax.optimization_barrier((some.swapaxes(1, 2), some_grad.swapaxes(1, 2)))
        log, moved = (flat(x).reshape(kv, 1, -1) for x in (normal, shift))

        def more(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            of_some, of_k, of_v = carry
            key_at, index, limit = _key_tile(tile, i, num_tokens, per_kv)
            key, value = cut(keys, key_at), cut(values, key_at)
            product = partial(jnp.einsum, "ksh,khq->ksq", preferred_element_type=jnp.float32)
            # Keys come first, so that most products contract over rows that lie in order.
            part = jnp.exp(product(key, turned[0]) - log)
            part = jnp.where((index[:, None] < limit[None])[None], part, 0.0)
            of_score = (part * (product(value, turned[1]) - moved)).astype(some.dtype)
            of_some += jnp.einsum("ksq,ksh->kqh", of_score, key, preferred_element_type=jnp.float32)
            summed = partial(jnp.einsum, "ksq,kqh->ksh", preferred_element_type=jnp.float32)
            more_k, more_v = summed(of_score, some), summed(part.astype(some.dtype), some_grad)
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=key_at, axis=1)
            of_k = put(of_k, cut(of_k, key_at) + more_k)
            return of_some, of_k, put(of_v, cut(of_v, key_at) + more_v)

        count = jnp.where(segment.reshape(-1)[start] > 0, _num_keys(tile)[1], 0)
        none = jnp.zeros((kv, TILE * per_kv, head))
        of_some, of_k, of_v = jax.lax.fori_loop(0, count, more, (none, of_k, of_v))
        of_some = of_some.reshape(kv, TILE, per_kv, head) + cut(of_q, query_at)
        of_q = jax.lax.dynamic_update_slice_in_dim(of_q, of_some, query_at, axis=1)
        return following, of_q, of_k, of_v

    empty = tuple(jnp.zeros(x.shape, jnp.float32) for x in (wide, keys, values))
    _, *found = jax.lax.while_loop(
        lambda carry: carry[0] < num_tokens, queries, (jnp.int32(0), *empty)
    )
    shape = segment.shape
    back = lambda x: jnp.moveaxis(x, 0, 1).reshape(*shape, kv, *x.shape[2:])  # noqa: E731
    of_q, of_k, of_v = (back(x).astype(wide.dtype) for x in found)
    return of_q, of_k, of_v, None, None


tile_attention.defvjp(_tiles_forward, _tiles_backward)
