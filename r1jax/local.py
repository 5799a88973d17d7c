"""Asks a language model on this machine's devices, as `r1jax.rewards.endpoint` asks a remote one.

model = Local(folder="Qwen3-8B", engine=Engine(max_prompt=8192, max_new=2048, slots=32))
reward = Batched(partial(pointwise, rubric=HELPFUL, complete=partial(ask, model=model)))
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

import jax
import numpy as np

from r1jax import settings, sharding
from r1jax.data import tokenizer as tokenizers
from r1jax.models import hf
from r1jax.rollout.answers import decode_answers, encode_prompts, stop_tokens, to_host
from r1jax.rollout.engine import make_engine
from r1jax.types import Params, Prompts

Messages = Sequence[Mapping[str, str]]  # of one prompt: {"role": ..., "content": ...}
Complete = Callable[[Sequence[Messages]], list[str | None]]


@dataclass(frozen=True, kw_only=True)
class Local:
    """A model of a Hugging Face folder, and how it is asked."""

    folder: str
    engine: settings.Engine
    at_once: int = 64  # prompts in one call of the engine, which is compiled for so many
    seed: int = 0  # of the sampling, where the engine's temperature is above 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of weights and compute
    mesh: settings.Mesh = field(default_factory=settings.Mesh)

    def __post_init__(self) -> None:
        if self.at_once < 1:
            raise ValueError(f"at_once must be >= 1, got {self.at_once}")


def ask(prompts: Sequence[Messages], *, model: Local) -> list[str | None]:
    """The model's reply to each prompt, in order; None to one that is too long for its engine.

    The model is loaded when it is first asked, and stays on the devices. A reply that is cut off
    is given as far as it goes. Equal prompts get the same reply at temperature 0, and replies of
    their own above it.

    Raises:
      ValueError: the folder cannot be loaded, or its tokenizer has no chat template.
    """
    return _loaded(model)(prompts)


@cache
def _loaded(model: Local) -> Complete:
    tokenizer = tokenizers.from_folder(model.folder)
    mesh = sharding.make_mesh(model.mesh)
    cfg, params = hf.load(model.folder, dtype=model.dtype, mesh=mesh)
    cfg = replace(cfg, dtype=model.dtype)
    return make_complete(cfg, params, tokenizer, mesh=mesh, model=model)


def make_complete(
    cfg: settings.Decoder,
    params: Params,
    tokenizer: Any,
    *,
    mesh: jax.sharding.Mesh,
    model: Local,
) -> Complete:
    """The function prompts -> replies of a model whose weights lie on `mesh`. See `ask`.

    Raises:
      ValueError: the tokenizer has no chat template or no end token.
    """
    if tokenizer.chat_template is None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(f"tokenizer {name} has no chat template: it cannot be given messages")
    greedy = model.engine.sampling.temperature == 0
    engine = make_engine(cfg, model.engine, group=1, stop=stop_tokens(tokenizer))
    generate = jax.jit(engine)
    key = jax.random.key(model.seed)

    def some(texts: Sequence[str], index: Sequence[int]) -> list[str]:
        prompts = encode_prompts(tokenizer, texts, max_prompt=model.engine.max_prompt, index=index)
        # Set here, not by the caller: judges are asked in threads of their own.
        with jax.set_mesh(mesh):
            placed = sharding.put(_filled(prompts, model.at_once), mesh, "batch")
            return decode_answers(tokenizer, to_host(generate(params, placed, key)))

    def complete(prompts: Sequence[Messages]) -> list[str | None]:
        if not prompts:
            return []
        texts = [
            tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
            for messages in prompts
        ]
        lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        # What is asked, by what makes its reply another one.
        places = [text if greedy else (i, text) for i, text in enumerate(texts)]
        waiting = {
            place: (0 if greedy else i, text)
            for i, (place, text) in enumerate(zip(places, texts, strict=True))
            if lengths[i] <= model.engine.max_prompt
        }
        replies: dict[Any, str] = {}
        for start in range(0, len(waiting), model.at_once):
            part = list(waiting)[start : start + model.at_once]
            index, asked = zip(*(waiting[place] for place in part), strict=True)
            replies |= zip(part, some(asked, index), strict=True)
        return [replies.get(place) for place in places]

    return complete


def _filled(prompts: Prompts, size: int) -> Prompts:
    """The prompts and empty ones, `size` in all, so that one program does for any number."""
    missing = size - len(prompts.length)
    return jax.tree.map(lambda x: np.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)), prompts)
