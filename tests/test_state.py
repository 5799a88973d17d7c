import math
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from r1jax.state import adamw, init_state, last_learning_rate, learning_rate_at

# --------------------------------------------------------------------------- optimizer


def test_adamw_moves_weights_by_the_papers_rule():
    lr, b1, b2, eps, decay = 0.1, 0.8, 0.9, 1e-3, 0.5
    weight, grads = np.array([1.0, -2.0]), np.array([[0.3, -0.4], [0.1, 0.2]])
    optimizer = adamw(2, learning_rate=lr, weight_decay=decay, b1=b1, b2=b2, eps=eps)
    params = {"w": jnp.asarray(weight, jnp.float32)}
    state = optimizer.init(params)
    mean = square = np.zeros(2)
    for t, grad in enumerate(grads, start=1):
        changes, state = optimizer.update({"w": jnp.asarray(grad, jnp.float32)}, state, params)
        params = jax.tree.map(jnp.add, params, changes)
        # Algorithm 2 of arXiv:1711.05101.
        mean, square = b1 * mean + (1 - b1) * grad, b2 * square + (1 - b2) * grad**2
        step = (mean / (1 - b1**t)) / (np.sqrt(square / (1 - b2**t)) + eps)
        weight = weight - lr * (step + decay * weight)
        np.testing.assert_allclose(params["w"], weight, rtol=1e-5)


def test_a_long_gradient_is_cut_to_the_norm_and_a_short_one_is_not():
    optimizer = adamw(1, learning_rate=1.0, b1=0.5, max_grad_norm=1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    for length, cut in ((5.0, 1.0), (0.5, 0.5)):
        grads = {"a": jnp.array([0.6 * length]), "b": jnp.array([0.8 * length])}
        _, state = optimizer.update(grads, optimizer.init(params), params)
        mean = optax.tree_utils.tree_get(state, "mu")  # (1 - b1) of the gradient that Adam saw
        np.testing.assert_allclose([mean["a"][0], mean["b"][0]], [0.3 * cut, 0.4 * cut], rtol=1e-6)


def test_norms_and_biases_do_not_decay_even_when_stacked():
    shape = (2, 3)
    mixer = {"qkv": jnp.ones(shape), "bias": jnp.ones(shape), "q_norm": jnp.ones(shape)}
    params = {"norm": jnp.ones(3), "groups": [{"mixer_norm": jnp.ones(shape), "mixer": mixer}]}
    optimizer = adamw(1, learning_rate=0.5, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes, _ = optimizer.update(zeros, optimizer.init(params), params)
    expected = jax.tree.map(jnp.zeros_like, params)
    expected["groups"][0]["mixer"]["qkv"] = jnp.full(shape, -0.25)
    chex.assert_trees_all_equal(changes, expected)


def test_the_learning_rate_rises_in_equal_parts_and_falls_along_half_a_cosine():
    rate = partial(learning_rate_at, steps=13, learning_rate=2.0, warmup=4, final=0.5)
    np.testing.assert_allclose([rate(t) for t in range(4)], [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose(rate(8), 1.5, rtol=1e-6)  # half-way down
    np.testing.assert_allclose([rate(4), rate(12), rate(50)], [2.0, 1.0, 1.0], rtol=1e-6)
    constant = [
        learning_rate_at(t, steps=5, learning_rate=0.3, warmup=0, final=1.0) for t in range(5)
    ]
    assert constant == [jnp.float32(0.3)] * 5


def test_the_optimizer_state_shows_the_learning_rate_it_used():
    params = {"w": jnp.ones(2)}
    optimizer = adamw(10, learning_rate=1.0, warmup=10)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for used in (0.1, 0.2, 0.3):
        _, state = update(params, state, params)
        assert last_learning_rate(state) == pytest.approx(used)
    assert last_learning_rate(optax.sgd(0.1).init(params)) is None


def test_updates_of_a_fresh_and_of_an_older_optimizer_state_are_one_program():
    params = {"w": jnp.ones(2)}
    optimizer = adamw(10, learning_rate=1.0)
    traces = []

    @jax.jit
    def update(state):
        traces.append(state)
        return optimizer.update(params, state, params)[1]

    state = optimizer.init(params)
    for _ in range(3):
        state = update(state)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be >= 0 and finite, got -1.0"),
        ({"learning_rate": math.nan}, "learning_rate must be >= 0 and finite, got nan"),
        ({"warmup": -1}, "warmup must be >= 0, got -1"),
        ({"final": 1.5}, "final must be in .* got 1.5"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0 .* got 0.0"),
    ],
)
def test_an_optimizer_setting_out_of_range_is_named(given, error):
    with pytest.raises(ValueError, match=error):
        adamw(10, **{"learning_rate": 1.0, **given})


def test_weights_too_narrow_for_adam_are_named():
    params = {"groups": [{"up": jnp.ones(2, jnp.bfloat16)}]}
    with pytest.raises(ValueError, match="needs float32 weights, groups/0/up is bfloat16"):
        adamw(1, learning_rate=1.0).init(params)


# --------------------------------------------------------------------------- train state


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    if len(jax.devices()) < math.prod(shape) and jax.default_backend() != "cpu":
        pytest.skip(f"needs {math.prod(shape)} devices")
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_moments_lie_as_their_weights_and_counts_on_the_whole_mesh():
    mesh = mesh_of(2, 2)
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    state = init_state(
        {"w": jax.device_put(jnp.ones((4, 4)), split)}, adamw(3, learning_rate=1.0), reference=True
    )
    matrices = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(matrices) == 4 and all(x.sharding == split for x in matrices)
    scalars = [x for x in jax.tree.leaves(state) if not x.ndim]
    assert scalars and all(x.sharding == NamedSharding(mesh, PartitionSpec()) for x in scalars)


def test_the_reference_outlives_the_weights():
    state = init_state({"w": jnp.ones(3)}, adamw(3, learning_rate=1.0), reference=True)
    jax.jit(lambda x: x + 1, donate_argnums=0)(state.params["w"])
    assert state.reference is not None
    np.testing.assert_array_equal(state.reference["w"], np.ones(3))
