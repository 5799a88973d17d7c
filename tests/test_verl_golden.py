"""Ours against numbers that verl computed: `third_party/verl_golden.py` makes the record.

Where verl computes something else on purpose the difference is exact, and is what is tested.
"""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.algos import advantages, critics, groups, kl, losses, ratios, returns, weights
from r1jax.kernels.logprob import token_logp
from r1jax.schedules import Adaptive
from r1jax.types import Batch, Rollout

RECORD = json.loads((Path(__file__).parent / "golden" / "verl.json").read_text())
INPUTS = {name: np.asarray(x) for name, x in RECORD["inputs"].items()}
GROUP, SHAPE = RECORD["group"], INPUTS["logp"].shape
PROMPTS = SHAPE[0] // GROUP
MASK = np.arange(SHAPE[1])[None, :] < INPUTS["length"][:, None]
CHOSEN = MASK & INPUTS["chosen"].astype(bool)  # a tool wrote the other tokens
FINISHED = MASK & INPUTS["finished"].astype(bool)[:, None]


def array(name, mask=MASK):
    """An input; nan off the mask, where ours must read nothing."""
    x = INPUTS[name].astype(np.float32)
    return jnp.asarray(np.where(mask, x, np.float32(np.nan)) if x.shape == SHAPE else x)


def make_rollout(**more):
    return Rollout(
        prompt=jnp.ones((PROMPTS, 1), jnp.int32),
        prompt_length=jnp.ones(PROMPTS, jnp.int32),
        answer=jnp.ones(SHAPE, jnp.int32),
        answer_length=jnp.asarray(INPUTS["length"], jnp.int32),
        finished=jnp.ones(SHAPE[0], bool),
        logp_rollout=array("logp_rollout"),
        decode_steps=jnp.asarray(SHAPE[1]),
        slot_steps=jnp.asarray(SHAPE[1]),
        reward=array("reward"),
        parts=array("parts"),
        logp_old=array("logp_old"),
        logp_ref=array("logp_ref"),
        value=array("value"),
        **more,
    )


def make_batch(weight=weights.token_mean, mask=MASK, **more):
    names = ("advantage", "logp_rollout", "logp_old", "logp_ref", "value_old", "target")
    return Batch(
        tokens=jnp.ones(SHAPE, jnp.int32),
        position=jnp.broadcast_to(jnp.arange(SHAPE[1]), SHAPE),
        segment=jnp.asarray(mask, jnp.int32),
        mask=jnp.asarray(mask),
        weight=jnp.asarray(weight(mask)),
        num_tokens=jnp.asarray(mask.sum(), jnp.float32),
        **{**{name: array(name, mask) for name in names}, **more},
    )


# --------------------------------------------------------------------------- advantages


def over_tokens(advantage):
    """Whitened over tokens, as verl does where ours takes the statistics of answers.

    Whitening forgets what numbers were shifted and scaled by before: so it undoes ours.
    """
    return lambda rollout: groups.whiten(advantage(rollout), jnp.asarray(MASK))


def remax(rollout):
    """The reward of another answer, the greedy one, taken off each: ours has no name for it."""
    shape = lambda _: -array("greedy")  # noqa: E731
    return advantages.shaped(rollout, shape=shape, advantage=partial(advantages.monte_carlo, **K1))


def of_chosen(rollout):
    """GAE and returns where tokens of a tool lie between those of the policy."""
    del rollout
    mask, reward = jnp.asarray(CHOSEN), array("token_reward", CHOSEN)
    advantage, target = returns.gae(reward, array("value", CHOSEN), mask, gamma=0.98, lam=0.9)
    return {
        "ppo": groups.whiten(advantage, mask),
        "value_targets": target,
        "returns": returns.discounted_return(reward, mask, gamma=0.9),
    }


K1 = {"kl": kl.k1, "kl_weight": 0.1}
GDPO = partial(advantages.by_source, weight=(1.0, 0.5))
ADVANTAGES = {
    "grpo": advantages.grpo,
    "dr_grpo": partial(advantages.grpo, scale=False),
    "gdpo": over_tokens(GDPO),
    "rloo": advantages.rloo,
    "remax": remax,
    "reinforce_plus_plus": partial(advantages.reinforce_plus_plus, gamma=0.9, **K1),
    "reinforce_plus_plus_baseline": over_tokens(advantages.reinforce_plus_plus_baseline),
    "ppo": partial(advantages.ppo, gamma=0.98, lam=0.9, **K1),
    "value_targets": partial(advantages.value_targets, gamma=0.98, lam=0.9, **K1),
    "whiten": lambda rollout: groups.whiten(array("logp"), jnp.asarray(MASK)),
    "ppo/chosen": lambda rollout: of_chosen(rollout)["ppo"],
    "value_targets/chosen": lambda rollout: of_chosen(rollout)["value_targets"],
    "returns/chosen": lambda rollout: of_chosen(rollout)["returns"],
}


