"""How a run would lie on a number of devices: its rows and bytes, with none of them at hand."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import settings, sharding
from r1jax.models import decoder, lora
from r1jax.rollout import cache
from r1jax.settings import Build, Compare, Sampled, Trained
from r1jax.sharding import RULES, Leaf, is_leaf, num_weights

Sizes = dict[str, int]  # devices along each axis of the mesh


class Held(NamedTuple):
    """Bytes on one device, by what they are."""

    weights: int = 0
    optimizer: int = 0
    frozen: int = 0  # a reference, or what adapters are added to
    rollout: int = 0  # the weights that answers are sampled with, in the compute dtype
    cache: int = 0
    gradients: int = 0
    layers: int = 0  # what recomputed layers begin with; other activations come on top

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
        return self.always + self.gradients + self.layers if self.gradients else 0


def plan(cfg: settings.Run, devices: int) -> list[str]:
    """Lines of text: the mesh, and for each stage what a device would hold.

    Raises:
      ValueError: the mesh's axes do not multiply to `devices`.
    """
    sizes = sharding.mesh_sizes(cfg.mesh, devices)
    asked = [
        stage
        for stage in cfg.stages
        if not isinstance(stage, Build | Compare) or samples_here(stage)
    ]
    held = {stage.name: held_by(cfg.model, stage, sizes) for stage in asked}
    notes = [f"note: {stage.name}: {one}" for stage in asked for one in uneven(stage, sizes)]
    split = ", ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    where = f"on {devices:,} device{'s' * (devices > 1)} ({split or 'nothing is split'})"
    return [*table(held, where), *notes]


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


def samples_here(stage: settings.Stage) -> bool:
    """Whether a stage that trains nothing asks a model of this run."""
    if isinstance(stage, Compare):
        return True
    answers = stage.answers if isinstance(stage, Build) else None
    return isinstance(answers, Sampled) and answers.run is None


def held_by(model: settings.Decoder, stage: settings.Stage, sizes: Sizes) -> Held:
    """What one device holds in a stage, the optimizer's state lying as its weights do."""
    own = decoder.leaves(model)
    compute = jnp.dtype(model.dtype).itemsize
    asked = engine_of(stage)
    rollout = 0 if asked is None else bytes_of(as_sampled(own), sizes, itemsize=compute)
    kept = 0 if asked is None else cache_bytes(model, asked, sizes)
    if not isinstance(stage, Trained):
        return Held(rollout=rollout, cache=kept)

    frozen = 0
    trained: Any = own
    if stage.lora is not None:
        frozen = bytes_of(own, sizes, itemsize=compute)
        trained = lora.adapter_leaves(model, rank=stage.lora.rank, targets=stage.lora.targets)
    held = learned(trained, stage.optimizer, sizes)
    copies = stage.reference not in (False, "none")
    critic, own_head = getattr(stage, "critic", None), getattr(stage, "head", None)
    if critic is not None:
        head = {} if critic.leaves is None else critic.leaves(model)
        if critic.trunk == "policy":
            held = learned((trained, head), stage.optimizer, sizes)
        else:
            beside = learned((trained, head), critic.optimizer, sizes)
            held = held._replace(
                weights=held.weights + beside.weights,
                optimizer=held.optimizer + beside.optimizer,
                gradients=max(held.gradients, beside.gradients),  # they learn in turn
            )
            frozen += beside.weights * critic.reference
    elif own_head is not None:
        held = learned((trained, own_head.leaves(model)), stage.optimizer, sizes)
    frozen += bytes_of(trained, sizes) * copies
    layers = layer_bytes(model, stage, sizes)
    return held._replace(frozen=frozen, rollout=rollout, cache=kept, layers=layers)


def learned(leaves: Any, optimizer: Any, sizes: Sizes) -> Held:
    """Weights that are trained, with their gradients and what the optimizer keeps of them."""
    weights = bytes_of(leaves, sizes)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), named(leaves), is_leaf=is_leaf
    )
    state = jax.tree.leaves(jax.eval_shape(optimizer(1000).init, shapes))
    numbers = sum(math.prod(x.shape) * x.dtype.itemsize for x in state)
    ratio = numbers / (num_weights(leaves) * 4)
    return Held(weights=weights, gradients=weights, optimizer=round(weights * ratio))


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
        return stage.answers.engine if isinstance(stage.answers, Sampled) else None
    return stage.engine


def as_sampled(leaves: Any) -> Any:
    """Leaves as the engine holds them: whole, but for experts and what `tensor` splits."""
    kept = [name for name, split in RULES.items() if split == ("tensor",)] + ["experts"]

    def one(leaf: Leaf) -> Leaf:
        return replace(leaf, axes=tuple(axis if axis in kept else None for axis in leaf.axes))

    return jax.tree.map(one, leaves, is_leaf=is_leaf)


def cache_bytes(model: settings.Decoder, asked: settings.Engine, sizes: Sizes) -> int:
    """Bytes of the rollout's cache on one device: a column for each token that a slot may have."""
    slots = -(-asked.slots // batch_parts(sizes))
    columns = asked.max_prompt + asked.max_new
    total = 0
    for group in model.groups:
        made = jax.eval_shape(
            lambda mixer=group.mixer: cache.empty(model, mixer, slots, columns, wide=True)
        )
        axes = cache.kind(group.mixer).axes
        for array, names in zip(made, axes, strict=True):
            inner = {"tensor": sizes["tensor"]}
            leaf = Leaf(array.shape, names, sharding.zeros, array.dtype)
            total += group.count * bytes_of(leaf, inner)
    return total


def layer_bytes(model: settings.Decoder, stage: Trained, sizes: Sizes) -> int:
    """Bytes on one device of what is kept before each layer to compute it again; 0 where all of a
    layer is kept."""
    if model.remat != "layer":
        return 0
    rows = -(-stage.micro_rows // batch_parts(sizes))
    shape = (sum(group.count for group in model.groups), rows, stage.row_length, model.dim)
    kept = Leaf(shape, (None, None, None, "kept"), sharding.zeros, jnp.dtype(model.dtype))
    return bytes_of(kept, sizes)


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
    asked = engine_of(stage)
    if asked is not None and asked.slots % parts:
        more = -(-asked.slots // parts) * parts
        found.append(f"slots={asked.slots} are made {more}, as many on each of {parts} devices")
    return found
