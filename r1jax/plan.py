"""How a run would lie on a number of devices: its rows and bytes, with none of them at hand."""

import math
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import comparison, settings, sharding
from r1jax.local import Local
from r1jax.models import decoder, lora
from r1jax.reward_model import RewardModel
from r1jax.rollout import cache
from r1jax.settings import Build, Compare, Sampled, Trained
from r1jax.sharding import RULES, Leaf, is_leaf, num_weights

Sizes = dict[str, int]  # devices along each axis of the mesh


class Held(NamedTuple):
    """Bytes on one device, by what they are."""

    weights: int = 0
    optimizer: int = 0
    frozen: int = 0  # a reference, reward models of the run, or what adapters are added to
    rollout: int = 0  # the weights that answers are sampled with, in the compute dtype
    cache: int = 0  # of slots, and of the prompts of a rollout
    gradients: int = 0  # the sum over micro-batches, and those of one
    remat: int = 0  # what recomputed layers begin with; other activations come on top

    @property
    def always(self) -> int:
        """While the stage runs."""
        return self.weights + self.optimizer + self.frozen

    @property
    def sampling(self) -> int:
        """While it samples, but for one token's activations."""
        return self.always + self.rollout + self.cache if self.rollout else 0

    @property
    def updating(self) -> int:
        """While it learns, but for activations inside a layer."""
        return self.always + self.gradients + self.remat if self.gradients else 0


def plan(cfg: settings.Run, devices: int) -> list[str]:
    """Lines of text: the mesh, and for each stage what a device would hold.

    Raises:
      ValueError: the mesh's axes do not multiply to `devices`.
    """
    sizes = sharding.mesh_sizes(cfg.mesh, devices)
    held = {stage.name: held_by(cfg.model, stage, sizes) for stage in cfg.stages}
    notes = [
        f"note: {stage.name}: {one}"
        for stage in cfg.stages
        for one in (*uneven(stage, sizes), *not_counted(stage))
    ]
    split = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    where = f"on {devices:,} device{'s' * (devices > 1)} ({split or 'nothing is split'})"
    return [*table({name: one for name, one in held.items() if any(one)}, where), *notes]


def table(held: dict[str, Held], where: str) -> list[str]:
    """Lines of a table, a stage to a line, its columns as wide as their heads."""
    most = max((max(one.sampling, one.updating) for one in held.values()), default=0)
    unit, size = ("GB", 1e9) if most >= 1e9 else ("MB", 1e6)
    names = (*Held._fields, "sampling", "updating")
    first = max(map(len, held), default=0)
    lines = [f"{where}, {unit} on each:", " ".join([" " * first, *(f"{n:>9}" for n in names)])]
    for name, one in held.items():
        numbers = [getattr(one, column) / size for column in names]
        cells = [f"{number:9,.1f}" if number else f"{'-':>9}" for number in numbers]
        lines.append(" ".join([f"{name:<{first}}", *cells]))
    return lines


# --------------------------------------------------------------------------- a stage


def held_by(model: settings.Decoder, stage: settings.Stage, sizes: Sizes) -> Held:
    """What one device holds in a stage, the optimizer's state lying as its weights do."""
    leaves = decoder.leaves(model)
    held = of_training(model, stage, sizes) if isinstance(stage, Trained) else Held()
    engine = engine_of(stage)
    if engine is None:
        return held
    compute = jnp.dtype(model.dtype).itemsize
    return held._replace(
        weights=held.weights or bytes_of(leaves, sizes),
        frozen=held.frozen + bytes_of(leaves, sizes) * len({*own_reward_models(stage)}),
        rollout=bytes_of(as_sampled(leaves), sizes, itemsize=compute),
        cache=cache_bytes(model, engine, sizes, prompts=prompts_of(stage)),
    )


def of_training(model: settings.Decoder, stage: Trained, sizes: Sizes) -> Held:
    """What one device holds to learn."""
    leaves: Any = decoder.leaves(model)
    frozen = 0
    if stage.lora is not None:
        frozen = bytes_of(leaves, sizes, itemsize=jnp.dtype(model.dtype).itemsize)
        leaves = lora.adapter_leaves(model, rank=stage.lora.rank, targets=stage.lora.targets)
    held = learned(leaves, stage.optimizer, sizes)
    critic, head = getattr(stage, "critic", None), getattr(stage, "head", None)
    if critic is not None:
        more = {} if critic.leaves is None else critic.leaves(model)
        if critic.trunk == "policy":
            held = learned((leaves, more), stage.optimizer, sizes)
        else:
            second = learned((leaves, more), critic.optimizer, sizes)
            held = held._replace(
                weights=held.weights + second.weights,
                optimizer=held.optimizer + second.optimizer,
                gradients=max(held.gradients, second.gradients),  # they learn in turn
            )
            frozen += second.weights * critic.reference
    elif head is not None:
        held = learned((leaves, head.leaves(model)), stage.optimizer, sizes)
    if stage.reference not in (False, "none"):
        frozen += bytes_of(leaves, sizes)
    return held._replace(frozen=frozen, remat=remat_bytes(model, stage, sizes))


def learned(leaves: Any, optimizer: Any, sizes: Sizes) -> Held:
    """Weights that are trained, with their gradients and what the optimizer keeps of them."""
    weights = bytes_of(leaves, sizes)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), named(leaves), is_leaf=is_leaf
    )
    state = jax.tree.leaves(jax.eval_shape(optimizer(1000).init, shapes))
    numbers = sum(math.prod(x.shape) * x.dtype.itemsize for x in state)
    ratio = numbers / (num_weights(leaves) * 4)
    return Held(weights=weights, gradients=2 * weights, optimizer=round(weights * ratio))


