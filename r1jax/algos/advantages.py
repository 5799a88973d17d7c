"""How much better an answer is than expected: one number for each token of a rollout.

An advantage function takes a `Rollout` whose rewards are known and gives [B, A]. Those here
compare an answer with the other answers to its prompt, and need no critic.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from r1jax.types import Rollout

Kl = Callable[[Float[Array, "B A"], Float[Array, "B A"]], Float[Array, "B A"]]


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
    if kl is None:
        if kl_weight:
            raise ValueError(f"kl_weight={kl_weight} needs kl, e.g. r1jax.algos.kl.k1")
        return jnp.asarray(rollout.reward)
    if rollout.logp_ref is None:
        raise ValueError("a KL penalty needs the reference's log-probs, got logp_ref=None")
    logp = rollout.logp_rollout if rollout.logp_old is None else rollout.logp_old
    penalty = jnp.where(answer_mask(rollout), kl(logp, rollout.logp_ref), 0.0)
    return rollout.reward - kl_weight * penalty.sum(axis=1)


def per_token(advantage: Float[Array, " B"], rollout: Rollout) -> Float[Array, "B A"]:
    """Gives every token of answer i the number advantage[i]; entries past its end get 0."""
    return jnp.where(answer_mask(rollout), advantage[:, None], 0.0)


def answer_mask(rollout: Rollout) -> Bool[Array, "B A"]:
    """True on the tokens of each answer, its end token included."""
    return jnp.arange(rollout.answer.shape[1])[None, :] < rollout.answer_length[:, None]


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
