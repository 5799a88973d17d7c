"""Makes tests/golden/verl.json: advantages, losses and gradients as verl computes them.

    python third_party/verl_golden.py > tests/golden/verl.json

It needs verl with torch, tensordict, ray and omegaconf, and imports nothing from r1jax. The
answers are a ragged batch drawn here: 3 prompts with 4 answers each. All is float64, so that the
numbers are those of the formulas; `tests/test_verl_golden.py` compares ours, in float32.
"""

import json
from collections.abc import Callable
from importlib.metadata import version

import numpy as np
import torch
from verl.trainer.ppo import core_algos
from verl.utils import torch_functional
from verl.workers.config import ActorConfig

PROMPTS, GROUP, WIDTH = 3, 4, 7
AGGREGATIONS = {
    "sequence_mean": "seq-mean-token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "token_mean": "token-mean",
    "constant_budget": "seq-mean-token-sum-norm",
}


def main() -> None:
    inputs = draw()
    record = {
        "verl": version("verl"),
        "group": GROUP,
        "inputs": {name: x.tolist() for name, x in inputs.items()},
        "advantages": advantages(inputs),
        "losses": losses(inputs),
    }
    print(json.dumps(rounded(record)))


def draw() -> dict[str, torch.Tensor]:
    """Numbers of the sizes that occur in training, rounded so that float32 holds them closely."""
    rng = np.random.default_rng(0)
    shape = (PROMPTS * GROUP, WIDTH)
    old = rng.normal(-1.2, 0.4, shape)
    arrays = {
        "length": rng.integers(1, WIDTH + 1, shape[0]),
        "reward": rng.normal(0.5, 1.0, shape[0]),
        "advantage": np.repeat(rng.normal(0, 1, (shape[0], 1)), WIDTH, 1),
        "logp": old + rng.normal(0, 0.3, shape),
        "logp_old": old,
        "logp_ref": old + rng.normal(0, 0.4, shape),
        "correction": rng.uniform(0.3, 2.0, shape),
        "value": rng.normal(0.3, 0.6, shape),
        "value_old": rng.normal(0.3, 0.6, shape),
        "target": rng.normal(0.5, 1.0, shape),
    }
    return {name: torch.tensor(np.round(x, 4)) for name, x in arrays.items()}


def advantages(inputs: dict[str, torch.Tensor]) -> dict[str, list[list[float]]]:
    mask = token_mask(inputs).double()
    last = torch.nn.functional.one_hot(inputs["length"] - 1, WIDTH)
    at_end = last * inputs["reward"][:, None]
    penalised = (at_end - 0.1 * (inputs["logp_old"] - inputs["logp_ref"])) * mask
    index = np.repeat(np.arange(PROMPTS), GROUP)
    by_group = {"token_level_rewards": at_end, "response_mask": mask, "index": index}

    def gae(gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
        return core_algos.compute_gae_advantage_return(
            penalised, inputs["value"] * mask, mask, gamma, lam
        )

    class Discount:
        gamma = 0.9

    found = {
        "grpo": core_algos.compute_grpo_outcome_advantage(**by_group)[0],
        "dr_grpo": core_algos.compute_grpo_outcome_advantage(
            **by_group, norm_adv_by_std_in_grpo=False
        )[0],
        "rloo": core_algos.compute_rloo_outcome_advantage(**by_group)[0],
        "reinforce_plus_plus": core_algos.compute_reinforce_plus_plus_outcome_advantage(
            penalised, mask, config=Discount
        )[0],
        "ppo": gae(0.98, 0.9)[0],
        "value_targets": gae(0.98, 0.9)[1],
        "whiten": torch_functional.masked_whiten(inputs["logp"], mask),
    }
    return {name: (x * mask).tolist() for name, x in found.items()}


def losses(inputs: dict[str, torch.Tensor]) -> dict[str, dict[str, object]]:
    mask = token_mask(inputs).double()

    def policy(name: str, low: float, high: float, how: str = "token_mean", dual: float = 1e6,
               correction: torch.Tensor | None = None) -> Callable[..., torch.Tensor]:  # fmt: skip
        config = ActorConfig(
            strategy="fsdp",
            rollout_n=GROUP,
            ppo_micro_batch_size_per_gpu=1,
            clip_ratio_low=low,
            clip_ratio_high=high,
            clip_ratio_c=dual,
            loss_scale_factor=WIDTH,
        )
        function = core_algos.get_policy_loss_fn(name)
        return lambda logp: function(
            old_log_prob=inputs["logp_old"],
            log_prob=logp,
            advantages=inputs["advantage"],
            response_mask=mask,
            loss_agg_mode=AGGREGATIONS[how],
            config=config,
            rollout_is_weights=correction,
        )[0]

    def penalty(kind: str) -> Callable[..., torch.Tensor]:
        return lambda logp: core_algos.agg_loss(
            core_algos.kl_penalty(logp, inputs["logp_ref"], kind), mask, AGGREGATIONS["token_mean"]
        )

    def value(x: torch.Tensor) -> torch.Tensor:
        return core_algos.compute_value_loss(x, inputs["target"], inputs["value_old"], mask, 0.4)[0]

    cases = {
        **{f"clipped/{how}": policy("vanilla", 0.2, 0.28, how) for how in AGGREGATIONS},
        "dual_clip": policy("vanilla", 0.2, 0.2, dual=1.4),
        "correction": policy("vanilla", 0.2, 0.2, correction=inputs["correction"]),
        "gspo": policy("gspo", 0.05, 0.08, "sequence_mean"),
        "cispo": policy("cispo", 0.2, 0.25),
        **{kind: penalty(kind) for kind in ("k1", "k2", "k3")},
        "value": value,
    }
    found = {}
    for name, function in cases.items():
        x = inputs["value" if name == "value" else "logp"].clone().requires_grad_()
        loss = function(x)
        loss.backward()
        found[name] = {"loss": loss.item(), "gradient": (x.grad * mask).tolist()}
    return found


def token_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.arange(WIDTH)[None, :] < inputs["length"][:, None]


def rounded(x: object) -> object:
    """Nine significant digits, more than float32 has."""
    if isinstance(x, dict):
        return {name: rounded(item) for name, item in x.items()}
    if isinstance(x, list):
        return [rounded(item) for item in x]
    return float(f"{x:.9g}") if isinstance(x, float) else x


if __name__ == "__main__":
    main()
