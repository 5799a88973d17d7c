"""How much better an answer is than expected: one number for each token of a rollout.

An advantage function takes a `Rollout` whose rewards are known and gives [B, A]. Most compare an
answer with the other answers to its prompt, and need no critic; `ppo` needs `rollout.value`,
`prime` needs `rollout.process`, `by_source` the `rollout.parts` of a weighted reward, and
`on_policy_distillation` a teacher's `rollout.logp_ref`. A stage that selects prompts shows it as
many as in any step: after those that were kept come empty ones, whose answers have no tokens and
rewards of nan, as if they could not be judged.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from r1jax.algos.groups import (
    batch_advantages,
    group_advantages,
    leave_one_out,
    leave_one_out_tokens,
    over_sources,
    pass_at_k_advantages,
    reinforce_baseline,
    whiten,
)
from r1jax.algos.returns import discounted_return, gae
from r1jax.types import Rollout

Kl = Callable[[Float[Array, "B A"], Float[Array, "B A"]], Float[Array, "B A"]]
Advantage = Callable[[Rollout], Float[Array, "B A"]]
Compare = Callable[..., Float[Array, " B"]]  # (reward, group=...) -> [B]
Number = float | Float[Array, ""]


def grpo(
    rollout: Rollout,
    *,
    scale: bool = True,
    ddof: int = 1,
    kl: Kl | None = None,
    kl_weight: Number = 0.0,
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


def rloo(rollout: Rollout, *, kl: Kl | None = None, kl_weight: Number = 0.0) -> Float[Array, "B A"]:
    """`leave_one_out` of the rewards for all tokens of an answer; `kl` as in `grpo`."""
    reward = penalised_reward(rollout, kl=kl, kl_weight=kl_weight)
    return per_token(leave_one_out(reward, group=_group_size(rollout)), rollout)


def batch_scaled(
    rollout: Rollout, *, ddof: int = 1, kl: Kl | None = None, kl_weight: Number = 0.0
) -> Float[Array, "B A"]:
    """`batch_advantages` of the rewards for all tokens of an answer; `kl` as in `grpo`."""
    reward = penalised_reward(rollout, kl=kl, kl_weight=kl_weight)
    return per_token(batch_advantages(reward, group=_group_size(rollout), ddof=ddof), rollout)


def pass_at_k(rollout: Rollout, *, k: int, right: float = 1.0) -> Float[Array, "B A"]:
    """`pass_at_k_advantages` of the rewards for all tokens of an answer."""
    reward = penalised_reward(rollout)
    group = _group_size(rollout)
    return per_token(pass_at_k_advantages(reward, group=group, k=k, right=right), rollout)


def by_source(
    rollout: Rollout,
    *,
    weight: Sequence[float],
    compare: Compare = group_advantages,
    whitened: bool = True,
) -> Float[Array, "B A"]:
    """`over_sources` of the parts of the reward, for all tokens of an answer: GDPO.

    weight[s] is of the part that is term s of `rewards.weighted`, whose own weights are not read.
    `compare` is one of `r1jax.algos.groups`, made for one reward: the default brings each part to
    one scale within its group, `leave_one_out` leaves each its own. With `whitened` the sums are
    then divided by their deviation over the batch. An answer has the advantage of the parts that
    could be judged; one without any is compared with by none and gets 0.

    Raises:
      ValueError: the rollout has no parts, there are not as many weights, or as `compare`.

    Source: GDPO, arXiv:2601.05242; with `leave_one_out` and not whitened PRIME's, arXiv:2502.01456.
    """
    if rollout.parts is None:
        raise ValueError("by_source needs the parts of a weighted reward, got parts=None")
    parts, group = jnp.asarray(rollout.parts), _group_size(rollout)
    total = over_sources(parts, weight=weight, advantage=partial(compare, group=group))
    if whitened:
        judged = ~jnp.isnan(parts).all(axis=1)
        total = reinforce_baseline(jnp.where(judged, total, jnp.nan), group=group)
    return per_token(total, rollout)


def monte_carlo(
    rollout: Rollout, *, gamma: float = 1.0, kl: Kl | None = None, kl_weight: Number = 0.0
) -> Float[Array, "B A"]:
    """The return of `token_rewards` from each token on, with nothing taken off: REINFORCE.

    An answer that could not be judged gets 0.
    """
    reward, mask = token_rewards(rollout, kl=kl, kl_weight=kl_weight)
    return discounted_return(reward, mask, gamma=gamma)


def reinforce_plus_plus(
    rollout: Rollout, *, gamma: float = 1.0, kl: Kl | None = None, kl_weight: Number = 0.0
) -> Float[Array, "B A"]:
    """`monte_carlo`, whitened over all tokens of the rollout: no groups are needed.

    Answers are compared with those to all prompts, so that equal rewards within one group get 0
    only where all the others have the same.

    Source: REINFORCE++, arXiv:2501.03262: the KL estimate k1 is in the rewards of tokens.
    """
    reward, mask = token_rewards(rollout, kl=kl, kl_weight=kl_weight)
    return whiten(discounted_return(reward, mask, gamma=gamma), mask)


def reinforce_plus_plus_baseline(
    rollout: Rollout, *, kl: Kl | None = None, kl_weight: Number = 0.0
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
    kl_weight: Number = 0.0,
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
    kl_weight: Number = 0.0,
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
    process_weight: Number = 1.0,
    outcome_weight: Number = 1.0,
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


def on_tokens(
    rollout: Rollout, *, advantage: Advantage, tokens: Callable[[Rollout], Bool[np.ndarray, "B A"]]
) -> Float[Array, "B A"]:
    """`advantage` of the rollout at the tokens that tokens(rollout), such as
    `selection.top_entropy`, chooses; 0 at the others, to which the policy's term of a loss then
    gives no gradient. What a loss divides by stays that of all tokens.
    """
    return jnp.where(jnp.asarray(tokens(rollout)), advantage(rollout), 0.0)


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
    rollout: Rollout, *, kl: Kl | None = None, kl_weight: Number = 0.0
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
    rollout: Rollout, *, kl: Kl | None = None, kl_weight: Number = 0.0
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
    return _on_tokens(advantage, rollout.answer_length, width=rollout.answer.shape[1])


def answer_mask(rollout: Rollout) -> Bool[Array, "B A"]:
    """True on the tokens of each answer, its end token included."""
    return _mask(rollout.answer_length, width=rollout.answer.shape[1])


@partial(jax.jit, static_argnames="width")
def _on_tokens(
    advantage: Float[Array, " B"], length: Int[Array, " B"], *, width: int
) -> Float[Array, "B A"]:
    return jnp.where(_mask(length, width=width), advantage[:, None], 0.0)


@partial(jax.jit, static_argnames="width")
def _mask(length: Int[Array, " B"], *, width: int) -> Bool[Array, "B A"]:
    return jnp.arange(width)[None, :] < length[:, None]


def _penalty(rollout: Rollout, kl: Kl | None, kl_weight: Number) -> Float[Array, "B A"]:
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
    rollout: Rollout, *, gamma: float, lam: float, kl: Kl | None, kl_weight: Number
) -> tuple[Float[Array, "B A"], Float[Array, "B A"], Bool[Array, "B A"]]:
    if rollout.value is None:
        raise ValueError("PPO's advantages need a critic, got value=None in the rollout")
    reward, mask = token_rewards(rollout, kl=kl, kl_weight=kl_weight)
    return *gae(reward, jnp.asarray(rollout.value), mask, gamma=gamma, lam=lam), mask


def _group_size(rollout: Rollout) -> int:
    answers, prompts = rollout.answer.shape[0], rollout.prompt.shape[0]
    if answers % prompts:
        raise ValueError(f"need as many answers to each prompt, got B={answers}, N={prompts}")
    return answers // prompts
