from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.algos import critics
from r1jax.types import Batch


def test_explained_variance_is_one_less_the_share_that_is_left():
    rng = np.random.default_rng(0)
    target, value = rng.normal(2, 3, (2, 4, 9)).astype(np.float32)
    mask = rng.random((4, 9)) < 0.6
    expected = 1 - np.var((target - value)[mask]) / np.var(target[mask])
    dirty = [jnp.asarray(np.where(mask, x, np.nan)) for x in (value, target)]
    got = critics.explained_variance(*dirty, jnp.asarray(mask))
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([1.0, 2.0, 6.0], 1.0),
        ([11.0, 12.0, 16.0], 1.0),
        ([5.0, 5.0, 5.0], 0.0),
        ([6.0, 2.0, 1.0], -18 / 7),
    ],
)
def test_a_perfect_critic_explains_all_and_a_constant_one_nothing(value, expected):
    # Squares about the mean: 14 of the targets, 50 of the last errors, -5, 0 and 5.
    target = jnp.array([[1.0, 2.0, 6.0]])
    got = critics.explained_variance(
        jnp.array([value], jnp.float32), target, jnp.ones((1, 3), bool)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_where_targets_do_not_vary_nothing_is_explained():
    target = jnp.full((2, 8), 1.1)
    value = jnp.arange(16.0).reshape(2, 8)
    for mask in (jnp.ones((2, 8), bool), jnp.zeros((2, 8), bool)):
        assert critics.explained_variance(value, target, mask) == 0


def test_binary_cross_entropy_is_its_definition_and_does_not_overflow():
    score = np.array([-3.0, -0.2, 0.0, 1.5, 4.0])
    for target in (0.0, 0.3, 1.0):
        p = 1 / (1 + np.exp(-score))
        expected = -target * np.log(p) - (1 - target) * np.log(1 - p)
        got = critics.binary_cross_entropy(
            jnp.asarray(score, jnp.float32), jnp.full(5, target, jnp.float32)
        )
        np.testing.assert_allclose(got, expected, rtol=1e-5)
    far = critics.binary_cross_entropy(jnp.array([1e4, -1e4]), jnp.array([0.0, 1.0]))
    np.testing.assert_allclose(far, [1e4, 1e4])


def test_values_within_the_bounds_are_not_counted_as_clipped():
    """In float32 a step added again to where it began may miss where it ended."""
    rng = np.random.default_rng(0)
    old = rng.normal(0, 0.3, (4, 50))
    value, value_old = np.float32(old + rng.uniform(-0.19, 0.19, old.shape)), np.float32(old)
    assert (value_old + (value - value_old) != value).any()
    batch = Batch(
        tokens=jnp.ones(old.shape, jnp.int32),
        position=jnp.ones(old.shape, jnp.int32),
        segment=jnp.ones(old.shape, jnp.int32),
        mask=jnp.ones(old.shape, bool),
        weight=jnp.full(old.shape, 1 / old.size, jnp.float32),
        num_tokens=jnp.asarray(old.size, jnp.float32),
        target=jnp.asarray(rng.integers(0, 2, old.shape), jnp.float32),
        value_old=jnp.asarray(value_old),
    )
    _, metrics = jax.jit(partial(critics.value_loss, clip=0.2))(jnp.asarray(value), batch)
    assert metrics["value_clipped"] == 0
