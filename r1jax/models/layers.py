"""The parts of a dense layer: norm, gated feed-forward, grouped-query attention.

A block is a pair of functions: `*_leaves(settings) -> tree of Leaf` for one layer, and an apply
function on that tree's arrays. Attention blocks receive `attend(q, k, v) -> (out, carry)`: the same
block trains on packed rows, prefills prompts and decodes with a cache, by what is passed.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from r1jax import settings
from r1jax.kernels.sums import Sums, as_they_come
from r1jax.models.rope import Rope, rotate
from r1jax.sharding import Leaf, constrain, normal, ones, zeros
from r1jax.types import Params

Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]

# The large weights of a block, and how many of their first dimensions are inputs.
GQA_MATRICES = {"qkv": 1, "out": 3}
MLP_MATRICES = {"gate": 1, "up": 1, "down": 1}


def rms_norm(
    scale: Float[Array, " D"], x: Float[Array, "... D"], eps: float, *, sums: Sums = as_they_come
) -> jax.Array:
    """`x` divided by its root mean square over the last dimension, times `scale`.

    Computed in float32, as the sum of squares of a wide bfloat16 row loses digits.
    """
    x32 = x.astype(jnp.float32)
    square = sums(lambda x: jnp.mean(x * x, axis=-1, keepdims=True), x32)
    inverse = jax.lax.rsqrt(square + eps)
    wide = scale.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + scale.shape)
    return (x32 * inverse * wide).astype(x.dtype)


def gqa_leaves(cfg: settings.Attention, dim: int) -> Params:
    """Weights of one grouped-query attention block.

    Queries, keys and values of key-value head k are one slice `qkv[:, k]`: its R query heads, then
    its key, then its value. One matmul makes all three, and splitting K over devices splits all.
    """
    per_kv = cfg.num_heads // cfg.num_kv_heads
    qkv = (cfg.num_kv_heads, per_kv + 2, cfg.head_dim)
    axes = ("kv_heads", None, None)
    std = dim**-0.5
    leaves: Params = {
        "qkv": Leaf((dim, *qkv), ("embed", *axes), normal(std)),
        "out": Leaf(
            (cfg.num_kv_heads, per_kv, cfg.head_dim, dim),
            (*axes, "embed"),
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
    flat = linear(x, matrix(params["qkv"], 1, dtype))
    qkv = flat.reshape(*x.shape[:-1], kv, per_kv + 2, head)
    if cfg.bias:
        bias = params["bias"].astype(dtype)
        qkv = qkv + bias.reshape((1,) * (x.ndim - 1) + bias.shape)
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
    return linear(out, matrix(params["out"], 3, dtype)), carry


def mlp_leaves(cfg: settings.Mlp, dim: int) -> Params:
    """Weights of one gated feed-forward.

    Gate and up are matmuls of their own: cutting one result in two would pad and copy its gradient.
    """
    return {
        "gate": Leaf((dim, cfg.dim), ("embed", "mlp"), normal(dim**-0.5)),
        "up": Leaf((dim, cfg.dim), ("embed", "mlp"), normal(dim**-0.5)),
        "down": Leaf((cfg.dim, dim), ("mlp", "embed"), normal(cfg.dim**-0.5)),
    }


class Turned(struct.PyTreeNode):
    """A matrix that lies [out, in]. See `linear`."""

    rows: Float[Array, "F D"]


def matrix(weight: jax.Array | Turned, inputs: int, dtype: Any) -> jax.Array | Turned:
    """The weight as [in, out], where its first `inputs` dimensions are what it takes."""
    if isinstance(weight, Turned):
        return weight
    return weight.reshape(math.prod(weight.shape[:inputs]), -1).astype(dtype)


def turned(weights: Params, matrices: Mapping[str, int]) -> Params:
    """A block's weights for decoding: those that `matrices` names, with how many of their
    dimensions are inputs, as `Turned`."""

    def turn(weight: jax.Array, inputs: int) -> Turned:
        flat = weight.reshape(math.prod(weight.shape[:inputs]), -1)
        return Turned(rows=jax.lax.optimization_barrier(flat.T))

    return {
        name: turn(weight, matrices[name]) if name in matrices else weight
        for name, weight in weights.items()
    }


def linear(x: Float[Array, "... D"], weight: jax.Array | Turned) -> Float[Array, "... F"]:
    """x @ weight, for a weight [D, F] or a `Turned` one.

    A CPU matmul first copies its right operand into another order. With few rows that costs more
    than the product, so decoding keeps the weights turned and gives them as the left operand:
    1.5 to 2 times as fast for 4 to 32 rows, and a row's bits are those of a long product. For 64
    and more nothing is won.
    """
    if isinstance(weight, Turned):
        return jax.lax.dot_general(weight.rows, x, (((1,), (1,)), ((), ()))).T
    return _product(x, weight)


@jax.custom_vjp
def _product(x: Float[Array, "... D"], weight: Float[Array, "D F"]) -> Float[Array, "... F"]:
    """x @ weight, with a gradient of its own for CPUs.

    The weight's gradient sums over rows, the first dimension of both operands. XLA's CPU matmuls
    do that at half speed; with the narrower operand transposed in memory they have full speed.
    """
    return x @ weight


def _product_forward(x: jax.Array, weight: jax.Array) -> tuple[jax.Array, Any]:
    return x @ weight, (x, weight)


def _product_backward(saved: Any, grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, weight = saved
    rows, out = x.reshape(-1, x.shape[-1]), grad.reshape(-1, grad.shape[-1])
    in_order = lambda x: jax.lax.platform_dependent(  # noqa: E731
        x, cpu=jax.lax.optimization_barrier, default=lambda x: x
    )
    if rows.shape[1] <= out.shape[1]:
        of_weight = in_order(rows.T) @ out
    else:
        of_weight = in_order(in_order(out.T) @ rows).T
    return grad @ weight.T, of_weight


_product.defvjp(_product_forward, _product_backward)


def mlp(params: Params, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """down(silu(gate(x)) * up(x)). Source: GLU variants, arXiv:2002.05202."""
    gate = linear(x, matrix(params["gate"], 1, x.dtype))
    hidden = jax.nn.silu(gate) * linear(x, matrix(params["up"], 1, x.dtype))
    if x.ndim == 3:
        hidden = constrain(hidden, "batch", None, "mlp")
    return linear(hidden, matrix(params["down"], 1, x.dtype))
