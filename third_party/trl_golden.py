"""Makes tests/golden/trl.json: advantages, losses and gradients as TRL computes them.

    python third_party/trl_golden.py > tests/golden/trl.json

It needs trl with torch, transformers, accelerate and datasets, and imports nothing from r1jax. The
trainers are TRL's own, built with their configs around a model of a few hundred weights. What a
model or a sampler would say, log-probabilities and answers, is drawn here and handed to them in
its place; all else, from rewards to advantages and from log-probabilities to the loss, is theirs.

The answers are a ragged batch: 3 prompts with 4 answers each, which are 6 pairs as well. All is
float64, so that the numbers are those of the formulas; `tests/test_trl_golden.py` compares ours,
in float32.
"""

import contextlib
import json
import logging
import os
import sys
import tempfile
import types
import warnings
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)
from transformers.utils.logging import disable_progress_bar
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.gkd import GKDTrainer
from trl.experimental.iw_opd import IWOPDTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.utils import FusedCausalLMOutput, selective_log_softmax_and_entropy

PROMPTS, GROUP, WIDTH, WORDS = 3, 4, 7, 5
ANSWERS = PROMPTS * GROUP
PAIRS = ANSWERS // 2  # answers 0 and 1, 2 and 3, ...: the even ones are the better
PAIRWISE = [*range(0, ANSWERS, 2), *range(1, ANSWERS, 2)]  # TRL wants all the better ones first
PROMPT, OTHER_PROMPT, PAD, WORD = 2, 3, 0, 1  # token ids
VOCABULARY = {"<pad>": PAD, "word": WORD, "prompt": PROMPT, "other": OTHER_PROMPT, "<eos>": 4}


def main() -> None:
    torch.set_default_dtype(torch.float64)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    disable_progress_bar()
    inputs = draw()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        Qwen2ForCausalLM(small_config()).save_pretrained(folder)
        record = {
            "trl": version("trl"),
            "torch": version("torch"),
            "group": GROUP,
            "inputs": {name: x.tolist() for name, x in inputs.items()},
            "advantages": advantages(folder, inputs),
            "policy": policy(folder, inputs),
            "preferences": preferences(folder, inputs),
            "distillation": distillation(inputs),
            "tokens": tokens(inputs),
        }
    print(json.dumps(rounded(record)))


def draw() -> dict[str, torch.Tensor]:
    """Numbers of the sizes that occur in training, rounded so that float32 holds them closely.

    Of the two sources of reward neither could judge answer 2, and the second not answer 9; the
    first gives all answers to the second prompt the same.
    """
    rng = np.random.default_rng(0)
    shape = (ANSWERS, WIDTH)
    old = np.minimum(rng.normal(-1.2, 0.4, shape), -0.3)

    def near(x: np.ndarray, scale: float, shift: float = 0.0) -> np.ndarray:
        return np.minimum(x + rng.normal(shift, scale, shape), -0.02)

    reward = rng.normal(0.5, 1.0, (ANSWERS, 2))
    reward[GROUP : 2 * GROUP, 0] = 0.7
    reward[2], reward[9, 1] = np.nan, np.nan
    arrays = {
        "length": rng.integers(1, WIDTH + 1, ANSWERS),
        "reward": reward,
        "advantage": rng.normal(0, 1, ANSWERS),
        "logp": near(old, 0.3),
        "logp_old": old,
        "logp_rollout": near(old, 0.3),
        "logp_ref": near(old, 0.4),
        "logp_other": near(old, 0.3, 0.2),  # of answers to another prompt
        "logp_other_ref": near(old, 0.3, -0.2),
        "entropy": rng.uniform(0.0, 2.0, shape),
        "label": rng.permutation([1] * 5 + [0] * (ANSWERS - 5)),
        "score": rng.normal(0, 1, shape),
        "student": rng.normal(0, 1.5, (PROMPTS, WIDTH, WORDS)),
        "teacher": rng.normal(0, 1.5, (PROMPTS, WIDTH, WORDS)),
        "token": rng.integers(0, WORDS, (PROMPTS, WIDTH)),
    }
    return {name: torch.tensor(np.round(x, 4)) for name, x in arrays.items()}


