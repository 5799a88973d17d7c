import itertools
import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.algos import advantages, groups, kl, selection
from r1jax.rollout.answers import fill_up, take
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
    got = groups.group_advantages(jnp.asarray(rewards), group=group, ddof=ddof, scale=scale)
    np.testing.assert_allclose(
        got, paper_advantages(rewards, group, scale, ddof, 1e-6), rtol=2e-5, atol=2e-5
    )


def test_one_right_answer_of_four_gets_the_numbers_worked_by_hand():
    reward = jnp.array([1.0, 0.0, 0.0, 0.0])  # mean 1/4, sum of squares 3/4
    one = groups.group_advantages(reward, group=4, eps=0.0)  # std sqrt(3/4 / 3) = 1/2
    np.testing.assert_allclose(one, [1.5, -0.5, -0.5, -0.5], rtol=1e-6)
    zero = groups.group_advantages(reward, group=4, ddof=0, eps=0.0)  # std sqrt(3)/4
    np.testing.assert_allclose(zero, np.array([3.0, -1, -1, -1]) / math.sqrt(3), rtol=1e-6)
    plain = groups.group_advantages(reward, group=4, scale=False)
    np.testing.assert_allclose(plain, [0.75, -0.25, -0.25, -0.25], rtol=1e-6)
    others = groups.leave_one_out(reward, group=4)  # the others of a wrong one: 1/3
    np.testing.assert_allclose(others, [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.1, -3.3, 1e6])
@pytest.mark.parametrize("group", [3, 16, 17])
def test_equal_rewards_give_exactly_zero(group, value):
    reward = jnp.full(2 * group, value, jnp.float32)
    for function in (groups.group_advantages, groups.leave_one_out):
        np.testing.assert_array_equal(jax.jit(partial(function, group=group))(reward), 0.0)


def test_groups_do_not_see_each_other():
    reward = jnp.array([1.0, 0.0, 5.0, 5.0, 7.0, 9.0])
    got = groups.group_advantages(reward, group=2, scale=False)
    np.testing.assert_allclose(got, [0.5, -0.5, 0, 0, -1, 1])


@pytest.mark.parametrize(
    "function", [groups.group_advantages, groups.leave_one_out], ids=["group", "rloo"]
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
    got = groups.leave_one_out(jnp.asarray(rewards), group=5)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "group"), [(3, 2), (4, 1), (4, 0), (2, 4)])
def test_groups_that_are_not_whole_are_refused(rows, group):
    for function in (groups.group_advantages, groups.leave_one_out):
        with pytest.raises(ValueError, match=f"whole groups.*B={rows}, group={group}"):
            function(jnp.zeros(rows), group=group)


def test_an_unknown_ddof_is_refused():
    with pytest.raises(ValueError, match="ddof must be 0 or 1, got 2"):
        groups.group_advantages(jnp.zeros(4), group=2, ddof=2)


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


# --------------------------------------------------------------------------- other baselines


def lengths_of(rollout):
    return np.asarray(rollout.answer_length).tolist()


def whitened(rows):
    """All numbers of ragged rows with mean 0 and deviation 1 (ddof 1)."""
    every = np.concatenate([np.asarray(row, np.float64) for row in rows])
    return [(np.asarray(row) - every.mean()) / math.sqrt(every.var(ddof=1) + 1e-8) for row in rows]


def assert_ragged(got, rows, rtol=1e-4, atol=1e-5):
    for i, row in enumerate(rows):
        np.testing.assert_allclose(got[i, : len(row)], row, rtol=rtol, atol=atol)
        np.testing.assert_array_equal(got[i, len(row) :], 0.0)


@pytest.mark.parametrize("ddof", [0, 1])
def test_batch_advantages_have_the_groups_mean_and_the_batchs_deviation(ddof):
    rewards = np.random.default_rng(5).normal(1, 2, 12).astype(np.float32)
    got = groups.batch_advantages(jnp.asarray(rewards), group=4, ddof=ddof)
    exact = rewards.astype(np.float64)
    gap = exact - exact.reshape(3, 4).mean(1).repeat(4)
    np.testing.assert_allclose(got, gap / exact.std(ddof=ddof), rtol=1e-4, atol=1e-5)


