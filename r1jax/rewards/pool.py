"""Worker processes that score answers beside the device, and that no answer can stop.

    with open_pool(workers=4, seconds=10.0) as pool:
        values = pool.map(accuracy, rows, answers)

A worker is a fresh Python that imports what the function needs and nothing else; it is never a
fork, which would inherit the threads and locks of JAX, and the program's main module is not
imported again. A worker that does not answer in time is killed, with all that it started; one that
dies is replaced. The answer it was at is None, and counted.
"""

import json
import os
import pickle
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

Row = Mapping[str, Any]

START_SECONDS = 60.0  # for a new worker, its imports among them
MOST_AT_ONCE = 16  # answers sent to a worker in one message
LOAD = b"load "  # begins a message that holds a function; no pickle does


@dataclass(kw_only=True)
class Pool:
    """Workers and what became of their work. `open_pool` makes it."""

    workers: int  # 0: all is computed in this process, without limits
    seconds: float  # for one answer
    memory: int | None  # bytes of address space of a worker
    timeouts: int = 0  # answers that took too long
    crashes: int = 0  # answers at which a worker died or ran out of memory or of stack
    _alive: list["_Worker"] = field(default_factory=list)

    def map(
        self,
        function: Callable[[Row, str], Any],
        rows: Sequence[Row],
        answers: Sequence[str],
    ) -> list[Any]:
        """`function(row, answer)` for each pair, in order; None where it was given up.

        Values are None, numbers, text, and lists and dicts of these; tuples come back as lists.
        Not to be called from two threads at a time.

        Raises:
          ValueError: the function raised it; or it cannot be imported by a worker.
          RuntimeError: the function raised anything else, which is named with its traceback; or
            workers die before they begin.
        """
        pairs = list(zip(rows, answers, strict=True))
        if not self.workers:
            return [self._here(function, row, answer) for row, answer in pairs]
        code = _pickled(function)
        values: list[Any] = [None] * len(pairs)
        waiting = deque(range(len(pairs)))
        try:
            while waiting or any(worker.tasks for worker in self._alive):
                self._give(code, waiting, pairs)
                for worker in self._listen():
                    if not worker.receive(values, self.seconds):
                        waiting.extendleft(reversed(self._bury(worker)))
                for worker in [worker for worker in self._alive if worker.late()]:
                    waiting.extendleft(reversed(self._bury(worker, late=True)))
        except BaseException:
            self.close()  # replies to what was given up must not reach the next call
            raise
        return values

    def close(self) -> None:
        """Kills all workers. The next `map` starts new ones."""
        while self._alive:
            self._alive.pop().kill()

    def _here(self, function: Callable[[Row, str], Any], row: Row, answer: str) -> Any:
        try:
            return function(row, answer)
        except (MemoryError, RecursionError):
            self.crashes += 1
            return None

    def _fill(self) -> None:
        while len(self._alive) < self.workers:
            self._alive.append(_start(self.seconds, self.memory))

    def _give(self, code: bytes, waiting: deque[int], pairs: Sequence[tuple[Row, str]]) -> None:
        """Gives each worker that has nothing to do the function, or else the next answers.

        They are several at first, so that no worker waits for this process, and one at the end, so
        that no worker waits for another.
        """
        for worker in list(self._alive):
            # One that is idle has nothing to say: what can be read is the end of its pipe.
            if not worker.busy() and worker.pipe.poll():
                self._bury(worker)
        self._fill()
        for worker in self._alive:
            if not worker.tasks and worker.code != code:
                worker.load(code)
            elif not worker.busy() and waiting:
                count = min(MOST_AT_ONCE, 1 + len(waiting) // (4 * self.workers))
                tasks = [waiting.popleft() for _ in range(count)]
                worker.begin(tasks, [pairs[task] for task in tasks], self.seconds)

    def _listen(self) -> list["_Worker"]:
        """The workers that have something to say, or died; waits until the next deadline."""
        busy = [worker for worker in self._alive if worker.busy()]
        limit = max(0.0, min(worker.deadline for worker in busy) - time.monotonic())
        heard = wait([worker.pipe for worker in busy], limit)
        return [worker for worker in busy if worker.pipe in heard]

    def _bury(self, worker: "_Worker", *, late: bool = False) -> list[int]:
        """Kills a worker that is dead or late; the answers that it had not come to.

        The one that it was at is counted and given up.

        Raises:
          RuntimeError: it had not even begun. The next one would fare no better.
        """
        self._alive.remove(worker)
        worker.kill()
        if worker.tasks:
            self.timeouts += late
            self.crashes += not late
        elif worker.loading:
            raise RuntimeError(
                f"a scoring worker did not start within {START_SECONDS:g} s"
                if late
                else "a scoring worker died while it imported the reward; see its output above"
            )
        return list(worker.tasks)[1:]


@contextmanager
def open_pool(*, workers: int, seconds: float = 10.0, memory: int | None = None) -> Iterator[Pool]:
    """A pool whose workers end with the block.

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
        if workers:
            pool._fill()
        yield pool
    finally:
        pool.close()


# --------------------------------------------------------------------------- this side


@dataclass(kw_only=True)
class _Worker:
    """A worker as the pool sees it."""

    process: subprocess.Popen[bytes]
    pipe: Connection
    deadline: float = 0.0  # of what it is doing
    code: bytes = b""  # the function that it was sent
    loading: int = 0  # functions that it was sent and has not yet said that it has
    tasks: deque[int] = field(default_factory=deque)  # the answer it is at, and the next ones

    def load(self, code: bytes) -> None:
        self.code = code
        self.loading += 1
        self.deadline = time.monotonic() + START_SECONDS
        self._send(LOAD + code)

    def begin(self, tasks: list[int], pairs: list[tuple[Row, str]], seconds: float) -> None:
        data = _pickled(pairs)
        self.tasks.extend(tasks)
        self.deadline = time.monotonic() + seconds
        self._send(data)

    def _send(self, data: bytes) -> None:
        # The worker is reading and does nothing else, so that no message can block for long.
        with suppress(BrokenPipeError, ConnectionResetError):  # dead: `receive` will see it
            self.pipe.send_bytes(data)

    def receive(self, values: list[Any], seconds: float) -> bool:
        """Takes what the worker says into `values`; False if it is dead or unfit for more.

        Raises:
          ValueError, RuntimeError: what the function raised.
        """
        try:
            kind, value = json.loads(self.pipe.recv_bytes())
        except (EOFError, ConnectionResetError):
            return False
        if kind == "refused":
            raise ValueError(value)
        if kind == "failed":
            raise RuntimeError(value)
        if kind == "loaded":
            self.loading -= 1
        elif kind == "value":
            values[self.tasks.popleft()] = value
            self.deadline = time.monotonic() + seconds
        return kind != "exhausted"  # what it would compute next could be anything

    def busy(self) -> bool:
        return bool(self.tasks) or self.loading > 0

    def late(self) -> bool:
        return self.busy() and time.monotonic() > self.deadline

    def kill(self) -> None:
        with suppress(ProcessLookupError, PermissionError):  # macOS: of a zombie
            os.killpg(self.process.pid, signal.SIGKILL)  # its children too
        self.process.wait()
        self.pipe.close()


def _pickled(value: object) -> bytes:
    try:
        return pickle.dumps(value)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise ValueError(
            f"cannot be sent to a scoring worker ({error}): a reward must be a function of a "
            f"module or a functools.partial of one, and a row plain data"
        ) from None


def _start(seconds: float, memory: int | None) -> _Worker:
    here, there = socket.socketpair()
    with there:
        program = (
            f"import sys; sys.path[:] = {[path or os.getcwd() for path in sys.path]!r}; "
            f"from r1jax.rewards.pool import serve; "
            f"serve({there.fileno()}, seconds={seconds!r}, memory={memory!r})"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program],
            pass_fds=[there.fileno()],
            stdin=subprocess.DEVNULL,
            # A reward that imports JAX after all must not take the device from the run.
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            start_new_session=True,  # a group to kill; and Ctrl-C is the pool's to handle
        )
    return _Worker(process=process, pipe=Connection(here.detach()))


# --------------------------------------------------------------------------- the worker's side


def serve(handle: int, *, seconds: float, memory: int | None) -> None:
    """What a worker process runs: scores what comes through the pipe until it is closed.

    Only what the pool itself sends is unpickled; what goes back is JSON.
    """
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    pipe = Connection(handle)
    function = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the pool is gone
        while True:
            data = pipe.recv_bytes()
            try:
                loaded = pickle.loads(data.removeprefix(LOAD))
            except (ImportError, AttributeError) as error:
                reason = (
                    f"a scoring worker cannot import the reward: {error}; "
                    f"move it to a module of its own, or score without workers"
                )
                _say(pipe, "refused", json.dumps(reason))
                continue
            if data.startswith(LOAD):
                function = loaded
                _say(pipe, "loaded", "null")
                continue
            assert function is not None
            for row, answer in loaded:
                # The pool kills a late worker. Should the pool be gone, the system does it.
                signal.setitimer(signal.ITIMER_REAL, 2 * seconds + 1)
                kind, value = _answer(function, row, answer)
                signal.setitimer(signal.ITIMER_REAL, 0)
                _say(pipe, kind, value)


def _say(pipe: Connection, kind: str, value: str) -> None:
    pipe.send_bytes(f'["{kind}", {value}]'.encode())


def _answer(function: Callable[[Row, str], Any], row: Row, answer: str) -> tuple[str, str]:
    """What there is to say of an answer: a kind, and a value as JSON."""
    try:
        return "value", json.dumps(function(row, answer))
    except (MemoryError, RecursionError):
        return "exhausted", "null"
    except ValueError as error:
        return "refused", json.dumps(str(error))
    except Exception:  # whatever it is, it is raised again on the other side
        return "failed", json.dumps(f"a reward failed:\n{traceback.format_exc()}")
