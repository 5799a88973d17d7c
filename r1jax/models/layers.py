"""The parts of a dense layer: norm, gated feed-forward, grouped-query attention.

Weights of matmuls are [out, in], with several dimensions on either side where heads are concerned:
as Hugging Face's files have them, so that to load them is to copy them.

A block is a pair of functions: `*_leaves(settings) -> tree of Leaf` for one layer, and an apply
function on that tree's arrays. Attention blocks receive `attend(q, k, v) -> (out, carry)`: the same
block trains on packed rows, prefills prompts and decodes with a cache, by what is passed.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax import settings
from r1jax.kernels.sums import Sums, as_they_come
from r1jax.models.rope import Rope, rotate
from r1jax.sharding import Leaf, constrain, normal, ones, zeros
from r1jax.types import Params

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]


def rms_norm(
    scale: Float[Array, " D"], x: Float[Array, "... D"], eps: float, *, sums: Sums = as_they_come
) -> jax.Array:
    """`x` divided by its root mean square over the last dimension, times `scale`.

    Computed in float32, as the sum of squares of a wide bfloat16 row loses digits.
    """
    x32 = x.astype(jnp.float32)
    square = sums(lambda x: jnp.mean(x * x, axis=-1, keepdims=True), x32)
    inverse = jax.lax.rsqrt(square + eps)
    return (x32 * inverse * spread(x.shape, scale.astype(jnp.float32))).astype(x.dtype)


def _spread(shape: tuple[int, ...], vector: Float[Array, " D"]) -> jax.Array:
    return jnp.broadcast_to(vector, shape)


# The function (shape, vector) -> the vector in every row of an array of that shape. Its gradient
# sums over rows; on CPUs by a product with a row of ones, as XLA's own reduction over the first
# dimension takes several times as long there.
spread = jax.custom_vjp(_spread, nondiff_argnums=(0,))


def _spread_forward(shape: tuple[int, ...], vector: jax.Array) -> tuple[jax.Array, None]:
    return spread(shape, vector), None


def _spread_backward(shape: tuple[int, ...], _: None, grad: jax.Array) -> tuple[jax.Array]:
    def product(grad: jax.Array) -> jax.Array:
        rows = grad.reshape(-1, shape[-1])
        return (jnp.ones((1, rows.shape[0]), rows.dtype) @ rows)[0]

    def reduction(grad: jax.Array) -> jax.Array:
        return jnp.sum(grad, axis=tuple(range(len(shape) - 1)))

    return (jax.lax.platform_dependent(grad, cpu=product, default=reduction),)


spread.defvjp(_spread_forward, _spread_backward)


def gqa_leaves(cfg: settings.Attention, dim: int) -> Params:
    """Weights of one grouped-query attention block.

    Queries, keys and values of key-value head k are one slice `qkv[k]`: its R query heads, then
    its key, then its value. One matmul makes all three, and splitting K over devices splits all.
    """
    per_kv = cfg.num_heads // cfg.num_kv_heads
    qkv = (cfg.num_kv_heads, per_kv + 2, cfg.head_dim)
    axes = ("kv_heads", None, None)
    std = dim**-0.5
    leaves: Params = {
        "qkv": Leaf((*qkv, dim), (*axes, "embed"), normal(std)),
        "out": Leaf(
            (dim, cfg.num_kv_heads, per_kv, cfg.head_dim),
            ("embed", *axes),
            normal((cfg.num_heads * cfg.head_dim) ** -0.5),
        ),
    }
    if cfg.bias:
        leaves["bias"] = Leaf(qkv, axes, zeros)
    if cfg.qk_norm:
        leaves["q_norm"] = Leaf((cfg.head_dim,), (None,), ones)
        leaves["k_norm"] = Leaf((cfg.head_dim,), (None,), ones)
    return leaves


def gqa(
    cfg: settings.Attention,
    params: Params,
    x: Float[Array, "... D"],
    *,
    rope: Rope,
    attend: Attend,
    eps: float,
    sums: Sums = as_they_come,
) -> tuple[Float[Array, "... D"], Any]:
    """Attention's part of the residual stream, and what `attend` carries (a cache, or None).

    `attend` gets q [..., K, R, H] and k, v [..., K, H], rotated; it returns [..., K, R, H].
    """
    kv, head = cfg.num_kv_heads, cfg.head_dim
    per_kv = cfg.num_heads // kv
    dtype = x.dtype
    flat = linear(x, params["qkv"].reshape(-1, x.shape[-1]).astype(dtype))
    if cfg.bias:
        flat = flat + spread(flat.shape, params["bias"].reshape(-1).astype(dtype))
    qkv = flat.reshape(*x.shape[:-1], kv, per_kv + 2, head)
    q, k, v = jnp.split(qkv, [per_kv, per_kv + 1], axis=-2)  # backward of a split is one copy
    k, v = k[..., 0, :], v[..., 0, :]
    if cfg.qk_norm:
        q = rms_norm(params["q_norm"], q, eps, sums=sums)
        k = rms_norm(params["k_norm"], k, eps, sums=sums)
    cos, sin = rope
    q = rotate(q, (cos[..., None, :], sin[..., None, :]))
    k = rotate(k, rope)
    out, carry = attend(q, k, v)
    out = out.reshape(*x.shape[:-1], kv * per_kv * head)
    return linear(out, params["out"].reshape(x.shape[-1], -1).astype(dtype)), carry


def mlp_leaves(cfg: settings.Mlp, dim: int) -> Params:
    """Weights of one gated feed-forward.

    Gate and up are matmuls of their own: cutting one result in two would pad and copy its gradient.
    """
    return {
        "gate": Leaf((cfg.dim, dim), ("mlp", "embed"), normal(dim**-0.5)),
        "up": Leaf((cfg.dim, dim), ("mlp", "embed"), normal(dim**-0.5)),
        "down": Leaf((dim, cfg.dim), ("embed", "mlp"), normal(cfg.dim**-0.5)),
    }


@jax.custom_vjp
def linear(x: Float[Array, "... D"], weight: Float[Array, "F D"]) -> Float[Array, "... F"]:
    """x @ weight.T, with a gradient of its own for CPUs.

    The weight's gradient sums over rows, the first dimension of both operands. XLA's CPU matmuls
    do that at half speed; with the narrower operand transposed in memory they have full speed.
    """
    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))


def _linear_forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, Any]:
    return linear(x, weight), (x, weight)


def _linear_backward(saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    rows, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    in_order = lambda x: jax.lax.platform_dependent(  # noqa: E731
        x, cpu=jax.lax.optimization_barrier, default=lambda x: x
    )
    if out.shape[1] <= rows.shape[1]:
        of_weight = in_order(out.T) @ rows
    else:
        of_weight = in_order(in_order(rows.T) @ out).T
    return grad @ weight, of_weight


linear.defvjp(_linear_forward, _linear_backward)


def mlp(params: Params, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """down(silu(gate(x)) * up(x)). Source: GLU variants, arXiv:2002.05202."""
    gate, up, down = (params[name].astype(x.dtype) for name in ("gate", "up", "down"))
    hidden = jax.nn.silu(linear(x, gate)) * linear(x, up)
    if x.ndim == 3:
        hidden = constrain(hidden, "batch", None, "mlp")
    return linear(hidden, down)
