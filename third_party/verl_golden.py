"""Makes tests/golden/verl.json: advantages, losses and gradients as verl computes them.

    pip install verl==0.9.1
    python third_party/verl_golden.py > tests/golden/verl.json

It needs verl with torch, tensordict, ray and omegaconf, and imports nothing from r1jax. The
answers are a ragged batch drawn here: 3 prompts with 4 answers each. All is float64, so that the
numbers are those of the formulas; `tests/test_verl_golden.py` compares ours, in float32.
"""

import json
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import numpy as np
import torch
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.utils import torch_functional
from verl.workers.config import ActorConfig

PROMPTS, GROUP, WIDTH, WORDS = 3, 4, 7, 5
ANSWERS = PROMPTS * GROUP
CLIPPED = ("actor/pg_clipfrac", "actor/pg_clipfrac_lower")
AGGREGATIONS = {
    "sequence_mean": "seq-mean-token-mean",
    "sequence_sum": "seq-mean-token-sum",
    "token_mean": "token-mean",
    "constant_budget": "seq-mean-token-sum-norm",
}
Tensors = dict[str, torch.Tensor]


def main() -> None:
    inputs = draw()
    record = {
        "verl": version("verl"),
        "torch": version("torch"),
        "group": GROUP,
        "inputs": {name: x.tolist() for name, x in inputs.items()},
        "advantages": advantages(inputs),
        "losses": losses(inputs),
        "corrections": corrections(inputs),
        "rejections": rejections(inputs),
        "k3": core_algos.kl_penalty(torch.zeros_like(inputs["gap"]), inputs["gap"], "k3").tolist(),
        "tokens": tokens(inputs),
        "adaptive": adaptive(inputs),
    }
    print(json.dumps(rounded(record)))


def draw() -> Tensors:
    """Numbers of the sizes that occur in training, rounded so that float32 holds them closely.

    All answers to the second prompt have one reward, and those to the third the same in the first
    of two parts: one half, as verl makes float32 of the parts, in which the mean of equal numbers
    may miss them, and it would divide what is left by a deviation of as little.
    """
    rng = np.random.default_rng(0)
    shape = (ANSWERS, WIDTH)
    old = rng.normal(-1.2, 0.4, shape)
    reward, parts = rng.normal(0.5, 1.0, ANSWERS), rng.normal(0.5, 1.0, (ANSWERS, 2))
    reward[GROUP : 2 * GROUP], parts[2 * GROUP :, 0] = 0.5, 0.5
    arrays = {
        "length": rng.integers(1, WIDTH + 1, ANSWERS),
        "chosen": rng.binomial(1, 0.7, shape),  # by the policy; a tool wrote the other tokens
        "finished": rng.permutation([0] * 3 + [1] * (ANSWERS - 3)),
        "reward": reward,
        "parts": parts,
        "greedy": np.repeat(rng.normal(0.5, 1.0, PROMPTS), GROUP),  # ReMax's baselines
        "token_reward": rng.normal(0.2, 0.6, shape),
        "advantage": np.repeat(rng.normal(0, 1, (ANSWERS, 1)), WIDTH, 1),
        "token_advantage": rng.normal(0, 1, shape),
        "logp": old + rng.normal(0, 0.3, shape),
        "logp_old": old,
        "logp_ref": old + rng.normal(0, 0.4, shape),
        "logp_rollout": old + rng.normal(0, 0.15, shape),
        "correction": rng.uniform(0.3, 2.0, shape),
        "value": rng.normal(0.3, 0.6, shape),
        "value_old": rng.normal(0.3, 0.6, shape),
        "target": rng.normal(0.5, 1.0, shape),
        "logits": rng.normal(0, 1.5, (GROUP, WIDTH, WORDS)),  # of the first prompt's answers
        "token": rng.integers(0, WORDS, (GROUP, WIDTH)),
        "gap": [-25.0, -3.0, -1.0, -0.01, 0.0, 0.01, 1.0, 2.5, 2.6, 8.0, 25.0],
        "kl": [0.02, 0.03, 0.0221, 0.018, 0.001, 0.0],
    }
    return {name: torch.tensor(np.round(x, 4)) for name, x in arrays.items()}


