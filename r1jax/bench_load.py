"""Times the loading of a Hugging Face folder beside the reading of its files.

python -m r1jax.bench_load FOLDER
python -m r1jax.bench_load FOLDER --gigabytes 4     writes a random model there first

A line for each repeat: `cat FILES > /dev/null`, then `hf.load`, seconds and GB/s. The first repeat
reads the disk, into memory that the process has not touched yet, and tells how far the process's
own memory went above the arrays at its highest. The others read the kernel's cache of the files,
into memory that the first has left; between the two they copy the files into arrays as they are,
which is the least that a load has to do, and `cat`, which keeps nothing, has not.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from r1jax import config, host
from r1jax.settings import Decoder

EVERY = 0.005  # seconds between two looks at the memory
PIECE = 2**24  # bytes that a thread reads at a time
POOL = 2**22  # random numbers that a random model consists of, again and again


@dataclass(frozen=True, kw_only=True)
class Loading:
    """What one load took: seconds of the clock and of the processors, and bytes."""

    seconds: float
    cpu_seconds: float
    arrays: int
    peak: int  # of the process's own memory, above that before

    @property
    def extra(self) -> int:
        """Bytes at the highest beside the arrays."""
        return self.peak - self.arrays


def write_random(folder: Path, cfg: Decoder) -> None:
    """Writes a folder of that model, bfloat16 from a normal distribution, in two files."""
    import jax.numpy as jnp
    import numpy as np

    from r1jax.models import hf, hf_config, hf_names, safetensors

    folder.mkdir(parents=True)
    text = json.dumps(hf_config.to_json(cfg, dtype="bfloat16"))
    (folder / "config.json").write_text(text)
    pool = np.random.default_rng(0).standard_normal(POOL, np.float32).astype(jnp.bfloat16)
    places = hf_names.places(cfg)
    where = {}
    for i, some in enumerate((places[: len(places) // 2], places[len(places) // 2 :])):
        file = f"model-{i + 1:05}-of-00002.safetensors"
        kinds = {place.name: (pool.dtype, place.shape) for place in some}
        safetensors.write(folder / file, kinds, (np.resize(pool, p.shape) for p in some))
        where |= dict.fromkeys(kinds, file)
    (folder / hf.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))


def of_size(gigabytes: float) -> Decoder:
    """Qwen3-1.7B with as many layers as make that many bytes of bfloat16."""
    from r1jax.models import decoder
    from r1jax.models.zoo import MODELS

    cfg = MODELS["qwen3-1.7b"]
    (group,) = cfg.groups
    one, two = (
        decoder.count_weights(replace(cfg, groups=(replace(group, count=n),))).total for n in (1, 2)
    )
    count = max(1, round((gigabytes * 1e9 / 2 - one) / (two - one)) + 1)
    return replace(cfg, groups=(replace(group, count=count),))


def own_memory() -> int:
    """Bytes of this process that are no file's. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def load(folder: Path) -> Loading:
    """Loads a folder, drops it again, and tells what that took."""
    import jax

    from r1jax.models import hf

    before, done = own_memory(), threading.Event()
    seen = [before]

    def watch() -> None:
        while not done.wait(EVERY):
            seen.append(own_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        began, cpu = time.perf_counter(), time.process_time()
        _, params = hf.load(folder)
        jax.block_until_ready(params)
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    finally:
        done.set()
        watcher.join()
    arrays = sum(x.nbytes for x in jax.tree.leaves(params))
    peak = max(*seen, own_memory()) - before
    return Loading(seconds=seconds, cpu_seconds=cpu_seconds, arrays=arrays, peak=peak)


def read(files: list[Path]) -> float:
    """Seconds of `cat FILES > /dev/null`."""
    began = time.perf_counter()
    subprocess.run(["cat", *files], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def copy(files: list[Path], threads: int) -> float:
    """Seconds of reading the files into arrays of the process and nothing else."""
    import numpy as np

    def fill(file: Path, first: int, piece: np.ndarray) -> None:
        with file.open("rb", buffering=0) as opened:
            opened.seek(first)
            got = 0
            while got < len(piece):
                got += opened.readinto(piece.data[got:])

    began = time.perf_counter()
    arrays = [np.empty(file.stat().st_size, np.uint8) for file in files]
    with ThreadPoolExecutor(threads) as pool:
        waiting = [
            pool.submit(fill, file, first, array[first : first + PIECE])
            for file, array in zip(files, arrays, strict=True)
            for first in range(0, len(array), PIECE)
        ]
        for each in waiting:
            each.result()
    return time.perf_counter() - began


def forget(files: list[Path]) -> None:
    """Takes files out of the kernel's cache."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def lines(folder: Path, repeats: int) -> Iterator[str]:
    """A line for each repeat."""
    from r1jax.models import hf

    files = sorted(folder.glob("*.safetensors"))
    size = sum(file.stat().st_size for file in files) / 1e9
    for repeat in range(repeats):
        if repeat == 0:
            forget(files)
        cat = read(files)
        if repeat == 0:
            forget(files)
        line = (
            f"{'disk ' if repeat == 0 else 'cache'} {size:.2f} GB | "
            f"cat {cat:6.2f} s {size / cat:6.2f} GB/s | "
        )
        if repeat > 0:
            copied = copy(files, hf.num_threads())
            line += f"copy {copied:6.2f} s {size / copied:6.2f} GB/s | "
        took = load(folder)
        line += (
            f"load {took.seconds:6.2f} s {size / took.seconds:6.2f} GB/s, "
            f"{took.cpu_seconds:.2f} s of processors"
        )
        if repeat == 0:
            line += f" | arrays {took.arrays / 2**20:.0f} MiB and {took.extra / 2**20:.0f} more"
        yield line


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m r1jax.bench_load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, help="write a random model of that size first")
    parser.add_argument("--repeats", type=int, default=4)
    return parser


@config.one_line_errors
def main() -> int:
    """Runs the command."""
    args = parser().parse_args()
    if args.gigabytes is not None and args.folder.exists():
        config.fail(f"{args.folder}: exists; need a new folder")
    host.prepare()
    if args.gigabytes is not None:
        write_random(args.folder, of_size(args.gigabytes))
    for line in lines(args.folder, args.repeats):
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