@cache
def our_advantages():
    return jax.jit(lambda rollout: {name: f(rollout) for name, f in ADVANTAGES.items()})(
        make_rollout()
    )


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_those_of_verl(name):
    expected = RECORD["advantages"][name]
    # Differences of numbers of the size of 1, in float32: that error is left near 0 too.
    np.testing.assert_allclose(our_advantages()[name], expected, rtol=1e-5, atol=1e-6)


def test_equal_rewards_get_nothing_here_where_verl_takes_off_the_mean_of_all_tokens():
    equal = np.repeat(np.ptp(INPUTS["reward"].reshape(PROMPTS, GROUP), axis=1) == 0, GROUP)
    ours = jax.jit(partial(groups.reinforce_baseline, group=GROUP))(array("reward"))
    theirs = np.asarray(RECORD["advantages"]["reinforce_plus_plus_baseline"])
    assert equal.sum() == GROUP and (ours[equal] == 0).all()
    assert (np.abs(theirs[equal][MASK[equal]]) > 0.1).all()


# --------------------------------------------------------------------------- losses


WEIGHTS = {
    "sequence_mean": weights.sequence_mean,
    "sequence_sum": weights.sequence_sum,
    "token_mean": weights.token_mean,
    "constant_budget": partial(weights.constant_budget, budget=SHAPE[1]),
}


def policy(function, how="token_mean", *, mask=MASK, advantage="advantage"):
    batch = make_batch(WEIGHTS[how], mask, advantage=array(advantage, mask))
    return lambda logp: function(logp, batch)


def kl_alone(estimate, **more):
    """The KL term of the policy loss with no advantage."""
    term = partial(losses.policy_loss, kl=estimate, kl_weight=1.0, **more)
    nothing = jnp.zeros(SHAPE)
    return lambda logp, old=None: term(
        logp, make_batch(advantage=nothing, logp_old=array("logp_old") if old is None else old)
    )


def unbiased_at_the_old_policy(logp):
    """The gradient of ratio * k3 where the ratio is 1 is that of k2: verl's k3+ is made of both."""
    return kl_alone(kl.k3, kl_unbiased=True)(logp, jax.lax.stop_gradient(logp))


def value(values):
    return critics.value_loss(values, make_batch(), clip=0.4)


def said(logits):
    """Log-probabilities of the first prompt's answers, and entropies."""
    return token_logp(logits, jnp.eye(logits.shape[-1]), jnp.asarray(INPUTS["token"], jnp.int32))


def entropy(logits):
    nothing = jnp.zeros(SHAPE)
    first = MASK & (np.arange(SHAPE[0])[:, None] < GROUP)
    found = jnp.pad(said(logits)[1], ((0, SHAPE[0] - GROUP), (0, 0)))
    batch = make_batch(mask=first, advantage=nothing, logp_old=nothing, entropy=found)
    return losses.policy_loss(nothing, batch, entropy_weight=-1.0)


CLIPPED = partial(losses.policy_loss, clip_low=0.2, clip_high=0.28)
GSPO = partial(losses.policy_loss, clip_low=0.05, clip_high=0.08)
BY_SEQUENCE = partial(GSPO, ratio=ratios.by_sequence)
BY_SEQUENCE_PER_TOKEN = partial(GSPO, ratio=ratios.by_sequence_per_token)
LOSSES = {
    **{f"clipped/{how}": policy(CLIPPED, how) for how in WEIGHTS},
    **{f"finished/{how}": policy(CLIPPED, how, mask=FINISHED) for how in WEIGHTS},
    "by_token": policy(CLIPPED, advantage="token_advantage"),
    "dual_clip": policy(partial(losses.policy_loss, clip_dual=1.4), advantage="token_advantage"),
    "correction": policy(partial(losses.policy_loss, correction=lambda _: array("correction"))),
    "gspo": policy(BY_SEQUENCE, "sequence_mean"),
    "gspo_token": policy(BY_SEQUENCE_PER_TOKEN, advantage="token_advantage"),
    "cispo": policy(partial(losses.cispo, clip_low=0.2, clip_high=0.25)),
    # Ratios held at 1: the plain policy gradient.
    "reinforce": policy(partial(losses.cispo, clip_low=0.0, clip_high=0.0)),
    **{name: kl_alone(getattr(kl, name)) for name in ("k1", "k2", "k3")},
    "k3+": unbiased_at_the_old_policy,
    "value": value,
    "entropy": entropy,
}
# An answer without tokens is an answer here; verl divides by the number of the others.
LEFT_OUT = {
    f"finished/{how}": FINISHED.any(axis=1).mean() for how in WEIGHTS if how != "token_mean"
}


