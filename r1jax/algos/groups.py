"""Rewards compared: each answer's with those of the other answers to its prompt, or with all.

Rows [k * group, (k + 1) * group) all answer prompt k. A nan reward is of an answer that could not
be judged. `r1jax.algos.advantages` makes advantages of rollouts of these.

A comparison is compiled whole: one by one, its operations are a dozen programs to compile.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


@partial(jax.jit, static_argnames=("group", "scale", "ddof", "eps"))
def group_advantages(
    reward: Float[Array, " B"],
    *,
    group: int,
    scale: bool = True,
    ddof: int = 1,
    eps: float = 1e-6,
) -> Float[Array, " B"]:
    """Scores each answer against the other answers to the same prompt.

    Rows [k * group, (k + 1) * group) all answer prompt k. With `scale` the gap to the group's
    mean is divided by its standard deviation + `eps` and has no unit; without, it has the
    reward's. A group whose rewards are all equal gets exactly 0. A nan reward (an answer that
    could not be judged) is left out of the mean and the deviation, and gets 0.

    `ddof` 1 divides the squares by group - 1, as the open trainers do (torch's default); 0
    divides by group (numpy's default), which makes advantages larger by sqrt(group / (group - 1)).
    The paper does not say which.

    Raises:
      ValueError: `group` < 2, B is not a multiple of `group`, or `ddof` is neither 0 nor 1.

    Source: DeepSeekMath, arXiv:2402.03300; without `scale` Dr. GRPO, arXiv:2503.20783.
    """
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    rewards, judged, equal = _groups(reward, group)
    count = judged.sum(axis=1, keepdims=True).astype(rewards.dtype)
    mean = rewards.sum(axis=1, keepdims=True) / jnp.maximum(count, 1)
    gap = jnp.where(judged & ~equal, rewards - mean, 0.0)
    if scale:
        variance = jnp.square(gap).sum(axis=1, keepdims=True) / jnp.maximum(count - ddof, 1)
        gap = gap / jnp.where(equal, 1.0, jnp.sqrt(variance) + eps)
    return gap.reshape(-1)


@partial(jax.jit, static_argnames="group")
def leave_one_out(reward: Float[Array, " B"], *, group: int) -> Float[Array, " B"]:
    """An answer's reward less the mean reward of the OTHER answers to its prompt.

    Rows, equal rewards and nan rewards are treated as in `group_advantages`. The baseline does
    not depend on the answer it is subtracted from, so it leaves the policy gradient unbiased.

    Raises:
      ValueError: `group` < 2, or B is not a multiple of `group`.

    Source: RLOO, arXiv:2402.14740.
    """
    rewards, judged, equal = _groups(reward, group)
    others = jnp.maximum(judged.sum(axis=1, keepdims=True) - 1, 1).astype(rewards.dtype)
    baseline = (rewards.sum(axis=1, keepdims=True) - rewards) / others
    return jnp.where(judged & ~equal, rewards - baseline, 0.0).reshape(-1)


@partial(jax.jit, static_argnames=("group", "ddof", "eps"))
def batch_advantages(
    reward: Float[Array, " B"], *, group: int, ddof: int = 1, eps: float = 1e-6
) -> Float[Array, " B"]:
    """The gap to the group's mean, divided by the deviation of ALL rewards of the batch.

    Rows, equal rewards and nan rewards are treated as in `group_advantages`. A group where one
    answer of many is right does not count for more than the others, as it does there.

    Raises:
      ValueError: as `group_advantages`.

    Source: Lite PPO, arXiv:2508.08221: mean of the group, deviation of the batch (TRL's
    scale_rewards="batch").
    """
    gap = group_advantages(reward, group=group, scale=False, ddof=ddof)
    return gap / (_deviation(reward, ~jnp.isnan(reward), ddof) + eps)


@partial(jax.jit, static_argnames=("group", "eps"))
def reinforce_baseline(
    reward: Float[Array, " B"], *, group: int, eps: float = 1e-6
) -> Float[Array, " B"]:
    """The gap to the group's mean, divided by the deviation of these GAPS over the batch.

    The gaps have mean 0, so a group of equal rewards gets exactly 0. (OpenRLHF and verl take
    mean and deviation over tokens instead of answers, so that long answers count for more in
    them, and such a group does not quite get 0.) nan rewards are treated as in
    `group_advantages`.

    Raises:
      ValueError: as `group_advantages`.

    Source: REINFORCE++-baseline, arXiv:2501.03262.
    """
    gap = group_advantages(reward, group=group, scale=False)
    return gap / (_deviation(gap, ~jnp.isnan(reward), 1) + eps)


@partial(jax.jit, static_argnames=("group", "k", "right"))
def pass_at_k_advantages(
    reward: Float[Array, " B"], *, group: int, k: int, right: float = 1.0
) -> Float[Array, " B"]:
    """What an answer does for the chance that at least one of k answers is right.

    An answer is right if its reward is at least `right`. Each of the C(G, k) sets of k answers
    gets 1 if one of them is right, and these scores are normalised to mean 0 and deviation 1; an
    answer's advantage is the mean over the sets that it is in, in closed form. It is 0 for all
    where every set has a right answer, or none has, and so for groups of equal rewards. A nan
    reward (could not be judged) is left out of the group and gets 0, as does a group with fewer
    than k that were judged.

    Raises:
      ValueError: `group` < 2, B is not a multiple of `group`, or `k` is not in [1, group].

    Source: Pass@k Training, arXiv:2508.10751.
    """
    if not 1 <= k <= group:
        raise ValueError(f"k must be in [1, group={group}], got {k}")
    rewards, judged, _ = _groups(reward, group)
    good = judged & (rewards >= right)
    count, wrong = judged.sum(axis=1), (judged & ~good).sum(axis=1)
    table = jnp.asarray(
        [[_pass_at_k(n, m, k) for m in range(group + 1)] for n in range(group + 1)], jnp.float32
    )
    chosen = table[count, wrong]  # [prompts, 2]
    advantage = jnp.where(good, chosen[:, :1], chosen[:, 1:])
    return jnp.where(judged, advantage, 0.0).reshape(-1)


def over_sources(
    reward: Float[Array, "B S"],
    *,
    weight: Sequence[float],
    advantage: Callable[[Float[Array, " B"]], Float[Array, " B"]],
) -> Float[Array, " B"]:
    """The weighted sum of what `advantage` makes of each source of reward alone.

    reward[:, s] is what source s gave. A source with nan for an answer leaves out that answer
    only for itself. With `leave_one_out` each source has its own baseline, as in PRIME; with
    `group_advantages` its own scale too, so that a source of large numbers does not drown others.

    Raises:
      ValueError: there are not as many weights as sources.

    Source: PRIME, arXiv:2502.01456 (sources apart); GDPO, arXiv:2601.05242 (scaled; it
    whitens the sum besides).
    """
    if len(weight) != reward.shape[1]:
        raise ValueError(f"need a weight for each source, got {len(weight)} for {reward.shape[1]}")
    return sum(
        (each * advantage(reward[:, i]) for i, each in enumerate(weight)),
        start=jnp.zeros(reward.shape[0], jnp.float32),
    )


@partial(jax.jit, static_argnames="group")
def leave_one_out_tokens(
    reward: Float[Array, "B A"], mask: Bool[Array, "B A"], *, group: int
) -> Float[Array, "B A"]:
    """A token's reward less the mean over the OTHER answers of their mean reward of a token.

    Rows are as in `group_advantages`; off the mask nothing is read and the result is 0. An answer
    without tokens is no part of the comparison.

    Raises:
      ValueError: `group` < 2, or B is not a multiple of `group`.

    Source: PRIME, arXiv:2502.01456. (Its code puts the token itself in the place of its
    answer's mean when it takes the answer out, which multiplies rewards by G / (G - 1).)
    """
    count = mask.sum(axis=1)
    reward = jnp.where(mask, reward, 0.0)
    mean = reward.sum(axis=1) / jnp.maximum(count, 1).astype(reward.dtype)
    means, judged, _ = _groups(jnp.where(count > 0, mean, jnp.nan), group)
    others = jnp.maximum(judged.sum(axis=1, keepdims=True) - 1, 1).astype(means.dtype)
    baseline = (means.sum(axis=1, keepdims=True) - means) / others
    return jnp.where(mask, reward - baseline.reshape(-1, 1), 0.0)


@partial(jax.jit, static_argnames="eps")
def whiten(
    x: Float[Array, "B A"], mask: Bool[Array, "B A"], *, eps: float = 1e-8
) -> Float[Array, "B A"]:
    """x with mean 0 and deviation 1 over all masked tokens; 0 off the mask.

    (x - mean) / sqrt(variance + eps), the variance with ddof 1, as verl has it. Where all are
    equal they get exactly 0.
    """
    count = jnp.maximum(mask.sum(), 1).astype(x.dtype)
    x = jnp.where(mask, x, 0.0)
    deviation = _deviation(x.reshape(-1), mask.reshape(-1), 1)
    gap = (x - x.sum() / count) / jnp.sqrt(jnp.square(deviation) + eps)
    return jnp.where(mask & (deviation > 0), gap, 0.0)


def _deviation(x: Float[Array, " M"], which: Bool[Array, " M"], ddof: int) -> Float[Array, ""]:
    """The standard deviation of some of the numbers; exactly 0 where they are all equal."""
    count = which.sum().astype(x.dtype)
    some = jnp.where(which, x, 0.0)
    gap = jnp.where(which, some - some.sum() / jnp.maximum(count, 1), 0.0)
    equal = jnp.where(which, x, -jnp.inf).max() <= jnp.where(which, x, jnp.inf).min()
    variance = jnp.square(gap).sum() / jnp.maximum(count - ddof, 1)
    return jnp.where(equal, 0.0, jnp.sqrt(jnp.where(equal, 1.0, variance)))


def _pass_at_k(count: int, wrong: int, k: int) -> tuple[float, float]:
    """The advantages of a right and of a wrong answer, `wrong` of `count` answers being wrong."""
    if wrong > count or k > count:
        return 0.0, 0.0
    mean = 1 - math.comb(wrong, k) / math.comb(count, k)
    deviation = math.sqrt(mean * (1 - mean))
    if deviation == 0:
        return 0.0, 0.0
    with_a_wrong_one = 1 - math.comb(max(wrong - 1, 0), k - 1) / math.comb(count - 1, k - 1)
    return (1 - mean) / deviation, (with_a_wrong_one - mean) / deviation


def _groups(
    reward: Float[Array, " B"], group: int
) -> tuple[Float[Array, "N G"], Bool[Array, "N G"], Bool[Array, "N 1"]]:
    """Rewards by group with nan as 0, which of them were judged, whether all of those are equal."""
    if group < 2 or reward.shape[0] % group:
        raise ValueError(f"need whole groups of >= 2 rows, got B={reward.shape[0]}, group={group}")
    rewards = reward.reshape(-1, group)
    judged = ~jnp.isnan(rewards)
    highest = jnp.where(judged, rewards, -jnp.inf).max(axis=1, keepdims=True)
    lowest = jnp.where(judged, rewards, jnp.inf).min(axis=1, keepdims=True)
    # The mean of equal float32 rewards can miss them by one ulp, and a deviation of that size
    # would make advantages of about 0.1 of it: so equality is tested, not a deviation of 0.
    return jnp.where(judged, rewards, 0.0), judged, highest <= lowest
