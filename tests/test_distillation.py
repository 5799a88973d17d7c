import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.algos import distillation

RNG = np.random.default_rng(0)
STUDENT, TEACHER = RNG.normal(0, 2, (2, 3, 4, 7)).astype(np.float32)


def probabilities(logits, temperature=1.0):
    e = np.exp(logits.astype(np.float64) / temperature)
    return e / e.sum(-1, keepdims=True)


def definition(p, q):
    """KL(p || q), one position and one token at a time."""
    result = np.zeros(p.shape[:-1])
    for place in np.ndindex(result.shape):
        result[place] = sum(a * np.log(a / b) for a, b in zip(p[place], q[place], strict=True))
    return result


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergences_are_their_definitions(temperature):
    p, q = probabilities(TEACHER, temperature), probabilities(STUDENT, temperature)
    mix = 0.3 * p + 0.7 * q
    expected = {
        distillation.forward_kl: definition(p, q),
        distillation.reverse_kl: definition(q, p),
        distillation.jensen_shannon: 0.3 * definition(p, mix) + 0.7 * definition(q, mix),
    }
    for function, value in expected.items():
        more = {"beta": 0.3} if function is distillation.jensen_shannon else {}
        got = function(jnp.asarray(STUDENT), jnp.asarray(TEACHER), temperature=temperature, **more)
        np.testing.assert_allclose(got, value, rtol=2e-5, atol=1e-6)


def test_jensen_shannon_goes_to_either_kl_at_its_ends():
    args = jnp.asarray(STUDENT) / 4, jnp.asarray(TEACHER) / 4
    low = distillation.jensen_shannon(*args, beta=1e-3) / 1e-3
    np.testing.assert_allclose(low, distillation.forward_kl(*args), rtol=1e-2)
    high = distillation.jensen_shannon(*args, beta=1 - 1e-3) / 1e-3
    np.testing.assert_allclose(high, distillation.reverse_kl(*args), rtol=1e-2)


@pytest.mark.parametrize(
    "function",
    [distillation.forward_kl, distillation.reverse_kl, distillation.jensen_shannon],
)
def test_equal_models_are_at_distance_zero_with_no_gradient(function):
    logits = jnp.asarray(TEACHER)
    np.testing.assert_allclose(function(logits, logits), 0.0, atol=1e-6)
    gradient = jax.grad(lambda x: function(x, logits).sum())(logits)
    np.testing.assert_allclose(gradient, 0.0, atol=1e-6)


def test_the_gradient_of_the_forward_kl_is_the_gap_of_the_probabilities():
    gradient = jax.grad(lambda x: distillation.forward_kl(x, jnp.asarray(TEACHER)).sum())(
        jnp.asarray(STUDENT)
    )
    expected = probabilities(STUDENT) - probabilities(TEACHER)
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_token_that_both_models_forbid_adds_nothing():
    student, teacher = (jnp.asarray(x).at[..., 2].set(-jnp.inf) for x in (STUDENT, TEACHER))
    rest = np.array([0, 1, 3, 4, 5, 6])
    for function in (
        distillation.forward_kl,
        distillation.reverse_kl,
        distillation.jensen_shannon,
    ):
        got, slope = jax.value_and_grad(lambda x, f=function: f(x, teacher).sum())(student)
        expected, part = jax.value_and_grad(lambda x, f=function: f(x, teacher[..., rest]).sum())(
            student[..., rest]
        )
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        np.testing.assert_allclose(slope[..., rest], part, rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(slope[..., 2], 0.0)


def test_half_precision_logits_are_compared_in_float32():
    student, teacher = (jnp.asarray(x, jnp.bfloat16) for x in (STUDENT, TEACHER))
    got = distillation.forward_kl(student, teacher)
    assert got.dtype == jnp.float32
    exact = definition(
        probabilities(np.asarray(teacher, np.float32)),
        probabilities(np.asarray(student, np.float32)),
    )
    np.testing.assert_allclose(got, exact, rtol=2e-5)


@pytest.mark.parametrize("beta", [0.0, 1.0, -0.1])
def test_a_mixture_of_one_model_only_is_refused(beta):
    with pytest.raises(ValueError, match="beta must be between 0 and 1"):
        distillation.jensen_shannon(jnp.asarray(STUDENT), jnp.asarray(TEACHER), beta=beta)


def with_rest(p, q, k):
    """Two distributions over the k likeliest tokens of p and the sum of all others."""
    both = np.zeros((2, *p.shape[:-1], k + 1))
    for place in np.ndindex(p.shape[:-1]):
        best = sorted(range(p.shape[-1]), key=lambda token: -p[place][token])
        for i, x in enumerate((p[place], q[place])):
            both[i][place] = [*x[best[:k]], sum(x[token] for token in best[k:])]
    return both


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_top_k_is_the_divergence_of_the_teachers_likeliest_tokens_and_one_rest(k, temperature):
    p, q = probabilities(TEACHER, temperature), probabilities(STUDENT, temperature)
    a, b = with_rest(p, q, k)
    mix = (a + b) / 2
    expected = {
        distillation.forward_kl: definition(a, b),
        distillation.reverse_kl: definition(b, a),
        distillation.jensen_shannon: (definition(a, mix) + definition(b, mix)) / 2,
    }
    args = jnp.asarray(STUDENT), jnp.asarray(TEACHER)
    for function, value in expected.items():
        got = distillation.top_k(*args, k=k, of=function, temperature=temperature)
        np.testing.assert_allclose(got, value, rtol=2e-5, atol=1e-6)
        whole = function(*args, temperature=temperature)
        assert np.all(got <= whole + 1e-6)
        assert np.allclose(got, whole, rtol=2e-5, atol=1e-6) == (k == 6)  # the rest is one token


def test_the_gradient_of_top_k_moves_the_rest_as_one():
    k = 3
    slope = jax.grad(lambda x: distillation.top_k(x, jnp.asarray(TEACHER), k=k).sum())
    p, q = probabilities(TEACHER), probabilities(STUDENT)
    chosen = p >= np.sort(p, axis=-1)[..., -k, None]
    rest = [np.where(chosen, 0, x).sum(-1, keepdims=True) for x in (p, q)]
    expected = q - np.where(chosen, p, q * rest[0] / rest[1])
    np.testing.assert_allclose(slope(jnp.asarray(STUDENT)), expected, rtol=1e-4, atol=1e-6)


def test_a_teacher_that_gives_nothing_to_the_rest_takes_it_from_the_student():
    k = 3
    p, q = probabilities(TEACHER), probabilities(STUDENT)
    chosen = p >= np.sort(p, axis=-1)[..., -k, None]
    stored = jnp.where(chosen, TEACHER, -jnp.inf)  # all that was kept of it
    value, slope = jax.value_and_grad(lambda x: distillation.top_k(x, stored, k=k).sum())(
        jnp.asarray(STUDENT)
    )
    p = np.where(chosen, p, 0) / np.where(chosen, p, 0).sum(-1, keepdims=True)
    gap = np.where(chosen, p * np.log(np.where(chosen, p, 1) / q), 0)
    np.testing.assert_allclose(value, gap.sum(), rtol=1e-5)
    np.testing.assert_allclose(slope, q - p, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [0, 7])
def test_a_k_that_leaves_no_rest_or_nothing_else_is_refused(k):
    with pytest.raises(ValueError, match=rf"k must be in \[1, 7\), .* got {k}"):
        distillation.top_k(jnp.asarray(STUDENT), jnp.asarray(TEACHER), k=k)
