"""A reward model that a run trained, asked for rewards on this machine's devices.

model = RewardModel(run="runs/helpful")
reward = Batched(partial(scores, model=model, prompt=short_prompt))

It is a decoder with a head, a `Supervised` stage with `head=Head(score=heads.rewards, ...)`. For
answers by themselves; `r1jax.search.model` has the same of parts of answers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import jax

from r1jax import restore, settings, sharding
from r1jax.checkpoint import load
from r1jax.models import heads
from r1jax.search.model import reward_model
from r1jax.search.paths import Score


@dataclass(frozen=True, kw_only=True)
class RewardModel:
    """Which weights score, and how they are asked."""

    run: str | None = None  # a run's folder; None: the run in whose reward it stands
    stage: str | None = None  # the one that trained the head; None: the last with a checkpoint
    at_once: int = 64  # texts in one program

    def __post_init__(self) -> None:
        if self.run is None and self.stage is None:
            raise ValueError("a reward model of the same run needs its stage")
        if self.at_once < 1:
            raise ValueError(f"at_once must be >= 1, got {self.at_once}")


def scores(
    rows: Sequence[settings.Row],
    answers: Sequence[str],
    *,
    model: RewardModel,
    prompt: Callable[[settings.Row], str],
) -> Sequence[float]:
    """The model's score of each answer as a whole, its end token read too, as in training.

    An answer that was cut off is scored as if it ended there. The model is loaded when it is first
    asked, and stays on the devices.

    Raises:
      ValueError: the run cannot be loaded, its stage has no reward head, or its tokenizer has no
        token for a part of a text.
    """
    return opened(model)([prompt(row) for row in rows], answers)


@cache
def opened(model: RewardModel) -> Score:
    """The scorer (prompts, answers) -> scores of a run's reward model.

    Raises:
      ValueError: as `scores`.
    """
    if model.run is None:
        raise ValueError(f"the reward model of stage {model.stage} is there only in its own run")
    found = restore.open_run(Path(model.run), stage=model.stage)
    stage = found.stage
    if not isinstance(stage, settings.Supervised) or stage.head is None:
        raise ValueError(f"{model.run}: stage {stage.name} trained no reward model: it has no head")
    like = {"params": sharding.abstract(heads.reward_leaves(found.run.model), found.mesh)}
    head = load(Path(model.run) / "checkpoints" / stage.name, found.step, like).state["params"]
    score = reward_model(
        found.run.model,
        found.params,
        head["reward"],
        found.tokenizer,
        at_once=model.at_once,
        end=(found.tokenizer.eos_token_id,),
    )

    def on_mesh(prompts: Sequence[str], answers: Sequence[str]) -> Sequence[float]:
        # Set here, not by the caller: rewards are asked in threads of their own.
        with jax.set_mesh(found.mesh):
            return score(prompts, answers)

    return on_mesh


def preferred(rows: Sequence[settings.Row], *, model: RewardModel) -> list[float]:
    """Of each pair (`prompt`, `chosen`, `rejected`): 1.0 if the model scores the better answer
    higher, 0.0 if lower, 0.5 if both are the same to it.

    Raises:
      ValueError: as `scores`.
    """
    prompts = [row["prompt"] for row in rows]
    better, worse = (
        opened(model)(prompts, [row[name] for row in rows]) for name in ("chosen", "rejected")
    )
    return [(good > bad) + (good == bad) / 2 for good, bad in zip(better, worse, strict=True)]