def advantages(inputs: Tensors) -> dict[str, list[list[float]]]:
    mask = token_mask(inputs).double()
    last = torch.nn.functional.one_hot(inputs["length"] - 1, WIDTH)
    at_end = last * inputs["reward"][:, None]
    old, ref = inputs["logp_old"], inputs["logp_ref"]
    penalised = core_algos.compute_rewards(at_end, old, ref, 0.1) * mask
    index = np.repeat(np.arange(PROMPTS), GROUP)
    by_group = {"token_level_rewards": at_end, "response_mask": mask, "index": index}
    gae = partial(core_algos.compute_gae_advantage_return, gamma=0.98, lam=0.9)
    ppo = gae(penalised, inputs["value"] * mask, mask)
    plus_plus = partial(
        core_algos.compute_reinforce_plus_plus_outcome_advantage, config=AlgoConfig(gamma=0.9)
    )
    found = {
        "grpo": core_algos.compute_grpo_outcome_advantage(**by_group)[0],
        "dr_grpo": core_algos.compute_grpo_outcome_advantage(
            **by_group, norm_adv_by_std_in_grpo=False
        )[0],
        "gdpo": gdpo(inputs, mask, by_group),
        "rloo": core_algos.compute_rloo_outcome_advantage(**by_group)[0],
        "remax": core_algos.compute_remax_outcome_advantage(penalised, inputs["greedy"], mask)[0],
        "reinforce_plus_plus": plus_plus(penalised, mask)[0],
        "reinforce_plus_plus_baseline": (
            core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(**by_group)[0]
        ),
        "ppo": ppo[0],
        "value_targets": ppo[1],
        "whiten": torch_functional.masked_whiten(inputs["logp"], mask),
    }
    chosen = mask * inputs["chosen"]
    among_others = {
        "ppo": gae(inputs["token_reward"], inputs["value"], chosen)[0],
        "value_targets": gae(inputs["token_reward"], inputs["value"], chosen)[1],
        "returns": plus_plus(inputs["token_reward"], chosen)[1],
    }
    return {
        **{name: (x * mask).tolist() for name, x in found.items()},
        **{f"{name}/chosen": (x * chosen).tolist() for name, x in among_others.items()},
    }


def gdpo(inputs: Tensors, mask: torch.Tensor, by_group: dict[str, object]) -> torch.Tensor:
    names = ["first", "second"]
    prompts = torch.ones(ANSWERS, 1)
    return core_algos.compute_gdpo_outcome_advantage(
        **by_group,
        config={"gdpo_reward_keys": names, "gdpo_reward_weights": [1.0, 0.5]},
        non_tensor_batch=dict(zip(names, inputs["parts"].T.numpy(), strict=True)),
        batch={"prompts": prompts, "attention_mask": torch.cat([prompts, mask], 1).long()},
    )[0]


