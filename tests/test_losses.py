import math
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.algos import kl, losses, weights
from r1jax.data import packing
from r1jax.types import Batch

# --------------------------------------------------------------------------- KL estimates


def softmax_kl(logits, other):
    """KL(softmax(logits) || softmax(other)), by its definition."""
    p, q = jax.nn.softmax(logits), jax.nn.softmax(other)
    return jnp.sum(p * (jnp.log(p) - jnp.log(q)))


def expectation(estimate, logits, other):
    """The exact mean of an estimate over tokens drawn from softmax(logits), samples held fixed."""
    p = jax.lax.stop_gradient(jax.nn.softmax(logits))
    return jnp.sum(p * estimate(jax.nn.log_softmax(logits), jax.nn.log_softmax(other)))


POLICY = jnp.array([0.3, -0.9, 1.2, 0.1, -0.4])
REFERENCE = jnp.array([-0.2, 0.5, 0.9, -0.3, 0.4])


@pytest.mark.parametrize("estimate", [kl.k1, kl.k3])
def test_k1_and_k3_have_the_kl_as_their_mean(estimate):
    got = expectation(estimate, POLICY, REFERENCE)
    np.testing.assert_allclose(got, softmax_kl(POLICY, REFERENCE), rtol=1e-5)


def test_the_gradients_of_the_estimates_are_as_documented():
    gradient = {
        name: jax.grad(partial(expectation, getattr(kl, name)))(POLICY, REFERENCE)
        for name in ("k1", "k2", "k3")
    }
    np.testing.assert_allclose(gradient["k1"], 0.0, atol=1e-6)
    forward = jax.grad(softmax_kl)(POLICY, REFERENCE)
    np.testing.assert_allclose(gradient["k2"], forward, rtol=1e-4, atol=1e-6)
    other_direction = jax.grad(lambda x: softmax_kl(REFERENCE, x))(POLICY)
    np.testing.assert_allclose(gradient["k3"], other_direction, rtol=1e-4, atol=1e-6)


def test_k1_in_a_reward_gives_the_gradient_of_the_kl():
    def surrogate(logits):  # REINFORCE with k1 as the return
        logp = jax.nn.log_softmax(logits)
        cost = kl.k1(jax.lax.stop_gradient(logp), jax.nn.log_softmax(REFERENCE))
        return jnp.sum(jax.lax.stop_gradient(jnp.exp(logp)) * cost * logp)

    expected = jax.grad(softmax_kl)(POLICY, REFERENCE)
    np.testing.assert_allclose(jax.grad(surrogate)(POLICY), expected, rtol=1e-4, atol=1e-6)


def test_k3_is_never_negative_and_keeps_its_digits_near_zero():
    gap = np.concatenate([s * np.logspace(-9, 1, 2001) for s in (1, -1)]).astype(np.float32)
    got = np.asarray(kl.k3(jnp.zeros(len(gap)), jnp.asarray(gap)), np.float64)
    assert (got >= 0).all()
    exact = gap.astype(np.float64)
    exact = np.expm1(exact) - exact
    usable = np.abs(gap) > 1e-3
    np.testing.assert_allclose(got[usable], exact[usable], rtol=1e-3)
    assert (np.asarray(kl.k2(jnp.zeros(len(gap)), jnp.asarray(gap))) >= 0).all()
    assert kl.k3(jnp.zeros(()), jnp.zeros(())) == 0


# --------------------------------------------------------------------------- weights

RAGGED = np.arange(4)[None, :] < np.array([4, 1, 0, 3])[:, None]  # 4 answers, 8 tokens


def test_sequence_mean_is_the_mean_over_answers_of_their_means():
    x = np.random.default_rng(0).normal(size=RAGGED.shape)
    means = [x[i, :n].mean() if n else 0.0 for i, n in enumerate([4, 1, 0, 3])]
    np.testing.assert_allclose((weights.sequence_mean(RAGGED) * x).sum(), sum(means) / 4)


def test_token_mean_is_the_mean_over_all_tokens():
    x = np.random.default_rng(1).normal(size=RAGGED.shape)
    got = (weights.token_mean(RAGGED) * x).sum()
    np.testing.assert_allclose(got, x[RAGGED].sum() / 8)


