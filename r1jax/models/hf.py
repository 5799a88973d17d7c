"""Models in Hugging Face folders: config.json, *.safetensors with an index, tokenizer.

`load` streams: each piece of a tensor goes from the file to the devices that hold a part of it, and
is forgotten before the next. Everything is checked before the first array is made.
"""

import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from r1jax import settings, sharding
from r1jax.models import decoder, hf_arrays, hf_config, hf_names, safetensors
from r1jax.models.hf_arrays import Weight
from r1jax.models.hf_names import Place
from r1jax.models.safetensors import Entry
from r1jax.sharding import Leaf, is_leaf
from r1jax.types import Params

INDEX, WHOLE = "model.safetensors.index.json", "model.safetensors"
SHARD = 5_000_000_000  # bytes of tensors in one file, unless one is larger
PIECE = 2**23  # numbers of a tensor that one thread takes at a time
MAX_THREADS = 16  # each holds a piece
SCALE = "_scale_inv"  # what the name of an FP8 weight's scales ends with
FLOAT32 = "router_bias"  # the weight that is float32 whatever the others are
log = logging.getLogger(__name__)

FLOATS = {np.dtype(t) for t in (jnp.float32, jnp.float16, jnp.bfloat16, jnp.float8_e4m3fn)}


def load(
    folder: Path | str, *, dtype: Any = None, mesh: jax.sharding.Mesh | None = None
) -> tuple[settings.Decoder, Params]:
    """The model of a folder and its weights, on the mesh (by default on the first device).

    `dtype` is that of the weights; None leaves them as they are in the files, and FP8 becomes
    bfloat16. A router's bias is float32 with any `dtype`. Where the config speaks of
    multi-token-prediction modules and the files have no tensor of any, as those that transformers
    saves, the model has none; a warning says so.

    Raises:
      ValueError: something is missing, too much, misshapen, truncated or not supported; one line
        that names the file and the tensor. Nothing is on a device by then.
    """
    folder = Path(folder)
    cfg = hf_config.read(folder / "config.json")
    found = files(folder)
    cfg = _without_absent_modules(folder, cfg, found)
    wanted = check(folder, cfg, found)
    check_tokenizer(folder, cfg)
    dtypes = _dtypes(folder, wanted, found, dtype)
    read = safetensors.Reader()
    for place in wanted:
        if place.same_as is not None:
            _check_same(read, found[place.name], found[place.same_as])
    leaves = decoder.leaves(cfg)
    weights = {
        path: Weight(leaf, dtypes[path], _sharding(leaf, mesh))
        for path, leaf in _by_path(leaves).items()
    }
    own = [place for place in wanted if place.same_as is None]
    own.sort(key=lambda place: (found[place.name].file, found[place.name].start))
    with ThreadPoolExecutor(num_threads()) as pool:
        for _ in pool.map(partial(_fill, read, found, weights), _pieces(own)):
            pass  # or raises what a thread raised
    arrays = [weight.array() for weight in weights.values()]
    return cfg, jax.tree.unflatten(jax.tree.structure(leaves, is_leaf=is_leaf), arrays)


def _without_absent_modules(
    folder: Path, cfg: settings.Decoder, found: Mapping[str, Entry]
) -> settings.Decoder:
    """The model without prediction modules if the files have no tensor of any."""
    first = sum(group.count for group in cfg.groups)
    modules = tuple(f"model.layers.{first + i}." for i in range(cfg.num_mtp))
    if not modules or any(name.startswith(modules) for name in found):
        return cfg
    log.warning(
        "%s: config.json has num_nextn_predict_layers %d, but no file has a tensor %s*: loaded "
        "without multi-token prediction",
        folder,
        cfg.num_mtp,
        modules[0],
    )
    return replace(cfg, num_mtp=0)


