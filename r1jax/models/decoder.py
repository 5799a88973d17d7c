"""The decoder-only transformer, one for training, prefill and decoding.

`forward` scans over the stacked layers of each group; `decode_step` unrolls them, one cache each,
since a scan would copy every cache at every token. Both apply the same `layer`.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from r1jax import settings
from r1jax.kernels.attention import packed_attention
from r1jax.kernels.sums import NAMED, Sums
from r1jax.models import layers
from r1jax.models.layers import Attend
from r1jax.sharding import Leaf, constrain, is_leaf, normal, ones
from r1jax.types import Params


def leaves(cfg: settings.Decoder) -> Params:
    """Every weight of the model. Group g's layers are stacked in `groups[g]`, dimension 0."""
    params: Params = {
        "embed": Leaf((cfg.vocab_size, cfg.dim), ("vocab", "embed"), normal(cfg.dim**-0.5)),
        "norm": Leaf((cfg.dim,), (None,), ones),
        "groups": [],
    }
    if not cfg.tied:
        params["head"] = Leaf((cfg.vocab_size, cfg.dim), ("vocab", "embed"), normal(cfg.dim**-0.5))
    for group in cfg.groups:
        one = {
            "mixer_norm": Leaf((cfg.dim,), (None,), ones),
            "mixer": layers.gqa_leaves(group.mixer, cfg.dim),
            "mlp_norm": Leaf((cfg.dim,), (None,), ones),
            "mlp": layers.mlp_leaves(group.mlp, cfg.dim),
        }
        params["groups"].append(
            jax.tree.map(lambda x, n=group.count: _stack(x, n), one, is_leaf=is_leaf)
        )
    return params


def _stack(leaf: Leaf, count: int) -> Leaf:
    def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jax.vmap(lambda k: leaf.init(k, shape[1:], dtype))(jax.random.split(key, count))

    return Leaf((count, *leaf.shape), (None, *leaf.axes), init, leaf.dtype)


def layer(
    cfg: settings.Decoder,
    group: settings.Group,
    params: Params,
    x: Float[Array, "... D"],
    *,
    rope: tuple[jax.Array, jax.Array],
    attend: Attend,
) -> tuple[Float[Array, "... D"], Any]:
    """One pre-norm layer: x + mixer(norm(x)), then x + mlp(norm(x)); and what `attend` carries."""
    add = sums(cfg)
    with jax.named_scope("mixer"):
        normed = layers.rms_norm(params["mixer_norm"], x, cfg.norm_eps, sums=add)
        mixed, carry = layers.gqa(
            group.mixer,
            params["mixer"],
            normed,
            rope=rope,
            attend=attend,
            eps=cfg.norm_eps,
            sums=add,
        )
        x = x + mixed
    with jax.named_scope("mlp"):
        normed = layers.rms_norm(params["mlp_norm"], x, cfg.norm_eps, sums=add)
        x = x + layers.mlp(params["mlp"], normed)
    return x, carry


def sums(cfg: settings.Decoder) -> Sums:
    """How this model's long sums are added up."""
    return NAMED[cfg.sums]


def embed(cfg: settings.Decoder, params: Params, tokens: Int[Array, "..."]) -> jax.Array:
    """Embedding rows of the tokens, in the compute dtype."""
    return params["embed"][tokens].astype(jnp.dtype(cfg.dtype))


def head(cfg: settings.Decoder, params: Params) -> Float[Array, "V D"]:
    """The matrix that turns a final hidden state into logits."""
    return params["embed"] if cfg.tied else params["head"]


def forward(
    cfg: settings.Decoder,
    params: Params,
    tokens: Int[Array, "B T"],
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    *,
    keep_kv: bool = False,
) -> tuple[Float[Array, "B T D"], Any]:
    """Final hidden states, after the last norm, of packed rows.

    A token sees the tokens before it in its own segment. With `keep_kv` also each layer's rotated
    keys and values, a list over groups of a pair [count, B, T, K, H]; otherwise None.
    """
    x = constrain(embed(cfg, params, tokens), "batch", None, None)
    kept = []
    for group, stacked in zip(cfg.groups, params["groups"], strict=True):
        rope = layers.rope_angles(position, head_dim=group.mixer.head_dim, theta=cfg.rope_theta)

        def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
            return packed_attention(q, k, v, segment, sums=sums(cfg)), (k, v) if keep_kv else None

        def one(x: jax.Array, params: Params, group=group, rope=rope) -> tuple[jax.Array, Any]:
            x, carry = layer(cfg, group, params, x, rope=rope, attend=attend)
            return constrain(x, "batch", None, None), carry

        body = jax.checkpoint(one) if cfg.remat == "layer" else one
        x, carry = jax.lax.scan(body, x, stacked, unroll=1 if cfg.scan else group.count)
        kept.append(carry)
    x = layers.rms_norm(params["norm"], x, cfg.norm_eps, sums=sums(cfg))
    return x, kept if keep_kv else None


def logits(
    cfg: settings.Decoder,
    params: Params,
    tokens: Int[Array, "B T"],
    mask: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """Next-token logits, float32. For small inputs: training never stores this array.

    `mask` is 0 on padding, which may stand on either side; positions count real tokens.
    """
    if mask is None:
        mask = jnp.ones_like(tokens)
    mask = mask.astype(jnp.int32)
    position = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden, _ = forward(cfg, params, tokens, position, mask)
    return jnp.einsum("btd,vd->btv", hidden, head(cfg, params).astype(hidden.dtype)).astype(
        jnp.float32
    )


def unstack(cfg: settings.Decoder, params: Params) -> list[tuple[settings.Group, Params]]:
    """Each layer's settings and weights in order, for loops that are not scanned."""
    out = []
    for group, stacked in zip(cfg.groups, params["groups"], strict=True):
        for i in range(group.count):
            out.append((group, jax.tree.map(lambda w, i=i: w[i], stacked)))
    return out


def decode_step(
    cfg: settings.Decoder,
    params: Params,
    unstacked: Sequence[tuple[settings.Group, Params]],
    tokens: Int[Array, " B"],
    position: Int[Array, " B"],
    attends: Sequence[Attend],
) -> tuple[Float[Array, "B D"], list[Any]]:
    """Final hidden state of one new token per row, and each layer's new cache."""
    x = constrain(embed(cfg, params, tokens), "batch", None)
    caches = []
    rope: dict[int, tuple[jax.Array, jax.Array]] = {}
    for (group, weights), attend in zip(unstacked, attends, strict=True):
        size = group.mixer.head_dim
        if size not in rope:
            rope[size] = layers.rope_angles(position, head_dim=size, theta=cfg.rope_theta)
        x, cache = layer(cfg, group, weights, x, rope=rope[size], attend=attend)
        caches.append(cache)
    return layers.rms_norm(params["norm"], x, cfg.norm_eps, sums=sums(cfg)), caches
