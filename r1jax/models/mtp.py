"""Multi-token prediction: modules that predict further ahead, one after another.

Module k joins the state at token t, which knows tokens up to t + k, with the embedding of the next
one, t + k + 1, and passes them through a layer of its own; from there the shared head predicts
token t + k + 2. In training their loss makes the main model plan ahead; in sampling they draft.

Source: DeepSeek-V3, arXiv:2412.19437, section 2.2. What goes in is the main model's state after
its last norm, the embedding first, as in the code that serves the published weights.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from r1jax import settings
from r1jax.kernels.attention import packed_attention
from r1jax.kernels.logprob import token_logp
from r1jax.models import decoder, moe
from r1jax.models.layers import linear, rms_norm
from r1jax.models.rope import Rope, rope_angles
from r1jax.types import Params


def module(params: Params, k: int) -> Params:
    """The weights of module `k`."""
    return jax.tree.map(lambda w: w[k], params["mtp"])


def predict(
    cfg: settings.Decoder,
    params: Params,
    weights: Params,
    hidden: Float[Array, "... D"],
    tokens: Int[Array, "..."],
    *,
    rope: Rope,
    attend: decoder.Attend,
    decoding: bool = False,
) -> tuple[Float[Array, "... D"], Any, moe.Routing | None]:
    """One module's state, normed: what the head and the next module take. Also what its layer's
    mixer carries, and its routing where it has experts.

    `hidden` is the state before, `tokens` the token after those that it knows; see `module` for
    `weights`, and `decoder.layer` for `attend` and `decoding`.
    """
    norm = partial(rms_norm, eps=cfg.norm_eps, sums=decoder.sums(cfg))
    embedded = norm(weights["embed_norm"], decoder.embed(cfg, params, tokens))
    known = norm(weights["hidden_norm"], hidden)
    x = linear(jnp.concatenate([embedded, known], axis=-1), weights["join"].astype(known.dtype))
    group = cfg.groups[-1]
    x, carry, routing = decoder.layer(
        cfg, group, weights["layer"], x, rope=rope, attend=attend, decoding=decoding
    )
    return norm(weights["norm"], x), carry, routing


class Ahead(NamedTuple):
    """What one module makes of packed rows."""

    state: jax.Array  # [B, T, D]
    cache: Any  # as `decoder.Outputs.cache`, of one layer
    routing: moe.Routing | None


def run(
    cfg: settings.Decoder,
    params: Params,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    *,
    count: int | None = None,
) -> list[Ahead]:
    """What each module, or the first `count`, makes of packed rows, from the main model's states.

    At index t, module k has seen tokens up to t + k + 1; where that lies outside of t's segment
    the state means nothing (`ahead` says where).
    """
    rope = rope_angles(cfg, position, decoder.rotated(cfg.groups[-1].mixer))

    def attend(q: jax.Array, key: jax.Array, v: jax.Array) -> tuple[jax.Array, Any]:
        return packed_attention(q, key, v, segment, sums=decoder.sums(cfg)), (key, v)

    out = []
    for k in range(cfg.num_mtp if count is None else count):
        following = jnp.roll(tokens, -(k + 1), axis=1)
        made = predict(cfg, params, module(params, k), hidden, following, rope=rope, attend=attend)
        out.append(Ahead(*made))
        hidden = made[0]
    return out


def ahead(segment: Int[Array, "B T"], count: int) -> Bool[Array, "B T"]:
    """True where the token `count` places on is of the same sequence; segment 0 is padding."""
    length = segment.shape[1]
    same = jnp.roll(segment, -count, axis=1) == segment
    inside = jnp.arange(length) < length - count
    return same & (segment > 0) & inside.reshape(1, length)


def loss(
    cfg: settings.Decoder,
    params: Params,
    hidden: Float[Array, "B T D"],
    tokens: Int[Array, "B T"],
    position: Int[Array, "B T"],
    segment: Int[Array, "B T"],
    weight: Float[Array, "B T"],
) -> tuple[Float[Array, ""], list[moe.Routing | None]]:
    """The mean over modules of the weighted cross-entropy of the tokens that they predict, and
    each module's routing.

    `weight[b, t]` is what token t counts for, as in `Batch`; tokens that no state of their own
    segment predicts count nothing. Multiply by DeepSeek-V3's 0.3, later 0.1. Gradients reach the
    main model, embedding and head too.
    """
    table = decoder.head(cfg, params)
    total = jnp.zeros((), jnp.float32)
    made = run(cfg, params, hidden, tokens, position, segment)
    for k, one in enumerate(made):
        further = k + 2
        target = jnp.roll(tokens, -further, axis=1)
        logp, _ = token_logp(one.state, table, target)
        counts = jnp.where(ahead(segment, further), jnp.roll(weight, -further, axis=1), 0.0)
        total = total - jnp.sum(counts * logp)
    return total / cfg.num_mtp, [one.routing for one in made]
