"""Makes tests/golden/rlax.json: returns, losses, divergences and gradients as rlax computes them.

    python third_party/rlax_golden.py > tests/golden/rlax.json

It needs rlax, and imports nothing from r1jax. rlax has one sequence at a time and no masks: it is
given the masked tokens of each row and nothing else. All is float64, so that the numbers are those
of the formulas; `tests/test_rlax_golden.py` compares ours, in float32.
"""

import json
import warnings
from collections.abc import Callable
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import rlax

ROWS, WIDTH, WORDS = 6, 8, 5
GAMMA, LAM = 0.97, 0.9


def main() -> None:
    jax.config.update("jax_enable_x64", True)
    warnings.simplefilter("ignore")
    inputs = draw()
    record = {
        "rlax": version("rlax"),
        "jax": version("jax"),
        "gamma": GAMMA,
        "lam": LAM,
        "inputs": {name: x.tolist() for name, x in inputs.items()},
        "returns": returns(inputs),
        "losses": losses(inputs),
        "divergences": divergences(inputs),
    }
    print(json.dumps(rounded(record)))


def draw() -> dict[str, np.ndarray]:
    """Rows of different lengths with unmasked tokens in between; the first has one masked token."""
    rng = np.random.default_rng(0)
    shape = (ROWS, WIDTH)
    mask = np.arange(WIDTH)[None, :] < rng.integers(3, WIDTH + 1, ROWS)[:, None]
    mask &= rng.random(shape) < 0.75
    mask[0] = np.arange(WIDTH) == 2
    old = rng.normal(-1.2, 0.4, shape)
    arrays = {
        "reward": rng.normal(0.2, 0.6, shape),
        "value": rng.normal(0.3, 0.6, shape),
        "target": rng.normal(0.5, 1.0, shape),
        "logp": old + rng.normal(0, 0.3, shape),
        "logp_old": old,
        "advantage": rng.normal(0, 1, shape),
        "score": rng.normal(0, 1.5, shape),
        "label": rng.integers(0, 2, ROWS),
        "logits": rng.normal(0, 1.5, (*shape, WORDS)),
        "other": rng.normal(0, 1.5, (*shape, WORDS)),
        "token": rng.integers(0, WORDS, shape),
    }
    return {"mask": mask, **{name: np.round(x, 4) for name, x in arrays.items()}}


def returns(inputs: dict[str, np.ndarray]) -> dict[str, list]:
    """Of each row; the value after its last token is 0."""

    def by_row(function: Callable[..., jax.Array]) -> list:
        found = np.zeros((ROWS, WIDTH))
        for i, mask in enumerate(inputs["mask"]):
            reward, value = inputs["reward"][i, mask], inputs["value"][i, mask]
            discount, values = np.full_like(reward, GAMMA), np.append(value, 0.0)
            found[i, mask] = function(*map(jnp.asarray, (reward, discount, values)))
        return found.tolist()

    return {
        "gae": by_row(
            lambda r, d, v: rlax.truncated_generalized_advantage_estimation(r, d, LAM, v)
        ),
        "lambda": by_row(lambda r, d, v: rlax.lambda_returns(r, d, v[1:], LAM)),
        "discounted": by_row(lambda r, d, _: rlax.discounted_returns(r, d, jnp.zeros_like(r))),
    }


def losses(inputs: dict[str, np.ndarray]) -> dict[str, dict[str, object]]:
    mask = inputs["mask"]
    x = {name: jnp.asarray(value[mask]) for name, value in inputs.items() if value.ndim > 1}
    one = jnp.ones_like(x["reward"])
    last = np.array([np.flatnonzero(row)[-1] for row in mask])
    label = jnp.asarray(inputs["label"], float)

    def clipped(logp: jax.Array) -> jax.Array:
        ratio = jnp.exp(logp[mask] - x["logp_old"])
        return rlax.clipped_surrogate_pg_loss(ratio, x["advantage"], 0.2)

    def policy_gradient(logits: jax.Array) -> jax.Array:
        return rlax.policy_gradient_loss(logits[mask], x["token"], x["advantage"], one)

    def value(values: jax.Array) -> jax.Array:
        return rlax.l2_loss(values[mask], x["target"]).mean()

    def pointwise(score: jax.Array) -> jax.Array:
        return rlax.log_loss(jax.nn.sigmoid(score[np.arange(ROWS), last]), label).mean()

    cases = {
        "clipped": (clipped, "logp"),
        "policy_gradient": (policy_gradient, "logits"),
        "entropy": (lambda logits: rlax.entropy_loss(logits[mask], one), "logits"),
        "value": (value, "value"),
        "pointwise": (pointwise, "score"),
    }
    found = {}
    for name, (loss, argument) in cases.items():
        result, gradient = jax.value_and_grad(loss)(jnp.asarray(inputs[argument]))
        found[name] = {"of": argument, "loss": result.item(), "gradient": gradient.tolist()}
    return found


def divergences(inputs: dict[str, np.ndarray]) -> dict[str, list]:
    logits, other = jnp.asarray(inputs["logits"]), jnp.asarray(inputs["other"])
    return {
        "kl": rlax.categorical_kl_divergence(logits, other).tolist(),
        "kl_warm": rlax.categorical_kl_divergence(logits, other, temperature=2.0).tolist(),
    }


def rounded(x: object) -> object:
    """Nine significant digits, more than float32 has."""
    if isinstance(x, dict):
        return {name: rounded(item) for name, item in x.items()}
    if isinstance(x, list):
        return [rounded(item) for item in x]
    return float(f"{x:.9g}") if isinstance(x, float) else x


if __name__ == "__main__":
    main()
