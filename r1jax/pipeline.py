"""A run's stages in order. What is done is not done again; what was begun goes on.

A stage is a function `(settings, inputs, out) -> None`. It leaves what it makes in `out`:
`checkpoints/<stage>` or `data/<stage>` in the run's folder. `RUNNERS` has one for each kind.
"""

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from r1jax import (
    checkpoint,
    comparison,
    dataset,
    manifest,
    metrics,
    parameters,
    restore,
    settings,
    sharding,
)
from r1jax.data import sources
from r1jax.inputs import digests
from r1jax.loops import rl, supervised
from r1jax.loops.objectives import Teacher
from r1jax.loops.run import Context, Scorer, Stopped
from r1jax.parameters import first_digest, weights_of
from r1jax.preflight import check_stage
from r1jax.reward_model import RewardModel, opened
from r1jax.rewards.pool import Pool, open_pool
from r1jax.rewards.weighted import known_accuracy, part_names, score_many
from r1jax.settings import FIRST, Build, Built, Compare, Mesh, Sampled, Trained
from r1jax.types import Params


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What a stage is given beside its settings, in which the rows of other stages are sources."""

    context: Context
    weights: str  # the stage whose weights it begins with or samples from, or "weights"
    load: Callable[[], Params]  # these weights


# --------------------------------------------------------------------------- the run


def run(
    cfg: settings.Run, folder: Path, *, text: Sequence[str], stopping: Callable[[], bool]
) -> None:
    """Runs all stages that are not done. Everything they make is in `folder`.

    Raises:
      Stopped: `stopping()` became true; the state is saved.
      ValueError: a stage that has begun was made with other settings or inputs, or with other
        stages before it; an input of a stage is missing or damaged. Stages that are done are left
        as they are.
    """
    mesh = sharding.make_mesh(cfg.mesh)
    entries = manifest.read(folder)
    names = [stage.name for stage in cfg.stages]
    if names[: len(entries)] != list(entries):
        raise ValueError(
            f"{folder} has begun with the stages {', '.join(entries)}; a new one can only come "
            f"after them, got {', '.join(names)}"
        )
    with jax.disable_jit(not cfg.jit), jax.set_mesh(mesh):
        context = Context(
            run=cfg,
            folder=folder,
            text=text,
            tokenizer=cfg.tokenizer(),
            mesh=mesh,
            writer=metrics.open_writer(folder, machine=devices(mesh)),
            stopping=stopping,
        )
        first = first_digest(cfg)
        for place, stage in enumerate(cfg.stages):
            one_stage(stage, context, entries, first, last=place + 1 >= len(entries))


def devices(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """What machine.json says of the devices, for the report's device-hours."""
    return {"devices": mesh.size, "device": mesh.devices.flat[0].device_kind}


def one_stage(
    cfg: settings.Stage,
    context: Context,
    entries: dict[str, manifest.Entry],
    first: str,
    *,
    last: bool,
) -> None:
    """Runs a stage unless it is done, and enters it in the manifest: at its start and its end.

    `last` says that no later stage has begun: it may still be repaired, if its newest checkpoint
    is damaged say.
    """
    folder, name = context.folder, cfg.name
    weights = weights_of(context.run, cfg)
    stage = with_folder(with_rows(cfg, partial(rows_of, folder)), folder)
    here = manifest.Entry(
        name=name,
        config=manifest.config_of(name, context.text),
        inputs=digests(cfg, weights, entries, first),
    )
    if name in entries:
        manifest.same_or_fail(folder, entries[name], here)
        if entries[name].done and not (last and damaged(cfg, folder, entries[name])):
            return
    if waits := list(settings.inside(cfg, Built)):
        for one in waits:
            whole_or_fail(name, one.stage, folder, entries)
        check_stage(stage, context.tokenizer)
    entries[name] = here
    save(folder, entries)
    # Weights that are not trained stay in the dtype of their files.
    dtype = None if isinstance(cfg, Trained) and cfg.lora is not None else "float32"
    load = partial(load_weights, context, name, weights, dtype=dtype)
    out = out_of(folder, stage)
    try:
        RUNNERS[type(stage)](stage, Inputs(context=context, weights=weights, load=load), out)
    except ConnectionError as error:  # a teacher or a judge that does not answer
        raise ConnectionError(f"{name}: {error}") from None
    entries[name] = replace(here, done=True, output=output(stage, out))
    save(folder, entries)


def save(folder: Path, entries: Mapping[str, manifest.Entry]) -> None:
    if jax.process_index() == 0:
        manifest.write(folder, entries)


# --------------------------------------------------------------------------- what runs a stage


