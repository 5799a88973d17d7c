import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.algos import returns


def paper_gae(reward, value, gamma, lam):
    """arXiv:1506.02438, eq. 16, as the double sum, for one sequence without gaps."""
    n = len(reward)
    value = [*value, 0.0]
    errors = [reward[t] + gamma * value[t + 1] - value[t] for t in range(n)]
    return [sum((gamma * lam) ** (s - t) * errors[s] for s in range(t, n)) for t in range(n)]


def ragged(seed, *, rows=3, length=20):
    """Rows of several sequences with unmasked tokens before, between and inside them."""
    rng = np.random.default_rng(seed)
    segment = np.zeros((rows, length), np.int32)
    for r in range(rows):
        ends = np.sort(rng.choice(np.arange(2, length - 1), 3, replace=False))
        for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            segment[r, start:end] = i + 1
    mask = (segment > 0) & (rng.random((rows, length)) < 0.7)
    reward, value = rng.normal(size=(2, rows, length)).astype(np.float32)
    return reward, value, mask, segment


def sequences(mask, segment):
    for r in range(len(mask)):
        for each in np.unique(segment[r]):
            places = np.flatnonzero(mask[r] & (segment[r] == each))
            if len(places):
                yield r, places


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (1.0, 0.95), (0.9, 0.8), (0.99, 0.0)])
def test_gae_is_the_papers_sum_over_the_masked_tokens_of_each_packed_sequence(gamma, lam):
    reward, value, mask, segment = ragged(int(100 * (gamma + lam)))
    got, target = returns.gae(
        *map(jnp.asarray, (reward, value, mask)), gamma=gamma, lam=lam, segment=jnp.asarray(segment)
    )
    count = 0
    for r, places in sequences(mask, segment):
        expected = paper_gae(reward[r, places], value[r, places], gamma, lam)
        np.testing.assert_allclose(got[r, places], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(
            target[r, places], expected + value[r, places], rtol=1e-5, atol=1e-5
        )
        count += len(places)
    assert count == mask.sum() > 20
    np.testing.assert_array_equal(np.asarray(got)[~mask], 0.0)
    np.testing.assert_array_equal(np.asarray(target)[~mask], 0.0)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_a_return_is_the_discounted_sum_of_what_follows(gamma):
    reward, _, mask, segment = ragged(7)
    got = returns.discounted_return(
        jnp.asarray(reward), jnp.asarray(mask), gamma=gamma, segment=jnp.asarray(segment)
    )
    for r, places in sequences(mask, segment):
        own = reward[r, places].astype(np.float64)
        for i, place in enumerate(places):
            expected = sum(gamma**j * x for j, x in enumerate(own[i:]))
            np.testing.assert_allclose(got[r, place], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(got)[~mask], 0.0)


def test_gae_of_three_tokens_worked_by_hand():
    reward, value = jnp.array([[0.0, 0.0, 1.0, 9.0]]), jnp.array([[0.5, 0.25, 0.5, 9.0]])
    mask = jnp.array([[True, True, True, False]])
    # errors with gamma 1: 0.25 - 0.5, 0.5 - 0.25, 1 - 0.5; lam 0.5
    advantage, target = returns.gae(reward, value, mask, lam=0.5)
    np.testing.assert_allclose(advantage, [[0.0, 0.5, 0.5, 0.0]])
    np.testing.assert_allclose(target, [[0.5, 0.75, 1.0, 0.0]])


def test_with_lambda_one_gae_is_the_return_less_the_value():
    reward, value, mask, segment = map(jnp.asarray, ragged(11))
    advantage, target = returns.gae(reward, value, mask, gamma=0.9, segment=segment)
    expected = returns.discounted_return(reward, mask, gamma=0.9, segment=segment)
    np.testing.assert_allclose(target, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        advantage, jnp.where(mask, expected - value, 0.0), rtol=1e-5, atol=1e-5
    )


def test_without_segments_a_row_is_one_sequence():
    reward, value, mask, _ = map(jnp.asarray, ragged(12))
    one = jnp.ones(mask.shape, jnp.int32)
    for a, b in zip(
        returns.gae(reward, value, mask, lam=0.9),
        returns.gae(reward, value, mask, lam=0.9, segment=one),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_read_off_the_mask_and_nothing_crosses_a_segment():
    reward, value, mask, segment = map(jnp.asarray, ragged(13))

    def both(reward, value):
        found = returns.gae(reward, value, mask, gamma=0.9, lam=0.8, segment=segment)
        return found, returns.discounted_return(reward, mask, segment=segment)

    dirty = [jnp.where(mask, x, jnp.nan) for x in (reward, value)]
    chex.assert_trees_all_equal(both(*dirty), both(reward, value))
    later = jnp.asarray(np.asarray(segment) > 1) & mask
    changed = both(jnp.where(later, 100.0, reward), jnp.where(later, -7.0, value))
    for a, b in zip(jax.tree.leaves(changed), jax.tree.leaves(both(reward, value)), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[segment == 1], np.asarray(b)[segment == 1])


def test_a_long_row_loses_no_digits():
    n, gamma = 4096, 1 - 2**-10  # a gamma that float32 holds
    reward = np.random.default_rng(0).normal(size=(1, n)).astype(np.float32)
    got = returns.discounted_return(jnp.asarray(reward), jnp.ones((1, n), bool), gamma=gamma)
    expected, total = np.zeros(n), 0.0
    for t in reversed(range(n)):
        total = float(reward[0, t]) + gamma * total
        expected[t] = total
    np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=1e-4)
