"""Low-rank adapters as a tree of their own: `{name: (a, b)}`, name being a weight's path.

The adapted weight is w + scale * a @ b, whatever the shape of w: a meets its inputs and b its
outputs, and stacked layers and experts have an adapter each. Training differentiates through
`merge`; export calls it once.

Source: LoRA, arXiv:2106.09685.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import settings
from r1jax.models import decoder, safetensors
from r1jax.sharding import Leaf, is_leaf, normal, zeros
from r1jax.types import Params

Adapters = dict[str, tuple[jax.Array, jax.Array]]

# The last key of a weight's path -> how many of its dimensions are stacked, and are inputs.
# Stacks of experts have one more.
TARGETS = {
    "qkv": 1,
    "q": 1,
    "q_down": 1,
    "q_up": 1,
    "kv_down": 1,
    "kv_up": 1,
    "gate": 1,
    "up": 1,
    "down": 1,
}
OUT = {settings.Attention: 3, settings.Latent: 2}  # inputs of a mixer's `out`: head dimensions


def adapter_leaves(
    cfg: settings.Decoder, *, rank: int, targets: Sequence[str] = ("qkv", "out")
) -> dict[str, tuple[Leaf, Leaf]]:
    """Leaves of the adapters of every weight whose path ends in one of `targets`.

    `b` starts at 0, so an adapted model starts as the model.

    Raises:
      ValueError: the rank is below 1, or no weight of the model has such a name.
    """
    if rank < 1:
        raise ValueError(f"rank must be >= 1, got {rank}")
    found: dict[str, tuple[Leaf, Leaf]] = {}
    used = set()
    for name, leaf in _named(decoder.leaves(cfg)).items():
        word = name.rpartition("/")[2]
        if word not in targets or not name.startswith("groups/"):
            continue
        used.add(word)
        stacked, inputs = _dims(cfg, name, leaf.shape)
        batch, axes = leaf.shape[:stacked], leaf.axes
        a = Leaf(
            (*batch, *leaf.shape[stacked : stacked + inputs], rank),
            (*axes[: stacked + inputs], None),
            normal(rank**-0.5),
        )
        b = Leaf(
            (*batch, rank, *leaf.shape[stacked + inputs :]),
            (*axes[:stacked], None, *axes[stacked + inputs :]),
            zeros,
        )
        found[name] = (a, b)
    for target in targets:
        if target not in used:
            raise ValueError(f"no weight of this model is called {target!r}")
    return found


def merge(cfg: settings.Decoder, params: Params, adapters: Adapters, *, scale: float) -> Params:
    """The weights with their adapters added; products are float32, dtypes stay.

    Raises:
      ValueError: an adapter is of no weight that the model has.
    """
    names = _named(params)
    for name in adapters:
        if name not in names:
            raise ValueError(f"the model has no weight {name!r}, of which there is an adapter")

    def one(path: tuple, weight: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in adapters:
            return weight
        a, b = (x.astype(jnp.float32) for x in adapters[name])
        stacked, _ = _dims(cfg, name, weight.shape)
        batch, rank = weight.shape[:stacked], a.shape[-1]
        product = a.reshape(*batch, -1, rank) @ b.reshape(*batch, rank, -1)
        moved = weight.astype(jnp.float32) + scale * product.reshape(weight.shape)
        return moved.astype(weight.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


def write(file: Path, adapters: Adapters) -> None:
    """Writes adapters as one safetensors file of `<name>/a` and `<name>/b`."""
    named = {
        f"{name}/{part}": x
        for name, ab in adapters.items()
        for part, x in zip("ab", ab, strict=True)
    }
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
    """How many leading dimensions of a weight are stacked, and how many after them are inputs."""
    _, g, *_, word = name.split("/")
    group = cfg.groups[int(g)]
    if word == "out":
        return 1, OUT[type(group.mixer)]
    experts = isinstance(group.mlp, settings.Experts) and word in ("gate", "up", "down")
    stacked = 2 if experts and "shared" not in name else 1
    assert len(shape) > stacked, name
    return stacked, TARGETS[word]