def losses(inputs: Tensors) -> dict[str, dict[str, object]]:
    """Losses with their gradients and, where there is a clip, the share of tokens that it cut."""
    mask = token_mask(inputs).double()
    policy = partial(policy_loss, inputs, mask)
    of_finished = partial(policy_loss, inputs, mask * inputs["finished"][:, None])

    def estimate(kind: str) -> Callable[..., torch.Tensor]:
        return lambda logp: core_algos.agg_loss(
            core_algos.kl_penalty(logp, inputs["logp_ref"], kind), mask, AGGREGATIONS["token_mean"]
        )

    def value(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return core_algos.compute_value_loss(x, inputs["target"], inputs["value_old"], mask, 0.4)

    def entropy(logits: torch.Tensor) -> torch.Tensor:
        return core_algos.compute_entropy_loss(logits, mask[:GROUP])

    by_token = {"advantage": inputs["token_advantage"]}
    cases = {
        **{f"clipped/{how}": policy("vanilla", 0.2, 0.28, how) for how in AGGREGATIONS},
        **{f"finished/{how}": of_finished("vanilla", 0.2, 0.28, how) for how in AGGREGATIONS},
        "by_token": policy("vanilla", 0.2, 0.28, **by_token),
        "dual_clip": policy("vanilla", 0.2, 0.2, dual=1.4, **by_token),
        "correction": policy("vanilla", 0.2, 0.2, correction=inputs["correction"]),
        "gspo": policy("gspo", 0.05, 0.08, "sequence_mean"),
        "gspo_token": policy("gspo", 0.05, 0.08, **by_token),
        "cispo": policy("cispo", 0.2, 0.25),
        "reinforce": policy("gpg", 0.2, 0.2),
        **{kind: estimate(kind) for kind in ("k1", "k2", "k3", "k3+")},
        "value": value,
        "entropy": entropy,
    }
    return {
        name: value_and_gradient(loss, inputs, {"value": "value", "entropy": "logits"}.get(name))
        for name, loss in cases.items()
    }


def policy_loss(
    inputs: Tensors,
    mask: torch.Tensor,
    name: str,
    low: float,
    high: float,
    how: str = "token_mean",
    *,
    dual: float = 1e6,
    correction: torch.Tensor | None = None,
    advantage: torch.Tensor | None = None,
) -> Callable[..., object]:
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=GROUP,
        ppo_micro_batch_size_per_gpu=1,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=dual,
        loss_scale_factor=WIDTH,
    )

    def loss(logp: torch.Tensor) -> tuple[torch.Tensor, float] | torch.Tensor:
        found, metrics = core_algos.get_policy_loss_fn(name)(
            old_log_prob=inputs["logp_old"],
            log_prob=logp,
            advantages=inputs["advantage"] if advantage is None else advantage,
            response_mask=mask,
            loss_agg_mode=AGGREGATIONS[how],
            config=config,
            rollout_is_weights=correction,
        )
        return (found, sum(metrics[share] for share in CLIPPED)) if metrics else found

    return loss


def value_and_gradient(
    loss: Callable[..., object], inputs: Tensors, argument: str | None
) -> dict[str, object]:
    argument = argument or "logp"
    x = inputs[argument].clone().requires_grad_()
    found = loss(x)
    found, clipped = found if isinstance(found, tuple) else (found, None)
    found.backward()
    share = {} if clipped is None else {"clipped": float(clipped)}
    return {"of": argument, "loss": found.item(), "gradient": x.grad.tolist(), **share}


def corrections(inputs: Tensors) -> dict[str, list[list[float]]]:
    """What a token's loss is multiplied by, of trainer / sampler."""
    gap, mask = inputs["logp_old"] - inputs["logp_rollout"], token_mask(inputs).double()
    of = partial(rollout_corr_helper.compute_rollout_correction_weights, gap, mask)
    bounds = {
        "token_truncated": 1.1,
        "token_masked": "0.85_1.2",
        "sequence_truncated": 1.1,
        "sequence_masked": "0.7_1.5",
    }
    return {name: of(name.split("_")[0], x)[0].tolist() for name, x in bounds.items()}


def rejections(inputs: Tensors) -> dict[str, list[list[float]]]:
    """1 for the tokens that stay, with bounds for sampler / trainer, the other way round."""
    gap, mask = inputs["logp_old"] - inputs["logp_rollout"], token_mask(inputs).double()
    of = partial(rollout_corr_helper.compute_rollout_rejection_mask, gap, mask)
    bounds = {"token_k1": "0.8_1.25", "seq_sum_k1": "0.6_1.6", "seq_mean_k1": "0.95_1.1"}
    return {name: of(name, threshold)[0].tolist() for name, threshold in bounds.items()}


def tokens(inputs: Tensors) -> dict[str, list[list[float]]]:
    logits, token = inputs["logits"], inputs["token"]
    return {
        "logp": torch_functional.logprobs_from_logits(logits, token).tolist(),
        "entropy": torch_functional.entropy_from_logits(logits).tolist(),
    }


def adaptive(inputs: Tensors) -> list[float]:
    """The weight after each step's KL: a target of 0.02 and a gain of 50 / 500."""
    controller = core_algos.AdaptiveKLController(0.1, target_kl=0.02, horizon=500)
    found = []
    for kl in inputs["kl"].tolist():
        controller.update(kl, n_steps=50)
        found.append(float(controller.value))
    return found


def token_mask(inputs: Tensors) -> torch.Tensor:
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