def named(leaves: Any) -> dict[str, Any]:
    """A tree as optimizers see it: of mappings, whose names say what decays."""
    parts = leaves if isinstance(leaves, tuple) else (leaves,)
    return {f"part{i}": part for i, part in enumerate(parts)}


def bytes_of(leaves: Any, sizes: Sizes, *, itemsize: int | None = None) -> int:
    """Bytes of a tree of Leaf on one device; `itemsize` is that of another dtype than theirs."""

    def of_one(leaf: Leaf) -> int:
        places = sharding.spec(leaf.shape, leaf.axes, sizes)
        over = [(split,) if isinstance(split, str) else split or () for split in places]
        parts = math.prod(sizes[axis] for split in over for axis in split)
        each = np.dtype(leaf.dtype).itemsize if itemsize is None else itemsize
        return math.prod(leaf.shape) // parts * each

    return sum(of_one(leaf) for leaf in jax.tree.leaves(leaves, is_leaf=is_leaf))


def engine_of(stage: settings.Stage) -> settings.Engine | None:
    """The engine that samples with weights of this run in a stage."""
    if isinstance(stage, settings.Supervised):
        return None if stage.evaluation is None else stage.evaluation.engine
    if isinstance(stage, Build):
        answers = stage.answers
        return answers.engine if isinstance(answers, Sampled) and answers.run is None else None
    return stage.engine


def prompts_of(stage: settings.Stage) -> int:
    """The most prompts that a stage answers in one rollout."""
    if isinstance(stage, settings.Reinforce):
        return max(stage.prompts, stage.evaluate_rows)
    if isinstance(stage, settings.Supervised):
        return 0 if stage.evaluation is None else stage.evaluation.rows
    if isinstance(stage, Compare):
        return comparison.ANSWERS_PER_SLOT * stage.engine.slots
    return stage.at_once


def own_reward_models(stage: settings.Stage) -> list[str]:
    """The stages of this run whose reward models a stage asks."""
    return [str(one.stage) for one in settings.inside(stage, RewardModel) if one.run is None]


def not_counted(stage: settings.Stage) -> list[str]:
    """Models beside this run's own, whose sizes it does not say."""
    others = [f"the model of {one.run}" for one in settings.inside(stage, RewardModel) if one.run]
    others += [f"the model in {one.folder}" for one in settings.inside(stage, Local)]
    if isinstance(stage, Trained) and stage.teacher is not None:
        others.append(f"the teacher, {stage.teacher.run}")
    if isinstance(stage, Build) and isinstance(stage.answers, Sampled) and stage.answers.run:
        others.append(f"the model of {stage.answers.run}, which answers")
    return [f"not counted: {one}" for one in dict.fromkeys(others)]


# --------------------------------------------------------------------------- parts


def as_sampled(leaves: Any) -> Any:
    """Leaves as the engine holds them: whole, but for experts and what `tensor` splits."""
    split = [name for name, axes in RULES.items() if axes == ("tensor",)] + ["experts"]

    def one(leaf: Leaf) -> Leaf:
        return replace(leaf, axes=tuple(axis if axis in split else None for axis in leaf.axes))

    return jax.tree.map(one, leaves, is_leaf=is_leaf)


def cache_bytes(
    model: settings.Decoder, engine: settings.Engine, sizes: Sizes, *, prompts: int
) -> int:
    """Bytes of a rollout's cache on one device: a column for each token that a slot may have, and
    for each token of the prompts, from which slots are filled."""
    slots = -(-engine.slots // batch_parts(sizes))
    columns = engine.max_prompt + engine.max_new
    stored = -(-prompts // batch_parts(sizes))
    mixers = [group.mixer for group in model.groups for _ in range(group.count)]
    if engine.draft != "none":
        mixers.append(model.groups[-1].mixer)  # the drafting module has a layer
        columns += 1  # a last guess is written too
    wide = engine.draft == "none"
    total = 0
    for mixer in mixers:
        for rows, width, of_slots in ((slots, columns, wide), (stored, engine.max_prompt, False)):
            make = partial(cache.empty, model, mixer, rows, width, wide=of_slots)
            for array, axes in zip(jax.eval_shape(make), cache.kind(mixer).axes, strict=True):
                leaf = Leaf(array.shape, axes, sharding.zeros, array.dtype)
                total += bytes_of(leaf, {"tensor": sizes["tensor"]})
    return total


def remat_bytes(model: settings.Decoder, stage: Trained, sizes: Sizes) -> int:
    """Bytes on one device of what each layer begins with, kept to compute it again; 0 where all of
    a layer is kept."""
    if model.remat != "layer":
        return 0
    parts = batch_parts(sizes)
    rows = stage.micro_rows if stage.micro_rows % parts else stage.micro_rows // parts
    shape = (sum(group.count for group in model.groups), rows, stage.row_length, model.dim)
    axes = (None, None, None, "remat")
    return bytes_of(Leaf(shape, axes, sharding.zeros, jnp.dtype(model.dtype)), sizes)


def batch_parts(sizes: Sizes) -> int:
    """In how many parts the mesh splits rows and slots."""
    return math.prod(sizes[axis] for axis in RULES["batch"])


def uneven(stage: settings.Stage, sizes: Sizes) -> list[str]:
    """Rows and slots that the devices cannot share alike."""
    parts = batch_parts(sizes)
    found = []
    rows = getattr(stage, "micro_rows", parts)
    if rows % parts:
        found.append(f"micro_rows={rows} is no multiple of {parts} devices: each computes them all")
    engine = engine_of(stage)
    if engine is not None and engine.slots % parts:
        more = -(-engine.slots // parts) * parts
        found.append(f"slots={engine.slots} are made {more}, as many on each of {parts} devices")
    return found