def test_constant_budget_divides_by_answers_times_budget():
    x = np.random.default_rng(2).normal(size=RAGGED.shape)
    got = (weights.constant_budget(RAGGED, budget=10) * x).sum()
    np.testing.assert_allclose(got, x[RAGGED].sum() / (4 * 10), rtol=1e-6)
    with pytest.raises(ValueError, match="budget must be >= 1 token, got 0"):
        weights.constant_budget(RAGGED, budget=0)


@pytest.mark.parametrize(
    "weight",
    [weights.sequence_mean, weights.token_mean, partial(weights.constant_budget, budget=3)],
)
@pytest.mark.parametrize("shape", [(3, 2), (0, 2)])
def test_weights_are_float32_and_zero_where_there_are_no_tokens(weight, shape):
    got = weight(RAGGED)
    assert isinstance(got, np.ndarray) and got.dtype == np.float32
    np.testing.assert_array_equal(got[~RAGGED], 0)
    np.testing.assert_array_equal(weight(np.zeros(shape, bool)), np.zeros(shape))


# --------------------------------------------------------------------------- losses


def make_batch(rng, rows=4, columns=9):
    """A random batch and log-probabilities, masked at random, with ratios on both sides of 1."""
    shape = (rows, columns)
    mask = rng.random(shape) < 0.6
    old = rng.normal(-1.5, 0.5, shape)
    values = {
        "weight": mask * rng.random(shape) / 10,
        "advantage": rng.normal(size=shape),
        "logp_rollout": old + rng.normal(0, 0.1, shape),
        "logp_old": old,
        "logp_ref": old + rng.normal(0, 0.5, shape),
    }
    batch = Batch(
        tokens=jnp.ones(shape, jnp.int32),
        position=jnp.zeros(shape, jnp.int32),
        segment=jnp.ones(shape, jnp.int32),
        mask=jnp.asarray(mask),
        num_tokens=jnp.asarray(mask.sum(), jnp.float32),
        **{name: jnp.asarray(x, jnp.float32) for name, x in values.items()},
    )
    return jnp.asarray(old + rng.normal(0, 0.3, shape), jnp.float32), batch


def one_token(logp, advantage, *, old=0.0, ref=0.0):
    """A batch of one token of weight 1, and its log-probability."""
    batch = Batch(
        tokens=jnp.ones((1, 1), jnp.int32),
        position=jnp.ones((1, 1), jnp.int32),
        segment=jnp.ones((1, 1), jnp.int32),
        mask=jnp.ones((1, 1), bool),
        weight=jnp.ones((1, 1)),
        num_tokens=jnp.ones(()),
        advantage=jnp.full((1, 1), advantage, jnp.float32),
        logp_old=jnp.full((1, 1), old, jnp.float32),
        logp_ref=jnp.full((1, 1), ref, jnp.float32),
    )
    return jnp.full((1, 1), logp, jnp.float32), batch


def paper_loss(logp, batch, clip_low, clip_high, kl_weight):
    """The objective of arXiv:2402.03300, eq. 3 with k3, minus it, one token at a time."""
    total, clipped = 0.0, 0
    for r, t in np.argwhere(np.asarray(batch.mask)):
        x, old, ref, advantage, weight = (
            float(a[r, t])
            for a in (logp, batch.logp_old, batch.logp_ref, batch.advantage, batch.weight)
        )
        ratio = math.exp(x) / math.exp(old)
        bounded = min(max(ratio, 1 - clip_low), 1 + clip_high)
        objective = min(ratio * advantage, bounded * advantage)
        clipped += bounded * advantage < ratio * advantage
        inverse = math.exp(ref) / math.exp(x)
        total -= weight * (objective - kl_weight * (inverse - math.log(inverse) - 1))
    return total, clipped / float(batch.num_tokens)


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.2, 0.28), (10.0, 10.0), (0.1, 0.5)])
@pytest.mark.parametrize("kl_weight", [0.0, 0.04])
def test_policy_loss_is_the_sum_of_the_paper(low, high, kl_weight):
    logp, batch = make_batch(np.random.default_rng(int(low * 100 + high * 10)))
    loss, metrics = jax.jit(
        partial(losses.policy_loss, clip_low=low, clip_high=high, kl=kl.k3, kl_weight=kl_weight)
    )(logp, batch)
    expected, clipped = paper_loss(logp, batch, low, high, kl_weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(metrics["clipped"], clipped, rtol=1e-6)
    assert clipped > 0 or low == 10


def test_metrics_are_means_over_tokens():
    logp, batch = make_batch(np.random.default_rng(3))
    mask = np.asarray(batch.mask)
    x, old, ref = (np.asarray(a, np.float64)[mask] for a in (logp, batch.logp_old, batch.logp_ref))
    loss, metrics = losses.policy_loss(logp, batch)
    np.testing.assert_allclose(metrics["ratio"], np.exp(x - old).mean(), rtol=1e-5)
    k3 = [np.exp(b - x) - (b - x) - 1 for b in (old, ref)]
    np.testing.assert_allclose(metrics["kl_old"], k3[0].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["kl"], k3[1].mean(), rtol=1e-4)
    assert metrics["loss"] == loss
    assert "kl" not in losses.policy_loss(logp, replace(batch, logp_ref=None))[1]


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -2.4, 0.0),  # gain capped at 1.2
        (0.5, 2.0, -1.0, -1.0),  # a good token that became unlikely is not held back
        (0.5, -2.0, 1.6, 0.0),  # capped at 0.8
        (1.5, -2.0, 3.0, 3.0),
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_clipping_of_one_token_worked_by_hand(ratio, advantage, expected, slope):
    logp, batch = one_token(math.log(ratio), advantage)
    (loss, metrics), gradient = jax.value_and_grad(losses.policy_loss, has_aux=True)(logp, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[0, 0], slope, rtol=1e-6)
    assert float(metrics["clipped"]) == (slope == 0 and advantage != 0)


