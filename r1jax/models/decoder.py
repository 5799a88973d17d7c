"""The decoder-only transformer, one for training, prefill and decoding, and for all families.

`run` scans over the stacked layers of each group; `decode_step` unrolls them, one cache each,
since a scan would copy every cache at every token. Both apply the same `layer`.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from r1jax import settings
from r1jax.kernels.attention import packed_attention
from r1jax.kernels.sums import NAMED, Sums
from r1jax.models import adapted, layers, mla, moe
from r1jax.models.rope import Rope, rope_angles
from r1jax.sharding import Leaf, constrain, is_leaf, normal, num_weights, ones
from r1jax.types import Params

# `layers.Attend` or `mla.LatentAttend`, as the layer's mixer wants it.
Attend = Callable[..., tuple[jax.Array, Any]]


class Outputs(struct.PyTreeNode, kw_only=True):
    """What a pass over packed rows gives. Lists are over groups, their arrays [count, ...]."""

    hidden: Float[Array, "B T D"]  # after the last norm
    cache: list[Any] | None = None  # pairs of rotated keys and values [count, B, T, K, H], or
    # latent attention's entries [count, B, T, E]
    routing: list[moe.Routing | None] | None = None  # None for a group without experts


class Decoded(NamedTuple):
    """What new tokens give. Lists are over layers."""

    hidden: jax.Array  # after the last norm
    cache: list[Any]  # what each layer's `attend` carries
    routing: list[moe.Routing | None]


def leaves(cfg: settings.Decoder) -> Params:
    """Every weight of the model. Group g's layers are stacked in `groups[g]`, dimension 0."""
    params: Params = {
        "embed": Leaf((cfg.vocab_size, cfg.dim), ("vocab", "embed"), normal(cfg.dim**-0.5)),
        "norm": Leaf((cfg.dim,), (None,), ones),
        "groups": [stack(layer_leaves(cfg, group), group.count) for group in cfg.groups],
    }
    if not cfg.tied:
        params["head"] = Leaf((cfg.vocab_size, cfg.dim), ("vocab", "embed"), normal(cfg.dim**-0.5))
    if cfg.num_mtp:
        params["mtp"] = stack(mtp_leaves(cfg), cfg.num_mtp)
    return params


def mtp_leaves(cfg: settings.Decoder) -> Params:
    """The weights of one multi-token-prediction module (`r1jax.models.mtp`)."""
    norm = Leaf((cfg.dim,), (None,), ones)
    join = Leaf((cfg.dim, 2 * cfg.dim), (None, "embed"), normal((2 * cfg.dim) ** -0.5))
    return {
        "embed_norm": norm,
        "hidden_norm": norm,
        "join": join,
        "layer": layer_leaves(cfg, cfg.groups[-1]),
        "norm": norm,
    }


def layer_leaves(cfg: settings.Decoder, group: settings.Group) -> Params:
    """The weights of one layer."""
    if isinstance(group.mixer, settings.Latent):
        mixer = mla.mla_leaves(group.mixer, cfg.dim)
    else:
        mixer = layers.gqa_leaves(group.mixer, cfg.dim)
    if isinstance(group.mlp, settings.Experts):
        mlp = moe.experts_leaves(group.mlp, cfg.dim)
    else:
        mlp = layers.mlp_leaves(group.mlp, cfg.dim)
    norm = Leaf((cfg.dim,), (None,), ones)
    return {"mixer_norm": norm, "mixer": mixer, "mlp_norm": norm, "mlp": mlp}


class Counts(NamedTuple):
    """Numbers in a model's weights, prediction modules apart, as their publishers count."""

    total: int
    active: int  # of those, what one token meets; a whole embedding and head are in it
    mtp: int  # of the modules' own, which repeat neither embedding nor head


