"""A run's model again, to be asked: what `r1jax.evaluate` and `r1jax.generate` share.

JAX is imported inside the functions, so that --help and a wrong flag need not wait for it.
"""

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from r1jax import config, host, settings


@dataclass(frozen=True, kw_only=True)
class Restored:
    """A run with the weights that one of its stages had at one step."""

    run: settings.Run
    stage: settings.Stage  # whose weights they are
    step: int
    tokenizer: Any
    mesh: Any  # jax.sharding.Mesh
    params: Any
    adapters: Any = None  # `lora.Adapters` that are merged in the weights, if the stage trained any


class Answer(NamedTuple):
    """One answer of the model."""

    text: str  # without the prompt
    length: int  # tokens, the end token included
    finished: bool  # ended by itself, not cut off


Which = int | Literal["last", "best"]  # a step, or that of the newest or best checkpoint
Answers = Callable[[Sequence[str], int], Iterator[list[Answer]]]

# --------------------------------------------------------------------------- the command line


def arguments(
    parser: argparse.ArgumentParser, *, required: bool = True, checkpoint: bool = True
) -> None:
    """Adds what says which weights to load and how to sample from them. Without `required` the
    run's folder may be missing: None. Without `checkpoint` the last one is meant."""
    nargs = None if required else "?"
    parser.add_argument("folder", type=Path, nargs=nargs, metavar="RUN", help="a run's folder")
    if checkpoint:
        parser.add_argument(
            "--checkpoint",
            type=which,
            default="last",
            metavar="last|best|STEP",
            help="default: last; best is the one with the highest held-out accuracy, which is then "
            "too high by having been chosen",
        )
    parser.add_argument(
        "--stage", metavar="NAME", help="whose weights; default: the last stage with a checkpoint"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="NAME=VALUE",
        help="change one setting of the run, as in --set model.dtype=bfloat16; may be given again",
    )
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    parser.add_argument("--top-k", type=int, metavar="K", help="0 leaves all tokens in")
    parser.add_argument("--top-p", type=float, metavar="P", help="1 leaves all tokens in")
    parser.add_argument("--max-new", type=int, metavar="TOKENS", help="tokens in an answer at most")
    parser.add_argument("--seed", type=int, help="default: the run's")


def sampling(args: argparse.Namespace, default: settings.Sampling) -> settings.Sampling:
    """`default` with what the command line changes."""
    given = {name: getattr(args, name) for name in ("temperature", "top_k", "top_p")}
    return dataclasses.replace(default, **{n: v for n, v in given.items() if v is not None})