# --------------------------------------------------------------------------- trainers


def build(
    folder: str,
    trainer: type,
    config: type,
    rows: dict[str, list],
    *,
    parts: dict[str, object] | None = None,
    **settings: object,
) -> object:
    """One of TRL's trainers, around a model that is never asked and rows that are never read."""
    args = config(
        output_dir=folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        per_device_train_batch_size=ANSWERS,
        **settings,
    )
    made = trainer(
        args=args,
        train_dataset=datasets.Dataset.from_dict(rows),
        processing_class=make_tokenizer(),
        **{"model": Qwen2ForCausalLM.from_pretrained(folder), **(parts or {})},
    )
    made.model.train()  # this and the next as its training loop does
    made.current_gradient_accumulation_steps = 1
    return made


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel(VOCABULARY, unk_token="word"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def small_config() -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        pad_token_id=PAD,
        num_labels=1,
    )


def reinforce(
    folder: str, trainer: type, config: type, rewards: torch.Tensor
) -> Callable[..., object]:
    """Makes trainers whose reward functions give the columns of `rewards`."""

    def source(column: list[float]) -> Callable[..., list[float | None]]:
        return lambda completions, **_: [None if np.isnan(x) else x for x in column]

    return partial(
        build,
        folder,
        trainer,
        config,
        {"prompt": ["prompt"]},
        parts={"reward_funcs": [source(column) for column in rewards.T.tolist()]},
        num_generations=GROUP,
        max_completion_length=WIDTH,
    )