def test_the_clip_of_r1_bounds_the_gain_at_eleven_and_nothing_from_below():
    clip = partial(losses.policy_loss, clip_low=10.0, clip_high=10.0)
    for ratio, advantage, expected in [(9, 1, -9), (30, 1, -11), (1e-3, -1, 1e-3), (30, -1, 30)]:
        loss, _ = clip(*one_token(math.log(ratio), advantage))
        np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_at_ratio_one_the_gradient_is_that_of_the_policy_gradient():
    _, batch = make_batch(np.random.default_rng(4))
    gradient = jax.grad(lambda x: losses.policy_loss(x, batch)[0])(batch.logp_old)
    expected = np.where(batch.mask, -np.asarray(batch.weight) * np.asarray(batch.advantage), 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_the_kl_term_adds_its_own_gradient():
    logp, batch = one_token(-0.5, 0.0, ref=-1.2)
    for estimate, slope in [(kl.k1, 1.0), (kl.k2, 0.7), (kl.k3, 1 - math.exp(-0.7))]:
        loss = partial(losses.policy_loss, kl=estimate, kl_weight=0.1)
        gradient = jax.grad(lambda x, loss=loss: loss(x, batch)[0])(logp)
        np.testing.assert_allclose(gradient[0, 0], 0.1 * slope, rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [partial(losses.policy_loss, kl=kl.k3, kl_weight=0.1), losses.cross_entropy],
    ids=["policy", "cross_entropy"],
)
def test_micro_batches_add_up_to_the_whole_batch(loss):
    logp, batch = make_batch(np.random.default_rng(5), rows=6)
    step = jax.value_and_grad(loss, has_aux=True)
    (whole, metrics), gradient = step(logp, batch)
    total, sums, gradients = 0.0, dict.fromkeys(metrics, 0.0), []
    for start in range(0, 6, 2):
        part = jax.tree.map(lambda x: x[start : start + 2] if x.ndim else x, batch)  # noqa: B023
        (value, scalars), grad = step(logp[start : start + 2], part)
        total += float(value)
        sums = {name: sums[name] + float(scalars[name]) for name in sums}
        gradients.append(grad)
    np.testing.assert_allclose(total, whole, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(np.concatenate(gradients), gradient)
    for name, value in metrics.items():
        np.testing.assert_allclose(sums[name], value, rtol=1e-5, atol=1e-7, err_msg=name)


@pytest.mark.parametrize("garbage", [1e4, -1e4, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    "loss",
    [partial(losses.policy_loss, kl=kl.k3, kl_weight=0.1), losses.cross_entropy],
    ids=["policy", "cross_entropy"],
)
def test_nothing_is_read_where_the_mask_is_false(loss, garbage):
    logp, batch = make_batch(np.random.default_rng(6))
    step = jax.value_and_grad(loss, has_aux=True)
    expected = step(logp, batch)
    names = ("advantage", "logp_old", "logp_ref", "weight")
    dirty = {n: jnp.where(batch.mask, getattr(batch, n), -garbage) for n in names}
    got = step(jnp.where(batch.mask, logp, garbage), replace(batch, **dirty))
    chex.assert_trees_all_equal(got, expected)
    np.testing.assert_array_equal(np.asarray(got[1])[~np.asarray(batch.mask)], 0.0)


@pytest.mark.parametrize("advantage", [0.0, 1.0, -1.0])
@pytest.mark.parametrize("gap", [-1000.0, 1000.0])
def test_policies_that_are_worlds_apart_give_no_nan(gap, advantage):
    logp, batch = one_token(gap, advantage)
    (loss, _), gradient = jax.value_and_grad(losses.policy_loss, has_aux=True)(logp, batch)
    assert np.isfinite(loss) and np.isfinite(gradient).all()


def test_an_update_without_a_token_has_loss_zero():
    logp, batch = make_batch(np.random.default_rng(7))
    nothing = replace(batch, mask=jnp.zeros_like(batch.mask), num_tokens=jnp.zeros(()))
    for loss in (losses.policy_loss, losses.cross_entropy):
        value, metrics = loss(logp, nothing)
        assert value == 0 and all(x == 0 for x in metrics.values())


def test_the_samplers_log_probs_stand_in_for_missing_old_ones():
    logp, batch = make_batch(np.random.default_rng(8))
    got, _ = losses.policy_loss(logp, replace(batch, logp_old=None))
    expected, _ = losses.policy_loss(logp, replace(batch, logp_old=batch.logp_rollout))
    assert got == expected != losses.policy_loss(logp, batch)[0]


def test_a_batch_that_lacks_what_the_loss_needs_is_refused():
    logp, batch = make_batch(np.random.default_rng(9))
    with pytest.raises(ValueError, match="needs advantage"):
        losses.policy_loss(logp, replace(batch, advantage=None))
    with pytest.raises(ValueError, match="logp_old or logp_rollout"):
        losses.policy_loss(logp, replace(batch, logp_old=None, logp_rollout=None))
    with pytest.raises(ValueError, match="logp_ref=None"):
        losses.policy_loss(logp, replace(batch, logp_ref=None), kl=kl.k3, kl_weight=0.1)
    with pytest.raises(ValueError, match=r"kl_weight=0.1 needs kl"):
        losses.policy_loss(logp, batch, kl_weight=0.1)


def test_cross_entropy_is_the_weighted_sum_of_surprise():
    logp, batch = make_batch(np.random.default_rng(10))
    expected = 0.0
    for r, t in np.argwhere(np.asarray(batch.mask)):
        expected -= float(batch.weight[r, t]) * float(logp[r, t])
    loss, metrics = losses.cross_entropy(logp, batch)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert metrics == {"loss": loss}
    gradient = jax.grad(lambda x: losses.cross_entropy(x, batch)[0])(logp)
    np.testing.assert_array_equal(gradient, jnp.where(batch.mask, -batch.weight, 0.0))


def test_packing_changes_neither_loss_nor_metrics():
    """Padded [B, A] arrays summed as they are, against the same answers packed into rows."""
    rng = np.random.default_rng(11)
    prompts, group, width = 3, 4, 7
    answers = prompts * group
    length = rng.integers(1, width + 1, answers)
    mask = np.arange(width)[None, :] < length[:, None]
    names = ("advantage", "logp_old", "logp_ref", "logp")
    values = {n: rng.normal(-1, 0.3, mask.shape).astype(np.float32) for n in names}
    values["weight"] = weights.sequence_mean(mask)
    prompt_length = rng.integers(1, 5, prompts)
    where = packing.pack_rollout(prompt_length, length, 16)
    fields = packing.place_rollouts(
        where,
        prompt=np.ones((prompts, 4), np.int32),
        answer=np.ones((answers, width), np.int32),
        extras=values,
        num_rows=where.answers.num_rows + 2,
    )
    packed = {name: jnp.asarray(x) for name, x in fields.items()}
    padded = {name: jnp.asarray(x) for name, x in values.items()} | {
        "tokens": jnp.ones(mask.shape, jnp.int32),
        "position": jnp.zeros(mask.shape, jnp.int32),
        "segment": jnp.ones(mask.shape, jnp.int32),
        "mask": jnp.asarray(mask),
        "num_tokens": jnp.asarray(length.sum(), jnp.float32),
    }
    loss = partial(losses.policy_loss, kl=kl.k3, kl_weight=0.1)
    results = [loss(fields.pop("logp"), Batch(**fields)) for fields in (packed, padded)]
    chex.assert_trees_all_close(*results, rtol=1e-5, atol=1e-6)
