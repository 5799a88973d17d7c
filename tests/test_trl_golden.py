"""Ours against numbers that TRL computed: `third_party/trl_golden.py` makes the record.

Where TRL computes something else on purpose the difference is exact, and is what is tested.
"""

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.algos import (
    advantages,
    distillation,
    groups,
    kl,
    losses,
    preferences,
    ratios,
    selection,
    weights,
)
from r1jax.kernels.logprob import token_logp
from r1jax.types import Batch, Rollout

RECORD = json.loads((Path(__file__).parent / "golden" / "trl.json").read_text())
INPUTS = {name: np.asarray(x, np.float64) for name, x in RECORD["inputs"].items()}
GROUP, SHAPE = RECORD["group"], INPUTS["logp"].shape
PROMPTS, PAIRS = SHAPE[0] // GROUP, SHAPE[0] // 2
MASK = np.arange(SHAPE[1])[None, :] < INPUTS["length"][:, None]
EPS = 1e-4  # what TRL adds to a deviation; the default here is 1e-6


def array(name):
    """An input; nan past the ends of answers, where ours must read nothing."""
    x = INPUTS[name].astype(np.float32)
    return np.where(MASK, x, np.float32(np.nan)) if x.shape == SHAPE else x


def at_each_token(x):
    return np.repeat(x[:, None], SHAPE[1], axis=1)


def packed(x):
    """Answers two to a row, as the two texts of a pair lie."""
    return jnp.asarray(x).reshape(PAIRS, -1)


def make_rollout(**more):
    return Rollout(
        prompt=np.ones((PROMPTS, 1), np.int32),
        prompt_length=np.ones(PROMPTS, np.int32),
        answer=np.ones(SHAPE, np.int32),
        answer_length=INPUTS["length"].astype(np.int32),
        finished=np.ones(SHAPE[0], bool),
        logp_rollout=array("logp_rollout"),
        decode_steps=SHAPE[1],
        slot_steps=SHAPE[1],
        reward=array("reward")[:, 0],
        logp_ref=array("logp_ref"),
        entropy=array("entropy"),
        **{"logp_old": array("logp_old"), **more},
    )


def make_batch(weight=weights.token_mean, **more):
    text = at_each_token(np.arange(SHAPE[0], dtype=np.int32) % 2)  # 0 better, 1 worse
    names = ("logp_old", "logp_rollout", "logp_ref", "entropy")
    fields = {
        **{name: array(name) for name in names},
        "advantage": at_each_token(array("advantage")),
        "target": 1.0 - text.astype(np.float32),
        **more,
    }
    return Batch(
        tokens=packed(np.ones(SHAPE, np.int32)),
        position=packed(np.arange(SHAPE[1], dtype=np.int32) + np.zeros(SHAPE, np.int32)),
        segment=packed(np.where(MASK, text + 1, 0)),
        mask=packed(MASK),
        weight=packed(weight(MASK)),
        num_tokens=jnp.asarray(MASK.sum(), jnp.float32),
        pair=packed(MASK.astype(np.int32)),
        **{name: packed(x) for name, x in fields.items()},
    )


# --------------------------------------------------------------------------- advantages


def from_sources(reward):
    """TRL brings the sum over sources to mean 0 and deviation 1, which `over_sources` does not."""
    scaled = partial(groups.group_advantages, group=GROUP, eps=EPS)
    total = groups.over_sources(reward, weight=(1.0, 0.5), advantage=scaled)
    judged = ~jnp.isnan(reward).all(axis=1)
    mean = jnp.mean(total, where=judged)
    deviation = jnp.std(total, where=judged, ddof=1)
    return jnp.where(judged, (total - mean) / (deviation + EPS), 0.0)


def at_first_token(advantage):
    return lambda reward: advantage(make_rollout())[:, 0]


ADVANTAGES = {
    "group": lambda r: groups.group_advantages(r[:, 0], group=GROUP, eps=EPS),
    "none": lambda r: groups.group_advantages(r[:, 0], group=GROUP, scale=False),
    "batch": lambda r: groups.batch_advantages(r[:, 0], group=GROUP, eps=EPS),
    "sources": from_sources,
    "rloo": at_first_token(advantages.rloo),
    "rloo_kl": at_first_token(partial(advantages.rloo, kl=kl.k1, kl_weight=0.1)),
    "overlong": lambda r: advantages.overlong_penalty(make_rollout(), limit=SHAPE[1] - 1, buffer=4),
}


@cache
def our_advantages():
    return jax.jit(lambda r: {name: f(r) for name, f in ADVANTAGES.items()})(array("reward"))


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_those_of_trl(name):
    np.testing.assert_allclose(
        our_advantages()[name], RECORD["advantages"][name], rtol=1e-5, atol=1e-6
    )