def score(trainer: object, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch as the trainer makes it of answers: rewards, advantages, importance ratios."""
    length = inputs["length"].tolist()
    answers = [[WORD] * n for n in length]
    sampled = [inputs["logp_rollout"][i, :n].tolist() for i, n in enumerate(length)]
    whole = (answers, None, [""] * ANSWERS, sampled, {}, None, None)
    online = isinstance(trainer, GRPOTrainer)
    trainer._generate = lambda prompts: ([[PROMPT]] * ANSWERS, *(whole if online else whole[:3:2]))
    told = lambda model: inputs["logp_old" if model is trainer.model else "logp_ref"]  # noqa: E731
    trainer._get_per_token_logps_and_entropies = lambda model, *_, **__: (told(model), None, None)
    return trainer._generate_and_score_completions([{"prompt": "prompt"}] * ANSWERS)


# --------------------------------------------------------------------------- what is recorded


def advantages(folder: str, inputs: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    first = inputs["reward"][:, :1]
    grpo = reinforce(folder, GRPOTrainer, GRPOConfig, first)
    by_source = reinforce(folder, GRPOTrainer, GRPOConfig, inputs["reward"])
    rloo = reinforce(folder, RLOOTrainer, RLOOConfig, first)
    trainers = {
        "group": grpo(scale_rewards="group"),
        "none": grpo(scale_rewards="none"),
        "batch": grpo(scale_rewards="batch"),
        "sources": by_source(
            reward_weights=[1.0, 0.5], multi_objective_aggregation="normalize_then_sum"
        ),
        "rloo": rloo(beta=0.0),
        "rloo_kl": rloo(beta=0.1),
    }
    found = {name: score(x, inputs)["advantages"].tolist() for name, x in trainers.items()}
    penalty = get_soft_overlong_punishment(max_completion_len=WIDTH - 1, soft_punish_cache=4)
    return {**found, "overlong": penalty([[WORD] * n for n in inputs["length"].tolist()])}


def policy(folder: str, inputs: dict[str, torch.Tensor]) -> dict[str, dict[str, object]]:
    grpo = reinforce(folder, GRPOTrainer, GRPOConfig, inputs["reward"][:, :1])
    wide = {"epsilon": 0.2, "epsilon_high": 0.28}
    sequence = {"epsilon": 0.05, "epsilon_high": 0.08, "importance_sampling_level": "sequence"}
    kl = {"beta": 0.3, "use_bias_correction_kl": False}
    settings = {
        **{name: {"loss_type": name, **wide} for name in ("grpo", "bnpo", "dr_grpo", "dapo")},
        "gspo": {"loss_type": "grpo", **sequence},
        "luspo": {"loss_type": "luspo", **sequence},
        "delta": {"loss_type": "dapo", "delta": 1.4},
        "cispo": {"loss_type": "cispo", "epsilon_high": 1.25},
        "kl": {"loss_type": "dapo", **kl},
        "kl_unbiased": {"loss_type": "dapo", **kl, "use_bias_correction_kl": True},
        "top_entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.4},
        "top_entropy_kl": {"loss_type": "dapo", "top_entropy_quantile": 0.4, **kl},
        "entropy_bonus": {"loss_type": "bnpo", "entropy_coef": 0.05},
    }
    bounds = {"vllm_importance_sampling_clip_min": 0.7, "vllm_importance_sampling_clip_max": 1.2}
    cap = {"vllm_importance_sampling_clip_max": 1.2}
    corrections = {
        **{f"{level}_truncate": cap for level in ("token", "sequence")},
        **{f"{level}_mask": bounds for level in ("token", "sequence")},
    }
    found = {}
    for name, given in {**settings, **corrections}.items():
        if corrected := name in corrections:
            given = {"loss_type": "dapo", "vllm_importance_sampling_mode": name, **given}
        trainer = grpo(**{"beta": 0.0, **given})
        trainer.use_vllm = corrected  # the config would look for vLLM
        found[name] = reinforce_loss(trainer, inputs)
    rloo = reinforce(folder, RLOOTrainer, RLOOConfig, inputs["reward"][:, :1])
    return {**found, "rloo": reinforce_loss(rloo(beta=0.0, epsilon=0.4), inputs)}


def reinforce_loss(trainer: object, inputs: dict[str, torch.Tensor]) -> dict[str, object]:
    mask = token_mask(inputs)
    batch = score(trainer, inputs)
    batch["advantages"] = inputs["advantage"]
    if isinstance(trainer, GRPOTrainer):
        batch["old_per_token_logps"] = inputs["logp_old"]

    def loss(logp: torch.Tensor) -> torch.Tensor:
        entropy = inputs["entropy"] * mask
        trainer._get_per_token_logps_and_entropies = lambda *_, **__: (logp, entropy, None)
        return trainer.compute_loss(trainer.model, batch)

    return value_and_gradient(loss, inputs["logp"], mask)


def preferences(folder: str, inputs: dict[str, torch.Tensor]) -> dict[str, dict[str, object]]:
    mask = token_mask(inputs)
    pairs = {"prompt": ["prompt"], "chosen": ["word"], "rejected": ["word word"]}
    dpo = partial(build, folder, DPOTrainer, DPOConfig, pairs)
    found = {
        name: value_and_gradient(dpo_loss(dpo(**settings), inputs, together), inputs["logp"], mask)
        for name, settings, together in (
            ("dpo", {"loss_type": ["sigmoid"], "beta": 0.3}, PAIRS),
            # AOT sorts the pairs of a batch; of one pair it is DPO with smoothed labels.
            ("smoothed", {"loss_type": ["aot"], "beta": 0.3, "label_smoothing": 0.2}, 1),
            ("robust", {"loss_type": ["robust"], "beta": 0.3, "label_smoothing": 0.2}, PAIRS),
            ("ipo", {"loss_type": ["ipo"], "beta": 0.3}, PAIRS),
        )
    }
    margin = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": 2.0, "simpo_gamma": 0.3}
    simpo = build(folder, CPOTrainer, CPOConfig, pairs, **margin)
    orpo = build(folder, ORPOTrainer, ORPOConfig, pairs, beta=0.5)
    surprise = lambda *x: orpo.concatenated_forward(*x)[4]  # noqa: E731
    for name, loss in (
        ("simpo", lambda *x: simpo.get_batch_loss_metrics(*x)[0]),
        ("orpo", lambda *x: orpo.get_batch_loss_metrics(*x)[0]),
        ("orpo_surprise", surprise),
    ):
        found[name] = value_and_gradient(from_logits(loss, inputs), inputs["logp"], mask)
    labelled = {"prompt": ["prompt"] * 2, "completion": ["word"] * 2, "label": [True, False]}
    sides = {"desirable_weight": 1.3, "undesirable_weight": 0.7}
    kto = build(folder, KTOTrainer, KTOConfig, labelled, beta=0.3, **sides)
    for name, swapped in (("kto", False), ("kto_at_zero", True)):
        loss = kto_loss(kto, inputs, swapped)
        found[name] = value_and_gradient(loss, inputs["logp"], mask)
        found[name]["kl"] = kto._metrics["train"]["kl"][-1]
    parts = {"model": Qwen2ForSequenceClassification(small_config())}
    reward = build(folder, RewardTrainer, RewardConfig, pairs, parts=parts)
    for name, margin in (("reward", None), ("reward_margin", 0.4)):
        loss = reward_loss(reward, inputs, margin)
        found[name] = value_and_gradient(loss, inputs["score"], mask)
    return found


def dpo_loss(trainer: object, inputs: dict[str, torch.Tensor], together: int) -> Callable:
    """The mean of the trainer's loss over batches of so many pairs."""

    def loss(logp: torch.Tensor) -> torch.Tensor:
        losses = []
        for i in range(0, PAIRS, together):
            chosen = PAIRWISE[i : i + together] + PAIRWISE[PAIRS + i : PAIRS + i + together]
            texts = texts_of(inputs, chosen)
            trainer.ref_model = speaking(inputs["logp_ref"][chosen])
            losses.append(trainer._compute_loss(speaking(logp[chosen]), texts, False))
        return torch.stack(losses).mean()

    return loss


def from_logits(loss: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor]) -> Callable:
    """loss(model, batch) of a model of two words, the second of which gets the log-probability."""
    texts = texts_of(inputs, PAIRWISE)
    labels = texts["input_ids"].masked_fill(texts["completion_mask"] == 0, -100)
    halves = {"input_ids": texts["input_ids"], "attention_mask": texts["attention_mask"]}
    batch = {
        f"{side}_{name}": half
        for name, x in {**halves, "labels": labels}.items()
        for side, half in zip(("chosen", "rejected"), x.chunk(2), strict=True)
    }

    def of(logp: torch.Tensor) -> torch.Tensor:
        chosen = logp[PAIRWISE]
        logits = torch.stack([torch.log(-torch.expm1(chosen)), chosen], dim=-1)
        logits = torch.nn.functional.pad(logits, (0, 0, 0, 1))  # what follows the last token
        return loss(lambda *_, **__: types.SimpleNamespace(logits=logits), batch)

    return of


