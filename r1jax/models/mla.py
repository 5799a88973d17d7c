"""Multi-head latent attention: whole keys and values in training, only latents in the cache.

A token leaves one entry behind: its latent (normed), from which all heads' keys and values are made
by a matmul, and a rotated key that the heads share. Decoding never makes the keys and values: the
matmul that would is moved to the query and to the result ("absorbed").

Source: DeepSeek-V2, arXiv:2405.04434, section 2.1; DeepSeek-V3, arXiv:2412.19437, section 2.1.1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from r1jax import settings
from r1jax.kernels.attention import MASKED
from r1jax.kernels.sums import NAMED
from r1jax.models.layers import Attend, linear, rms_norm
from r1jax.models.rope import Rope, rotate, score_scale
from r1jax.sharding import Leaf, normal, ones
from r1jax.types import Params

EPS = 1e-6  # of the latents' norms: fixed in the published code, whatever the layers' is

# (queries [..., N, E], entry [..., E]) -> (weighted sum of latents [..., N, C], what it carries)
LatentAttend = Callable[[jax.Array, jax.Array], tuple[jax.Array, Any]]


def mla_leaves(cfg: settings.Latent, dim: int) -> Params:
    """Weights of one latent attention block."""
    query = (cfg.num_heads, cfg.nope_dim + cfg.rope_dim)
    heads = ("heads", None)
    leaves: Params = {
        "kv_down": Leaf((cfg.kv_rank + cfg.rope_dim, dim), (None, "embed"), normal(dim**-0.5)),
        "kv_norm": Leaf((cfg.kv_rank,), (None,), ones),
        "kv_up": Leaf(
            (cfg.num_heads, cfg.nope_dim + cfg.value_dim, cfg.kv_rank),
            (*heads, None),
            normal(cfg.kv_rank**-0.5),
        ),
        "out": Leaf(
            (dim, cfg.num_heads, cfg.value_dim),
            ("embed", *heads),
            normal((cfg.num_heads * cfg.value_dim) ** -0.5),
        ),
    }
    if cfg.q_rank is None:
        leaves["q"] = Leaf((*query, dim), (*heads, "embed"), normal(dim**-0.5))
    else:
        leaves["q_down"] = Leaf((cfg.q_rank, dim), (None, "embed"), normal(dim**-0.5))
        leaves["q_norm"] = Leaf((cfg.q_rank,), (None,), ones)
        leaves["q_up"] = Leaf((*query, cfg.q_rank), (*heads, None), normal(cfg.q_rank**-0.5))
    return leaves


def mla(
    cfg: settings.Decoder,
    block: settings.Latent,
    params: Params,
    x: Float[Array, "... D"],
    *,
    rope: Rope,
    attend: Attend,
) -> tuple[Float[Array, "... D"], Float[Array, "... E"]]:
    """Attention's part of the residual stream, and the tokens' cache entries.

    `attend` is as in `layers.gqa`, with one query head to each key-value head; what it carries is
    dropped. It scales scores by 1/sqrt(head size), so YaRN's factor goes into the queries. Values
    are filled up with zeros to the width of keys.
    """
    nope, rank = block.nope_dim, block.kv_rank
    q_nope, q_rope = _queries(cfg, block, params, x, rope)
    entry = _entry(cfg, block, params, x, rope)
    up = params["kv_up"].astype(x.dtype)
    made = linear(entry[..., :rank], up.reshape(-1, rank))
    made = made.reshape(*x.shape[:-1], block.num_heads, nope + block.value_dim)
    shared = jnp.broadcast_to(
        entry[..., None, rank:], (*x.shape[:-1], block.num_heads, block.rope_dim)
    )
    q = jnp.concatenate([q_nope, q_rope], axis=-1) * score_scale(cfg)
    k = jnp.concatenate([made[..., :nope], shared], axis=-1)
    spare = nope + block.rope_dim - block.value_dim
    v = jnp.pad(made[..., nope:], ((0, 0),) * (made.ndim - 1) + ((0, spare),))
    out, _ = attend(q[..., None, :], k, v)
    return _project(params, out[..., 0, : block.value_dim]), entry


def mla_decode(
    cfg: settings.Decoder,
    block: settings.Latent,
    params: Params,
    x: Float[Array, "... D"],
    *,
    rope: Rope,
    attend: LatentAttend,
) -> tuple[Float[Array, "... D"], Any]:
    """As `mla`, over a cache of entries: `attend` gets queries that are scaled and ready to be
    multiplied with entries, and the new token's entry; see `latent_attention`."""
    nope = block.nope_dim
    q_nope, q_rope = _queries(cfg, block, params, x, rope)
    up = params["kv_up"].astype(x.dtype)
    q_latent = jnp.einsum("...nh,nhc->...nc", q_nope, up[:, :nope])
    scale = score_scale(cfg) * (nope + block.rope_dim) ** -0.5
    q = jnp.concatenate([q_latent, q_rope], axis=-1) * scale
    latent, carry = attend(q, _entry(cfg, block, params, x, rope))
    return _project(params, jnp.einsum("...nc,nhc->...nh", latent, up[:, nope:])), carry