def test_reinforce_baseline_scales_the_gaps_by_their_own_deviation():
    rewards = np.random.default_rng(6).normal(1, 2, 12).astype(np.float32)
    got = groups.reinforce_baseline(jnp.asarray(rewards), group=4)
    exact = rewards.astype(np.float64)
    gap = exact - exact.reshape(3, 4).mean(1).repeat(4)
    np.testing.assert_allclose(got, gap / gap.std(ddof=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "function", [groups.batch_advantages, groups.reinforce_baseline], ids=["batch", "gap"]
)
def test_batch_scaled_groups_of_equal_rewards_get_zero_and_unjudged_answers_are_left_out(function):
    nan = float("nan")
    got = function(jnp.array([1.1, 1.1, 1.1, 0.0, 1.0, 3.0]), group=3)
    np.testing.assert_array_equal(got[:3], 0.0)
    assert (np.asarray(got[3:]) != 0).all()
    np.testing.assert_array_equal(function(jnp.full(9, 1.1), group=3), 0.0)
    left_out = function(jnp.array([1.0, nan, 0.0, 0.5, 2.0, nan]), group=3)
    rest = jnp.array([1.0, 0.0, 0.5, 2.0])
    np.testing.assert_allclose(
        left_out[jnp.array([0, 2, 3, 4])], function(rest, group=2), rtol=1e-5
    )
    assert left_out[1] == left_out[5] == 0
    np.testing.assert_array_equal(function(jnp.full(4, nan), group=2), 0.0)


def every_set_advantages(right, k):
    """Pass@k training by its definition: all sets of k answers, scored and normalised."""
    sets = list(itertools.combinations(range(len(right)), k))
    scores = np.array([float(any(right[i] for i in each)) for each in sets])
    if scores.std() == 0:
        return np.zeros(len(right))
    normal = (scores - scores.mean()) / scores.std()
    return [
        np.mean([a for a, each in zip(normal, sets, strict=True) if i in each])
        for i in range(len(right))
    ]


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_pass_at_k_advantages_are_means_over_every_set_of_k(k):
    rewards = [[int(i < c) for i in range(6)] for c in range(7)]
    reward = jnp.asarray(np.array(rewards, np.float32).reshape(-1))
    got = groups.pass_at_k_advantages(reward, group=6, k=k)
    expected = np.concatenate([every_set_advantages(group, k) for group in rewards])
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    equal = np.asarray(got).reshape(7, 6)[[0, 6]]
    np.testing.assert_array_equal(equal, 0.0)


def test_pass_at_one_advantages_are_those_of_grpo():
    reward = jnp.array([1.0, 0.0, 0.0, 0.0])
    got = groups.pass_at_k_advantages(reward, group=4, k=1)
    np.testing.assert_allclose(got, np.array([3.0, -1, -1, -1]) / math.sqrt(3), rtol=1e-6)


def test_pass_at_k_leaves_out_unjudged_answers_and_small_groups():
    nan = float("nan")
    got = groups.pass_at_k_advantages(
        jnp.array([1.0, nan, 0.0, 0.2, 1.0, nan, nan, nan]), group=4, k=2
    )
    expected = every_set_advantages([1, 0, 0], 2)
    np.testing.assert_allclose(got[jnp.array([0, 2, 3])], expected, rtol=1e-5)
    np.testing.assert_array_equal(got[jnp.array([1, 4, 5, 6, 7])], 0.0)
    with pytest.raises(ValueError, match=r"k must be in \[1, group=4\], got 5"):
        groups.pass_at_k_advantages(jnp.zeros(4), group=4, k=5)


def test_sources_of_reward_are_compared_apart_and_then_summed():
    rng = np.random.default_rng(8)
    reward = rng.normal(size=(6, 2)).astype(np.float32) * np.array([1, 100], np.float32)
    for scale in (True, False):
        function = partial(groups.group_advantages, group=3, scale=scale)
        got = groups.over_sources(jnp.asarray(reward), weight=(2.0, 0.5), advantage=function)
        parts = [paper_advantages(reward[:, s], 3, scale, 1, 1e-6) for s in (0, 1)]
        np.testing.assert_allclose(
            got, 2 * np.array(parts[0]) + np.array(parts[1]) / 2, rtol=1e-4, atol=1e-4
        )
    with pytest.raises(ValueError, match="got 1 for 2"):
        groups.over_sources(jnp.asarray(reward), weight=(1.0,), advantage=function)


def test_a_source_that_could_not_judge_an_answer_leaves_out_only_itself():
    nan = float("nan")
    reward = jnp.array([[1.0, nan], [0.0, 2.0], [0.0, 4.0]])
    got = groups.over_sources(
        reward, weight=(1.0, 1.0), advantage=partial(groups.leave_one_out, group=3)
    )
    np.testing.assert_allclose(got, [1.0, -0.5 - 2, -0.5 + 2], rtol=1e-6)


@pytest.mark.parametrize("whitened", [True, False])
def test_gdpo_normalises_each_part_in_its_group_and_then_the_sum_over_the_batch(whitened):
    rng = np.random.default_rng(10)
    parts = rng.normal(size=(12, 2)).astype(np.float32) * np.array([1, 100], np.float32)
    rollout = make_rollout(rng, parts=parts)
    got = advantages.by_source(rollout, weight=(2.0, 0.5), whitened=whitened)
    total = sum(
        w * np.array(paper_advantages(parts[:, s], 4, True, 1, 1e-6))
        for s, w in enumerate((2.0, 0.5))
    )
    if whitened:
        total = (total - total.mean()) / (total.std(ddof=1) + 1e-6)
    for i, length in enumerate(lengths_of(rollout)):
        np.testing.assert_allclose(got[i, :length], total[i], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(got[i, length:], 0)


def test_a_part_that_was_not_judged_leaves_an_answer_to_its_other_parts():
    nan = float("nan")
    parts = np.array([[1, nan], [0, 2], [0, 4], [1, 3], [1, 3], [nan, nan]], np.float32)
    rollout = make_rollout(np.random.default_rng(11), prompts=2, group=3, parts=parts)
    compare = {"compare": groups.leave_one_out, "whitened": False}
    got = advantages.by_source(rollout, weight=(1.0, 1.0), **compare)[:, 0]
    # As PRIME has it: each less the mean of the others that have the part. The second group's
    # parts are equal, and its last answer has none.
    np.testing.assert_allclose(got, [1.0, -0.5 - 2, -0.5 + 2, 0, 0, 0], rtol=1e-6)
    np.testing.assert_array_equal(got[3:], 0)
    whitened = advantages.by_source(
        rollout, weight=(1.0, 1.0), compare=groups.leave_one_out, whitened=True
    )[:, 0]
    # The mean of the five that were judged is 0: by hand, their squares are 1, 6.25, 2.25, 0, 0.
    np.testing.assert_allclose(whitened, got / (math.sqrt(9.5 / 4) + 1e-6), rtol=1e-5)
    np.testing.assert_array_equal(whitened[3:], 0)


def test_parts_are_needed_and_a_weight_for_each():
    rollout = make_rollout(np.random.default_rng(12))
    with pytest.raises(ValueError, match="got parts=None"):
        advantages.by_source(rollout, weight=(1.0,))
    rollout = replace(rollout, parts=np.zeros((12, 2), np.float32))
    with pytest.raises(ValueError, match="need a weight for each source, got 1 for 2"):
        advantages.by_source(rollout, weight=(1.0,))


def test_token_rewards_are_compared_with_the_mean_token_of_the_other_answers():
    rollout = make_rollout(np.random.default_rng(9))
    reward = np.asarray(rollout.logp_ref, np.float64)
    lengths = lengths_of(rollout)
    means = [reward[i, :n].mean() for i, n in enumerate(lengths)]
    rows = []
    for i, n in enumerate(lengths):
        others = [means[j] for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        rows.append(reward[i, :n] - np.mean(others))
    mask = advantages.answer_mask(rollout)
    dirty = jnp.where(mask, rollout.logp_ref, jnp.nan)
    assert_ragged(groups.leave_one_out_tokens(dirty, mask, group=4), rows)


def test_whitening_gives_mean_zero_and_deviation_one_over_the_masked_tokens():
    rng = np.random.default_rng(10)
    x, mask = rng.normal(3, 5, (4, 7)).astype(np.float32), rng.random((4, 7)) < 0.6
    got = np.asarray(groups.whiten(jnp.asarray(np.where(mask, x, np.nan)), jnp.asarray(mask)))
    exact = x[mask].astype(np.float64)
    np.testing.assert_allclose(
        got[mask], (exact - exact.mean()) / exact.std(ddof=1), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_array_equal(got[~mask], 0.0)
    for value in (0.1, 1.1, -3.3):
        equal = groups.whiten(jnp.full((4, 7), value), jnp.asarray(mask))
        np.testing.assert_array_equal(equal, 0.0)
    np.testing.assert_array_equal(groups.whiten(jnp.ones((2, 2)), jnp.zeros((2, 2), bool)), 0.0)


# --------------------------------------------------------------------------- token by token


def paper_token_rewards(rollout, weight=0.0):
    """Each answer's rewards by token: the outcome at the last, minus weight * k1 at each."""
    rows = []
    for i, n in enumerate(lengths_of(rollout)):
        old, ref = (np.asarray(x, np.float64)[i, :n] for x in (rollout.logp_old, rollout.logp_ref))
        row = -weight * (old - ref)
        row[-1] += float(rollout.reward[i])
        rows.append(row)
    return rows


def paper_returns(row, gamma):
    return [sum(gamma ** (s - t) * row[s] for s in range(t, len(row))) for t in range(len(row))]


@pytest.mark.parametrize(("gamma", "weight"), [(1.0, 0.0), (0.9, 0.2)])
def test_reinforce_sums_the_rewards_of_tokens_and_its_plus_plus_whitens_them(gamma, weight):
    rollout = make_rollout(np.random.default_rng(11))
    settings = {"gamma": gamma, "kl": kl.k1, "kl_weight": weight}
    rows = [paper_returns(row, gamma) for row in paper_token_rewards(rollout, weight)]
    assert_ragged(advantages.monte_carlo(rollout, **settings), rows)
    assert_ragged(advantages.reinforce_plus_plus(rollout, **settings), whitened(rows))


def test_reinforce_plus_plus_of_equal_rewards_is_exactly_zero():
    rollout = make_rollout(np.random.default_rng(12), reward=jnp.full(12, 1.1))
    for function in (advantages.reinforce_plus_plus, advantages.reinforce_plus_plus_baseline):
        np.testing.assert_array_equal(function(rollout), 0.0)


def paper_ppo(rollout, gamma, lam, weight):
    rows = []
    for i, row in enumerate(paper_token_rewards(rollout, weight)):
        value = [*np.asarray(rollout.value, np.float64)[i, : len(row)], 0.0]
        errors = [r + gamma * value[t + 1] - value[t] for t, r in enumerate(row)]
        rows.append(np.array(paper_returns(errors, gamma * lam)))
    return rows


def test_ppo_is_gae_of_the_token_rewards_and_its_targets_are_the_returns():
    rng = np.random.default_rng(13)
    rollout = make_rollout(rng, value=jnp.asarray(rng.normal(size=(12, 6)).astype(np.float32)))
    settings = {"gamma": 0.98, "lam": 0.9, "kl": kl.k1, "kl_weight": 0.2}
    rows = paper_ppo(rollout, 0.98, 0.9, 0.2)
    assert_ragged(advantages.ppo(rollout, whitened=False, **settings), rows)
    assert_ragged(advantages.ppo(rollout, **settings), whitened(rows))
    targets = [row + np.asarray(rollout.value)[i, : len(row)] for i, row in enumerate(rows)]
    assert_ragged(advantages.value_targets(rollout, **settings), targets)
    with pytest.raises(ValueError, match="value=None"):
        advantages.ppo(replace(rollout, value=None))


def paper_prime(rollout, process_weight, outcome_weight, gamma, scaled):
    lengths = lengths_of(rollout)
    rewards = [float(r) for r in rollout.reward]
    process = [np.asarray(rollout.process, np.float64)[i, :n] for i, n in enumerate(lengths)]
    if scaled:
        largest = max(abs(x) for row in process for x in paper_returns(row, 1.0))
        process = [row / (largest + 1e-6) for row in process]
    rows = []
    for i, row in enumerate(process):
        others = [j for j in range(i // 4 * 4, i // 4 * 4 + 4) if j != i]
        baseline = np.mean([process[j].mean() for j in others])
        outcome = rewards[i] - np.mean([rewards[j] for j in others])
        credit = np.array(paper_returns(row - baseline, gamma))
        rows.append(process_weight * credit + outcome_weight * outcome)
    return rows


@pytest.mark.parametrize(("gamma", "scaled"), [(1.0, True), (0.9, False)])
def test_prime_adds_process_returns_and_outcomes_each_against_the_other_answers(gamma, scaled):
    rng = np.random.default_rng(14)
    process = rng.normal(0, 0.3, (12, 6)).astype(np.float32)
    rollout = make_rollout(rng, process=jnp.asarray(process))
    settings = {"process_weight": 0.7, "outcome_weight": 1.5, "gamma": gamma, "scaled": scaled}
    rows = paper_prime(rollout, 0.7, 1.5, gamma, scaled)
    assert_ragged(advantages.prime(rollout, whitened=False, **settings), rows)
    assert_ragged(advantages.prime(rollout, **settings), whitened(rows))
    with pytest.raises(ValueError, match="process=None"):
        advantages.prime(replace(rollout, process=None))


def test_primes_process_rewards_worked_by_hand():
    rollout = make_rollout(
        np.random.default_rng(0),
        prompts=1,
        group=2,
        width=2,
        answer_length=jnp.array([2, 1]),
        reward=jnp.array([1.0, 0.0]),
        process=jnp.array([[0.5, 0.25], [-1.0, 7.0]]),
    )
    # Baselines: the other's mean, -1 and 0.375. Tokens 1.5, 1.25 | -1.375; outcomes +1 | -1.
    got = advantages.prime(rollout, scaled=False, whitened=False)
    np.testing.assert_allclose(got, [[3.75, 2.25], [-2.375, 0.0]])


def test_an_unjudged_answer_gets_zero_and_changes_no_other_answers_advantage():
    rng = np.random.default_rng(15)
    more = {
        n: jnp.asarray(rng.normal(size=(12, 6)).astype(np.float32)) for n in ("value", "process")
    }
    rollout = make_rollout(rng, answer_length=jnp.full(12, 6), **more)
    reward = jnp.asarray(rollout.reward).at[jnp.array([1, 6])].set(jnp.nan)
    functions = [
        advantages.batch_scaled,
        partial(advantages.pass_at_k, k=2, right=0.0),
        advantages.monte_carlo,
        advantages.reinforce_plus_plus,
        advantages.reinforce_plus_plus_baseline,
        partial(advantages.ppo, lam=0.9),
        advantages.prime,
    ]
    unread = {n: jnp.asarray(x).at[jnp.array([1, 6])].set(99.0) for n, x in more.items()}
    for function in functions:
        got = function(replace(rollout, reward=reward))
        np.testing.assert_array_equal(got[jnp.array([1, 6])], 0.0)
        assert np.isfinite(got).all()
        same = function(replace(rollout, reward=reward, **unread))
        np.testing.assert_array_equal(got, same)
    targets = advantages.value_targets(replace(rollout, reward=reward))
    np.testing.assert_array_equal(targets[1], more["value"][1])


def test_nothing_past_the_end_of_an_answer_is_read():
    rng = np.random.default_rng(16)
    more = {
        n: jnp.asarray(rng.normal(size=(12, 6)).astype(np.float32)) for n in ("value", "process")
    }
    rollout = make_rollout(rng, **more)
    past = ~advantages.answer_mask(rollout)
    names = ("value", "process", "logp_old", "logp_ref")
    dirty = {n: jnp.where(past, jnp.nan, jnp.asarray(getattr(rollout, n))) for n in names}
    for function in (
        partial(advantages.ppo, kl=kl.k1, kl_weight=0.1),
        advantages.value_targets,
        advantages.prime,
        advantages.on_policy_distillation,
        partial(advantages.reinforce_plus_plus, kl=kl.k2, kl_weight=0.1),
    ):
        np.testing.assert_array_equal(function(replace(rollout, **dirty)), function(rollout))


def test_on_policy_distillation_has_the_gradient_of_the_reverse_kl():
    """Every token once, weighted with its probability: the exact mean over samples."""
    student = jnp.array([0.3, -0.9, 1.2, 0.1])
    teacher = jnp.array([-0.2, 0.5, 0.9, -0.3])
    rollout = make_rollout(
        np.random.default_rng(0),
        prompts=1,
        group=4,
        width=1,
        answer_length=jnp.ones(4, jnp.int32),
        reward=None,
        logp_old=jax.nn.log_softmax(student)[:, None],
        logp_ref=jax.nn.log_softmax(teacher)[:, None],
    )
    advantage = advantages.on_policy_distillation(rollout)[:, 0]

    def surrogate(logits):
        return -jnp.sum(jax.nn.softmax(student) * advantage * jax.nn.log_softmax(logits))

    def reverse_kl(logits):
        p = jax.nn.softmax(logits)
        return jnp.sum(p * (jnp.log(p) - jax.nn.log_softmax(teacher)))

    np.testing.assert_allclose(
        jax.grad(surrogate)(student), jax.grad(reverse_kl)(student), rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ValueError, match="teacher"):
        advantages.on_policy_distillation(replace(rollout, logp_ref=None))


def test_overlong_answers_are_penalised_as_in_dapo_and_the_penalty_shapes_any_advantage():
    rollout = make_rollout(
        np.random.default_rng(17),
        prompts=1,
        group=6,
        answer_length=jnp.array([100, 16384, 18432, 20480, 20481, 30000]),
    )
    got = advantages.overlong_penalty(rollout, limit=20480, buffer=4096)
    np.testing.assert_allclose(got, [0, 0, -0.5, -1, -1, -1])
    shape = partial(advantages.overlong_penalty, limit=20480, buffer=4096, factor=0.5)
    np.testing.assert_allclose(shape(rollout), np.asarray(got) / 2)
    shaped = advantages.shaped(rollout, advantage=advantages.rloo, shape=shape)
    by_hand = advantages.rloo(replace(rollout, reward=rollout.reward + shape(rollout)))
    np.testing.assert_array_equal(shaped, by_hand)
    with pytest.raises(ValueError, match=r"buffer must be in \[1, limit=10\]"):
        advantages.overlong_penalty(rollout, limit=10, buffer=11)


def test_tokens_that_are_not_chosen_have_no_advantage():
    ended = np.arange(12) % 3 > 0
    rollout = make_rollout(np.random.default_rng(5), finished=jnp.asarray(ended))
    got = advantages.on_tokens(rollout, advantage=advantages.grpo, tokens=selection.finished)
    whole = np.asarray(advantages.grpo(rollout))
    assert (whole[:, 0] != 0).all()
    np.testing.assert_array_equal(got, np.where(ended[:, None], whole, 0))


@pytest.mark.parametrize(
    "advantage",
    [
        advantages.grpo,
        partial(advantages.grpo, kl=kl.k3, kl_weight=0.1),
        advantages.rloo,
        advantages.batch_scaled,
        partial(advantages.pass_at_k, k=2),
        partial(advantages.by_source, weight=(1.0, 0.5)),
        partial(advantages.monte_carlo, gamma=0.9, kl=kl.k1, kl_weight=0.1),
        partial(advantages.reinforce_plus_plus, kl=kl.k1, kl_weight=0.1),
        advantages.reinforce_plus_plus_baseline,
        partial(advantages.ppo, lam=0.9),
        partial(advantages.value_targets, lam=0.9),
        partial(advantages.prime, gamma=0.9),
        advantages.on_policy_distillation,
        partial(
            advantages.on_tokens,
            advantage=advantages.grpo,
            tokens=partial(selection.top_entropy, share=0.3),
        ),
        partial(
            advantages.shaped,
            advantage=advantages.reinforce_plus_plus,
            shape=partial(advantages.overlong_penalty, limit=6, buffer=4),
        ),
    ],
)
def test_empty_prompts_after_a_rollouts_own_change_no_advantage(advantage):
    rng = np.random.default_rng(11)
    rollout = make_rollout(rng)
    answers, width = rollout.answer.shape
    reward = rng.integers(0, 2, answers).astype(np.float32)
    reward[5] = np.nan
    parts = rng.normal(size=(answers, 2)).astype(np.float32)
    parts[2, 1] = np.nan
    tokens = [rng.normal(size=(answers, width)).astype(np.float32) for _ in range(3)]
    rollout = rollout.replace(
        reward=reward,
        parts=parts,
        value=tokens[0],
        process=tokens[1],
        entropy=tokens[2],
    )
    rollout = jax.tree.map(np.asarray, rollout)
    full = fill_up(rollout, 5)
    assert full.answer.shape == (20, width) and full.prompt.shape == (5, 2)
    expected, got = np.asarray(advantage(rollout)), np.asarray(advantage(full))
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(got[:answers], expected, rtol=2e-6, atol=1e-6)
    np.testing.assert_array_equal(got[answers:], 0)
    jax.tree.map(np.testing.assert_array_equal, take(full, full.prompt_length > 0), rollout)


def test_a_rollout_cannot_be_filled_up_to_fewer_prompts_than_it_has():
    rollout = make_rollout(np.random.default_rng(0))
    with pytest.raises(ValueError, match=r"at most 2 prompts, got B=12, N=3"):
        fill_up(rollout, 2)
