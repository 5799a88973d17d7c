"""What a token leaves behind in each layer: how it lies in memory and is read, by kind of mixer.

Grouped-query attention keeps keys and values; latent attention keeps one entry for all heads. A
layer's cache is a tuple of arrays whose first dimension is of rows or slots, and one dimension of
each counts columns, a token to a column.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from r1jax import settings
from r1jax.kernels.attention import decode_attention
from r1jax.kernels.sums import cache_dtype
from r1jax.models import decoder, mla, moe, mtp
from r1jax.models.rope import rope_angles
from r1jax.sharding import constrain
from r1jax.types import Params, Prompts

Mixer = settings.Attention | settings.Latent
Arrays = tuple[jax.Array, ...]  # one layer's cache


class Kind(NamedTuple):
    """How the cache of one kind of mixer lies, and how it is read.

    `shapes(mixer, rows, columns)` and `axes` are one for each array; `columns` says which
    dimension of it counts tokens. `kept` turns what `decoder.run` keeps for one layer into the
    cache's arrays; `read` is attention of new queries over pieces of cache.
    """

    shapes: Callable[[Any, int, int], tuple[tuple[int, ...], ...]]
    axes: tuple[tuple[str | None, ...], ...]
    columns: tuple[int, ...]
    kept: Callable[[Any], Arrays]
    read: Callable[..., jax.Array]


class Prefilled(struct.PyTreeNode, kw_only=True):
    """What N prompts leave behind: each layer's cache of P columns, and the states they end in."""

    caches: list[Arrays]
    hidden: Float[Array, "N 2 D"]  # after the last token but one (any, if there is none), the last
    choice: Int[Array, "N P E k"] | None = None  # experts taken, in layers that have them
    ahead: Arrays | None = None  # the first prediction module's cache


def kind(mixer: Mixer) -> Kind:
    """The kind of a mixer's cache."""
    return LATENT if isinstance(mixer, settings.Latent) else GROUPED


def empty(
    cfg: settings.Decoder, mixer: Mixer, rows: int, columns: int, *, wide: bool = False
) -> Arrays:
    """One layer's cache with nothing in it. With `wide`, values lie in the dtype in which
    `decoder.sums(cfg)` adds them up."""
    dtype = jnp.dtype(cfg.dtype)
    own = kind(mixer)
    made = []
    for i, (shape, axes) in enumerate(zip(own.shapes(mixer, rows, columns), own.axes, strict=True)):
        of_values = wide and i == 1
        kept = cache_dtype(dtype, decoder.sums(cfg)) if of_values else dtype
        with jax.enable_x64(kept == np.float64):
            made.append(constrain(jnp.zeros(shape, kept), *axes))
    return tuple(made)


def num_columns(mixer: Mixer, cache: Arrays) -> int:
    """How many tokens a cache has room for."""
    return cache[0].shape[kind(mixer).columns[0]]


def read(
    cfg: settings.Decoder,
    mixer: Mixer,
    q: Float[Array, "B ..."],
    pieces: Sequence[Arrays],
    visible: Bool[Array, "B S"],
) -> jax.Array:
    """Attention of one new token per row, its query as the mixer made it, over S columns."""
    return kind(mixer).read(cfg, mixer, q, pieces, visible)


def extend(
    cfg: settings.Decoder, mixer: Mixer, cache: Arrays, position: Int[Array, "B Q"]
) -> decoder.Attend:
    """An `attend` for Q new tokens per row over a cache whose column t is the row's token t.

    The tokens are written at their positions, each sees the columns up to its own, and the cache
    with them is carried. A token whose position has no column is not written.
    """
    own = kind(mixer)
    rows, queries = position.shape
    width = num_columns(mixer, cache)
    column = jnp.where(position < 0, width, position)  # negative ones would count from the end
    visible = jnp.arange(width)[None, None] <= position[..., None]
    each = jnp.arange(rows)[:, None]

    def attend(q: jax.Array, *new: jax.Array) -> tuple[jax.Array, Arrays]:
        written = tuple(
            array.at[(each, *(slice(None),) * (dim - 1), column)].set(x, mode="drop")
            for array, x, dim in zip(cache, new, own.columns, strict=True)
        )
        # The tokens stand beside each other as heads do, each with columns that it may see.
        heads = jnp.moveaxis(q, 1, -3)  # [B, K, Q, R, H] or [B, Q, N, E]
        per_token = heads.shape[-2]
        flat = heads.reshape(*heads.shape[:-3], queries * per_token, heads.shape[-1])
        out = own.read(cfg, mixer, flat, [written], jnp.repeat(visible, per_token, axis=1))
        out = out.reshape(*heads.shape[:-1], out.shape[-1])
        return jnp.moveaxis(out, -3, 1), written

    return attend


def prefill(
    cfg: settings.Decoder,
    params: Params,
    prompts: Prompts,
    *,
    chunk: int = 0,
    choices: bool = False,
    ahead: bool = False,
) -> Prefilled:
    """The prompts' caches and last states; on request the experts taken and the module's cache.

    With `chunk` so many tokens of each prompt are computed at a time, over the cache of those
    before: less memory for states and scores, and for latent attention no keys and values at all.
    """
    compute = partial(_in_chunks, chunk=chunk) if chunk else _at_once
    hidden, caches, choice, cache = compute(cfg, params, prompts, choices=choices, ahead=ahead)
    last = prompts.length[:, None] - jnp.asarray([[2, 1]])
    hidden = jnp.take_along_axis(hidden, jnp.maximum(last, 0)[..., None], axis=1)
    return Prefilled(caches=caches, hidden=hidden, choice=choice, ahead=cache)


