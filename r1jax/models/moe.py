"""Mixture of experts without a capacity: every token is computed by all the experts it chose.

Tokens are sorted by expert and multiplied in groups. On a mesh, each device sorts its own tokens
and sends them to the devices that hold their experts, along the mesh axis `expert`.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from r1jax import settings
from r1jax.kernels.grouped import grouped_matmul
from r1jax.models import layers
from r1jax.sharding import RULES, Leaf, free_axes, normal, zeros
from r1jax.types import Params

SLACK = 1.25  # room for rows from one device to another in a round, over an even share
GATHERED = ("gate", "up", "down")  # the weights that have one matrix an expert
IN_FLOAT32 = ("router", "router_bias")  # the weights that no compute dtype changes


class Routing(struct.PyTreeNode, kw_only=True):
    """What the router said of each token. `score` is before the bias, float32."""

    choice: Int[Array, "... k"]
    score: Float[Array, "... E"]


def experts_leaves(cfg: settings.Experts, dim: int) -> Params:
    """Weights of one mixture. `router_bias` is moved by `update_bias`, never by a gradient."""
    into = ("experts", "mlp", "embed")
    leaves: Params = {
        "router": Leaf((cfg.num_experts, dim), (None, "embed"), normal(dim**-0.5)),
        "gate": Leaf((cfg.num_experts, cfg.dim, dim), into, normal(dim**-0.5)),
        "up": Leaf((cfg.num_experts, cfg.dim, dim), into, normal(dim**-0.5)),
        "down": Leaf(
            (cfg.num_experts, dim, cfg.dim), ("experts", "embed", "mlp"), normal(cfg.dim**-0.5)
        ),
    }
    if cfg.score == "sigmoid":
        leaves["router_bias"] = Leaf((cfg.num_experts,), (None,), zeros)
    if cfg.shared_dim:
        leaves["shared"] = layers.mlp_leaves(settings.Mlp(dim=cfg.shared_dim), dim)
    return leaves


def experts(
    cfg: settings.Experts,
    params: Params,
    x: Float[Array, "... D"],
    *,
    choice: Int[Array, "... k"] | None = None,
) -> tuple[Float[Array, "... D"], Routing]:
    """The weighted sum of the chosen experts' outputs, and what the router said.

    With `choice` those experts are taken whatever the router says now; the weights are still its
    own (replay of a rollout's routing). A token whose choice is negative was not recorded and
    chooses for itself. On a mesh the tokens are split over data, fsdp and expert. In a `shard_map`
    over `expert` the tokens are this device's, and so may the experts be (see `are_spread`).

    Raises:
      ValueError: the mesh axis `expert` does not divide the experts.
    """
    with jax.named_scope("router"):
        weight, routing = route(cfg, params, x, choice=choice)
    flat = x.reshape(-1, x.shape[-1])
    top, share = routing.choice.reshape(-1, cfg.top_k), weight.reshape(-1, cfg.top_k)
    stacks = {name: params[name].astype(x.dtype) for name in GATHERED}
    axes = free_axes()
    if math.prod(axes.values()) == 1 and stacks["gate"].shape[0] == cfg.num_experts:
        out = local_experts(stacks, flat, top, share)
    else:
        out = _on_mesh(cfg, axes, stacks, flat, top, share)
    out = out.reshape(x.shape)
    if cfg.shared_dim:
        out = out + layers.mlp(params["shared"], x)
    return out, routing


def route(
    cfg: settings.Experts,
    params: Params,
    x: Float[Array, "... D"],
    *,
    choice: Int[Array, "... k"] | None = None,
) -> tuple[Float[Array, "... k"], Routing]:
    """The weight of each chosen expert, and the routing. All in float32: a close choice that falls
    otherwise in the sampler than in the trainer is another network.

    Source: DeepSeek-V3, arXiv:2412.19437, eq. 12-16; Qwen3, arXiv:2505.09388.
    """
    logit = jnp.einsum("...d,ed->...e", x.astype(jnp.float32), params["router"].astype(jnp.float32))
    if cfg.score == "sigmoid":
        score = jax.nn.sigmoid(logit)
    else:
        score = jax.nn.softmax(logit, axis=-1)
    own = choose(cfg, score, params.get("router_bias"))
    choice = own if choice is None else jnp.where(choice < 0, own, choice.astype(own.dtype))
    weight = jnp.take_along_axis(score, choice, axis=-1)
    if cfg.normalise:
        weight = weight / (jnp.sum(weight, axis=-1, keepdims=True) + 1e-20)
    return weight * cfg.scale, Routing(choice=choice, score=score)


def choose(
    cfg: settings.Experts, score: Float[Array, "... E"], bias: Float[Array, " E"] | None
) -> Int[Array, "... k"]:
    """The `top_k` experts by score plus bias, from the best groups; a group is as good as the sum
    of its best two."""
    value = jax.lax.stop_gradient(score)
    if bias is not None:
        wide = jax.lax.stop_gradient(bias).astype(jnp.float32)
        value = value + wide.reshape((1,) * (value.ndim - 1) + wide.shape)
    if cfg.num_groups > 1:
        grouped = value.reshape(*value.shape[:-1], cfg.num_groups, -1)
        best = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)
        kept = jax.lax.top_k(best, cfg.top_groups)[1]
        allowed = jnp.sum(jax.nn.one_hot(kept, cfg.num_groups), axis=-2) > 0
        value = jnp.where(allowed[..., None], grouped, -jnp.inf).reshape(value.shape)
    return jax.lax.top_k(value, cfg.top_k)[1]


# --------------------------------------------------------------------------- computing


def local_experts(
    stacks: Params,
    x: Float[Array, "n D"],
    choice: Int[Array, "n k"],
    weight: Float[Array, "n k"],
) -> Float[Array, "n D"]:
    """The mixture where every expert is at hand; outputs are added up in float32."""
    flat = choice.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=stacks["gate"].shape[0])
    out = _feed(stacks, x[order // choice.shape[1]], sizes)
    placed = jnp.zeros_like(out).at[order].set(out).reshape(*choice.shape, -1)
    total = jnp.einsum("nkd,nk->nd", placed.astype(jnp.float32), weight)
    return total.astype(x.dtype)


def _feed(stacks: Params, x: jax.Array, sizes: jax.Array) -> jax.Array:
    hidden = jax.nn.silu(grouped_matmul(x, stacks["gate"], sizes))
    return grouped_matmul(hidden * grouped_matmul(x, stacks["up"], sizes), stacks["down"], sizes)


def _on_mesh(
    cfg: settings.Experts,
    sizes: dict[str, int],
    stacks: Params,
    x: jax.Array,
    choice: jax.Array,
    weight: jax.Array,
) -> jax.Array:
    """`exchanged_experts` on every device, for its share of the tokens. Each takes its part of an
    expert's width, and the parts are summed along `tensor`. `sizes` are of the axes that no
    `shard_map` around has taken: where `expert` is not among them, tokens and experts are split."""
    devices = jax.sharding.get_abstract_mesh().shape["expert"]
    if cfg.num_experts % devices:
        raise ValueError(
            f"mesh.expert must divide num_experts, got {devices} and {cfg.num_experts}"
        )
    spread = "expert" if "expert" in sizes else None
    assert spread or stacks["gate"].shape[0] * devices == cfg.num_experts
    batch = tuple(axis for axis in RULES["batch"] if axis in sizes)
    parts = math.prod(sizes[axis] for axis in batch)
    spare = -x.shape[0] % parts
    padded = [jnp.pad(a, ((0, spare), (0, 0))) for a in (x, choice, weight)]
    tokens = PartitionSpec(batch)
    wide, narrow = PartitionSpec(spread, "tensor", None), PartitionSpec(spread, None, "tensor")
    run = jax.shard_map(
        partial(exchanged_experts, axis="expert", width_axis="tensor"),
        in_specs=({"gate": wide, "up": wide, "down": narrow}, tokens, tokens, tokens),
        out_specs=tokens,
        axis_names=set(sizes),
        check_vma=False,
    )
    return run(stacks, *padded)[: x.shape[0]]


def exchanged_experts(
    stacks: Params,
    x: Float[Array, "n D"],
    choice: Int[Array, "n k"],
    weight: Float[Array, "n k"],
    *,
    axis: str,
    width_axis: str,
) -> Float[Array, "n D"]:
    """The mixture of this device's tokens, inside `shard_map`; experts are spread along `axis`.

    Rows go to the holders of their experts and back in rounds of a fixed size. One round is enough
    while no holder gets more than SLACK times its even share from any device; else as many follow
    as are needed, up to the worst case, so nothing is dropped.
    """
    devices, held = jax.lax.axis_size(axis), stacks["gate"].shape[0]
    (n, k), dim = choice.shape, x.shape[1]
    flat = choice.reshape(-1)
    order = jnp.argsort(flat)  # by expert, hence by holder
    count = jnp.bincount(flat // held, length=devices)
    start = jnp.cumsum(count) - count
    worst = n * min(k, held)
    room = min(math.ceil(SLACK * n * k / devices), worst)
    rounds = -(-worst // room)
    needed = jax.lax.pmax(-(-jnp.max(count) // room), axis)
    exchange = partial(jax.lax.all_to_all, axis_name=axis, split_axis=0, concat_axis=0)

    @jax.checkpoint  # rounds that were not needed must not keep anything for backward
    def turn(stacks: Params, x: jax.Array, weight: jax.Array, number: jax.Array) -> jax.Array:
        index = number * room + jnp.arange(room)
        real = index[None] < count[:, None]  # [devices, room]
        source = order[jnp.minimum(start[:, None] + index[None], n * k - 1)]
        sent = jnp.where(real[..., None], x[source // k], jnp.zeros((), x.dtype))
        expert = exchange(jnp.where(real, flat[source] % held, held)).reshape(-1)
        rows = exchange(sent).reshape(-1, dim)
        by_expert = jnp.argsort(expert)
        out = _feed(stacks, rows[by_expert], jnp.bincount(expert, length=held + 1)[:held])
        out = jnp.zeros_like(out).at[by_expert].set(out).reshape(devices, room, dim)
        share = jnp.where(real, weight.reshape(-1)[source], 0.0)
        back = exchange(out).astype(jnp.float32) * share[..., None]
        return jnp.zeros(x.shape, jnp.float32).at[source // k].add(back)

    def one(total: jax.Array, number: jax.Array) -> tuple[jax.Array, None]:
        more = jax.lax.cond(
            number < needed,
            turn,
            lambda stacks, x, weight, number: jnp.zeros(x.shape, jnp.float32),
            stacks,
            x,
            weight,
            number,
        )
        return total + more, None

    total, _ = jax.lax.scan(one, jnp.zeros(x.shape, jnp.float32), jnp.arange(rounds))
    return jax.lax.psum(total, width_axis).astype(x.dtype)


def are_spread(cfg: settings.Decoder, params: Params) -> bool:
    """Whether a `shard_map` around left this device a part of each layer's experts: then devices
    along `expert` must run the model at the same time."""
    return any(
        isinstance(group.mlp, settings.Experts)
        and stacked["mlp"]["gate"].shape[1] < group.mlp.num_experts
        for group, stacked in zip(cfg.groups, params["groups"], strict=True)
    )


# --------------------------------------------------------------------------- balance


def load(routing: Routing, mask: Bool[Array, "..."], *, num_experts: int) -> Float[Array, " E"]:
    """How many of the tokens where `mask` is True chose each expert."""
    hit = jax.nn.one_hot(routing.choice, num_experts, dtype=jnp.float32)
    hit = jnp.sum(hit, axis=-2) * mask[..., None].astype(jnp.float32)
    return jnp.sum(hit.reshape(-1, num_experts), axis=0)


def statistics(load: Float[Array, " E"]) -> dict[str, jax.Array]:
    """Numbers for the log: the fullest expert over an even share (1 is balanced), the share of
    experts that got nothing, and the entropy of the load over that of an even one."""
    share = load / jnp.maximum(jnp.sum(load), 1.0)
    entropy = -jnp.sum(jnp.where(share > 0, share * jnp.log(jnp.maximum(share, 1e-30)), 0.0))
    return {
        "load_max": jnp.max(share) * load.shape[0],
        "load_idle": jnp.mean((load == 0).astype(jnp.float32)),
        "load_entropy": entropy / math.log(load.shape[0]),
    }


def update_bias(
    bias: Float[Array, "... E"], load: Float[Array, "... E"], *, rate: float
) -> Float[Array, "... E"]:
    """The router's bias after a step: `rate` down for experts with more than the mean load, `rate`
    up for those with less. Source: arXiv:2408.15664; DeepSeek-V3 uses 0.001, then 0."""
    return bias + rate * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)


def sequence_balance(
    routing: Routing, segment: Int[Array, "B T"], weight: Float[Array, "B T"]
) -> Float[Array, ""]:
    """The sum over sequences of sum_e f_e P_e, which is 1 where experts are used evenly, each
    times the sum of `weight` over its tokens.

    f_e is the share of a sequence's choices that went to e, times E; P_e is the mean of its scores
    that are normalised over experts. `segment` counts from 1 in each row, 0 being padding. Weights
    that sum to 1 over an update make a mean that does not depend on how it is packed or cut.

    Source: DeepSeek-V3, arXiv:2412.19437, eq. 17-20 (there times 0.0001).
    """
    num_experts, top_k = routing.score.shape[-1], routing.choice.shape[-1]

    def sums(x: jax.Array) -> jax.Array:  # over each sequence's tokens; [B, T, ...]
        empty = jnp.zeros((x.shape[1] + 1, *x.shape[2:]), jnp.float32)
        return jax.vmap(lambda x, s: empty.at[s].add(x)[1:])(x, segment)

    hit = jnp.sum(jax.nn.one_hot(routing.choice, num_experts, dtype=jnp.float32), axis=-2)
    share = routing.score / (jnp.sum(routing.score, axis=-1, keepdims=True) + 1e-20)
    length = jnp.maximum(sums(jnp.ones(segment.shape, jnp.float32)), 1.0)[..., None]
    each = jnp.sum(sums(hit) / length * (num_experts / top_k) * (sums(share) / length), axis=-1)
    return jnp.sum(each * sums(weight))


def moved(
    params: Params, loads: Sequence[Any], *, rate: float, mtp_load: jax.Array | None = None
) -> Params:
    """The model's weights with every `router_bias` moved; `loads[g]` is [count, E], or None where
    group g has no experts with a bias. `mtp_load` is that of the prediction modules."""

    def move(layer: Params, load_: jax.Array | None) -> Params:
        if load_ is None or "router_bias" not in layer["mlp"]:
            return layer
        bias = update_bias(layer["mlp"]["router_bias"], load_, rate=rate)
        return {**layer, "mlp": {**layer["mlp"], "router_bias": bias}}

    groups = [move(*pair) for pair in zip(params["groups"], loads, strict=True)]
    params = {**params, "groups": groups}
    if mtp_load is not None:
        layer = move(params["mtp"]["layer"], mtp_load)
        params["mtp"] = {**params["mtp"], "layer": layer}
    return params


# --------------------------------------------------------------------------- records


def record_shape(cfg: settings.Decoder) -> tuple[int, int]:
    """(L, k): how many layers have experts, prediction modules apart, and how many a token takes.

    Raises:
      ValueError: no layer has experts, or k differs between layers.
    """
    found = [(g.count, g.mlp.top_k) for g in cfg.groups if isinstance(g.mlp, settings.Experts)]
    if len({top_k for _, top_k in found}) != 1:
        raise ValueError(
            f"routing can be recorded where layers have experts and one top_k, "
            f"got top_k {[top_k for _, top_k in found]}"
        )
    return sum(count for count, _ in found), found[0][1]


def record(choices: Sequence[Int[Array, "... k"]]) -> Int[Array, "... L k"]:
    """The choices of the layers with experts, in their order, in 2 bytes each."""
    return jnp.stack(choices, axis=-2).astype(jnp.int16)


def record_of_groups(routing: Sequence[Routing | None]) -> Int[Array, "B T L k"]:
    """`record` of what `decoder.run` keeps."""
    kept = [r.choice for r in routing if r is not None]
    return record([choice[i] for choice in kept for i in range(choice.shape[0])])


def choices_of(
    cfg: settings.Decoder, record: Int[Array, "B T L k"]
) -> list[Int[Array, "L B T k"] | None]:
    """A record as `decoder.run` replays it: one entry a group."""
    layers, out, start = jnp.moveaxis(record, 2, 0), [], 0
    for group in cfg.groups:
        if isinstance(group.mlp, settings.Experts):
            out.append(layers[start : start + group.count])
            start += group.count
        else:
            out.append(None)
    return out