def positive(text: str) -> int:
    """A number of at least 1, for argparse."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"need a whole number of at least 1, got {text!r}")
    return int(text)


def which(text: str) -> Which:
    """Which checkpoint a flag asks for."""
    if text == "last" or text == "best":
        return text
    if text.isascii() and text.isdecimal():
        return int(text)
    raise argparse.ArgumentTypeError(f"need last, best or a step, got {text!r}")


# --------------------------------------------------------------------------- the model


def open_run(
    folder: Path,
    *,
    stage: str | None = None,
    checkpoint: Which = "last",
    overrides: Sequence[str] = (),
) -> Restored:
    """The run in `folder` with the weights of a checkpoint, adapters merged. Nothing in the folder
    is changed; the config that it holds is executed.

    `stage` is the last one that has a checkpoint unless it is named; `checkpoint` is "last",
    "best" or a step. `overrides` are made after those of the run.

    Raises:
      ValueError: there is no such folder, run, stage or checkpoint, or the checkpoint is damaged or
        of another model, or the run's mesh does not fit the devices there are.
    """
    if not folder.is_dir():
        raise ValueError(f"no such folder: {folder}")
    spec, made = config.saved(folder)
    host.prepare()  # before the config, which imports JAX
    run = config.load(spec, [*made, *overrides])
    from r1jax import parameters, sharding

    chosen = _stage(run, folder, stage)
    mesh = sharding.make_mesh(run.mesh)
    loaded = parameters.load(run, folder, chosen.name, mesh, which=checkpoint)
    return Restored(
        run=run,
        stage=chosen,
        step=loaded.step,
        tokenizer=run.tokenizer(),
        mesh=mesh,
        params=loaded.params,
        adapters=loaded.adapters,
    )


def task_stage(restored: Restored) -> settings.Stage | None:
    """The stage whose held-out problems the weights are asked about; None if the run has none.

    It is the stage of the weights or, if that has none, the next one that has, or else the last
    one before. `settings.evaluation_of` says how they are asked.
    """
    stages = restored.run.stages
    place = stages.index(restored.stage)
    for stage in (*stages[place:], *reversed(stages[:place])):
        if settings.evaluation_of(stage) is not None:
            return stage
    return None


def check_prompts(restored: Restored, prompts: Sequence[str], max_prompt: int) -> None:
    """Passes if the model can read every prompt.

    Raises:
      ValueError: a prompt is empty, too long, or holds something that has no token.
    """
    from r1jax.data.tokenizer import encode
    from r1jax.rollout.answers import encode_prompts

    for prompt in prompts:
        encode(restored.tokenizer, prompt)
    encode_prompts(restored.tokenizer, prompts, max_prompt=max_prompt, index=range(len(prompts)))


def make_answers(
    restored: Restored,
    engine: settings.Engine,
    *,
    samples: int,
    at_once: int,
    key: Any,
) -> Answers:
    """The function (prompts, number of the first) -> `samples` answers to each prompt, in order.

    The engine is compiled once, for `at_once` prompts (or a few more, so that devices share them
    evenly); fewer are filled up, more are taken so many at a time. An answer depends on the
    weights, its prompt and that prompt's number, `key` and its place among the samples alone.
    """
    import jax

    from r1jax import sharding
    from r1jax.rollout.answers import decode_answers, encode_prompts, stop_tokens, to_host
    from r1jax.rollout.engine import make_engine

    stop = stop_tokens(restored.tokenizer)
    generate = jax.jit(make_engine(restored.run.model, engine, group=samples, stop=stop))
    parts = math.prod(restored.mesh.shape[axis] for axis in sharding.RULES["batch"])
    size = -(-at_once // parts) * parts

    def some(prompts: Sequence[str], first: int) -> list[list[Answer]]:
        filled = [*prompts, *[prompts[-1]] * (size - len(prompts))]
        index = range(first, first + size)
        encoded = encode_prompts(
            restored.tokenizer, filled, max_prompt=engine.max_prompt, index=index
        )
        with jax.set_mesh(restored.mesh):
            placed = sharding.put(encoded, restored.mesh, "batch")
            rollout = to_host(generate(restored.params, placed, key))
        texts = decode_answers(restored.tokenizer, rollout)
        answers = [
            Answer(text, int(length), bool(finished))
            for text, length, finished in zip(
                texts, rollout.answer_length, rollout.finished, strict=True
            )
        ]
        return [answers[i * samples : (i + 1) * samples] for i in range(len(prompts))]

    def answers(prompts: Sequence[str], first: int = 0) -> Iterator[list[Answer]]:
        for start in range(0, len(prompts), size):
            yield from some(prompts[start : start + size], first + start)

    return answers


def _stage(run: settings.Run, folder: Path, name: str | None) -> settings.Stage:
    from r1jax.checkpoint import numbers

    if name is not None:
        for stage in run.stages:
            if stage.name == name:
                return stage
        known = ", ".join(stage.name for stage in run.stages)
        raise ValueError(f"{folder} has no stage {name!r}; there are: {known}")
    for stage in reversed(run.stages):
        checkpoints = folder / "checkpoints" / stage.name
        if checkpoints.is_dir() and numbers(checkpoints):
            return stage
    raise ValueError(f"{folder} has no checkpoint yet")
