"""Checkpoints of one stage: written in the background, checked before they are read.

A folder of checkpoints, with 40 updates done and then 20 more:
  40/ 60/        one checkpoint each:
    arrays/        the state, as orbax writes it
    meta.json      FORM, metrics, the caller's notes, and every array's name, dtype and shape
    SHA256SUMS     a line for each of these files; `sha256sum --check SHA256SUMS` reads it
  unfinished/    what is being written or deleted; whatever is left there is rubbish
  damaged/       checkpoints that did not pass their check

A number is the last thing that a checkpoint gets, by a rename: a process killed at any moment
leaves whole checkpoints behind, and `unfinished`.

The sums are there because orbax reads a flipped bit in an array's data without a word.
"""

import errno
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

SUMS = "SHA256SUMS"
# How a state's arrays are to be understood, where names and shapes do not tell. Without a form, or
# with 1, weights of matmuls are [in, out]; with 2, [out, in].
FORM = 2


class Saved(NamedTuple):
    """A checkpoint that was read."""

    step: int
    state: Any
    meta: dict[str, Any]
    metrics: dict[str, float]


@dataclass(kw_only=True)
class Store:
    """The checkpoints that one stage of a run writes. Made by `open_checkpoints`."""

    folder: Path
    keep: int
    best: str | None
    _thread: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
    )
    _pending: tuple[int, Future[None]] | None = None
    _newest: int | None = None

    def save(
        self,
        step: int,
        state: Any,
        meta: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Begins to write a checkpoint, and returns when `state` may be donated.

        `meta` is anything that JSON can hold. A step that this store saved or restored last is
        left as it is. If the save before is still being written, this waits for it.

        Raises:
          OSError: this one, or the one before, could not be written; checkpoints before it are
            whole.
        """
        self.wait()
        if step == self._newest:
            return
        metrics = {name: float(value) for name, value in (metrics or {}).items()}
        score = metrics.get(self.best, math.nan) if self.best else math.nan
        record = {
            "form": FORM,
            "step": step,
            "score": None if math.isnan(score) else score,
            "metrics": metrics,
            "meta": dict(meta),
            "arrays": _arrays(state),
        }
        text = json.dumps(record, indent=1)
        orbax = _orbax()
        context = orbax.Context()
        # Else a folder that cannot be made leaves threads that wait for it for five minutes.
        context.asynchronous.create_directories_asynchronously = False
        try:
            with context:
                response = orbax.save_async(self._unfinished(step) / "arrays", state)
        except (OSError, ValueError, RuntimeError) as error:
            raise self._failure(step, error) from error
        self._pending = step, self._thread.submit(self._finish, step, response, text)
        self._newest = step

    def restore(self, like: Any) -> Saved | None:
        """The newest checkpoint that is whole, laid out as `like`; None if there is none.

        `like` has the structure of the saved state; its leaves are arrays or ShapeDtypeStructs,
        whose shardings say where to put each array: not where it was when saved. A damaged
        checkpoint is named in a line on stderr and moved to `damaged/`.

        Raises:
          ValueError: the checkpoint has another form; or an array is missing, is not wanted, or
            has another dtype or shape.
        """
        self.wait()
        step = self._newest_whole() if jax.process_index() == 0 else None
        if jax.process_count() > 1:  # the first process decides for all
            told = np.asarray(-1 if step is None else step)
            step = int(multihost_utils.broadcast_one_to_all(told))
            step = None if step < 0 else step
        self._newest = step
        return None if step is None else _read(self.folder / str(step), like, whole=True)

    def wait(self) -> None:
        """Returns when the last save is complete. Raises OSError if it failed."""
        if self._pending is None:
            return
        (step, future), self._pending = self._pending, None
        error = future.exception()
        if error is not None:
            self._newest = None
            raise self._failure(step, error) from error

    def close(self) -> None:
        """As `wait`; nothing can be saved any more."""
        self._thread.shutdown()
        self.wait()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _unfinished(self, step: int) -> Path:
        return self.folder.absolute() / "unfinished" / str(step)

    def _failure(self, step: int, error: BaseException) -> OSError:
        return OSError(f"checkpoint {step} could not be saved in {self.folder}: {_reason(error)}")

    def _finish(self, step: int, response: Any, text: str) -> None:
        try:
            response.result()
            if jax.process_index() == 0:
                work = self._unfinished(step)
                _write(work / "meta.json", text.encode())
                _write(work / SUMS, _sums(work))
                work.rename(self.folder / str(step))
                self._prune()
        finally:
            if jax.process_index() == 0:
                shutil.rmtree(self.folder / "unfinished", ignore_errors=True)

    def _prune(self) -> None:
        """Deletes all but the newest `keep` checkpoints and the best one."""
        steps = numbers(self.folder)
        kept = {*steps[-self.keep :], best_step(self.folder)}
        for step in steps:
            if step not in kept:
                # First out of sight, at once: half a checkpoint must not look like one.
                gone = (self.folder / str(step)).rename(self._unfinished(step))
                shutil.rmtree(gone)

    def _newest_whole(self) -> int | None:
        bad, good = [], None
        for step in reversed(numbers(self.folder)):
            why = damage(self.folder / str(step))
            if why is None:
                good = step
                break
            bad.append((step, why, _set_aside(self.folder / str(step))))
        used = "no other is left" if good is None else f"using {good}"
        for step, why, aside in bad:
            where = f"checkpoint {step} in {self.folder}"
            print(f"{where} is damaged ({why}); set aside as {aside}; {used}", file=sys.stderr)
        return good


def open_checkpoints(folder: Path | str, *, keep: int = 2, best: str | None = None) -> Store:
    """Opens a folder to save to, made where missing; rubbish of a killed process is deleted.

    The newest `keep` checkpoints stay, and the one whose metric `best` was highest (of equals, the
    newest). Only one process, or one group of JAX processes, may have the folder open; `load` needs
    no store.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    folder = Path(folder)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "unfinished", ignore_errors=True)
    return Store(folder=folder, keep=keep, best=best)


