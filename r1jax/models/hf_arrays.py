"""Weights while they are read: pieces of the files' tensors become arrays on devices.

A tensor of a file is one layer's, a weight here all layers'. Where the device's memory is the
host's, a piece is read from the file straight to where it belongs; elsewhere it is sent, and
written into the weight there.
"""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax.models.hf_names import Place, check_block
from r1jax.sharding import Leaf

LINE = 64  # bytes; XLA uses host memory as it is where it begins at a multiple


class Weight:
    """One weight in the making: what each device of this process holds of it.

    In host memory no page is touched before its numbers come: the first touch is the slow part.
    """

    def __init__(self, leaf: Leaf, dtype: np.dtype, where: jax.sharding.Sharding) -> None:
        self._leaf, self._where, self._writing = leaf, where, threading.Lock()
        self._ranges: dict[Any, list[tuple[int, int]]] = {}
        self._held: dict[Any, Any] = {}
        for device, index in where.addressable_devices_indices_map(leaf.shape).items():
            assert index is not None
            ranges = [s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True)]
            shape = tuple(high - low for low, high in ranges)
            make = _empty if on_host(device) else partial(jnp.zeros, device=device)
            self._ranges[device], self._held[device] = ranges, make(shape, dtype)

    def memory(self, place: Place, dtype: np.dtype) -> np.ndarray | None:
        """Where the piece's numbers belong, if that is one place and they need no change."""
        check_block(place, self._leaf.shape)
        if len(self._held) != 1:
            return None
        ((device, held),) = self._held.items()
        if not on_host(device) or held.shape != self._leaf.shape or held.dtype != dtype:
            return None
        ends = zip(place.at, place.block, strict=True)
        return held[tuple(slice(begin, begin + size) for begin, size in ends)]

    def fill(self, place: Place, array: np.ndarray) -> None:
        """Writes a tensor, or a piece of one, to where it belongs. Threads may do so at once."""
        check_block(place, self._leaf.shape)
        block = array.reshape(place.block)
        for device, ranges in self._ranges.items():
            cut, at = [], []
            for (low, high), begin, size in zip(ranges, place.at, block.shape, strict=True):
                cut.append(slice(max(low - begin, 0), max(min(high - begin, size), 0)))
                at.append(max(begin - low, 0))
            mine = block[tuple(cut)]
            if mine.size == 0:
                continue
            if on_host(device):
                there = tuple(slice(i, i + n) for i, n in zip(at, mine.shape, strict=True))
                copy(self._held[device][there], mine)
                continue
            sent = jax.block_until_ready(jax.device_put(mine, device))
            with self._writing:
                self._held[device] = _write(self._held[device], sent, [np.int32(i) for i in at])

    def array(self) -> jax.Array:
        """The whole weight, once every tensor is in.

        On a CPU its memory is numpy's: a program to which it is donated makes a new one.
        """
        held = [jax.device_put(x, device) for device, x in self._held.items()]
        return jax.make_array_from_single_device_arrays(self._leaf.shape, self._where, held)


def on_host(device: Any) -> bool:
    """Whether the device's memory is the host's."""
    return device.platform == "cpu"


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that XLA's CPU backend will take as it is.

    From 4 MB on, numpy asks the kernel for huge pages: the first touch is 5 times as fast.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + LINE, np.uint8)
    first = -raw.ctypes.data % LINE
    return raw[first : first + size].view(dtype).reshape(shape)


def copy(out: np.ndarray, block: np.ndarray) -> None:
    """Makes `out` equal to `block`, of the same shape."""
    if out.dtype == block.dtype:  # as whole numbers of the same bits, which numpy copies faster
        bits = np.dtype(f"u{out.itemsize}")
        out, block = out.view(bits), block.view(bits)
    np.copyto(out, block, casting="unsafe")


@partial(jax.jit, donate_argnums=0)
def _write(buffer: jax.Array, block: jax.Array, at: Sequence[jax.Array]) -> jax.Array:
    """The buffer with the block at that place, written in place.

    As whole numbers of the same bits: XLA may convert a buffer of bfloat16 to float32 and back as a
    whole, for every block.
    """
    bits = jnp.uint16 if buffer.dtype.itemsize == 2 else jnp.uint32
    as_bits = partial(jax.lax.bitcast_convert_type, new_dtype=bits)
    written = jax.lax.dynamic_update_slice(as_bits(buffer), as_bits(block.astype(buffer.dtype)), at)
    return jax.lax.bitcast_convert_type(written, buffer.dtype)