def num_threads() -> int:
    """As many as there are processors for this process, which copying alone can keep busy."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(count or 1, MAX_THREADS)


def _pieces(wanted: Sequence[Place]) -> Iterator[tuple[Place, int]]:
    for place in wanted:
        yield from hf_names.pieces(place, PIECE)


def _fill(
    read: safetensors.Reader,
    found: Mapping[str, Entry],
    weights: Mapping[hf_names.Path, Weight],
    piece: tuple[Place, int],
) -> None:
    """One piece from its file to where it belongs."""
    place, first = piece
    entry = found[place.name].rows(first, place.shape[0])
    scale, weight = found.get(place.name + SCALE), weights[place.path]
    own = weight.memory(place, entry.dtype)
    if own is not None:
        safetensors.read_into(entry, own)
        return
    array = read(entry) if scale is None else dequantize(read(entry), read(scale), first)
    weight.fill(place, array)
    read.forget(entry)


def dequantize(weight: np.ndarray, scale: np.ndarray, first: int = 0) -> np.ndarray:
    """An FP8 weight times the scale of each 128 x 128 block, bfloat16; a product is rounded once.

    Blocks at the lower and right edge may be smaller. `weight` may be a run of the rows that
    `scale` is for: those from `first` on. Source: DeepSeek-V3's README_WEIGHTS.md.
    """
    rows, columns = hf_config.FP8_BLOCK
    table = np.arange(256, dtype=np.uint8).view(weight.dtype).astype(np.float32)
    out = np.empty(weight.shape, jnp.bfloat16)
    for i in range(first // rows, -(-(first + len(weight)) // rows)):
        block = slice(max(i * rows - first, 0), (i + 1) * rows - first)
        wide = np.repeat(scale[i], columns)[: weight.shape[1]]
        out[block] = table[weight[block].view(np.uint8)] * wide
    return out


# --------------------------------------------------------------------------- what is in a folder


def files(folder: Path) -> dict[str, Entry]:
    """The tensors of a folder by name, from its index if it has one.

    Raises:
      ValueError: a file is missing, truncated or malformed, or not what the index says.
    """
    index = folder / INDEX
    if not index.is_file():
        if not (folder / WHOLE).is_file():
            raise ValueError(f"{folder}: holds neither {WHOLE} nor {INDEX}")
        return safetensors.entries(folder / WHOLE)
    try:
        where = json.loads(index.read_bytes())["weight_map"]
        fine = all(isinstance(file, str) and Path(file).name == file for file in where.values())
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: cannot be read ({type(error).__name__}: {error})") from None
    if not fine:
        raise ValueError(f"{index}: weight_map must name files of the same folder")
    found: dict[str, Entry] = {}
    for file in sorted(set(where.values())):
        if not (folder / file).is_file():
            name = next(name for name, its in where.items() if its == file)
            raise ValueError(f"{folder / file}: missing; it holds tensor {name} by {INDEX}")
        for name, entry in safetensors.entries(folder / file).items():
            if where.get(name) != file:
                raise ValueError(f"{folder / file}: holds tensor {name}, which {INDEX} lacks there")
            found[name] = entry
    for name, file in where.items():
        if name not in found:
            raise ValueError(f"{folder / file}: lacks tensor {name}, which {INDEX} puts there")
    return found


def check(folder: Path, cfg: settings.Decoder, found: Mapping[str, Entry]) -> list[Place]:
    """The places of the tensors, if `found` is all that the model needs and nothing else.

    Raises:
      ValueError: a tensor is missing, extra, or has another shape or an unknown dtype.
    """
    wanted = hf_names.places(cfg)
    for name, same in hf_names.repeats(cfg).items():
        if name in found:
            shape = found[same].shape if same in found else ()
            wanted.append(hf_names.repeated(name, shape, same))
    names = {place.name for place in wanted}
    for place in wanted:
        if place.name not in found:
            raise ValueError(f"{folder}: tensor {place.name} is in none of its files")
        entry = found[place.name]
        if entry.shape != place.shape:
            raise ValueError(
                f"{entry.file}: tensor {entry.name} has shape {list(entry.shape)}, "
                f"config.json needs {list(place.shape)}"
            )
        if entry.dtype not in FLOATS:
            raise ValueError(f"{entry.file}: tensor {entry.name} is {entry.dtype}, need floats")
        if entry.dtype.itemsize == 1:
            _check_scale(entry, found)
            names.add(entry.name + SCALE)
    for name, entry in found.items():
        if name not in names and not name.endswith(".rotary_emb.inv_freq"):  # old, and computed
            raise ValueError(f"{entry.file}: tensor {name} is no part of this model")
    return wanted


def _check_scale(entry: Entry, found: Mapping[str, Entry]) -> None:
    name = entry.name + SCALE
    if name not in found:
        raise ValueError(f"{entry.file}: tensor {entry.name} is FP8 and its {name} is missing")
    scale = found[name]
    rows, columns = hf_config.FP8_BLOCK
    need = (
        () if len(entry.shape) != 2 else (-(-entry.shape[0] // rows), -(-entry.shape[1] // columns))
    )
    if scale.shape != need or scale.dtype != np.float32:
        raise ValueError(
            f"{scale.file}: tensor {name} is {scale.dtype}{list(scale.shape)}, "
            f"need float32{list(need)}"
        )


def check_tokenizer(folder: Path, cfg: settings.Decoder) -> None:
    """Passes if the folder has no tokenizer.json or every token in it has an embedding.

    Raises:
      ValueError: there are more tokens than embeddings, or the file cannot be read.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_bytes())
        vocabulary = content["model"]["vocab"]
        ids = [token["id"] for token in content.get("added_tokens") or ()]
        if isinstance(vocabulary, dict):
            ids += vocabulary.values()
        else:  # unigram: a list of pieces
            ids.append(len(vocabulary) - 1)
        size = max(ids, default=-1) + 1
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: cannot be read ({type(error).__name__}: {error})") from None
    if size > cfg.vocab_size:
        raise ValueError(
            f"{file}: {size} tokens, but model.embed_tokens.weight has {cfg.vocab_size} rows"
        )


