"""How the process uses the machine it is on, set before JAX is imported."""

import ctypes
import os
import sys

# glibc's names and numbers, malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4

MAX_DEVICES = 8  # more would leave each too few rows; JAX_NUM_CPU_DEVICES says otherwise
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false"


def prepare() -> None:
    """What every command does before it imports JAX."""
    keep_freed_memory()
    one_device_per_core()


def one_device_per_core() -> None:
    """Makes JAX's CPU backend a device per core, each with one thread, unless the user chose.

    Rows and slots are then split over the cores, which meet once in a while, where one device's
    threads meet in every small operation: sleeping and waking them takes longer than the work
    (BENCHMARKS.md). Devices are a power of two, as the counts that they split usually are.

    XLA's pool has as many threads as there are devices. One that waits in a collective can have a
    piece of another device's matmul in its queue: a deadlock, met once in some thousand updates.
    So nothing that is split over these devices alone may hold a collective (see
    `loops.step.sum_parts`), and tests of those that do have more threads (NPROC).
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    count = min(1 << ((cores or 1).bit_length() - 1), MAX_DEVICES)
    flags = os.environ.get("XLA_FLAGS", "")
    if "JAX_NUM_CPU_DEVICES" in os.environ or "xla_cpu_multi_thread_eigen" in flags:
        return
    os.environ["JAX_NUM_CPU_DEVICES"] = str(count)
    os.environ["XLA_FLAGS"] = f"{flags} {ONE_THREAD}".strip()


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
    never = -1  # a number would be an int's, 2 GB at most
    wishes = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, never), (M_TOP_PAD, 64 * 2**20))
    return all(libc.mallopt(name, value) == 1 for name, value in wishes)