# --------------------------------------------------------------------------- losses of the policy


def loss_of(function, weight=weights.token_mean, **more):
    """(logp) -> loss, of log-probabilities one answer to a row."""

    def loss(logp):
        return function(packed(logp), make_batch(weight, **more))[0]

    return loss


def of_chosen(mask):
    """Weights of the tokens with the highest entropy; the normaliser is that of all tokens."""
    chosen = selection.top_entropy(make_rollout(), share=0.4)
    return weights.token_mean(mask) * chosen


def top_entropy_with_kl(logp):
    """TRL's choice of tokens does not reach its KL term; weights of 0 here take both."""
    whole = losses.policy_loss(packed(logp), make_batch(), kl=kl.k3, kl_weight=0.3)[0]
    without = losses.policy_loss(packed(logp), make_batch())[0]
    return loss_of(losses.policy_loss, of_chosen)(logp) + whole - without


def corrected(correction, **more):
    return loss_of(partial(losses.policy_loss, correction=partial(correction, **more)))


WIDE = partial(losses.policy_loss, clip_low=0.2, clip_high=0.28)
BY_SEQUENCE = partial(losses.policy_loss, ratio=ratios.by_sequence, clip_low=0.05, clip_high=0.08)
BY_PRODUCT = partial(losses.policy_loss, ratio=ratios.by_product, clip_low=0.4, clip_high=0.4)
K3 = partial(losses.policy_loss, kl=kl.k3, kl_weight=0.3)
TRUNCATED, MASKED = {"cap": 1.2}, {"low": 0.7, "high": 1.2}
POLICY = {
    "grpo": loss_of(WIDE, weights.sequence_mean),
    "bnpo": loss_of(WIDE),
    "dapo": loss_of(WIDE),
    "dr_grpo": loss_of(WIDE, partial(weights.constant_budget, budget=SHAPE[1])),
    "gspo": loss_of(BY_SEQUENCE, weights.sequence_mean),
    "luspo": loss_of(BY_SEQUENCE, weights.sequence_sum),
    "delta": loss_of(partial(losses.policy_loss, clip_dual=1.4)),
    # TRL's epsilon_high of 1.25 is the largest ratio itself, not its distance from 1.
    "cispo": loss_of(partial(losses.cispo, clip_high=0.25)),
    "kl": loss_of(K3),
    "kl_unbiased": loss_of(partial(K3, kl_unbiased=True)),
    "top_entropy": loss_of(losses.policy_loss, of_chosen),
    "top_entropy_kl": top_entropy_with_kl,
    # TRL's bonus is a mean over tokens whatever the weights of the loss; here they are the same.
    "entropy_bonus": loss_of(partial(losses.policy_loss, entropy_weight=0.05)),
    "token_truncate": corrected(ratios.truncated, **TRUNCATED),
    "token_mask": corrected(ratios.masked, **MASKED),
    "sequence_truncate": corrected(ratios.truncated, **TRUNCATED, ratio=ratios.by_product),
    "sequence_mask": corrected(ratios.masked, **MASKED, ratio=ratios.by_product),
    "rloo": loss_of(BY_PRODUCT, weights.sequence_mean),
}

# --------------------------------------------------------------------------- preferences


def mean_over_pairs(function, **more):
    return loss_of(function, weights.sequence_mean, **more)


def ipo_of_means(logp):
    """TRL divides a text's log-ratio by its length: ours, of log-ratios so divided."""
    length, ref = array("length")[:, None], array("logp_ref")
    return mean_over_pairs(partial(preferences.ipo, beta=0.3))(ref + (logp - ref) / length)


def better_alone(mask):
    better = np.arange(len(mask)) % 2 == 0
    return weights.token_mean(mask & better[:, None])


def orpo_of_tokens(logp):
    """TRL's surprise is a mean over the tokens of all better texts, ours over texts."""
    loss, metrics = preferences.orpo(packed(logp), make_batch(weights.sequence_mean), weight=0.5)
    return loss - metrics["surprise"] + loss_of(losses.cross_entropy, better_alone)(logp)


def reference_point(ours, reference):
    batch = make_batch(logp_ref=array(reference))
    total, count = preferences.kto_reference_point(packed(array(ours)), batch)
    return jnp.maximum(total / count, 0.0)


def kto(ours, reference):
    label = at_each_token(array("label"))
    function = partial(preferences.kto, beta=0.3, desirable=1.3, undesirable=0.7)

    def loss(logp):
        batch = make_batch(weights.sequence_mean, target=label)
        estimate = reference_point(ours, reference)
        return function(packed(logp), replace(batch, kl_estimate=estimate))[0]

    return loss


