"""Processes that do work which may hang or crash: killed at a deadline, replaced, counted.

A worker is a program that reads one JSON value a line and answers each with one line. The parent
starts it anew (never by fork: the parent may hold a device and threads) and it runs apart from
the parent's terminal. `r1jax.rewards.math_worker` is such a program.
"""

import json
import os
import queue
import select
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

START_SECONDS = 120.0  # importing sympy takes one second, and many more on a crowded machine
# Until a worker is killed: it is to end a job by itself after `seconds` of processor time, which
# on a crowded machine are many more on the clock.
PATIENCE = 10.0  # times `seconds`
GRACE = 5.0  # seconds more
LINE = 1 << 20  # bytes; a longer answer is a crash


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What came of a job: `value` if it was done, None if it ran out of time or crashed."""

    status: Literal["done", "timeout", "crash"]
    value: Any = None


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Jobs since the pool was made, by what came of them."""

    done: int = 0
    timeout: int = 0
    crash: int = 0


class Workers:
    """Up to `num_workers` processes of one command, started when first needed.

    May be used from several threads. A job is any JSON value; it is sent as
    `{"job": ..., "seconds": ...}`. The worker answers `{"value": ...}`, or `{"status": "timeout"}`
    or `{"status": "crash"}` where it ended the job itself and is ready for the next. One that
    does neither within `PATIENCE * seconds + GRACE` is killed with all its children.
    """

    def __init__(
        self, command: Sequence[str], *, num_workers: int, env: Mapping[str, str] | None = None
    ):
        if num_workers < 1:
            raise ValueError(f"need one worker or more, got num_workers={num_workers}")
        self.command = list(command)
        self.env = dict(os.environ if env is None else env)
        self.num_workers = num_workers
        # Last in, first out: one job at a time keeps one process warm and starts no other.
        self._free: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(num_workers):
            self._free.put(None)
        self._lock = threading.Lock()
        self._counts = Counts()
        self._alive: set[_Worker] = set()

    def counts(self) -> Counts:
        return self._counts

    def processes(self) -> list[int]:
        """Process ids of the workers that are running now."""
        with self._lock:
            return sorted(worker.process.pid for worker in self._alive)

    def do(self, job: Any, *, seconds: float) -> Reply:
        """What came of one job. Waits for a free worker, whose time is not counted.

        Raises:
          RuntimeError: the worker program does not start.
        """
        worker = self._free.get()
        try:
            if worker is None:
                worker = self._start()
            reply = worker.do(job, seconds)
            if reply is None:
                status = "crash" if worker.process.poll() is not None else "timeout"
                self._stop(worker)
                worker, reply = None, Reply(status=status)
        except BaseException:
            if worker is not None:
                self._stop(worker)
                worker = None
            raise
        finally:
            self._free.put(worker)
        with self._lock:
            before = getattr(self._counts, reply.status)
            self._counts = replace(self._counts, **{reply.status: before + 1})
        return reply

    def do_all(self, jobs: Sequence[Any], *, seconds: float) -> list[Reply]:
        """What came of each job, in their order; all workers share them."""
        if len(jobs) <= 1:
            return [self.do(job, seconds=seconds) for job in jobs]
        with ThreadPoolExecutor(min(self.num_workers, len(jobs))) as threads:
            return list(threads.map(lambda job: self.do(job, seconds=seconds), jobs))

    def close(self) -> None:
        """Kills every worker, also those at work."""
        with self._lock:
            alive = list(self._alive)
        for worker in alive:
            self._stop(worker)

    def _start(self) -> "_Worker":
        worker = _Worker(self.command, self.env)
        with self._lock:
            self._alive.add(worker)
        try:
            worker.wait_until_ready()
        except BaseException:
            self._stop(worker)
            raise
        return worker

    def _stop(self, worker: "_Worker") -> None:
        worker.kill()
        with self._lock:
            self._alive.discard(worker)


class _Worker:
    """One process and the two pipes to it."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]):
        self.process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            start_new_session=True,  # killed as a group; spared the terminal's Ctrl-C
        )
        self.name = " ".join(command)

    def wait_until_ready(self) -> None:
        reply = self._read(time.monotonic() + START_SECONDS)
        if reply is None:
            code = self.process.poll()
            ended = f"ended with code {code}" if code is not None else "said nothing"
            raise RuntimeError(f"worker `{self.name}` {ended} before it was ready")
        if "error" in reply:
            raise RuntimeError(f"worker `{self.name}` cannot start: {reply['error']}")

    def do(self, job: Any, seconds: float) -> Reply | None:
        """None: the worker must be replaced."""
        assert self.process.stdin is not None
        line = json.dumps({"job": job, "seconds": seconds}) + "\n"  # ASCII, surrogates escaped
        try:
            self.process.stdin.write(line.encode())
        except BrokenPipeError:
            return None
        reply = self._read(time.monotonic() + PATIENCE * seconds + GRACE)
        if reply is None:
            return None
        return Reply(status=reply.get("status", "done"), value=reply.get("value"))

    def _read(self, deadline: float) -> dict[str, Any] | None:
        """The next line; None if there is none before the deadline, or the process ended."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        parts: list[bytes] = []
        while not (parts and parts[-1].endswith(b"\n")):
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(left * 1000):
                return None
            part = os.read(descriptor, LINE)
            parts.append(part)
            if not part or sum(map(len, parts)) > LINE:
                self.process.kill()  # ended, or babbles: a crash either way
                self.process.wait()
                return None
        return json.loads(b"".join(parts))

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
