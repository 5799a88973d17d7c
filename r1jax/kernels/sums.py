"""How long sums are added up: as they come, or so that their order leaves no trace.

Sampler and trainer run the same functions on arrays of different shapes, and XLA adds up each shape
in an order of its own. In float32 that is a difference of 1e-7, which a trained network makes 1e-4
of in a few tokens. CPU matmuls give every row the same bits whatever rows are beside it; what is
left are the sums over keys, over a vocabulary and in a norm: in float64, rounded once, these agree
to the bit as well.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Sums = Callable[..., Any]  # (function, *arrays) -> function(*arrays)


def as_they_come(function: Callable[..., Any], *args: jax.Array) -> Any:
    """function(*args)."""
    return function(*args)


def cache_dtype(dtype: Any, sums: Sums) -> Any:
    """In which dtype to keep what `sums` would widen again at every token."""
    wide = sums is in_float64 and jnp.dtype(dtype) == jnp.float32
    return np.dtype(np.float64) if wide and jax.default_backend() == "cpu" else jnp.dtype(dtype)


def as_dtype(x: jax.Array, dtype: Any) -> jax.Array:
    """`x` in that dtype, float64 not excepted."""
    with jax.enable_x64(np.dtype(dtype) == np.float64):
        return x.astype(dtype)


def in_float64(function: Callable[..., Any], *args: jax.Array) -> Any:
    """function(*args), computed in float64 on CPUs if an argument is float32, and rounded once."""
    dtypes = {x.dtype for x in args}
    if dtypes.isdisjoint({np.dtype(np.float32), np.dtype(np.float64)}):
        return function(*args)

    def wide(*args: jax.Array) -> Any:
        with jax.enable_x64(True):
            out = function(*(x.astype(jnp.float64) for x in args))
            return jax.tree.map(lambda x: x.astype(jnp.float32), out)

    def plain(*args: jax.Array) -> Any:
        return jax.tree.map(lambda x: x.astype(jnp.float32), function(*args))

    if np.dtype(np.float64) in dtypes:  # made so by `cache_dtype`, so this is a CPU
        return wide(*args)
    return jax.lax.platform_dependent(*args, cpu=wide, default=plain)


NAMED: dict[str, Sums] = {"float32": as_they_come, "float64": in_float64}