def run_supervised(cfg: settings.Supervised, inputs: Inputs, out: Path) -> None:
    """Trains on texts; the checkpoints in `out` show how far it came."""
    asked, context = cfg.evaluation, inputs.context
    teacher = open_teacher(cfg.teacher, context)
    train = partial(supervised.train, cfg, context, inputs.load(), teacher=teacher)
    if asked is None:
        train()
        return
    workers, seconds = asked.reward_workers, asked.reward_seconds
    with open_scorer(asked.task.accuracy, asked.task, workers=workers, seconds=seconds) as scorer:
        train(scorer=scorer)


def run_reinforce(cfg: settings.Reinforce, inputs: Inputs, out: Path) -> None:
    """Trains with rewards; the checkpoints in `out` show how far it came."""
    for model in settings.inside(cfg, RewardModel):
        opened(model)  # here, because rewards are asked in threads, which must not load configs
    workers, seconds = cfg.reward_workers, cfg.reward_seconds
    with open_scorer(cfg.reward, cfg.task, workers=workers, seconds=seconds) as scorer:
        teacher = open_teacher(cfg.teacher, inputs.context)
        rl.train(cfg, inputs.context, inputs.load(), scorer=scorer, teacher=teacher)


@contextmanager
def open_scorer(
    reward: Callable[..., Any], task: settings.Task, *, workers: int, seconds: float
) -> Iterator[Scorer]:
    """What judges answers, in processes that end with the block."""
    with open_pool(workers=workers, seconds=seconds) as pool:
        yield Scorer(
            reward=partial(score_many, reward, each=pool.map),
            each=pool.map,
            accuracy=known_accuracy(reward, task.accuracy),
            parts=part_names(reward),
            # Without workers nothing can be given up, and there is nothing to count.
            given_up=partial(given_up, pool) if workers else dict,
        )


def given_up(pool: Pool) -> dict[str, int]:
    """How many values the pool gave up so far, by why."""
    return {"reward_timeouts": pool.timeouts, "reward_crashes": pool.crashes}


def run_build(cfg: Build, inputs: Inputs, out: Path) -> None:
    """Builds a data set in `out`; the answers there show how far it came.

    Raises:
      Stopped: the context's `stopping()` became true; the answers so far are kept.
    """
    context, ask = inputs.context, None
    if isinstance(cfg.answers, settings.Taught):
        ask = dataset.ask_teacher(cfg)
    elif cfg.answers is not None:
        model = asked_model(cfg.answers, inputs)
        ask = dataset.ask_model(cfg, model, seed=context.run.seed)
    stages = [stage.name for stage in context.run.stages]
    metrics.rewind(context.folder, stages=stages, stage=cfg.name, step=-1)
    if not dataset.build(cfg, ask, out, stopping=context.stopping):
        raise Stopped
    numbers = {f"rows/{count['name']}": float(count["rows"]) for count in dataset.counts(out)}
    numbers["time/rollout_tokens"] = float(dataset.num_tokens(out / dataset.ANSWERS))
    context.writer.write(cfg.name, 1, numbers)


def run_compare(cfg: Compare, inputs: Inputs, out: Path) -> None:
    """Measures models; their answers in `out` show how far it came.

    Raises:
      Stopped: the context's `stopping()` became true; the answers so far are kept.
    """
    context = inputs.context

    def model(stage: str) -> restore.Restored:
        params = load_weights(context, cfg.name, stage)
        return as_restored(context, stage, params)

    if not comparison.compare(cfg, model, out, seed=context.run.seed, stopping=context.stopping):
        raise Stopped
    print("\n".join(comparison.lines(out)), file=sys.stderr)
    tokens = sum(
        dataset.num_tokens(comparison.answers_of(stage, out)) for stage in {*cfg.models.values()}
    )
    context.writer.write(cfg.name, 1, {"time/evaluate_tokens": float(tokens)})


RUNNERS: Mapping[type, Callable[[Any, Inputs, Path], None]] = {
    settings.Supervised: run_supervised,
    settings.Reinforce: run_reinforce,
    Build: run_build,
    Compare: run_compare,
}


def out_of(folder: Path, stage: settings.Stage) -> Path:
    """Where a stage leaves what it makes."""
    return folder / ("checkpoints" if isinstance(stage, Trained) else "data") / stage.name


def output(stage: settings.Stage, out: Path) -> dict[str, Any]:
    """What the manifest says of a stage that is done."""
    if isinstance(stage, Build):
        return dataset.output(out)
    if isinstance(stage, Compare):
        return {"sha256": sources.file_digest(out / metrics.TABLE)}
    sums = out / str(stage.steps) / checkpoint.SUMS
    return {"sha256": sources.file_digest(sums), "steps": stage.steps}


def damaged(stage: settings.Stage, folder: Path, entry: manifest.Entry) -> bool:
    """Whether what a stage made is no longer what it was."""
    out = out_of(folder, stage)
    if not isinstance(stage, Trained):
        file = out / (dataset.ROWS if isinstance(stage, Build) else metrics.TABLE)
        return not file.is_file() or sources.file_digest(file) != entry.output["sha256"]
    path = out / str(stage.steps)
    return not path.is_dir() or checkpoint.damage(path) is not None