def kto_loss(trainer: object, inputs: dict[str, torch.Tensor], swapped: bool) -> Callable:
    """With `swapped` the model and the reference change places where the KL is estimated."""
    mine, others = texts_of(inputs, range(ANSWERS)), texts_of(inputs, range(ANSWERS))
    others["input_ids"][:, 0] = OTHER_PROMPT
    batch = {
        **mine,
        **{f"KL_{name}": x for name, x in others.items()},
        "label": inputs["label"],
    }
    other = [inputs["logp_other"], inputs["logp_other_ref"]]

    def loss(logp: torch.Tensor) -> torch.Tensor:
        trainer.ref_model = speaking(inputs["logp_ref"], other[not swapped])
        return trainer._compute_loss(speaking(logp, other[swapped]), batch, False)

    return loss


def reward_loss(trainer: object, inputs: dict[str, torch.Tensor], margin: float | None) -> Callable:
    given = {} if margin is None else {"margin": torch.full((PAIRS,), margin)}

    def loss(scores: torch.Tensor) -> torch.Tensor:
        last = scores[torch.arange(ANSWERS), inputs["length"] - 1]
        model = lambda **_: types.SimpleNamespace(logits=last[PAIRWISE, None])  # noqa: E731
        batch = {"attention_mask": token_mask(inputs).long(), **given}
        return trainer.compute_loss(model, batch)

    return loss