def count_weights(cfg: settings.Decoder) -> Counts:
    """How large the model is. The router's bias is no weight: no gradient moves it."""
    tree = leaves(cfg)
    mtp = num_weights(tree.pop("mtp", ()))
    total = num_weights(tree)
    idle = 0
    for group, stacked in zip(cfg.groups, tree["groups"], strict=True):
        if isinstance(group.mlp, settings.Experts):
            if "router_bias" in stacked["mlp"]:
                total -= num_weights(stacked["mlp"]["router_bias"])
            routed = sum(num_weights(stacked["mlp"][name]) for name in moe.GATHERED)
            idle += routed // group.mlp.num_experts * (group.mlp.num_experts - group.mlp.top_k)
    return Counts(total=total, active=total - idle, mtp=mtp)


def stack(leaves: Params, count: int) -> Params:
    """The tree of Leaf of `count` equal layers, stacked along a new dimension 0."""

    def one(leaf: Leaf) -> Leaf:
        def init(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
            return jax.vmap(lambda k: leaf.init(k, shape[1:], dtype))(jax.random.split(key, count))

        return Leaf((count, *leaf.shape), (None, *leaf.axes), init, leaf.dtype)

    return jax.tree.map(one, leaves, is_leaf=is_leaf)


def layer(
    cfg: settings.Decoder,
    group: settings.Group,
    params: Params,
    x: Float[Array, "... D"],
    *,
    rope: Rope,
    attend: Attend,
    decoding: bool = False,
    choice: Int[Array, "... k"] | None = None,
) -> tuple[Float[Array, "... D"], Any, moe.Routing | None]:
    """One pre-norm layer: x + mixer(norm(x)), then x + mlp(norm(x)).

    Also what the mixer carries (what `attend` did; for latent attention that is not `decoding`,
    the cache entries), and the routing where there are experts. With `choice` they are given.
    """
    add = sums(cfg)
    with jax.named_scope("mixer"):
        normed = layers.rms_norm(params["mixer_norm"], x, cfg.norm_eps, sums=add)
        weights = params["mixer"]
        if isinstance(group.mixer, settings.Attention):
            mixed, carry = layers.gqa(
                group.mixer,
                weights,
                normed,
                rope=rope,
                attend=attend,
                eps=cfg.norm_eps,
                sums=add,
            )
        else:
            mixer = mla.mla_decode if decoding else mla.mla
            mixed, carry = mixer(cfg, group.mixer, weights, normed, rope=rope, attend=attend)
        x = x + mixed
    with jax.named_scope("mlp"):
        normed = layers.rms_norm(params["mlp_norm"], x, cfg.norm_eps, sums=add)
        if isinstance(group.mlp, settings.Experts):
            out, routing = moe.experts(group.mlp, params["mlp"], normed, choice=choice)
        else:
            out, routing = layers.mlp(params["mlp"], normed), None
    return x + out, carry, routing


def sums(cfg: settings.Decoder) -> Sums:
    """How this model's long sums are added up."""
    return NAMED[cfg.sums]


def embed(cfg: settings.Decoder, params: Params, tokens: Int[Array, "..."]) -> jax.Array:
    """Embedding rows of the tokens, in the compute dtype."""
    return params["embed"][tokens].astype(jnp.dtype(cfg.dtype))


def head(cfg: settings.Decoder, params: Params) -> Float[Array, "V D"]:
    """The matrix that turns a final hidden state into logits."""
    return params["embed"] if cfg.tied else params["head"]


def rotated(mixer: settings.Attention | settings.Latent) -> int:
    """How many entries of a head are rotated by its position."""
    return mixer.rope_dim if isinstance(mixer, settings.Latent) else mixer.head_dim


def run(
    cfg: settings.Decoder,
    params: Params,
    tokens: Int[Array, "B T"],
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    prompt: Int[Array, "B T"] | None = None,
    *,
    keep_cache: bool = False,
    keep_routing: bool = False,
    choices: Sequence[Int[Array, "L B T k"] | None] | None = None,
) -> Outputs:
    """Final hidden states of packed rows, and what is asked to be kept.

    A token sees the tokens before it in its own segment and in the segment that `prompt` names.
    `choices[g]` replays the experts that each layer of group g took (a `Routing.choice` that was
    kept, or the sampler's). Weights of groups may be `adapted.Adapted`.
    """
    x = constrain(embed(cfg, params, tokens), "batch", None, None)
    caches, routings = [], []
    for g, group in enumerate(cfg.groups):
        given = None if choices is None else choices[g]
        x, cache, routing = _layers(
            cfg,
            group,
            params["groups"][g],
            x,
            position,
            (segment, prompt),
            choices=given,
            keep_cache=keep_cache,
            keep_routing=keep_routing,
        )
        caches.append(cache)
        routings.append(routing)
    return Outputs(
        hidden=layers.rms_norm(params["norm"], x, cfg.norm_eps, sums=sums(cfg)),
        cache=caches if keep_cache else None,
        routing=routings if keep_routing else None,
    )


def _layers(
    cfg: settings.Decoder,
    group: settings.Group,
    stacked: Params,
    x: jax.Array,
    position: jax.Array,
    segments: tuple[jax.Array, jax.Array | None],
    *,
    choices: jax.Array | None,
    keep_cache: bool,
    keep_routing: bool,
) -> tuple[jax.Array, Any, Any]:
    """All layers of one group, by a scan."""
    rope = rope_angles(cfg, position, rotated(group.mixer))

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        return packed_attention(q, k, v, *segments, sums=sums(cfg)), (k, v)

    def one(x: jax.Array, xs: tuple[Params, jax.Array | None]) -> tuple[jax.Array, Any]:
        weights, choice = xs
        x = constrain(constrain(x, "batch", None, between), "batch", None, None)
        weights = adapted.merged(weights)
        x, cache, routing = layer(cfg, group, weights, x, rope=rope, attend=attend, choice=choice)
        kept = (cache if keep_cache else None, routing if keep_routing else None)
        return constrain(x, "batch", None, between), kept

    # What a recomputed layer begins with is kept for the way back. It lies split, and is put
    # together where a layer needs it whole.
    between = "remat" if cfg.remat == "layer" else None
    body = jax.checkpoint(one) if cfg.remat == "layer" else one
    unroll = 1 if cfg.scan else group.count
    x = constrain(x, "batch", None, between)
    x, (cache, routing) = jax.lax.scan(body, x, (stacked, choices), unroll=unroll)
    return x, cache, routing


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
    hidden = run(cfg, params, tokens, position, mask).hidden
    return jnp.einsum("btd,vd->btv", hidden, head(cfg, params).astype(hidden.dtype)).astype(
        jnp.float32
    )


def compute_weights(cfg: settings.Decoder, params: Params) -> Params:
    """The weights in the compute dtype, as `layer` would cast each of them at every use.

    Those of norms and routers stay: they are used in float32, in training too.
    """

    def cast(path: Any, weight: jax.Array) -> jax.Array:
        name = path[-1].key
        if "norm" in name or name in moe.IN_FLOAT32:
            return weight
        return weight.astype(jnp.dtype(cfg.dtype))

    return jax.tree_util.tree_map_with_path(cast, params)


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
    tokens: Int[Array, "B ..."],
    position: Int[Array, "B ..."],
    attends: Sequence[Attend],
) -> Decoded:
    """The final hidden states of new tokens, one or several to a row.

    A layer with latent attention takes an `attend` as `mla.mla_decode` does.
    """
    x = constrain(embed(cfg, params, tokens), "batch", *(None,) * tokens.ndim)
    caches, routings = [], []
    rope: dict[int, Rope] = {}
    for (group, weights), attend in zip(unstacked, attends, strict=True):
        size = rotated(group.mixer)
        if size not in rope:
            rope[size] = rope_angles(cfg, position, size)
        x, cache, routing = layer(
            cfg, group, weights, x, rope=rope[size], attend=attend, decoding=True
        )
        caches.append(cache)
        routings.append(routing)
    hidden = layers.rms_norm(params["norm"], x, cfg.norm_eps, sums=sums(cfg))
    return Decoded(hidden, caches, routings)
