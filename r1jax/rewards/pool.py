"""Worker processes that score answers beside the device, and that no answer can stop.

    with open_pool(workers=4) as pool:
        values = pool.map(accuracy, rows, answers)

A worker is a fresh Python that imports what the function needs and nothing else; it is never a
fork of this process, which would inherit the threads and locks of JAX, and the program's main
module is not imported again. Each answer has a deadline. A worker that passes it, or dies, is
killed with all that it started, and replaced (`r1jax.rewards.worker`). The answer it was at is
None, and counted.
"""

import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from r1jax.rewards.worker import CLOCKS, GONE, LOAD

START_SECONDS = 120.0  # for a new worker, its imports among them
GRACE = 2.0  # seconds after its deadline in which a worker is to end by itself
MOST_AT_ONCE = 16  # answers sent to a worker in one message


@dataclass(kw_only=True)
class Pool:
    """Workers, which are started when they are needed, and what became of their work.

    May be used by several threads, which then wait for each other.
    """

    workers: int  # 0: all is computed in this process, without limits
    seconds: float  # by the clock, for one answer
    memory: int | None = None  # bytes of address space of a worker
    warm: Callable[[], None] | None = None  # what a worker does once before its first answer
    done: int = 0  # answers that have a value
    timeouts: int = 0  # answers that took too long
    crashes: int = 0  # answers at which a worker died or ran out of memory or of stack
    _alive: list["_Worker"] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def map(
        self,
        function: Callable[[Any, Any], Any],
        rows: Sequence[Any],
        answers: Sequence[Any],
        *,
        seconds: float | None = None,
        cpu_seconds: float | None = None,
    ) -> list[Any]:
        """`function(row, answer)` for each pair, in order; None where it was given up.

        That is after `seconds` by the clock (the pool's, if None) or `cpu_seconds` of processor
        time (any number, if None), which do not depend on what else the machine does. Values are
        None, numbers, text, and lists and dicts of these; tuples come back as lists.

        Raises:
          ValueError: the function raised it; or it cannot be imported by a worker.
          RuntimeError: the function raised anything else, which is named with its traceback; or
            workers die before they begin.
        """
        pairs = list(zip(rows, answers, strict=True))
        if not self.workers:
            return [self._here(function, row, answer) for row, answer in pairs]
        work = _Work(
            code=_pickled(function),
            pairs=pairs,
            seconds=self.seconds if seconds is None else seconds,
            cpu_seconds=cpu_seconds,
            waiting=deque(range(len(pairs))),
            values=[None] * len(pairs),
        )
        with self._lock:
            try:
                while work.waiting or any(worker.tasks for worker in self._alive):
                    self._give(work)
                    for worker in self._listen():
                        self._hear(worker, work)
                    for worker in [worker for worker in self._alive if worker.late()]:
                        self._bury(worker, work, late=True)
            except BaseException:
                self.close()  # replies to what was given up must not reach the next call
                raise
        return work.values

    def start(self, count: int | None = None) -> None:
        """Starts workers until there are `count`, all if None; does not wait for them."""
        while len(self._alive) < (self.workers if count is None else count):
            self._alive.append(_start(self.memory, self.warm))

    def close(self) -> None:
        """Kills all workers. The next `map` starts new ones."""
        while self._alive:
            self._alive.pop().kill()

    def processes(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [worker.keeper.pid for worker in self._alive]

    def _here(self, function: Callable[[Any, Any], Any], row: Any, answer: Any) -> Any:
        try:
            value = function(row, answer)
        except (MemoryError, RecursionError):
            self.crashes += 1
            return None
        self.done += 1
        return value

    def _give(self, work: "_Work") -> None:
        """Gives each worker that has nothing to do the function, or else the next answers.

        They are several at first, so that no worker waits for this process, and one at the end, so
        that no worker waits for another.
        """
        for worker in list(self._alive):
            while not worker.tasks and worker in self._alive and worker.pipe.poll():
                self._hear(worker, work)
        at_work = sum(bool(worker.tasks) for worker in self._alive)
        self.start(min(self.workers, at_work + len(work.waiting)))
        for worker in self._alive:
            if worker.busy() or not work.waiting:
                continue
            if worker.code != work.code:
                worker.load(work.code)
            else:
                count = min(MOST_AT_ONCE, 1 + len(work.waiting) // (4 * self.workers))
                worker.begin([work.waiting.popleft() for _ in range(count)], work)

    def _listen(self) -> list["_Worker"]:
        """The workers that have something to say, or died; waits until the next deadline."""
        busy = [worker for worker in self._alive if worker.busy()]
        if not busy:
            return []
        limit = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        heard = wait([worker.pipe for worker in busy], limit)
        return [worker for worker in busy if worker.pipe in heard]

    def _hear(self, worker: "_Worker", work: "_Work") -> None:
        """Takes what a worker says.

        Raises:
          ValueError, RuntimeError: what the function raised.
        """
        try:
            kind, value = json.loads(worker.pipe.recv_bytes())
        except GONE:
            self._bury(worker, work)
            return
        if kind == "refused":
            raise ValueError(value)
        if kind == "failed":
            raise RuntimeError(value)
        if kind == "ready":
            worker.child = value
        elif kind == "loaded":
            worker.loading = False
        elif kind == "value":
            work.values[worker.tasks.popleft()] = value
            worker.deadline = time.monotonic() + work.seconds + GRACE
            self.done += 1
        elif value == -signal.SIGKILL:
            self._bury(worker, work)  # from outside, perhaps in the middle of a message
        else:
            assert kind == "ended", kind
            self._count(worker, work, late=-value in CLOCKS)

    def _bury(self, worker: "_Worker", work: "_Work", *, late: bool = False) -> None:
        """Kills a worker that is dead, or so late that it cannot be ended otherwise."""
        self._alive.remove(worker)
        worker.kill()
        self._count(worker, work, late=late)

    def _count(self, worker: "_Worker", work: "_Work", *, late: bool) -> None:
        """Gives up the answer at which a worker ended; what it had not come to waits again.

        Raises:
          RuntimeError: it had not even begun. The next one would fare no better.
        """
        if worker.loading:
            raise RuntimeError(
                f"a scoring worker did not start within {START_SECONDS:g} s"
                if late
                else "a scoring worker died while it imported the reward; see its output above"
            )
        if worker.tasks:
            self.timeouts += late
            self.crashes += not late
            worker.tasks.popleft()
        work.waiting.extendleft(reversed(worker.tasks))
        worker.tasks.clear()
        worker.code, worker.child = b"", 0  # the next child knows no function yet


@contextmanager
def open_pool(*, workers: int, seconds: float = 60.0, memory: int | None = None) -> Iterator[Pool]:
    """A pool whose workers start now and end with the block.

    `workers` 0 computes in this process: nothing is started, and nothing can be stopped.
    `memory` limits what a worker may reserve; programs that it starts inherit the limit.

    Raises:
      ValueError: `workers` < 0 or `seconds` <= 0.
    """
    if workers < 0:
        raise ValueError(f"workers must be >= 0 (0: none, score in this process), got {workers}")
    if not seconds > 0:
        raise ValueError(f"seconds must be > 0, got {seconds}")
    pool = Pool(workers=workers, seconds=seconds, memory=memory)
    try:
        pool.start()
        yield pool
    finally:
        pool.close()


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One call of `map`. A task is the number of a pair."""

    code: bytes  # the function
    pairs: list[tuple[Any, Any]]
    seconds: float
    cpu_seconds: float | None
    waiting: deque[int]
    values: list[Any]


@dataclass(eq=False, kw_only=True)
class _Worker:
    """A worker as the pool sees it."""

    keeper: subprocess.Popen[bytes]
    pipe: Connection
    child: int = 0  # the process that scores; 0: not yet known
    deadline: float = 0.0  # of what it is doing
    code: bytes = b""  # the function that it was sent
    loading: bool = False  # was sent a function, and has not yet said that it has it
    tasks: deque[int] = field(default_factory=deque)  # the answer it is at, and the next ones

    def load(self, code: bytes) -> None:
        self.code = code
        self.loading = True
        self.deadline = time.monotonic() + START_SECONDS
        self.send(LOAD + code)

    def begin(self, tasks: list[int], work: _Work) -> None:
        pairs = [work.pairs[task] for task in tasks]
        data = _pickled((pairs, work.seconds, work.cpu_seconds))
        self.tasks.extend(tasks)
        self.deadline = time.monotonic() + work.seconds + GRACE
        self.send(data)

    def send(self, data: bytes) -> None:
        # The worker is reading and does nothing else, so that no message can block for long.
        with suppress(*GONE):  # dead: the next `_hear` will see it
            self.pipe.send_bytes(data)

    def busy(self) -> bool:
        return bool(self.tasks) or self.loading

    def late(self) -> bool:
        return self.busy() and time.monotonic() > self.deadline

    def kill(self) -> None:
        for group in (self.keeper.pid, self.child):  # the keeper first: it would fork another
            with suppress(ProcessLookupError, PermissionError):  # macOS: of a zombie
                if group:
                    os.killpg(group, signal.SIGKILL)
        self.keeper.wait()
        self.pipe.close()


def _pickled(value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"cannot be sent to a scoring worker ({error}): a reward must be a function of a "
            f"module or a functools.partial of one, and a row plain data"
        ) from None


def _start(memory: int | None, warm: Callable[[], None] | None) -> _Worker:
    here, there = socket.socketpair()
    with there:
        program = (
            f"import sys; sys.path[:] = {[path or os.getcwd() for path in sys.path]!r}; "
            f"from r1jax.rewards.worker import keep; keep({there.fileno()}, {memory!r})"
        )
        keeper = subprocess.Popen(
            [sys.executable, "-c", program],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            # A reward that imports JAX after all must not take the device from the run.
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            start_new_session=True,  # a group to kill; and Ctrl-C is the pool's to handle
        )
    worker = _Worker(keeper=keeper, pipe=Connection(here.detach()))
    worker.send(_pickled(warm))
    return worker