def _check_same(read: safetensors.Reader, entry: Entry, other: Entry) -> None:
    """Passes if two tensors hold the same bytes; a piece at a time."""
    ours, theirs = read(entry), read(other)
    equal = ours.dtype == theirs.dtype and ours.shape == theirs.shape
    step = max(1, PIECE * len(ours) // max(ours.size, 1))
    for i in range(0, ours.shape[0] if equal else 0, step):
        a, b = (np.ascontiguousarray(x[i : i + step]).view(np.uint8) for x in (ours, theirs))
        equal = equal and np.array_equal(a, b)
        read.forget(entry)
        read.forget(other)
    if not equal:
        raise ValueError(
            f"{entry.file}: tensor {entry.name} differs from {other.name}, which it repeats"
        )


def _dtypes(
    folder: Path, wanted: Sequence[Place], found: Mapping[str, Entry], dtype: Any
) -> dict[hf_names.Path, np.dtype]:
    """The dtype that each weight will have."""
    out: dict[hf_names.Path, np.dtype] = {}
    for place in wanted:
        if place.same_as is not None:
            continue
        entry = found[place.name]
        kept = np.dtype(jnp.bfloat16) if entry.dtype.itemsize == 1 else entry.dtype
        if dtype is not None:
            kept = np.dtype(jnp.float32 if place.path[-1] == FLOAT32 else dtype)
        if out.setdefault(place.path, kept) != kept:
            raise ValueError(
                f"{entry.file}: tensor {entry.name} is {kept}, others of its kind are "
                f"{out[place.path]}; choose a dtype"
            )
    return out


# --------------------------------------------------------------------------- places of weights


def _by_path(leaves: Params) -> dict[hf_names.Path, Leaf]:
    pairs = jax.tree_util.tree_leaves_with_path(leaves, is_leaf=is_leaf)
    return {tuple(_key(k) for k in path): leaf for path, leaf in pairs}


def _key(key: Any) -> Any:
    return key.idx if isinstance(key, jax.tree_util.SequenceKey) else key.key


def _sharding(leaf: Leaf, mesh: jax.sharding.Mesh | None) -> jax.sharding.Sharding:
    if mesh is None:
        return SingleDeviceSharding(jax.local_devices()[0])
    return sharding.shardings(leaf, mesh)


# --------------------------------------------------------------------------- writing


def save(
    folder: Path | str,
    cfg: settings.Decoder,
    params: Params,
    tokenizer: Any = None,
    *,
    shard: int = SHARD,
) -> None:
    """Writes a folder that `load`, transformers and others read. Dtypes are those of `params`.

    Files of up to `shard` bytes of tensors, and an index if there are several. The folder appears
    under its name when it is complete.

    Raises:
      ValueError: the folder exists and is not empty, no Hugging Face family has such layers, or an
        array lies partly on another process.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists; need a new or empty folder")
    weights = {
        tuple(_key(k) for k in path): weight
        for path, weight in jax.tree_util.tree_leaves_with_path(params)
    }
    wanted = hf_names.places(cfg)
    config = hf_config.to_json(cfg, dtype=str(params["embed"].dtype))
    work = folder.absolute().with_name(folder.name + ".unfinished")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    _write_json(work / "config.json", config)
    if tokenizer is not None:
        tokenizer.save_pretrained(work)
    _write_json(work / "generation_config.json", _generation(tokenizer))
    sources = {place.name: place for place in wanted}
    plan = _split(wanted, sources, weights, shard)
    where = {}
    for i, some in enumerate(plan):
        file = WHOLE if len(plan) == 1 else f"model-{i + 1:05}-of-{len(plan):05}.safetensors"
        kinds = {p.name: (_source(p, sources, weights).dtype, p.shape) for p in some}
        safetensors.write(work / file, kinds, _tensors(some, sources, weights))
        where |= {place.name: file for place in some}
    if len(plan) > 1:
        total = sum(_size(place, sources, weights) for place in wanted)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(work / INDEX, index)
    if folder.exists():
        folder.rmdir()
    work.rename(folder)


def _source(
    place: Place, sources: Mapping[str, Place], weights: Mapping[hf_names.Path, jax.Array]
) -> jax.Array:
    """The weight that a tensor is cut from."""
    own = place if place.same_as is None else sources[place.same_as]
    return weights[own.path]


def _size(place: Place, sources: Mapping[str, Place], weights: Mapping[Any, jax.Array]) -> int:
    return int(np.prod(place.shape)) * _source(place, sources, weights).dtype.itemsize


def _split(
    wanted: Sequence[Place],
    sources: Mapping[str, Place],
    weights: Mapping[hf_names.Path, jax.Array],
    shard: int,
) -> list[list[Place]]:
    """The tensors of each file, in order."""
    plan: list[list[Place]] = [[]]
    filled = 0
    for place in wanted:
        size = _size(place, sources, weights)
        if plan[-1] and filled + size > shard:
            plan.append([])
            filled = 0
        plan[-1].append(place)
        filled += size
    return plan


def _tensors(
    some: Sequence[Place],
    sources: Mapping[str, Place],
    weights: Mapping[hf_names.Path, jax.Array],
) -> Iterator[np.ndarray]:
    """The tensors of one file, one at a time on the host."""
    for place in some:
        own = place if place.same_as is None else sources[place.same_as]
        yield _tensor(own, weights[own.path])


def _tensor(place: Place, weight: jax.Array) -> np.ndarray:
    """A tensor as the file has it, from the devices that hold its parts."""
    if not weight.is_fully_addressable:
        raise ValueError(f"{place.name}: a part of it is on another process; gather it first")
    out = np.empty(place.shape, weight.dtype)
    block = out.reshape(place.block)
    for shard in weight.addressable_shards:
        if shard.replica_id:
            continue
        ranges = [s.indices(n)[:2] for s, n in zip(shard.index, weight.shape, strict=True)]
        there, here = [], []
        for (low, high), begin, size in zip(ranges, place.at, block.shape, strict=True):
            first, last = max(low, begin), min(high, begin + size)
            there.append((first - low, max(last - first, 0)))
            here.append(slice(first - begin, max(last, first) - begin))
        if all(size for _, size in there):
            starts, sizes = zip(*there, strict=True)
            found = _read(shard.data, [np.int32(at) for at in starts], sizes)
            hf_arrays.copy(block[tuple(here)], np.asarray(found))
    return out


@partial(jax.jit, static_argnums=2)
def _read(data: jax.Array, at: Sequence[jax.Array], size: tuple[int, ...]) -> jax.Array:
    return jax.lax.dynamic_slice(data, at, size)


def _generation(tokenizer: Any) -> dict[str, Any]:
    """generation_config.json: which tokens begin, end and fill up a text."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {} if tokenizer is None else {name: getattr(tokenizer, name) for name in names}
    return {name: value for name, value in ids.items() if value is not None}


def _write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
