"""Matrix products of rows that are sorted by the matrix they meet."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def grouped_matmul(
    x: Float[Array, "rows D"], weight: Float[Array, "E D F"], sizes: Int[Array, " E"]
) -> Float[Array, "rows F"]:
    """Row i times the matrix of its group: the first `sizes[0]` rows meet `weight[0]`, and so on.

    Rows after the last group are 0. Sums are float32 where the backend has a kernel for it.
    """
    out = jax.lax.ragged_dot(x, weight, sizes)
    # Some backends leave the rows of no group as they found them.
    past = jnp.arange(x.shape[0]) >= jnp.sum(sizes)
    return jnp.where(past[:, None], jnp.zeros((), out.dtype), out)
