"""Ours against numbers that verl computed: `third_party/verl_golden.py` makes the record."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.algos import advantages, critics, groups, kl, losses, ratios, weights
from r1jax.types import Batch, Rollout

RECORD = json.loads((Path(__file__).parent / "golden" / "verl.json").read_text())
INPUTS = {name: np.asarray(x) for name, x in RECORD["inputs"].items()}
MASK = np.arange(INPUTS["logp"].shape[1])[None, :] < INPUTS["length"][:, None]


def array(name):
    """An input on the device; nan past the ends of answers, where ours must read nothing."""
    x = INPUTS[name].astype(np.float32)
    return jnp.asarray(np.where(MASK, x, np.nan) if x.ndim == 2 else x)


def make_rollout():
    answers, width = MASK.shape
    return Rollout(
        prompt=jnp.ones((answers // RECORD["group"], 1), jnp.int32),
        prompt_length=jnp.ones(answers // RECORD["group"], jnp.int32),
        answer=jnp.ones(MASK.shape, jnp.int32),
        answer_length=jnp.asarray(INPUTS["length"], jnp.int32),
        finished=jnp.ones(answers, bool),
        logp_rollout=array("logp_old"),
        decode_steps=jnp.asarray(width),
        slot_steps=jnp.asarray(width),
        reward=array("reward"),
        logp_old=array("logp_old"),
        logp_ref=array("logp_ref"),
        value=array("value"),
    )


TOKENS = {"kl": kl.k1, "kl_weight": 0.1}
ADVANTAGES = {
    "grpo": advantages.grpo,
    "dr_grpo": partial(advantages.grpo, scale=False),
    "rloo": advantages.rloo,
    "reinforce_plus_plus": partial(advantages.reinforce_plus_plus, gamma=0.9, **TOKENS),
    "ppo": partial(advantages.ppo, gamma=0.98, lam=0.9, **TOKENS),
    "value_targets": partial(advantages.value_targets, gamma=0.98, lam=0.9, **TOKENS),
    "whiten": lambda rollout: groups.whiten(array("logp"), jnp.asarray(MASK)),
}


@pytest.mark.parametrize("name", ADVANTAGES)
def test_advantages_are_those_of_verl(name):
    got = jax.jit(ADVANTAGES[name])(make_rollout())
    np.testing.assert_allclose(got, RECORD["advantages"][name], rtol=2e-5, atol=2e-6)


def make_batch(weight):
    names = ("advantage", "logp_old", "logp_ref", "value_old", "target")
    shape = MASK.shape
    return Batch(
        tokens=jnp.ones(shape, jnp.int32),
        position=jnp.broadcast_to(jnp.arange(shape[1]), shape),
        segment=jnp.asarray(MASK, jnp.int32),
        mask=jnp.asarray(MASK),
        weight=jnp.asarray(weight(MASK)),
        num_tokens=jnp.asarray(MASK.sum(), jnp.float32),
        **{name: array(name) for name in names},
    )


WEIGHTS = {
    "sequence_mean": weights.sequence_mean,
    "sequence_sum": weights.sequence_sum,
    "token_mean": weights.token_mean,
    "constant_budget": partial(weights.constant_budget, budget=MASK.shape[1]),
}


def kl_alone(estimate):
    """The KL term of the policy loss with no advantage."""

    def loss(logp, batch):
        batch = replace(batch, advantage=jnp.zeros_like(batch.weight))
        return losses.policy_loss(logp, batch, kl=estimate, kl_weight=1.0)

    return loss


def given_correction(batch):
    return array("correction")


CLIPPED = partial(losses.policy_loss, clip_low=0.2, clip_high=0.28)
GSPO = {"ratio": ratios.by_sequence_per_token, "clip_low": 0.05, "clip_high": 0.08}
LOSSES = {
    **{f"clipped/{how}": (CLIPPED, how) for how in WEIGHTS},
    "dual_clip": (partial(losses.policy_loss, clip_dual=1.4), "token_mean"),
    "correction": (partial(losses.policy_loss, correction=given_correction), "token_mean"),
    "gspo": (partial(losses.policy_loss, **GSPO), "sequence_mean"),
    "cispo": (partial(losses.cispo, clip_low=0.2, clip_high=0.25), "token_mean"),
    **{name: (kl_alone(getattr(kl, name)), "token_mean") for name in ("k1", "k2", "k3")},
    "value": (partial(critics.value_loss, clip=0.4), "token_mean"),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_verl(name):
    loss, how = LOSSES[name]
    x = array("value" if name == "value" else "logp")
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, _), gradient = step(x, make_batch(WEIGHTS[how]))
    np.testing.assert_allclose(value, RECORD["losses"][name]["loss"], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(gradient, RECORD["losses"][name]["gradient"], rtol=2e-5, atol=1e-7)


def test_everything_on_record_is_compared():
    assert RECORD["advantages"].keys() == ADVANTAGES.keys()
    assert RECORD["losses"].keys() == LOSSES.keys()
