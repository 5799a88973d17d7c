"""Low-rank adapters as a tree of their own: `{name: (a, b)}`, name being a weight's path.

The adapted weight is w + scale * b @ a, whatever the shape of w: a meets its inputs and b its
outputs, and stacked layers and experts have an adapter each. Training differentiates through
`attach`; the rollout engine and export get what `merge` gives.

Source: LoRA, arXiv:2106.09685.
"""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import settings
from r1jax.models import decoder, safetensors
from r1jax.models.adapted import Adapted, is_adapted, stacked_dims, total
from r1jax.sharding import Leaf, is_leaf, normal, zeros
from r1jax.types import Params

Adapters = dict[str, tuple[jax.Array, jax.Array]]

# The last keys of the paths of weights that may have an adapter.
TARGETS = ("qkv", "out", "q", "q_down", "q_up", "kv_down", "kv_up", "gate", "up", "down")
OUT = {settings.Attention: 3, settings.Latent: 2}  # dimensions that are inputs of a mixer's `out`


def adapter_leaves(
    cfg: settings.Decoder, *, rank: int, targets: Sequence[str] = ("qkv", "out")
) -> dict[str, tuple[Leaf, Leaf]]:
    """Leaves of the adapters of every weight whose path ends in one of `targets`.

    `b` starts at 0, so an adapted model starts as the model.

    Raises:
      ValueError: the rank is below 1, or no weight of the model has such a name and TARGETS too.
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    found: dict[str, tuple[Leaf, Leaf]] = {}
    used = set()
    for name, leaf in _named(decoder.leaves(cfg)).items():
        word = name.rpartition("/")[2]
        if word not in targets or word not in TARGETS or not name.startswith("groups/"):
            continue
        used.add(word)
        stacked, inputs = _dims(cfg, name, leaf.shape)
        shape, axes = leaf.shape, leaf.axes
        a = Leaf(
            (*shape[:stacked], rank, *shape[-inputs:]),
            (*axes[:stacked], None, *axes[-inputs:]),
            normal(rank**-0.5),
        )
        b = Leaf((*shape[:-inputs], rank), (*axes[:-inputs], None), zeros)
        found[name] = (a, b)
    for target in targets:
        if target not in used:
            raise ValueError(f"no weight of this model is called {target!r}")
    return found


def attach(params: Params, adapters: Adapters, *, scale: float) -> Params:
    """The weights with `Adapted` in the place of those that have an adapter. Nothing is computed.

    Raises:
      ValueError: an adapter is of no weight that the model has, or of one of another shape.
    """
    names = _named(params)
    for name in adapters:
        if name not in names:
            raise ValueError(f"the model has no weight {name!r}, of which there is an adapter")

    def one(path: tuple, weight: jax.Array) -> jax.Array | Adapted:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in adapters:
            return weight
        a, b = adapters[name]
        found = Adapted(weight=weight, a=a, b=b, scale=scale)
        stacked = stacked_dims(found)
        whole = (*b.shape[:-1], *a.shape[stacked + 1 :])
        again = (*b.shape[:stacked], b.shape[-1])
        if stacked < 1 or whole != weight.shape or a.shape[: stacked + 1] != again:
            raise ValueError(
                f"the adapter of {name} does not fit: {a.shape} and {b.shape} for {weight.shape}"
            )
        return found

    return jax.tree_util.tree_map_with_path(one, params)


def merge(params: Params, adapters: Adapters, *, scale: float, dtype: Any = None) -> Params:
    """The weights with their adapters added. Sums are float32, and then of `dtype`: None, theirs.

    A sum lies on the devices as its weight does. Weights without an adapter are the same arrays.

    Raises:
      ValueError: as `attach`.
    """
    parts, tree = jax.tree.flatten(attach(params, adapters, scale=scale), is_leaf=is_adapted)
    found = [x for x in parts if is_adapted(x)]
    places = tuple(x.weight.sharding for x in found)
    dtypes = tuple(jnp.dtype(dtype or x.weight.dtype) for x in found)
    sums = iter(_totals(places, dtypes)(found))
    return jax.tree.unflatten(tree, [next(sums) if is_adapted(x) else x for x in parts])


@cache
def _totals(
    places: tuple[Any, ...], dtypes: tuple[Any, ...]
) -> Callable[[list[Adapted]], list[jax.Array]]:
    def totals(found: list[Adapted]) -> list[jax.Array]:
        return [total(x).astype(dtype) for x, dtype in zip(found, dtypes, strict=True)]

    return jax.jit(totals, out_shardings=list(places))


def write(file: Path, adapters: Adapters, *, scale: float = 1.0) -> None:
    """Writes adapters as one safetensors file of `<name>/a` and `<name>/b`.

    Each `b` is multiplied by `scale`, so that whoever merges them needs none.
    """
    named = {}
    for name, (a, b) in adapters.items():
        named[f"{name}/a"], b = np.asarray(a), np.asarray(b)
        named[f"{name}/b"] = b * b.dtype.type(scale)
    kinds = {name: (np.dtype(x.dtype), x.shape) for name, x in named.items()}
    safetensors.write(file, kinds, (np.asarray(x) for x in named.values()))


def read(file: Path) -> Adapters:
    """The adapters that `write` wrote.

    Raises:
      ValueError: the file is no such file, or half of an adapter is missing.
    """
    found, reader = safetensors.entries(file), safetensors.Reader()
    out: Adapters = {}
    for name in found:
        base, _, part = name.rpartition("/")
        if part not in ("a", "b") or not {f"{base}/a", f"{base}/b"} <= found.keys():
            raise ValueError(f"{file}: tensor {name} is no half of an adapter's pair")
        # Copies: the file may change.
        a, b = (jnp.array(reader(found[f"{base}/{part}"])) for part in "ab")
        out[base] = (a, b)
    return out


def _named(tree: Params) -> dict[str, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in pairs}


def _dims(cfg: settings.Decoder, name: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """How many leading dimensions of a weight are stacked, and how many at its end are inputs."""
    _, g, *_, word = name.split("/")
    group = cfg.groups[int(g)]
    if word == "out":
        return 1, OUT[type(group.mixer)]
    experts = isinstance(group.mlp, settings.Experts) and word in ("gate", "up", "down")
    stacked = 2 if experts and "shared" not in name else 1
    assert len(shape) > stacked, name
    return stacked, 1