def latent_attention(
    q: Float[Array, "B N E"],
    entries: Sequence[Float[Array, "B _ E"]],
    visible: Bool[Array, "B S"] | Bool[Array, "B N S"],
    *,
    rank: int,
) -> Float[Array, "B N C"]:
    """Softmax-weighted sums of the latents, the first `rank` numbers of entries; S in all.

    Pieces stay apart, as joining them would copy the cache at every token. What is `visible` may
    differ from query to query.
    """
    score = jnp.concatenate(
        [jnp.einsum("bne,bse->bns", q, e, preferred_element_type=jnp.float32) for e in entries],
        axis=-1,
    )
    score = jnp.where(visible[:, None] if visible.ndim == 2 else visible, score, MASKED)
    weight = jax.nn.softmax(score, axis=-1).astype(q.dtype)
    out, start = jnp.zeros((*q.shape[:2], rank), q.dtype), 0
    for e in entries:
        end = start + e.shape[1]
        out = out + jnp.einsum("bns,bsc->bnc", weight[..., start:end], e[..., :rank])
        start = end
    return out


def _queries(
    cfg: settings.Decoder, block: settings.Latent, params: Params, x: jax.Array, rope: Rope
) -> tuple[jax.Array, jax.Array]:
    if block.q_rank is None:
        source, weight = x, params["q"]
    else:
        source = linear(x, params["q_down"].astype(x.dtype))
        source = rms_norm(params["q_norm"], source, EPS, sums=NAMED[cfg.sums])
        weight = params["q_up"]
    q = linear(source, weight.reshape(-1, weight.shape[-1]).astype(x.dtype))
    q = q.reshape(*x.shape[:-1], *weight.shape[:-1])
    return q[..., : block.nope_dim], rotate(_halves(block, q[..., block.nope_dim :]), rope)


def _entry(
    cfg: settings.Decoder, block: settings.Latent, params: Params, x: jax.Array, rope: Rope
) -> jax.Array:
    down = linear(x, params["kv_down"].astype(x.dtype))
    latent = rms_norm(params["kv_norm"], down[..., : block.kv_rank], EPS, sums=NAMED[cfg.sums])
    key = rotate(_halves(block, down[..., None, block.kv_rank :]), rope)[..., 0, :]
    return jnp.concatenate([latent, key], axis=-1)


def _halves(block: settings.Latent, x: jax.Array) -> jax.Array:
    """Rotary entries with pair i at (i, i + half), as `rotate` wants them. Queries and keys move
    alike, so their products stay."""
    if not block.interleaved:
        return x
    return jnp.concatenate([x[..., 0::2], x[..., 1::2]], axis=-1)


def _project(params: Params, heads: jax.Array) -> jax.Array:
    out = params["out"].astype(heads.dtype)
    flat = heads.reshape(*heads.shape[:-2], -1)
    return linear(flat, out.reshape(out.shape[0], -1))
