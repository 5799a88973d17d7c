"""How much better an answer is than expected: one number for each token of a rollout.

An advantage function takes a `Rollout` whose rewards are known and gives [B, A]. Most compare an
answer with the other answers to its prompt, and need no critic; `ppo` needs `rollout.value`,
`prime` needs `rollout.process`, and `on_policy_distillation` a teacher's `rollout.logp_ref`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from r1jax.algos.returns import discounted_return, gae
from r1jax.types import Rollout

Kl = Callable[[Float[Array, "B A"], Float[Array, "B A"]], Float[Array, "B A"]]
Advantage = Callable[[Rollout], Float[Array, "B A"]]

# --------------------------------------------------------------------------- of answers


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


# --------------------------------------------------------------------------- of rollouts


def grpo(
    rollout: Rollout,
    *,
    scale: bool = True,
    ddof: int = 1,
    kl: Kl | None = None,
    kl_weight: float = 0.0,
) -> Float[Array, "B A"]:
    """`group_advantages` of the rewards, the same for all tokens of an answer and 0 after it.

    With `kl` (one of `r1jax.algos.kl`) an answer's KL to the reference, kl_weight * the sum of
    the estimate over its tokens, is subtracted from its reward before the comparison; see
    `penalised_reward`. GRPO as published has its KL term in the loss instead.

    Raises:
      ValueError: as `group_advantages` and `penalised_reward`.
    """
    reward = penalised_reward(rollout, kl=kl, kl_weight=kl_weight)
    advantage = group_advantages(reward, group=_group_size(rollout), scale=scale, ddof=ddof)
    return per_token(advantage, rollout)


def rloo(rollout: Rollout, *, kl: Kl | None = None, kl_weight: float = 0.0) -> Float[Array, "B A"]:
    """`leave_one_out` of the rewards for all tokens of an answer; `kl` as in `grpo`."""
    reward = penalised_reward(rollout, kl=kl, kl_weight=kl_weight)
    return per_token(leave_one_out(reward, group=_group_size(rollout)), rollout)


def batch_scaled(
    rollout: Rollout, *, ddof: int = 1, kl: Kl | None = None, kl_weight: float = 0.0
) -> Float[Array, "B A"]:
    """`batch_advantages` of the rewards for all tokens of an answer; `kl` as in `grpo`."""
    reward = penalised_reward(rollout, kl=kl, kl_weight=kl_weight)
    return per_token(batch_advantages(reward, group=_group_size(rollout), ddof=ddof), rollout)


def pass_at_k(rollout: Rollout, *, k: int, right: float = 1.0) -> Float[Array, "B A"]:
    """`pass_at_k_advantages` of the rewards for all tokens of an answer."""
    reward = penalised_reward(rollout)
    group = _group_size(rollout)
    return per_token(pass_at_k_advantages(reward, group=group, k=k, right=right), rollout)


def monte_carlo(
    rollout: Rollout, *, gamma: float = 1.0, kl: Kl | None = None, kl_weight: float = 0.0
) -> Float[Array, "B A"]:
    """The return of `token_rewards` from each token on, with nothing taken off: REINFORCE.

    An answer that could not be judged gets 0.
    """
    reward, mask = token_rewards(rollout, kl=kl, kl_weight=kl_weight)
    return discounted_return(reward, mask, gamma=gamma)


def reinforce_plus_plus(
    rollout: Rollout, *, gamma: float = 1.0, kl: Kl | None = None, kl_weight: float = 0.0
) -> Float[Array, "B A"]:
    """`monte_carlo`, whitened over all tokens of the rollout: no groups are needed.

    Answers are compared with those to all prompts, so that equal rewards within one group get 0
    only where all the others have the same.

    Source: REINFORCE++, arXiv:2501.03262: the KL estimate k1 is in the rewards of tokens.
    """
    reward, mask = token_rewards(rollout, kl=kl, kl_weight=kl_weight)
    return whiten(discounted_return(reward, mask, gamma=gamma), mask)


def reinforce_plus_plus_baseline(
    rollout: Rollout, *, kl: Kl | None = None, kl_weight: float = 0.0
) -> Float[Array, "B A"]:
    """`reinforce_baseline` of the rewards for all tokens of an answer; `kl` as in `grpo`.

    The paper puts its KL, k2, in the loss.
    """
    reward = penalised_reward(rollout, kl=kl, kl_weight=kl_weight)
    return per_token(reinforce_baseline(reward, group=_group_size(rollout)), rollout)


def ppo(
    rollout: Rollout,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    kl: Kl | None = None,
    kl_weight: float = 0.0,
    whitened: bool = True,
) -> Float[Array, "B A"]:
    """GAE of `token_rewards` with the critic's `rollout.value`, whitened over all tokens.

    Raises:
      ValueError: the rollout has no value, or as `token_rewards`.

    Source: PPO, arXiv:1707.06347; gamma = lam = 1 and whitening as in TinyZero.
    """
    advantage, _, mask = _gae(rollout, gamma=gamma, lam=lam, kl=kl, kl_weight=kl_weight)
    return whiten(advantage, mask) if whitened else advantage


def value_targets(
    rollout: Rollout,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    kl: Kl | None = None,
    kl_weight: float = 0.0,
) -> Float[Array, "B A"]:
    """The returns that a critic is to learn, of the same settings as `ppo`.

    An answer that could not be judged gets the critic's own values.
    """
    _, target, judged = _gae(rollout, gamma=gamma, lam=lam, kl=kl, kl_weight=kl_weight)
    value = jnp.where(answer_mask(rollout), jnp.asarray(rollout.value), 0.0)
    return jnp.where(judged, target, value)


def prime(
    rollout: Rollout,
    *,
    process_weight: float = 1.0,
    outcome_weight: float = 1.0,
    gamma: float = 1.0,
    scaled: bool = True,
    whitened: bool = True,
) -> Float[Array, "B A"]:
    """Returns of process rewards, plus the outcome; each against the other answers to the prompt.

    process_weight * sum over s >= t of gamma^(s - t) * leave_one_out_tokens(process)_s
    + outcome_weight * leave_one_out(reward)

    `rollout.process` is beta * (logp of the implicit process reward model - logp_ref) at each
    token. With `scaled` it is first divided by the largest absolute sum of process rewards from a
    token to the end of its answer; with `whitened` the result is made of mean 0 and deviation 1
    over all tokens. An answer that could not be judged gets 0 and is compared with by none.

    Raises:
      ValueError: the rollout has no process rewards or no rewards.

    Source: PRIME, arXiv:2502.01456; scaling and whitening as in its released code.
    """
    if rollout.process is None:
        raise ValueError("prime needs rewards of tokens, got process=None in the rollout")
    reward = penalised_reward(rollout)
    mask = answer_mask(rollout) & ~jnp.isnan(reward)[:, None]
    process = jnp.where(mask, rollout.process, 0.0)
    if scaled:
        process = process / (jnp.abs(discounted_return(process, mask)).max() + 1e-6)
    group = _group_size(rollout)
    credit = discounted_return(leave_one_out_tokens(process, mask, group=group), mask, gamma=gamma)
    outcome = leave_one_out(reward, group=group)[:, None]
    advantage = jnp.where(mask, process_weight * credit + outcome_weight * outcome, 0.0)
    return whiten(advantage, mask) if whitened else advantage


def on_policy_distillation(rollout: Rollout) -> Float[Array, "B A"]:
    """How much likelier the teacher makes each sampled token than the student: minus k1.

    `rollout.logp_ref` is the teacher's. With `policy_loss` the gradient is that of the reverse
    KL(student || teacher) at each position by itself. No reward is read.

    Raises:
      ValueError: the rollout has no `logp_ref`.

    Source: GKD, arXiv:2306.13649, on the student's own samples; MiniLLM, arXiv:2306.08543, its
    single-step part; K. Lu, "On-Policy Distillation" (2025).
    """
    if rollout.logp_ref is None:
        raise ValueError("on_policy_distillation needs the teacher's log-probs in logp_ref")
    gap = rollout.logp_ref - _policy_logp(rollout)
    return jnp.where(answer_mask(rollout), gap, 0.0)


def shaped(
    rollout: Rollout, *, advantage: Advantage, shape: Callable[[Rollout], Float[Array, " B"]]
) -> Float[Array, "B A"]:
    """`advantage` of the rollout with shape(rollout), such as `overlong_penalty`, added to rewards.

    Raises:
      ValueError: the rollout has no reward.
    """
    reward = penalised_reward(rollout) + shape(rollout)
    return advantage(replace(rollout, reward=reward))


def overlong_penalty(
    rollout: Rollout, *, limit: int, buffer: int, factor: float = 1.0
) -> Float[Array, " B"]:
    """0 for answers of up to limit - buffer tokens, falling to -factor at `limit` and beyond.

    Raises:
      ValueError: `buffer` is not in [1, limit].

    Source: DAPO, arXiv:2503.14476, eq. 13: limit 20,480, buffer 4,096.
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"buffer must be in [1, limit={limit}] tokens, got {buffer}")
    beyond = rollout.answer_length - (limit - buffer)
    return -factor * jnp.clip(beyond.astype(jnp.float32) / buffer, 0.0, 1.0)