def load(
    folder: Path | str, which: int | Literal["last", "best"], like: Mapping[str, Any]
) -> Saved:
    """One checkpoint, or a part of one: `like={"params": ...}` leaves all else on disk.

    Nothing is changed in the folder, so a run may be writing to it. `like` is as in
    `Store.restore`, for the parts that are wanted.

    Raises:
      ValueError: there is no such checkpoint, it is damaged or has another form, or an array is
        missing or has another dtype or shape.
    """
    folder = Path(folder)
    steps = numbers(folder) if folder.is_dir() else []
    if which == "last":
        step = steps[-1] if steps else None
    else:
        step = best_step(folder) if which == "best" else which
    if step not in steps:
        known = f"there are: {', '.join(map(str, steps))}" if steps else "there are none"
        raise ValueError(f"no checkpoint {which!r} in {folder}; {known}")
    path = folder / str(step)
    why = damage(path)
    if why is not None:
        raise ValueError(f"checkpoint {step} in {folder} is damaged ({why})")
    return _read(path, dict(like), whole=False)


def numbers(folder: Path) -> list[int]:
    """The steps that have a checkpoint in `folder`, in order; damaged ones too."""
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted(int(name) for name in names if name.isascii() and name.isdecimal())


def best_step(folder: Path) -> int | None:
    """The step whose score was highest (of equals, the newest); None if none has a score."""
    scores = []
    for step in numbers(folder) if folder.is_dir() else []:
        try:
            score = json.loads((folder / str(step) / "meta.json").read_bytes())["score"]
        except (OSError, ValueError, LookupError, TypeError):
            continue  # damaged, hence not the best; who reads it will be told
        if score is not None:
            scores.append((score, step))
    return max(scores)[1] if scores else None