# --------------------------------------------------------------------------- inputs


def load_weights(
    context: Context, stage: str, weights: str, *, dtype: str | None = "float32"
) -> Params:
    """Weights on the mesh, float32; `dtype` is that of a folder's that the run begins with.

    Raises:
      ValueError: they are missing or damaged; `stage`, which needs them, is named.
    """
    cfg, folder, mesh = context.run, context.folder, context.mesh
    if weights == FIRST:
        return parameters.first_params(cfg, mesh, dtype=dtype)
    try:
        steps = parameters.steps_of(cfg, weights)
        return parameters.load(cfg, folder, weights, mesh, which=steps).params
    except ValueError as error:
        raise ValueError(f"stage {stage} needs the weights of {weights}: {error}") from None


def asked_model(answers: Sampled, inputs: Inputs) -> restore.Restored:
    """The model that answers the problems of a `Build` stage."""
    if answers.run is not None:
        return restore.open_run(Path(answers.run), stage=answers.stage)
    return as_restored(inputs.context, inputs.weights, inputs.load())


def as_restored(context: Context, name: str, params: Params) -> restore.Restored:
    """The model of a stage of this run, as `restore.open_run` would give it."""
    stages = {stage.name: stage for stage in context.run.stages}
    return restore.Restored(
        run=context.run,
        stage=stages.get(name, context.run.stages[0]),
        step=0,
        tokenizer=context.tokenizer,
        mesh=context.mesh,
        params=params,
    )


def open_teacher(cfg: settings.Teacher | None, context: Context) -> Teacher | None:
    """The model of another run, on the mesh of this one; None where there is none.

    Raises:
      ValueError: it cannot be loaded, or has another vocabulary.
    """
    if cfg is None:
        return None
    axes = [f"mesh.{one.name}={getattr(context.run.mesh, one.name)}" for one in fields(Mesh)]
    found = restore.open_run(Path(cfg.run), stage=cfg.stage, overrides=axes)
    sizes = found.run.model.vocab_size, context.run.model.vocab_size
    if len(set(sizes)) > 1 or found.tokenizer.get_vocab() != context.tokenizer.get_vocab():
        raise ValueError(
            f"the teacher {cfg.run} must have the vocabulary of the model that it teaches: "
            f"{sizes[0]} and {sizes[1]} rows, and the same tokens"
        )
    return Teacher(model=found.run.model, params=found.params)


def rows_of(folder: Path, stage: str) -> Callable[[], settings.Rows]:
    """The source of the rows that a `Build` stage wrote."""
    return partial(sources.jsonl, folder / "data" / stage / dataset.ROWS)


def with_rows(value: Any, rows: Callable[[str], Callable[[], settings.Rows]]) -> Any:
    """A setting with a source in the place of each `Built`; itself where there is none in it."""
    return changed(value, lambda one: rows(one.stage) if isinstance(one, Built) else one)


def with_folder(value: Any, folder: Path) -> Any:
    """A setting in which the reward models of the run itself have its folder."""

    def change(one: Any) -> Any:
        own = isinstance(one, RewardModel) and one.run is None
        return replace(one, run=str(folder)) if own else one

    return changed(value, change)


def changed(value: Any, change: Callable[[Any], Any]) -> Any:
    """A setting with `change` of each of its parts; itself where that changes nothing.

    Parts are the arguments of partials, the items of mappings, lists and tuples, and the fields of
    records. A part that was changed is not looked into again.
    """
    new = change(value)
    if new is not value:
        return new
    inner = partial(changed, change=change)
    if isinstance(value, partial):
        args, keywords = inner(value.args), inner(value.keywords)
        same = args is value.args and keywords is value.keywords
        return value if same else partial(value.func, *args, **keywords)
    if isinstance(value, Mapping):
        items = {name: inner(item) for name, item in value.items()}
        return value if all(items[name] is value[name] for name in items) else items
    if isinstance(value, list | tuple):
        parts = [inner(item) for item in value]
        return value if all(map(operator.is_, parts, value)) else type(value)(parts)
    if is_dataclass(value) and not isinstance(value, type):
        given = {one.name: getattr(value, one.name) for one in fields(value) if one.init}
        parts = inner(given)
        return value if parts is given else replace(value, **parts)
    return value


def whole_or_fail(
    name: str, needed: str, folder: Path, entries: Mapping[str, manifest.Entry]
) -> None:
    """Passes if the rows of stage `needed` are those that it wrote.

    Raises:
      ValueError: they are missing or were changed; `name`, which needs them, is named.
    """
    file = folder / "data" / needed / dataset.ROWS
    if not file.is_file():
        raise ValueError(f"stage {name} needs the rows of {needed}: {file}: no such file")
    if sources.file_digest(file) != entries[needed].output["sha256"]:
        raise ValueError(
            f"stage {name} needs the rows of {needed}: {file} was changed after it was made"
        )