# --------------------------------------------------------------------------- parts


def token_rewards(
    rollout: Rollout, *, kl: Kl | None = None, kl_weight: float = 0.0
) -> tuple[Float[Array, "B A"], Bool[Array, "B A"]]:
    """The reward at each answer's last token, less kl_weight * the KL estimate at every token.

    The mask beside it is True on the tokens of answers that could be judged.

    Raises:
      ValueError: as `penalised_reward`.
    """
    reward = penalised_reward(rollout)
    mask = answer_mask(rollout) & ~jnp.isnan(reward)[:, None]
    last = jnp.arange(mask.shape[1])[None, :] == rollout.answer_length[:, None] - 1
    tokens = jnp.where(mask & last, reward[:, None], 0.0)
    return tokens - jnp.where(mask, _penalty(rollout, kl, kl_weight), 0.0), mask


def penalised_reward(
    rollout: Rollout, *, kl: Kl | None = None, kl_weight: float = 0.0
) -> Float[Array, " B"]:
    """Rewards less kl_weight * the sum over an answer's tokens of kl(logp, logp_ref).

    The policy's log-probabilities are `logp_old`, or `logp_rollout` where there is none. A nan
    reward stays nan.

    Raises:
      ValueError: the rollout has no reward, `kl` is given without `logp_ref`, or `kl_weight`
        without `kl`.
    """
    if rollout.reward is None:
        raise ValueError("advantages need a rollout with rewards, got reward=None")
    if kl is None and not kl_weight:
        return jnp.asarray(rollout.reward)
    return rollout.reward - _penalty(rollout, kl, kl_weight).sum(axis=1)