def damage(path: Path) -> str | None:
    """What is wrong with the files of a checkpoint, in a few words; None if nothing is."""
    try:
        expected, found = (path / SUMS).read_bytes(), _sums(path)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except OSError as error:
        if error.errno != errno.EIO:  # the disk's fault; not permissions, nor a lost mount
            raise
        return _reason(error)
    if found == expected:
        return None
    before, after = _table(expected), _table(found)
    for name in sorted({*before, *after}):
        if name not in after:
            return f"{name} is missing"
        if name not in before:
            return f"{name} is not in {SUMS}"
        if before[name] != after[name]:
            return f"{name} does not match its sum"
    return f"{SUMS} is malformed"


def outline(tree: Any) -> Any:
    """Shapes, dtypes and shardings of a tree's arrays: enough to restore it, without its memory."""

    def describe(x: Any) -> jax.ShapeDtypeStruct:
        # orbax would put an array without one where it was saved, whatever devices there are now.
        sharding = x.sharding or SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(describe, tree)


# --------------------------------------------------------------------------- files


def _read(path: Path, like: Any, *, whole: bool) -> Saved:
    """Reads a checkpoint that passed its check."""
    record = json.loads((path / "meta.json").read_bytes())
    form = record.get("form", 1)
    if form != FORM:  # a square weight would be read the wrong way round without a word
        raise ValueError(
            f"{path} has form {form}, need {FORM}: another version of r1jax wrote it, whose "
            f"r1jax.convert makes a folder of it that every version reads"
        )
    saved, wanted = record["arrays"], _arrays(like)
    for name, need in wanted.items():
        if name not in saved:
            raise ValueError(f"{path} has no {name}, need {need}")
        if saved[name] != need:  # orbax would cast it without a word
            raise ValueError(f"{name} is {saved[name]} in {path}, need {need}")
    for name in saved:
        if whole and name not in wanted:
            raise ValueError(f"{path} has {name}, which is not in the state to restore")
    orbax = _orbax()
    context = orbax.Context()
    context.pytree.loading.partial_load = not whole
    with context:
        state = orbax.load(path.absolute() / "arrays", outline(like))
    return Saved(record["step"], state, record["meta"], record["metrics"])


def _arrays(tree: Any) -> dict[str, str]:
    """Name -> dtype and shape of each array, such as `params/embed: float32[100,96]`."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{x.dtype}[{','.join(map(str, x.shape))}]"
        )
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def _sums(path: Path) -> bytes:
    """The lines of SHA256SUMS for all files under `path` but itself."""
    lines = []
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name != SUMS:
            with file.open("rb") as opened:
                lines.append(f"{hashlib.file_digest(opened, 'sha256').hexdigest()}  {name}\n")
    return "".join(lines).encode()


def _table(sums: bytes) -> dict[str, str]:
    pairs = (line.partition("  ") for line in sums.decode(errors="replace").split("\n"))
    return {name: digest for digest, _, name in pairs if name}


def _write(file: Path, data: bytes) -> None:
    with file.open("wb") as opened:
        opened.write(data)
        opened.flush()
        os.fsync(opened.fileno())


def _set_aside(path: Path) -> Path:
    folder = path.parent / "damaged"
    folder.mkdir(exist_ok=True)
    names = (path.name if n == 1 else f"{path.name}-{n}" for n in count(1))
    return path.rename(next(folder / name for name in names if not (folder / name).exists()))


def _reason(error: BaseException) -> str:
    """Why it failed: what the system said, if it did, or else the deepest cause's first line."""
    chain: list[BaseException] = [error]
    while (below := chain[-1].__cause__ or chain[-1].__context__) and below not in chain:
        chain.append(below)
    for link in chain:
        if isinstance(link, OSError) and link.strerror:
            return link.strerror
        if code := re.search(r"os_error_code='(\d+)'", str(link)):  # tensorstore's
            return os.strerror(int(code[1]))
    return str(chain[-1]).partition("\n")[0] or type(chain[-1]).__name__


def _orbax() -> Any:
    """orbax, whose log is kept quiet: one full disk is 200 lines there, and raised as well."""
    from orbax.checkpoint import v1  # here, since it takes most of a second

    logging.getLogger("absl").addFilter(_not_from_orbax)  # the same filter is added once only
    return v1


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return f"{os.sep}orbax{os.sep}" not in record.pathname
