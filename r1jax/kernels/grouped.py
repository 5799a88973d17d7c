"""Matrix products of rows that are sorted by the matrix they meet."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Rows meet matrices [F, D], one a group.
ROWS_BY_GROUP = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())),
    lhs_ragged_dimensions=(0,),
    rhs_group_dimensions=(0,),
)


def grouped_matmul(
    x: Float[Array, "rows D"], weight: Float[Array, "E F D"], sizes: Int[Array, " E"]
) -> Float[Array, "rows F"]:
    """The matrix of its group times row i: the first `sizes[0]` rows meet `weight[0]`, and so on.

    Rows after the last group are 0. Sums are float32 where the backend has a kernel for it.
    """
    out = jax.lax.ragged_dot_general(x, weight, sizes, ROWS_BY_GROUP)
    # Some backends leave the rows of no group as they found them.
    past = jnp.arange(x.shape[0]) >= jnp.sum(sizes)
    return jnp.where(past[:, None], jnp.zeros((), out.dtype), out)