def per_token(advantage: Float[Array, " B"], rollout: Rollout) -> Float[Array, "B A"]:
    """Gives every token of answer i the number advantage[i]; entries past its end get 0."""
    return jnp.where(answer_mask(rollout), advantage[:, None], 0.0)


def answer_mask(rollout: Rollout) -> Bool[Array, "B A"]:
    """True on the tokens of each answer, its end token included."""
    return jnp.arange(rollout.answer.shape[1])[None, :] < rollout.answer_length[:, None]


def _penalty(rollout: Rollout, kl: Kl | None, kl_weight: float) -> Float[Array, "B A"]:
    """kl_weight * the KL estimate at the tokens of answers; 0 after them, and without `kl`."""
    if kl is None:
        if kl_weight:
            raise ValueError(f"kl_weight={kl_weight} needs kl, e.g. r1jax.algos.kl.k1")
        return jnp.zeros(rollout.answer.shape, jnp.float32)
    if rollout.logp_ref is None:
        raise ValueError("a KL penalty needs the reference's log-probs, got logp_ref=None")
    estimate = kl(jnp.asarray(_policy_logp(rollout)), jnp.asarray(rollout.logp_ref))
    return jnp.where(answer_mask(rollout), kl_weight * estimate, 0.0)


def _policy_logp(rollout: Rollout) -> Float[Array, "B A"]:
    found = rollout.logp_rollout if rollout.logp_old is None else rollout.logp_old
    return jnp.asarray(found)


def _gae(
    rollout: Rollout, *, gamma: float, lam: float, kl: Kl | None, kl_weight: float
) -> tuple[Float[Array, "B A"], Float[Array, "B A"], Bool[Array, "B A"]]:
    if rollout.value is None:
        raise ValueError("PPO's advantages need a critic, got value=None in the rollout")
    reward, mask = token_rewards(rollout, kl=kl, kl_weight=kl_weight)
    return *gae(reward, jnp.asarray(rollout.value), mask, gamma=gamma, lam=lam), mask


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


def _group_size(rollout: Rollout) -> int:
    answers, prompts = rollout.answer.shape[0], rollout.prompt.shape[0]
    if answers % prompts:
        raise ValueError(f"need as many answers to each prompt, got B={answers}, N={prompts}")
    return answers // prompts
