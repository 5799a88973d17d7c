import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.algos import advantages, kl
from r1jax.types import Rollout


def paper_advantages(rewards, group, scale, ddof, eps):
    """A_i = (r_i - mean r) / std r, one group and one answer at a time."""
    result = []
    for start in range(0, len(rewards), group):
        answers = [float(r) for r in rewards[start : start + group]]
        mean = sum(answers) / group
        std = math.sqrt(sum((r - mean) ** 2 for r in answers) / (group - ddof))
        result += [(r - mean) / (std + eps if scale else 1) for r in answers]
    return result


def make_rollout(rng, *, prompts=3, group=4, width=6, **fields):
    answers = prompts * group
    length = rng.integers(1, width + 1, answers)
    logp = [rng.normal(-1, 0.5, (answers, width)).astype(np.float32) for _ in range(3)]
    default = dict(
        prompt=jnp.ones((prompts, 2), jnp.int32),
        prompt_length=jnp.full(prompts, 2),
        answer=jnp.ones((answers, width), jnp.int32),
        answer_length=jnp.asarray(length),
        finished=jnp.ones(answers, bool),
        logp_rollout=jnp.asarray(logp[0]),
        decode_steps=jnp.asarray(width),
        slot_steps=jnp.asarray(width),
        reward=jnp.asarray(rng.normal(size=answers).astype(np.float32)),
        logp_old=jnp.asarray(logp[1]),
        logp_ref=jnp.asarray(logp[2]),
    )
    return Rollout(**(default | fields))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("group", [2, 3, 16])
def test_group_advantages_are_those_of_the_paper(group, ddof, scale):
    rewards = np.random.default_rng(group).normal(2, 3, 5 * group).astype(np.float32)
    got = advantages.group_advantages(jnp.asarray(rewards), group=group, ddof=ddof, scale=scale)
    np.testing.assert_allclose(
        got, paper_advantages(rewards, group, scale, ddof, 1e-6), rtol=2e-5, atol=2e-5
    )


def test_one_right_answer_of_four_gets_the_numbers_worked_by_hand():
    reward = jnp.array([1.0, 0.0, 0.0, 0.0])  # mean 1/4, sum of squares 3/4
    one = advantages.group_advantages(reward, group=4, eps=0.0)  # std sqrt(3/4 / 3) = 1/2
    np.testing.assert_allclose(one, [1.5, -0.5, -0.5, -0.5], rtol=1e-6)
    zero = advantages.group_advantages(reward, group=4, ddof=0, eps=0.0)  # std sqrt(3)/4
    np.testing.assert_allclose(zero, np.array([3.0, -1, -1, -1]) / math.sqrt(3), rtol=1e-6)
    plain = advantages.group_advantages(reward, group=4, scale=False)
    np.testing.assert_allclose(plain, [0.75, -0.25, -0.25, -0.25], rtol=1e-6)
    others = advantages.leave_one_out(reward, group=4)  # the others of a wrong one: 1/3
    np.testing.assert_allclose(others, [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.1, -3.3, 1e6])
@pytest.mark.parametrize("group", [3, 16, 17])
def test_equal_rewards_give_exactly_zero(group, value):
    reward = jnp.full(2 * group, value, jnp.float32)
    for function in (advantages.group_advantages, advantages.leave_one_out):
        np.testing.assert_array_equal(jax.jit(partial(function, group=group))(reward), 0.0)


def test_groups_do_not_see_each_other():
    reward = jnp.array([1.0, 0.0, 5.0, 5.0, 7.0, 9.0])
    got = advantages.group_advantages(reward, group=2, scale=False)
    np.testing.assert_allclose(got, [0.5, -0.5, 0, 0, -1, 1])


@pytest.mark.parametrize(
    "function", [advantages.group_advantages, advantages.leave_one_out], ids=["group", "rloo"]
)
def test_an_unjudged_answer_is_left_out_and_gets_zero(function):
    nan = float("nan")
    got = function(jnp.array([1.0, nan, 0.0, 0.25]), group=4)
    np.testing.assert_allclose(
        got[jnp.array([0, 2, 3])], function(jnp.array([1.0, 0.0, 0.25]), group=3), rtol=1e-6
    )
    assert got[1] == 0
    nobody_or_one = function(jnp.array([nan, nan, nan, 3.0]), group=2)
    np.testing.assert_array_equal(nobody_or_one, 0.0)
    all_equal = function(jnp.array([1.1, nan, 1.1, 1.1]), group=4)
    np.testing.assert_array_equal(all_equal, 0.0)


