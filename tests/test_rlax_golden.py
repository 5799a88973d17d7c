"""Ours against numbers that rlax computed: `third_party/rlax_golden.py` makes the record."""

import json
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax.algos import critics, distillation, losses, preferences, returns, weights
from r1jax.kernels.logprob import token_logp
from r1jax.types import Batch

RECORD = json.loads((Path(__file__).parent / "golden" / "rlax.json").read_text())
INPUTS = {name: np.asarray(x) for name, x in RECORD["inputs"].items()}
MASK, SHAPE = INPUTS["mask"], INPUTS["mask"].shape
GAMMA, LAM = RECORD["gamma"], RECORD["lam"]


def array(name):
    """An input on the device; nan off the mask, where ours must read nothing."""
    x = INPUTS[name].astype(np.float32)
    off = ~MASK.reshape(MASK.shape + (1,) * (x.ndim - 2))
    return jnp.asarray(x if name in ("label", "logits", "other") else np.where(off, np.nan, x))


def gae():
    found = partial(returns.gae, gamma=GAMMA, lam=LAM)
    return found(array("reward"), array("value"), jnp.asarray(MASK))


RETURNS = {
    "gae": lambda: gae()[0],
    "lambda": lambda: gae()[1],
    "discounted": lambda: returns.discounted_return(
        array("reward"), jnp.asarray(MASK), gamma=GAMMA
    ),
}


@pytest.mark.parametrize("name", RETURNS)
def test_returns_are_those_of_rlax(name):
    got = jax.jit(RETURNS[name])()
    np.testing.assert_allclose(got, RECORD["returns"][name], rtol=1e-5, atol=1e-6)


def make_batch(weight=weights.token_mean, **more):
    return Batch(
        tokens=jnp.ones(SHAPE, jnp.int32),
        position=jnp.broadcast_to(jnp.arange(SHAPE[1]), SHAPE),
        segment=jnp.ones(SHAPE, jnp.int32),
        mask=jnp.asarray(MASK),
        weight=jnp.asarray(weight(MASK)),
        num_tokens=jnp.asarray(MASK.sum(), jnp.float32),
        **more,
    )


def said(logits):
    """Log-probabilities of the tokens, and entropies."""
    token = jnp.asarray(INPUTS["token"], jnp.int32)
    return token_logp(logits, jnp.eye(logits.shape[-1]), token)


def clipped(logp):
    batch = make_batch(logp_old=array("logp_old"), advantage=array("advantage"))
    return losses.policy_loss(logp, batch)[0]


def policy_gradient(logits):
    """Where the policy is still the old one all ratios are 1."""
    logp, _ = said(logits)
    old = jax.lax.stop_gradient(logp)
    return losses.cispo(logp, make_batch(logp_old=old, advantage=array("advantage")))[0]


def entropy(logits):
    logp, entropy = said(logits)
    nothing = jnp.zeros_like(logp)
    batch = make_batch(logp_old=nothing, advantage=nothing, entropy=entropy)
    return losses.policy_loss(nothing, batch, entropy_weight=1.0)[0]


def value(values):
    return critics.value_loss(values, make_batch(target=array("target")), clip=None)[0]


def pointwise(score):
    label = jnp.broadcast_to(array("label")[:, None], SHAPE)
    return preferences.pointwise_loss(score, make_batch(weights.sequence_mean, target=label))[0]


LOSSES = {
    "clipped": clipped,
    "policy_gradient": policy_gradient,
    "entropy": entropy,
    "value": value,
    "pointwise": pointwise,
}


@cache
def our_losses():
    """Losses and gradients, all in one program."""

    def every(inputs):
        return {
            name: jax.value_and_grad(loss)(inputs[RECORD["losses"][name]["of"]])
            for name, loss in LOSSES.items()
        }

    return jax.jit(every)({name: array(name) for name in ("logp", "logits", "value", "score")})


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_gradients_are_those_of_rlax(name):
    value, gradient = our_losses()[name]
    expected = RECORD["losses"][name]
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(gradient, expected["gradient"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("name", "temperature"), [("kl", 1.0), ("kl_warm", 2.0)])
def test_divergences_in_both_directions_are_those_of_rlax(name, temperature):
    logits, other = array("logits"), array("other")
    reverse = partial(distillation.reverse_kl, temperature=temperature)(logits, other)
    forward = partial(distillation.forward_kl, temperature=temperature)(other, logits)
    np.testing.assert_allclose(reverse, RECORD["divergences"][name], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(forward, RECORD["divergences"][name], rtol=1e-5, atol=1e-6)


def test_everything_on_record_is_compared():
    assert RECORD["returns"].keys() == RETURNS.keys()
    assert RECORD["losses"].keys() == LOSSES.keys()
    assert RECORD["divergences"].keys() == {"kl", "kl_warm"}