def _at_once(
    cfg: settings.Decoder, params: Params, prompts: Prompts, *, choices: bool, ahead: bool
) -> tuple[jax.Array, list[Arrays], jax.Array | None, Arrays | None]:
    count, width = prompts.tokens.shape
    position = jnp.broadcast_to(jnp.arange(width), (count, width))
    segment = (position < prompts.length[:, None]).astype(jnp.int32)
    rows = prompts.tokens, position, segment
    out = decoder.run(cfg, params, *rows, keep_cache=True, keep_routing=choices)
    assert out.cache is not None
    caches = [
        kind(group.mixer).kept(jax.tree.map(lambda x, i=i: x[i], kept))
        for group, kept in zip(cfg.groups, out.cache, strict=True)
        for i in range(group.count)
    ]
    choice = None if out.routing is None else moe.record_of_groups(out.routing)
    if not ahead:
        return out.hidden, caches, choice, None
    (made,) = mtp.run(cfg, params, out.hidden, *rows, count=1)
    return out.hidden, caches, choice, kind(cfg.groups[-1].mixer).kept(made.cache)


def _in_chunks(
    cfg: settings.Decoder,
    params: Params,
    prompts: Prompts,
    *,
    chunk: int,
    choices: bool,
    ahead: bool,
) -> tuple[jax.Array, list[Arrays], jax.Array | None, Arrays | None]:
    """By a scan over chunks with the layers unrolled, each writing to a cache of its own."""
    count, width = prompts.tokens.shape
    unstacked = decoder.unstack(cfg, params)
    mixers = [group.mixer for group, _ in unstacked]
    if ahead:
        mixers.append(cfg.groups[-1].mixer)

    def cut(x: jax.Array) -> jax.Array:  # [chunks, N, chunk]
        x = jnp.pad(x, ((0, 0), (0, -width % chunk)))
        return jnp.moveaxis(x.reshape(count, -1, chunk), 1, 0)

    def one(caches: list[Arrays], xs: tuple[jax.Array, ...]) -> tuple[list[Arrays], Any]:
        tokens, following, start = xs
        position = jnp.broadcast_to(start + jnp.arange(chunk), tokens.shape)
        attends = [
            extend(cfg, mixer, cache, position) for mixer, cache in zip(mixers, caches, strict=True)
        ]
        layers = attends[: len(unstacked)]
        out = decoder.decode_step(cfg, params, unstacked, tokens, position, layers)
        caches = out.cache
        if ahead:
            _, cache = look_ahead(cfg, params, out.hidden, following, position, attends[-1])
            caches = [*caches, cache]
        taken = [r.choice for r in out.routing if r is not None]
        return caches, (out.hidden, moe.record(taken) if choices else None)

    caches = [empty(cfg, mixer, count, width) for mixer in mixers]
    tokens = cut(prompts.tokens)
    starts = jnp.arange(tokens.shape[0]) * chunk
    xs = tokens, cut(jnp.roll(prompts.tokens, -1, axis=1)), starts
    caches, kept = jax.lax.scan(one, caches, xs)

    def join(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x, 0, 1).reshape(count, -1, *x.shape[3:])[:, :width]

    hidden, choice = jax.tree.map(join, kept)
    return hidden, caches[: len(unstacked)], choice, caches[-1] if ahead else None


def look_ahead(
    cfg: settings.Decoder,
    params: Params,
    hidden: Float[Array, "B Q D"],
    tokens: Int[Array, "B Q"],
    position: Int[Array, "B Q"],
    attend: decoder.Attend,
) -> tuple[Float[Array, "B Q D"], Arrays]:
    """The first prediction module's states at `position`, and what its `attend` carries.

    `hidden` is the model's state there, `tokens` the token after it.
    """
    rope = rope_angles(cfg, position, decoder.rotated(cfg.groups[-1].mixer))
    weights = mtp.module(params, 0)
    state, cache, _ = mtp.predict(
        cfg, params, weights, hidden, tokens, rope=rope, attend=attend, decoding=True
    )
    return state, cache


def _read_grouped(
    cfg: settings.Decoder, _: Mixer, q: jax.Array, pieces: Sequence[Arrays], visible: jax.Array
) -> jax.Array:
    keys, values = zip(*pieces, strict=True)
    return decode_attention(q, keys, values, visible, sums=decoder.sums(cfg))


def _read_latent(
    _: settings.Decoder,
    mixer: settings.Latent,
    q: jax.Array,
    pieces: Sequence[Arrays],
    visible: jax.Array,
) -> jax.Array:
    return mla.latent_attention(q, [entry for (entry,) in pieces], visible, rank=mixer.kv_rank)


# Keys lie with the position last and values with the head last; see `decode_attention`.
GROUPED = Kind(
    shapes=lambda mixer, rows, columns: (
        (rows, mixer.num_kv_heads, mixer.head_dim, columns),
        (rows, mixer.num_kv_heads, columns, mixer.head_dim),
    ),
    axes=(("batch", "kv_heads", None, None),) * 2,
    columns=(3, 2),
    kept=lambda kept: (kept[0].transpose(0, 2, 3, 1), kept[1].transpose(0, 2, 1, 3)),
    read=_read_grouped,
)
LATENT = Kind(
    shapes=lambda mixer, rows, columns: ((rows, columns, mixer.kv_rank + mixer.rope_dim),),
    axes=(("batch", None, None),),
    columns=(1,),
    kept=lambda kept: (kept,),
    read=_read_latent,
)