DPO = partial(preferences.dpo, beta=0.3)
KL_TEXTS = {
    "kto": ("logp_other", "logp_other_ref"),
    "kto_at_zero": ("logp_other_ref", "logp_other"),  # a negative estimate is none
}
PREFERENCES = {
    "dpo": mean_over_pairs(DPO),
    "smoothed": mean_over_pairs(partial(DPO, smoothing=0.2)),
    # ((1 - s) loss(h) - s loss(-h)) / (1 - 2 s), which smoothing by less than nothing gives.
    "robust": mean_over_pairs(partial(DPO, smoothing=-0.2 / 0.6)),
    "ipo": ipo_of_means,
    "simpo": mean_over_pairs(partial(preferences.simpo, beta=2.0, gamma=0.3)),
    "orpo": orpo_of_tokens,
    "orpo_surprise": loss_of(losses.cross_entropy, better_alone),
    **{name: kto(*texts) for name, texts in KL_TEXTS.items()},
    "reward": mean_over_pairs(preferences.pairwise_loss),
    "reward_margin": mean_over_pairs(partial(preferences.pairwise_loss, margin=0.4)),
}

# --------------------------------------------------------------------------- distillation


def divergence_of(function):
    def loss(student):
        rows = make_batch()
        one = lambda x: x.reshape(SHAPE)[: len(student)]  # noqa: E731
        batch = jax.tree.map(lambda x: x if x.ndim == 0 else one(x), rows)
        batch = replace(batch, weight=jnp.asarray(weights.token_mean(MASK[: len(student)])))
        teacher = jnp.asarray(array("teacher"))
        return distillation.distillation_loss(function(student, teacher), batch)[0]

    return loss


def on_policy(function):
    """The first update of a rollout: its log-probabilities are those in training."""

    def loss(logp):
        old = jax.lax.stop_gradient(logp)
        advantage = advantages.on_policy_distillation(make_rollout(logp_old=old))
        return loss_of(function, logp_old=old, advantage=advantage)(logp)

    return loss


JENSEN_SHANNON = distillation.jensen_shannon
DISTILLATION = {
    "forward": divergence_of(distillation.forward_kl),
    "reverse": divergence_of(distillation.reverse_kl),
    "reverse_warm": divergence_of(partial(distillation.reverse_kl, temperature=2.0)),
    "jensen_shannon": divergence_of(JENSEN_SHANNON),
    "jensen_shannon_skew": divergence_of(partial(JENSEN_SHANNON, beta=0.2, temperature=2.0)),
    "on_policy": on_policy(losses.cispo),
}

# --------------------------------------------------------------------------- comparisons

LOSSES = {"policy": POLICY, "preferences": PREFERENCES, "distillation": DISTILLATION}


def argument(family, name):
    if family == "distillation" and name != "on_policy":
        return "student"
    return "score" if name.startswith("reward") else "logp"


@cache
def our_losses(family):
    """Losses and gradients of a family, all in one program."""

    def every(inputs):
        return {
            name: jax.value_and_grad(loss)(inputs[argument(family, name)])
            for name, loss in LOSSES[family].items()
        }

    return jax.jit(every)({name: array(name) for name in ("logp", "score", "student")})


@pytest.mark.parametrize(
    ("family", "name"), [(family, name) for family, cases in LOSSES.items() for name in cases]
)
def test_losses_and_gradients_are_those_of_trl(family, name):
    value, gradient = our_losses(family)[name]
    expected = RECORD[family][name]
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, expected["gradient"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", KL_TEXTS)
def test_the_reference_point_is_that_of_trl(name):
    got = jax.jit(reference_point, static_argnums=(0, 1))(*KL_TEXTS[name])
    np.testing.assert_allclose(got, RECORD["preferences"][name]["kl"], rtol=1e-5)


def test_the_first_policy_gradient_of_on_policy_distillation_is_that_of_trl():
    gradient = jax.jit(jax.grad(on_policy(losses.policy_loss)))(jnp.asarray(array("logp")))
    expected = RECORD["distillation"]["on_policy"]["gradient"]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-7)


def test_log_probabilities_and_entropies_are_those_of_trl():
    token = jnp.asarray(INPUTS["token"], jnp.int32)
    words = jnp.eye(INPUTS["student"].shape[-1])
    logp, entropy = token_logp(jnp.asarray(array("student")), words, token, temperature=0.7)
    # Differences of logits of up to 6: float32 leaves an error of that size, near 0 too.
    np.testing.assert_allclose(logp, RECORD["tokens"]["logp"], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(entropy, RECORD["tokens"]["entropy"], rtol=1e-5, atol=1e-6)


def test_everything_on_record_is_compared():
    assert RECORD["advantages"].keys() == ADVANTAGES.keys()
    assert {family: RECORD[family].keys() for family in LOSSES} == {
        family: cases.keys() for family, cases in LOSSES.items()
    }
