"""How the process uses the machine it is on, set before JAX is imported."""

import ctypes
import sys

# glibc's names and numbers, malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep large freed blocks for the next allocation; True if it will.

    XLA's CPU client allocates the buffers of every program run anew. By default glibc asks the
    kernel for each and gives it back, so a run first touches all its memory page by page: writing
    44 MB then takes 6 times as long (BENCHMARKS.md). Memory use stays at its peak instead.
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # not every libc has it, nor a use for it
        return False
    largest = 2**31 - 1
    wishes = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, largest), (M_TOP_PAD, 64 * 2**20))
    return all(libc.mallopt(name, value) == 1 for name, value in wishes)
