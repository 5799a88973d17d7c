"""One description of each weight, and from it shapes, initial values and places on a mesh."""

import logging
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from r1jax import settings
from r1jax.types import Params

log = logging.getLogger(__name__)

Init = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]

AXES = ("data", "fsdp", "tensor", "expert", "context", "stage")

# Logical axis of a weight or an activation -> mesh axes that split it, each for the first dimension
# that asks for it: weights that are no expert's lie spread over `expert` as over `fsdp`.
RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert"),
    "embed": ("fsdp", "expert"),
    "vocab": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "remat": ("tensor",),
}


@dataclass(frozen=True)
class Leaf:
    """One weight before it exists. Not a registered pytree node, hence a leaf of trees.

    `axes` names each dimension as RULES do; one that is None is not split.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: Init
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        assert len(self.shape) == len(self.axes), (self.shape, self.axes)


def normal(std: float) -> Init:
    """Initial values from a normal distribution of that standard deviation."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def zeros(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initial values 0."""
    del key
    return jnp.zeros(shape, dtype)


def ones(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Initial values 1."""
    del key
    return jnp.ones(shape, dtype)


def mesh_sizes(cfg: settings.Mesh, count: int) -> dict[str, int]:
    """How many of `count` devices lie along each axis of AXES.

    Raises:
      ValueError: the axes do not multiply to `count`, or devices are along an axis over which RULES
        split nothing.
    """
    sizes = [getattr(cfg, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and count % known == 0:
        sizes[sizes.index(-1)] = count // known
    if min(sizes) < 1 or math.prod(sizes) != count:
        given = ", ".join(f"{a}={getattr(cfg, a)}" for a in AXES)
        raise ValueError(f"mesh axes must multiply to the {count} devices there are, got {given}")
    for axis, size in zip(AXES, sizes, strict=True):
        if size > 1 and not any(axis in split for split in RULES.values()):
            raise ValueError(f"mesh.{axis} must be 1: nothing is split over it, got {size}")
    return dict(zip(AXES, sizes, strict=True))


def make_mesh(cfg: settings.Mesh) -> jax.sharding.Mesh:
    """The mesh over all devices, with every axis of AXES.

    Raises:
      ValueError: as `mesh_sizes`.
    """
    sizes = tuple(mesh_sizes(cfg, jax.device_count()).values())
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def is_leaf(x: Any) -> bool:
    return isinstance(x, Leaf)


def spec(
    shape: tuple[int, ...], axes: tuple[str | None, ...], mesh_shape: dict[str, int]
) -> PartitionSpec:
    """Mesh axes for each dimension by RULES. A dimension that they do not divide stays whole."""
    out = []
    taken: set[str] = set()
    for size, axis in zip(shape, axes, strict=True):
        free = [a for a in (RULES[axis] if axis else ()) if a not in taken]
        split = tuple(a for a in free if mesh_shape.get(a, 1) > 1)
        parts = math.prod(mesh_shape[a] for a in split)
        if size % parts:
            say_once(f"{axis} of size {size} is not split: {parts} parts do not divide it")
            split = ()
        taken |= {*split}
        out.append(split or None)
    return PartitionSpec(*out)


@cache
def say_once(text: str) -> None:
    """A warning, which many weights have alike."""
    log.warning(text)


def shardings(leaves: Any, mesh: jax.sharding.Mesh) -> Any:
    """The tree of NamedSharding of a tree of Leaf."""
    sizes = dict(mesh.shape)
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, spec(leaf.shape, leaf.axes, sizes)),
        leaves,
        is_leaf=is_leaf,
    )


def abstract(leaves: Any, mesh: jax.sharding.Mesh) -> Any:
    """The tree of ShapeDtypeStruct with shardings: for planning and for restoring."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        leaves,
        shardings(leaves, mesh),
        is_leaf=is_leaf,
    )


def init(leaves: Any, key: jax.Array, mesh: jax.sharding.Mesh | None = None) -> Params:
    """Initial weights, made in place on the mesh. A weight depends on the key and its path only."""
    paths = jax.tree_util.tree_leaves_with_path(leaves, is_leaf=is_leaf)
    treedef = jax.tree.structure(leaves, is_leaf=is_leaf)

    def make(key: jax.Array) -> Params:
        values = []
        for path, leaf in paths:
            own = jax.random.fold_in(key, zlib.crc32(jax.tree_util.keystr(path).encode()))
            values.append(leaf.init(own, leaf.shape, leaf.dtype))
        return jax.tree.unflatten(treedef, values)

    if mesh is None:
        return jax.jit(make)(key)
    return jax.jit(make, out_shardings=shardings(leaves, mesh))(key)


def free_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh that `jax.set_mesh` chose, without those that a `shard_map`
    around has taken; empty where there is no mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types, strict=True)
    return {name: size for name, size, kind in axes if kind != AxisType.Manual}


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out by RULES on the mesh that `jax.set_mesh` chose; unchanged without one.

    Within a `shard_map` only the axes that it leaves alone count.
    """
    sizes = free_axes()
    if math.prod(sizes.values()) == 1:
        return x
    return jax.lax.with_sharding_constraint(x, spec(x.shape, axes, sizes))


def put(tree: Any, mesh: jax.sharding.Mesh, *axes: str | None) -> Any:
    """Host arrays placed on the mesh; `axes` name their leading dimensions, the rest is whole."""
    sizes = dict(mesh.shape)

    def place(x: Any) -> jax.Array:
        x = np.asarray(x)
        names = (axes + (None,) * x.ndim)[: x.ndim]
        return jax.device_put(x, NamedSharding(mesh, spec(x.shape, names, sizes)))

    return jax.tree.map(place, tree)


def num_weights(leaves: Any) -> int:
    """Count of numbers in a tree of Leaf or of arrays."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(leaves, is_leaf=is_leaf))
