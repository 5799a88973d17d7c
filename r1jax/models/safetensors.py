"""The safetensors file format: a header of JSON, then the tensors' bytes.

Read straight to where it belongs, or through a memory map, so that a tensor costs memory only
while it is looked at. Unlike the format's own numpy front end this reads FP8, and writes without
having all tensors at once.
"""

import json
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

# Names in the files -> numpy's (those that numpy lacks come with JAX).
DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": np.dtype(jnp.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
ALIGNED = 64  # the tensors begin at a multiple of so many bytes
LONGEST_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Where a tensor lies. `start` is in bytes from the beginning of the file."""

    file: Path
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, first: int, count: int) -> "Entry":
        """A run of the tensor's rows."""
        skipped = first * math.prod(self.shape[1:]) * self.dtype.itemsize
        return replace(self, shape=(count, *self.shape[1:]), start=self.start + skipped)


def entries(file: Path) -> dict[str, Entry]:
    """The tensors of a file by name. Only the header is read, and checked against the file's size.

    Raises:
      ValueError: the file is truncated or otherwise not of this format; the line names the tensor
        where there is one.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > min(size - 8, LONGEST_HEADER):
            raise ValueError(f"{file}: truncated, or no safetensors file: {size} bytes")
        text = opened.read(length)
    try:
        header = json.loads(text)
        if not isinstance(header, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its header cannot be read ({error})") from None
    header.pop("__metadata__", None)
    found = {name: _entry(file, name, record, 8 + length) for name, record in header.items()}
    end = 8 + length
    for entry in sorted(found.values(), key=lambda entry: (entry.start, entry.size)):
        if entry.start != end:
            raise ValueError(
                f"{file}: tensor {entry.name} begins at byte {entry.start}, expected {end}"
            )
        end += entry.size
        if end > size:
            raise ValueError(
                f"{file}: truncated: tensor {entry.name} ends at byte {end}, the file at {size}"
            )
    if end != size:
        raise ValueError(f"{file}: {size - end} bytes follow its last tensor")
    return found


def _entry(file: Path, name: str, record: Any, begin: int) -> Entry:
    try:
        code, shape = record["dtype"], tuple(record["shape"])
        first, last = record["data_offsets"]
        fine = all(type(n) is int and n >= 0 for n in (*shape, first, last))
    except (KeyError, TypeError, ValueError):
        fine, code, shape, first, last = False, None, (), 0, 0
    if not fine:
        raise ValueError(f"{file}: tensor {name} has a malformed header entry")
    if code not in DTYPES:
        raise ValueError(f"{file}: tensor {name} has dtype {code}; known: {', '.join(DTYPES)}")
    entry = Entry(file=file, name=name, dtype=DTYPES[code], shape=shape, start=begin + first)
    if last - first != entry.size:
        raise ValueError(
            f"{file}: tensor {name} has {last - first} bytes, "
            f"{code}{list(shape)} needs {entry.size}"
        )
    return entry


def read_into(entry: Entry, out: np.ndarray) -> None:
    """Fills `out`, of the tensor's dtype and size: twice as fast as from a map of the file.

    `out` may be cut from a larger array: each run of its memory is a read of its own.

    Raises:
      ValueError: the file has become shorter.
    """
    apart = 0
    while not out[(0,) * apart].flags.c_contiguous:
        apart += 1
    with entry.file.open("rb", buffering=0) as opened:
        opened.seek(entry.start)
        for index in np.ndindex(out.shape[:apart]):
            rest = out[index].reshape(-1).view(np.uint8).data
            while rest:
                count = opened.readinto(rest)
                if not count:
                    raise ValueError(
                        f"{entry.file}: truncated: tensor {entry.name} is not all there"
                    )
                rest = rest[count:]


class Reader:
    """Arrays of some files. They are views of the files: valid while the files are unchanged."""

    def __init__(self) -> None:
        self._maps: dict[Path, mmap.mmap] = {}

    def __call__(self, entry: Entry) -> np.ndarray:
        """The tensor, read when it is looked at."""
        if entry.size == 0:
            return np.zeros(entry.shape, entry.dtype)
        if entry.file not in self._maps:
            with entry.file.open("rb") as opened:
                made = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps.setdefault(entry.file, made)  # another thread may have been faster
        count = math.prod(entry.shape)
        flat = np.frombuffer(self._maps[entry.file], entry.dtype, count, entry.start)
        return flat.reshape(entry.shape)

    def forget(self, entry: Entry) -> None:
        """Gives a tensor's memory back; it can be read again."""
        if entry.file in self._maps and hasattr(mmap, "MADV_DONTNEED"):
            first = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
            length = entry.start + entry.size - first
            self._maps[entry.file].madvise(mmap.MADV_DONTNEED, first, length)


def write(
    file: Path,
    kinds: Mapping[str, tuple[np.dtype, Sequence[int]]],
    arrays: Iterable[np.ndarray],
) -> None:
    """Writes a file of tensors with those names, dtypes and shapes; `arrays` in the same order.

    One array is alive at a time if `arrays` makes them one by one.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    end = 0
    for name, (dtype, shape) in kinds.items():
        size = math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": CODES[np.dtype(dtype)],
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), array in zip(kinds.items(), arrays, strict=True):
            assert array.dtype == dtype and array.shape == tuple(shape), name
            opened.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
