"""What a worker process of `r1jax.rewards.pool` runs: two processes, of which one may be lost.

The keeper is a fresh Python. It does what takes long once, then forks a child, and the child
scores. If an answer ends the child, the keeper kills what the child has started, says so, and
forks the next one, which takes milliseconds where a new Python would take up to a second.

Both speak through one pipe, never at the same time: the child while it lives, the keeper when it
does not. Only what the pool itself has pickled is unpickled: a function that the config passes,
rows, and answers as text, which no text can make anything else. What goes back is JSON.
"""

import gc
import json
import os
import pickle
import resource
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

LOAD = b"load "  # begins a message that holds a function; no pickle does
CLOCKS = (signal.SIGALRM, signal.SIGPROF)  # of the wall, of the processor
GONE = (EOFError, BrokenPipeError, ConnectionResetError)  # what a pipe without its other end raises


def keep(handle: int, memory: int | None) -> None:
    """Keeps one child at work until the other end of the pipe is closed.

    `memory` limits the address space of the child, in bytes. The first message is a function that
    runs once, or None.
    """
    if memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(handle)
    with suppress(*GONE):
        warm = pickle.loads(pipe.recv_bytes())
        try:
            if warm is not None:
                warm()
        except ImportError as error:
            _say(pipe, "failed", json.dumps(f"a worker cannot start: {error}"))
            return
        gc.freeze()  # the children share these pages
        while True:
            child = os.fork()
            if child == 0:
                _work_alone(pipe)
            status = _wait(child)
            if status == 0:
                return
            _say(pipe, "ended", json.dumps(status))


def _wait(child: int) -> int:
    """The child's exit status, or less than 0: the signal that ended it. Kills its processes."""
    _, status = os.waitpid(child, 0)
    with suppress(ProcessLookupError):  # it left none
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def _work_alone(pipe: Connection) -> None:
    """Does what the pool says, in a process group of its own; never returns."""
    status = 1
    try:
        os.setpgid(0, 0)
        for clock in CLOCKS:
            signal.signal(clock, signal.SIG_DFL)  # ends the process, whatever it is at
        _say(pipe, "ready", str(os.getpid()))
        _work(pipe)
    except GONE:
        status = 0
    except (MemoryError, RecursionError):
        pass  # what it would compute next could be anything
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _work(pipe: Connection) -> None:
    function = None
    while True:
        try:
            data = pipe.recv_bytes()
        except MemoryError as error:
            # Who read on would begin in the middle of a message, at what may be an answer's text.
            raise EOFError from error
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
        pairs, seconds, cpu_seconds = loaded
        for row, answer in pairs:
            # The kernel ends a late child, also one that is deep in C, or whose pool is gone.
            signal.setitimer(signal.ITIMER_REAL, seconds)
            signal.setitimer(signal.ITIMER_PROF, cpu_seconds or 0)
            kind, value = _judged(function, row, answer)
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            _say(pipe, kind, value)


def _judged(function: Callable[[Any, Any], Any], row: Any, answer: Any) -> tuple[str, str]:
    """What there is to say of an answer: a kind, and a value as JSON.

    Raises:
      MemoryError, RecursionError: the function did.
    """
    try:
        return "value", json.dumps(function(row, answer))
    except (MemoryError, RecursionError):
        raise
    except ValueError as error:
        return "refused", json.dumps(str(error))
    except Exception:  # a user's function may raise anything; it is raised again on the other side
        return "failed", json.dumps(f"a reward failed:\n{traceback.format_exc()}")


def _say(pipe: Connection, kind: str, value: str) -> None:
    pipe.send_bytes(f'["{kind}", {value}]'.encode())