@cache
def our_losses():
    """Losses, metrics and gradients, all in one program."""

    def every(inputs):
        return {
            name: jax.value_and_grad(loss, has_aux=True)(inputs[RECORD["losses"][name]["of"]])
            for name, loss in LOSSES.items()
        }

    return jax.jit(every)({name: array(name) for name in ("logp", "value", "logits")})


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_verl(name):
    (value, metrics), gradient = our_losses()[name]
    expected, factor = RECORD["losses"][name], LEFT_OUT.get(name, 1.0)
    np.testing.assert_allclose(value, factor * expected["loss"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(
        gradient, factor * np.asarray(expected["gradient"]), rtol=1e-5, atol=1e-7
    )
    if "clipped" in expected:
        share = metrics["value_clipped" if name == "value" else "clipped"]
        np.testing.assert_allclose(share, expected["clipped"], rtol=1e-6)


def test_k3_is_that_of_verl_up_to_the_10_where_verl_cuts_it_off():
    gap = jnp.asarray(INPUTS["gap"], jnp.float32)
    ours = np.asarray(jax.jit(kl.k3)(jnp.zeros_like(gap), gap))
    assert (ours > 10).sum() == 3
    # Of two numbers of the size of the gap: where that is small, float32 leaves its rounding.
    np.testing.assert_allclose(np.minimum(ours, 10.0), RECORD["k3"], rtol=1e-5, atol=1e-8)


def test_log_probabilities_and_entropies_are_those_of_verl():
    logp, entropy = jax.jit(said)(array("logits"))
    # Differences of logits of up to 5: float32 leaves an error of that size, near 0 too.
    np.testing.assert_allclose(logp, RECORD["tokens"]["logp"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, RECORD["tokens"]["entropy"], rtol=1e-5, atol=1e-6)


# --------------------------------------------------------------------------- sampler and trainer


CORRECTIONS = {
    "token_truncated": partial(ratios.truncated, cap=1.1),
    "token_masked": partial(ratios.masked, low=0.85, high=1.2),
    "sequence_truncated": partial(ratios.truncated, cap=1.1, ratio=ratios.by_product),
    "sequence_masked": partial(ratios.masked, low=0.7, high=1.5, ratio=ratios.by_product),
}
# verl has bounds for sampler / trainer here, the other way round.
REJECTIONS = {
    "token_k1": partial(ratios.masked, low=1 / 1.25, high=1 / 0.8),
    "seq_sum_k1": partial(ratios.masked, low=1 / 1.6, high=1 / 0.6, ratio=ratios.by_product),
    "seq_mean_k1": partial(ratios.masked, low=1 / 1.1, high=1 / 0.95, ratio=ratios.by_sequence),
}


@pytest.mark.parametrize("name", CORRECTIONS)
def test_corrections_are_those_of_verl(name):
    ours = np.where(MASK, jax.jit(CORRECTIONS[name])(make_batch()), 0.0)
    expected = np.asarray(RECORD["corrections"][name])
    assert len(np.unique(expected[MASK])) > 2
    np.testing.assert_allclose(ours, expected, rtol=1e-5)


@pytest.mark.parametrize("name", REJECTIONS)
def test_tokens_that_are_masked_are_those_that_verl_rejects(name):
    kept = MASK & np.asarray(jax.jit(REJECTIONS[name])(make_batch()) > 0)
    assert 0 < kept.sum() < MASK.sum()
    np.testing.assert_array_equal(kept, RECORD["rejections"][name])


# --------------------------------------------------------------------------- the rest


def test_the_adaptive_weight_moves_as_that_of_verl():
    rule = Adaptive(first=0.1, target=0.02, gain=50 / 500)
    weight, found = rule.first, []
    for kl_of_step in INPUTS["kl"].tolist():
        weight = rule.after(weight, kl_of_step)
        found.append(weight)
    np.testing.assert_allclose(found, RECORD["adaptive"], rtol=1e-8)


def test_everything_on_record_is_compared():
    assert RECORD["advantages"].keys() == ADVANTAGES.keys()
    assert RECORD["losses"].keys() == LOSSES.keys()
    assert RECORD["corrections"].keys() == CORRECTIONS.keys()
    assert RECORD["rejections"].keys() == REJECTIONS.keys()