def distillation(inputs: dict[str, torch.Tensor]) -> dict[str, dict[str, object]]:
    mask = token_mask(inputs)[:PROMPTS]
    labels = torch.where(mask, inputs["token"], -100)

    def divergence(beta: float, temperature: float) -> Callable:
        return lambda x: GKDTrainer.generalized_jsd_loss(
            x, inputs["teacher"], labels=labels, beta=beta, temperature=temperature
        )

    found = {
        name: value_and_gradient(divergence(beta, temperature), inputs["student"], mask[..., None])
        for name, beta, temperature in (
            ("forward", 0.0, 1.0),
            ("reverse", 1.0, 1.0),
            ("reverse_warm", 1.0, 2.0),
            ("jensen_shannon", 0.5, 1.0),
            ("jensen_shannon_skew", 0.2, 2.0),
        )
    }
    on_policy = types.SimpleNamespace(  # this trainer cannot be built without a teacher to load
        temperature=1.0,
        iw_opd_gamma=0.0,
        iw_opd_epsilon=1e-8,
        model=types.SimpleNamespace(training=True),
        _metrics={"train": defaultdict(list)},
    )
    mask = token_mask(inputs)
    words = torch.full(mask.shape, WORD)

    def sampled(logp: torch.Tensor) -> torch.Tensor:
        logits = torch.stack([torch.log(-torch.expm1(logp)), logp], dim=-1)
        labels = torch.where(mask, words, -100)
        return IWOPDTrainer._compute_iw_opd_loss(
            on_policy, logits, words, labels, inputs["logp_ref"]
        )

    found["on_policy"] = value_and_gradient(sampled, inputs["logp"], mask)
    return found


def tokens(inputs: dict[str, torch.Tensor]) -> dict[str, list]:
    """Log-probabilities of tokens, and entropies, from logits at temperature 0.7."""
    logp, entropy = selective_log_softmax_and_entropy(
        inputs["student"], inputs["token"], temperature=0.7
    )
    return {"logp": logp.tolist(), "entropy": entropy.tolist()}


# --------------------------------------------------------------------------- parts


def texts_of(inputs: dict[str, torch.Tensor], which: range | list[int]) -> dict[str, torch.Tensor]:
    """Answers behind a prompt of one token."""
    mask = token_mask(inputs)[list(which)].long()
    first = torch.full((len(mask), 1), PROMPT)
    return {
        "input_ids": torch.cat([first, torch.where(mask == 1, WORD, PAD)], dim=1),
        "attention_mask": torch.cat([torch.ones_like(first), mask], dim=1),
        "completion_mask": torch.cat([torch.zeros_like(first), mask], dim=1),
    }


def speaking(logp: torch.Tensor, other: torch.Tensor | None = None) -> Callable[..., object]:
    """A model that gives the tokens of texts these log-probabilities; `other` by their prompt."""

    def model(*, input_ids: torch.Tensor, labels: torch.Tensor, **_: object) -> FusedCausalLMOutput:
        said = logp if input_ids[0, 0] == PROMPT else other
        nothing = torch.zeros_like(said)
        return FusedCausalLMOutput(
            log_probs=torch.where(labels[:, 1:] != -100, said, 0.0),
            entropy=nothing,
            mean_logits=nothing,
            is_top1=nothing.bool(),
        )

    return model


def value_and_gradient(
    loss: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, mask: torch.Tensor
) -> dict[str, object]:
    x = x.clone().requires_grad_()
    value = loss(x)
    value.backward()
    assert (x.grad * ~mask == 0).all(), "the trainer read past the end of an answer"
    return {"loss": value.item(), "gradient": x.grad.tolist()}


def token_mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.arange(WIDTH)[None, :] < inputs["length"][:, None]


def rounded(x: object) -> object:
    """Nine significant digits, more than float32 has; null where there is no number."""
    if isinstance(x, dict):
        return {name: rounded(item) for name, item in x.items()}
    if isinstance(x, list):
        return [rounded(item) for item in x]
    if isinstance(x, float):
        return None if np.isnan(x) else float(f"{x:.9g}")
    return x


if __name__ == "__main__":
    main()
