"""A weight with a low-rank adapter beside it, as one node of a model's tree of weights.

A pass over rows adds the two up within each layer (`decoder.run`), so that with remat="layer" the
sum, and its gradient, are there for one layer at a time. The rollout engine is given sums that
were made once (`lora.merge`).
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from r1jax.types import Array, Params


class Adapted(struct.PyTreeNode, kw_only=True):
    """weight + scale * b @ a. Their first dimensions may be stacked: layers, experts.

    `a` has the weight's stacked dimensions, the rank and the weight's input dimensions, `b` the
    stacked and the output dimensions and then the rank.
    """

    weight: Array
    a: Array
    b: Array
    scale: float = struct.field(pytree_node=False)


def is_adapted(x: Any) -> bool:
    return isinstance(x, Adapted)


def total(x: Adapted) -> jax.Array:
    """The sum, float32: in a narrower dtype small adapters would be lost."""
    stacked = stacked_dims(x)
    batch, rank = x.weight.shape[:stacked], x.b.shape[-1]
    a = x.a.astype(jnp.float32).reshape(*batch, rank, -1)
    b = x.b.astype(jnp.float32).reshape(*batch, -1, rank)
    # Accelerators would round the factors to fewer bits.
    product = jnp.matmul(b, a, precision=jax.lax.Precision.HIGHEST)
    return x.weight.astype(jnp.float32) + x.scale * product.reshape(x.weight.shape)


def stacked_dims(x: Adapted) -> int:
    """How many leading dimensions are stacked: those that `a` and `b` both have."""
    return x.a.ndim + x.b.ndim - x.weight.ndim - 2


def merged(tree: Params) -> Params:
    """A tree with the sum in the place of every `Adapted`; as it is where there is none."""
    with jax.named_scope("adapters"):
        return jax.tree.map(lambda x: total(x) if is_adapted(x) else x, tree, is_leaf=is_adapted)