def test_the_leave_one_out_baseline_is_the_mean_of_the_others():
    rewards = np.random.default_rng(0).normal(size=15).astype(np.float32)
    expected = []
    for start in (0, 5, 10):
        for i in range(start, start + 5):
            others = [float(rewards[j]) for j in range(start, start + 5) if j != i]
            expected.append(rewards[i] - sum(others) / 4)
    got = advantages.leave_one_out(jnp.asarray(rewards), group=5)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "group"), [(3, 2), (4, 1), (4, 0), (2, 4)])
def test_groups_that_are_not_whole_are_refused(rows, group):
    for function in (advantages.group_advantages, advantages.leave_one_out):
        with pytest.raises(ValueError, match=f"whole groups.*B={rows}, group={group}"):
            function(jnp.zeros(rows), group=group)


def test_an_unknown_ddof_is_refused():
    with pytest.raises(ValueError, match="ddof must be 0 or 1, got 2"):
        advantages.group_advantages(jnp.zeros(4), group=2, ddof=2)


def test_each_token_of_an_answer_gets_its_advantage_and_none_after_its_end():
    rollout = make_rollout(np.random.default_rng(1))
    expected = paper_advantages(rollout.reward, 4, True, 1, 1e-6)
    got = advantages.grpo(rollout)
    assert got.shape == rollout.answer.shape
    for i, length in enumerate(rollout.answer_length.tolist()):
        np.testing.assert_allclose(got[i, :length], expected[i], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got[i, length:], 0.0)
    plain = advantages.grpo(rollout, scale=False)
    np.testing.assert_allclose(
        plain[:, 0], paper_advantages(rollout.reward, 4, False, 1, 0), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        advantages.rloo(rollout), plain * 4 / 3, rtol=1e-4, atol=1e-5
    )  # r - mean of the others = G / (G - 1) * (r - mean of all)


@pytest.mark.parametrize("policy", ["logp_old", "logp_rollout"])
@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_a_kl_penalty_is_summed_over_the_answer_and_taken_off_its_reward(name, policy):
    term = {
        "k1": lambda p, q: math.log(p / q),
        "k2": lambda p, q: math.log(p / q) ** 2 / 2,
        "k3": lambda p, q: q / p - math.log(q / p) - 1,
    }[name]
    rollout = make_rollout(np.random.default_rng(2))
    if policy == "logp_rollout":
        rollout = replace(rollout, logp_old=None)
    given = np.asarray(rollout.reward)
    rewards = []
    for i, length in enumerate(rollout.answer_length.tolist()):
        p = np.exp(np.asarray(getattr(rollout, policy), np.float64)[i, :length])
        q = np.exp(np.asarray(rollout.logp_ref, np.float64)[i, :length])
        rewards.append(float(given[i]) - 0.3 * sum(map(term, p, q)))
    got = advantages.penalised_reward(rollout, kl=getattr(kl, name), kl_weight=0.3)
    np.testing.assert_allclose(got, rewards, rtol=1e-5, atol=1e-5)
    got = advantages.grpo(rollout, kl=getattr(kl, name), kl_weight=0.3)
    expected = paper_advantages(rewards, 4, True, 1, 1e-6)
    np.testing.assert_allclose(got[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_a_penalty_reads_nothing_past_the_end_of_an_answer():
    rollout = make_rollout(np.random.default_rng(3))
    past = ~advantages.answer_mask(rollout)
    assert past.any()
    dirty = replace(
        rollout,
        logp_old=jnp.where(past, jnp.nan, jnp.asarray(rollout.logp_old)),
        logp_ref=jnp.where(past, jnp.inf, jnp.asarray(rollout.logp_ref)),
    )
    np.testing.assert_array_equal(
        advantages.grpo(dirty, kl=kl.k3, kl_weight=0.1),
        advantages.grpo(rollout, kl=kl.k3, kl_weight=0.1),
    )


def test_a_rollout_that_lacks_what_is_asked_for_is_refused():
    rollout = make_rollout(np.random.default_rng(4))
    with pytest.raises(ValueError, match="reward=None"):
        advantages.grpo(replace(rollout, reward=None))
    with pytest.raises(ValueError, match="logp_ref=None"):
        advantages.rloo(replace(rollout, logp_ref=None), kl=kl.k1, kl_weight=0.1)
    with pytest.raises(ValueError, match=r"kl_weight=0.1 needs kl"):
        advantages.grpo(rollout, kl_weight=0.1)
    uneven = replace(rollout, prompt=rollout.prompt[:2], answer=rollout.answer[:3])
    with pytest.raises(ValueError, match="B=3, N=2"):
        advantages.grpo(uneven)
