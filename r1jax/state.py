"""The state that training changes: how it begins, and how AdamW moves it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from r1jax.types import Params, TrainState

# --------------------------------------------------------------------------- optimizer


def adamw(
    steps: int,
    *,
    learning_rate: float,
    warmup: int = 0,
    final: float = 1.0,
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.95,
    eps: float = 1e-8,
    max_grad_norm: float = 1.0,
) -> optax.GradientTransformation:
    """AdamW for a stage of `steps` updates, on gradients clipped to a global norm.

    The learning rate follows `learning_rate_at`. `weight_decay` is per update and in units of the
    learning rate; norms and biases do not decay. `max_grad_norm=inf` does not clip.

    Raises:
      ValueError: a number out of its range; or, when it meets the weights, one that is narrower
        than float32: Adam's second moment has its dtype, and in bfloat16 it stops growing.

    Source: Decoupled Weight Decay Regularization, arXiv:1711.05101.
    """
    for name, value, fits, need in (
        ("steps", steps, steps >= 1, ">= 1"),
        ("learning_rate", learning_rate, 0 <= learning_rate < math.inf, ">= 0 and finite"),
        ("warmup", warmup, warmup >= 0, ">= 0"),
        ("final", final, 0 <= final <= 1, "in [0, 1]: a share of learning_rate"),
        ("weight_decay", weight_decay, weight_decay >= 0, ">= 0"),
        ("max_grad_norm", max_grad_norm, max_grad_norm > 0, "> 0 (inf: no clipping)"),
    ):
        if not fits:
            raise ValueError(f"adamw: {name} must be {need}, got {value}")

    @jax.jit  # optax calls it once outside of a program
    def schedule(step: Int[Array, ""]) -> Float[Array, ""]:
        return learning_rate_at(
            step, steps=steps, learning_rate=learning_rate, warmup=warmup, final=final
        )

    chain = optax.chain(
        optax.clip_by_global_norm(max_grad_norm),
        optax.scale_by_adam(b1, b2, eps),
        optax.add_decayed_weights(weight_decay, mask=_decays),
        # Injected, so that the optimizer's state shows the rate it used.
        optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=schedule),
    )

    def init(params: Params) -> Any:
        for path, weight in jax.tree_util.tree_leaves_with_path(params):
            if weight.dtype.itemsize < 4:
                raise ValueError(f"adamw needs float32 weights, {_name(path)} is {weight.dtype}")
        return chain.init(params)

    def update(updates: Params, state: Any, params: Params | None = None) -> tuple[Params, Any]:
        # optax raises Python's floats to the power of an int32 count.
        with jax.numpy_dtype_promotion("standard"):
            return chain.update(updates, state, params)

    return optax.GradientTransformation(init, update)


def learning_rate_at(
    step: int | Int[Array, ""], *, steps: int, learning_rate: float, warmup: int, final: float
) -> Float[Array, ""]:
    """The learning rate of update `step`, the first being 0 and the last `steps - 1`.

    It rises in equal parts until update `warmup - 1` has all of it, then falls along half a cosine
    to `final` times as much at the last update. With `final=1` it stays.
    """
    now = jnp.asarray(step, jnp.float32)
    rise = jnp.minimum((now + 1) / max(warmup, 1), 1.0)
    passed = jnp.clip((now - warmup) / max(steps - 1 - warmup, 1), 0.0, 1.0)
    fall = final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * passed))
    return learning_rate * rise * fall


def last_learning_rate(opt_state: Any) -> Float[Array, ""] | None:
    """The learning rate of the update that made `opt_state`; None if the optimizer hides it.

    optax keeps it in the state where `optax.inject_hyperparams` was used, as in `adamw`.
    """
    return optax.tree_utils.tree_get(
        opt_state, "learning_rate", filtering=lambda _, value: isinstance(value, jax.Array)
    )


def _decays(params: Params) -> Any:
    # By name: stacked layers give even a bias two dimensions.
    def decays(path: Any, _: Any) -> bool:
        words = _name(path).replace("/", "_").split("_")
        return "norm" not in words and "bias" not in words

    return jax.tree_util.tree_map_with_path(decays, params)


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# --------------------------------------------------------------------------- train state


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, reference: bool = False
) -> TrainState:
    """The state before the first update; with `reference`, a copy of the weights is frozen in it.

    Adam's moments lie on the devices as their weights do. What has no place of its own, such as a
    count, is put on every device of the weights' mesh.
    """
    home = jax.tree.leaves(params)[0].sharding

    def place(x: jax.Array) -> jax.Array:
        if isinstance(home, NamedSharding) and not isinstance(x.sharding, NamedSharding):
            return jax.device_put(x, NamedSharding(home.mesh, PartitionSpec()))
        return x

    return TrainState(
        step=place(jnp.zeros((), jnp.int32)),
        params=params,
        opt_state=jax.tree.map(place, optimizer.init(params)),
        # A copy: an update donates the weights, and the reference must outlive them.
        reference=jax.tree.map(jnp.copy, params) if reference else None,
    )
