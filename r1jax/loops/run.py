"""What every training loop is given, and how each begins, goes on and stops."""

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from r1jax import checkpoint, metrics, monitors, settings
from r1jax.checkpoint import Store
from r1jax.types import TrainState

Rows = Sequence[settings.Row]
Answers = Sequence[str]
Judged = tuple[float | None, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """How answers are judged; answer i is to rows[i]. None: it could not be.

    `reward` gives each answer's reward and the parts it is made of; `each(function, rows, answers)`
    gives the function's value for each. `accuracy` reads the task's accuracy off the first; None:
    it is not in it. `parts` are the names of those that a reward can have, in order. `given_up`
    counts, by why, the values that were given up so far.
    """

    reward: Callable[[Rows, Answers], Sequence[Judged]]
    each: Callable[[Callable[..., Any], Rows, Answers], Sequence[Any]]
    accuracy: Callable[[Judged], float | None] | None = None
    parts: Sequence[str] = ()
    given_up: Callable[[], Mapping[str, int]] = dict


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """A run as its loops see it."""

    run: settings.Run
    folder: Path
    text: Sequence[str]  # of the config, kept in each checkpoint
    tokenizer: Any
    mesh: jax.sharding.Mesh
    writer: metrics.Writer
    stopping: Callable[[], bool]


def stream_key(seed: int, name: str, step: int) -> jax.Array:
    """The random key of step `step` of a named stream of a run."""
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    return jax.random.fold_in(key, step)


@contextmanager
def resumed(
    context: Context, stage: settings.Trained, state: TrainState, *, best: str | None = None
) -> Iterator[tuple[Store, TrainState, int]]:
    """Opens a stage's checkpoints: its store, the newest state (or `state`), steps already done.

    The logs are cut back to that step, so that what follows is written once.
    """
    folder = context.folder / "checkpoints" / stage.name
    with checkpoint.open_checkpoints(folder, keep=stage.checkpoints.keep, best=best) as store:
        saved = store.restore(checkpoint.outline(state))
        done = 0 if saved is None else saved.step
        metrics.rewind(
            context.folder,
            stages=[other.name for other in context.run.stages],
            stage=stage.name,
            step=-1 if saved is None else done,
        )
        yield store, state if saved is None else saved.state, done


def end_step(
    context: Context,
    stage: settings.Trained,
    store: Store,
    state: TrainState,
    step: int,
    scores: Mapping[str, float],
) -> None:
    """Saves after `step` steps where it is due, and stops the run if it was asked to.

    Raises:
      Stopped: after the state was saved.
    """
    stop = context.stopping() and step < stage.steps
    if stop or step == stage.steps or step % stage.checkpoints.every == 0:
        meta = {"seed": context.run.seed, "config": list(context.text)}
        store.save(step, state, meta, scores)
    if stop:
        store.wait()
        raise Stopped


def check_finite(values: Mapping[str, Any], writer: metrics.Writer, stage: str, step: int) -> None:
    """Raises ValueError if the loss or the gradient is not finite; the step is logged before."""
    problem = monitors.fatal(values)
    if problem:
        writer.write(stage, step, values)
        raise ValueError(f"{stage}, step {step}: {problem}")


def to_floats(values: Mapping[str, Any]) -> dict[str, float]:
    """Scalars of the device as Python numbers; waits for it."""
    return {name: float(np.asarray(value)) for name, value in jax.device_get(dict(values)).items()}
