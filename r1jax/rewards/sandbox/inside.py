"""What runs inside the sandbox: a process that forks, and its children, one for each program.

Starting Python takes longer than most programs that are graded, so one process starts once, loads
what programs commonly import, and forks a child for each. The child takes its pipes, gives up its
rights (`lockdown`), says that it did, and only then reads a line of the program. It holds nothing
that a program may not see: no expected result, no other program, no open file of its parent.

A child plays one of five parts (`_PARTS`): a script; a compiled program; a compiler; a module
whose functions are called; the tests that call them, in a child of another sandbox. The module and
the tests exchange frames (a length, a letter, an encoded value), relayed by the grader. So values
are all that passes between them: there is no object of the program's in the process that compares,
and no expected result in the process that runs the program. Whoever forges an answer on its channel
has to know the right one.

Imported by the sandbox only. It must not import anything but the standard library and its two
neighbours.
"""

import atexit
import builtins
import gc
import json
import marshal
import math
import os
import random
import select
import signal
import socket
import struct
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any

from r1jax.rewards.sandbox import lockdown, values

# Loaded before any program: what they commonly import.
_COMMON = """
abc array asyncio bisect cmath collections copy dataclasses datetime decimal enum fractions
functools hashlib heapq io itertools math operator queue random re statistics string textwrap
time typing unicodedata
"""

JOB, STDIN, STDOUT, STDERR, WORD, EXTRA = range(6)  # files sent with a job, in this order
_WORD, _EXTRA = 3, 4  # their numbers in the child, after stdin, stdout and stderr
_LOCK_SECONDS = 30.0
_LENGTH = struct.Struct("!I")


def main(control: int) -> None:
    """Serves one job at a time from the socket `control`, until its other end closes."""
    settings = json.loads(sys.argv[1])
    lockdown.drop_root(keep_reading=settings["keep_reading"])
    for name in _COMMON.split():
        __import__(name)
    sys.path[:] = [path for path in sys.path if path not in settings["hidden"]]
    gc.collect()
    gc.freeze()
    channel = socket.socket(fileno=control)
    channel.send(b"hello")
    while True:
        message, files, _, _ = socket.recv_fds(channel, 64, 6)
        if not message:
            return
        if not files:  # "kill", for a job that had just ended
            continue
        # The grader's own bytes, sealed. Children never hold the socket that they come through.
        job = marshal.loads(_contents(files[JOB]))
        locked, lock = os.pipe()
        pid = os.fork()
        if pid == 0:
            _child(job, files, lock)
        for file in (*files, lock):
            os.close(file)
        ended = _wait(pid, channel, locked, job["wall_seconds"])
        os.close(locked)
        channel.send(json.dumps(ended).encode())


def _wait(pid: int, channel: socket.socket, locked: int, seconds: float) -> dict[str, Any]:
    """Waits for a child; kills it at the deadline, or when asked, or when nobody asks any more.

    The time counts from the moment at which the child is confined and closes `locked`.
    """
    ended = os.pidfd_open(pid)
    select.select([locked, ended, channel], [], [], _LOCK_SECONDS)
    ready, _, _ = select.select([ended, channel], [], [], seconds)
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
    os.close(ended)
    _, status, usage = os.wait4(pid, 0)
    return {
        "code": os.waitstatus_to_exitcode(status),
        "late": not ready,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }


def _child(job: dict[str, Any], files: list[int], lock: int) -> None:
    """Becomes the job's program; never returns."""
    code = 127
    try:
        lock = _take_files([*files[STDIN:], lock])
        _lock(job)
        os.close(lock)
        os.write(_WORD, b"R")
        code = _PARTS[job["part"]](job)
    except BaseException as error:
        code = _report(error)
    finally:
        code = _finish(code)
        os._exit(code)


def _take_files(files: list[int]) -> int:
    """Makes the files 0 and up, the last its result, and closes all others: the socket, too."""
    high = [os.dup2(file, 100 + place) for place, file in enumerate(files)]
    for place, file in enumerate(high):
        os.dup2(file, place)
    os.closerange(len(high), 65536)
    sys.stdin = os.fdopen(0, encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    return len(high) - 1


def _lock(job: dict[str, Any]) -> None:
    lockdown.limit(**job["limits"])
    if job["landlock"]:
        lockdown.hide_files(job["readable"], job["writable"])
    part = job["part"]
    lockdown.filter_calls(execute=part == "binary", compiler=part == "compile")


# ------------------------------------------------------------------------------- a whole program


def _program(job: dict[str, Any]) -> int:
    """Runs a script as `python program.py` would."""
    os.close(_WORD)
    _run(job["source"], "program.py", _new_module("__main__"))
    return 0


def _binary(job: dict[str, Any]) -> int:
    os.close(_WORD)
    os.set_inheritable(_EXTRA, False)
    os.execve(_EXTRA, ["program"], {})
    return 127


def _compile(job: dict[str, Any]) -> int:
    os.close(_WORD)
    os.chdir(job["writable"][0])
    os.execve(job["command"][0], job["command"], {"PATH": "/usr/bin:/bin", "TMPDIR": "."})
    return 127


def _new_module(name: str, setup: str = "") -> types.ModuleType:
    """A module in which `setup` has run; random numbers start from seed 0."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    sys.argv = ["program.py"]
    random.seed(0)
    _run(setup, "setup.py", module)
    return module


def _run(source: str, file: str, module: types.ModuleType) -> None:
    # What a model wrote in Python is executed here only: in a child that has given up its rights.
    exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)


# ------------------------------------------------------------------- functions, called by others


def _functions(job: dict[str, Any]) -> int:
    """Defines the program's functions, then answers calls of one of them until no more come.

    Frames out: "s" the setup has run, "d" the program too, "v" a value, "x" [an exception's type,
    its text]. In: "c" a call's [args, kwargs].
    """
    try:
        module = _new_module("program", job["setup"])
        _send("s", None)
        _run(job["source"], "program.py", module)
        function = _find(module, job["entry"])
    except BaseException as raised:
        _send("x", _described(raised))
        return 0
    _send("d", None)
    while (frame := _receive()) is not None:
        try:
            arguments, keywords = values.decode(frame[1:])
            result = function(*arguments, **keywords)
        except BaseException as raised:
            _send("x", _described(raised))
            continue
        try:
            reply = "v", values.encode(result)
        except ValueError as raised:
            reply = "x", values.encode(["not plain", str(raised)])
        _send_encoded(*reply)
    return 0


def _find(module: types.ModuleType, entry: str) -> Callable[..., Any]:
    """The module's function `entry`, or the method of that name of its class `Solution`."""
    if hasattr(module, entry):
        return getattr(module, entry)
    if hasattr(module, "Solution"):
        return getattr(module.Solution(), entry)
    raise NameError(f"the program defines no {entry}")


def _described(error: BaseException) -> list[str]:
    for kind in type(error).__mro__:  # the nearest type that the tests know too
        if getattr(builtins, kind.__name__, None) is kind:
            return [kind.__name__, str(error)[:500]]
    return ["Exception", str(error)[:500]]


# ------------------------------------------------------------------------------ tests, that call


class _ProgramFailed(Exception):
    """The program raised something that the tests cannot be handed."""


def _tests(job: dict[str, Any]) -> int:
    """Runs tests of a function that lives in another process.

    Frames out: "c" a call, and at last "r" [status, number of tests passed, detail]. In: the
    other process's "v" and "x". The status is "sandbox_error" where the tests fail by themselves.
    """
    calls, raised = 0, ""

    def blame() -> str:  # for a test that failed on the last reply
        return {"": "wrong", "MemoryError": "memory"}.get(raised, "error")

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls, raised
        _send("c", [arguments, keywords])
        frame = _receive()
        calls += 1
        if frame is None:
            raise _ProgramFailed("no answer")
        value = values.decode(frame[1:])
        raised = "" if frame[:1] == b"v" else str(value[0])
        if raised:
            raise _raised_there(raised, str(value[1]))
        return value

    try:
        if job["script"] is None:
            status, passed, detail = _compare_calls(candidate, job, blame)
        else:
            _run_script(candidate, job["setup"], job["script"], job["entry"])
            status, passed, detail = "ok", 1, ""
    except BaseException as error:
        status, passed, detail = blame(), 0, f"{type(error).__name__}: {error}"[:500]
    if calls == 0:
        status, detail = "sandbox_error", f"the tests never call the program. {detail}"
    _send("r", [status, passed, detail])
    return 0


def _raised_there(name: str, text: str) -> Exception:
    """The exception that the program raised, if it is one of Python's own.

    But never StopIteration: `all(map(test, cases))` would take it for the end of the cases.
    """
    kind = getattr(builtins, name, None)
    ends = (StopIteration, StopAsyncIteration)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, ends):
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError, for one, wants more than a text
            pass
    return _ProgramFailed(f"{name}: {text}")


def _run_script(candidate: Callable[..., Any], setup: str, script: str, entry: str) -> None:
    """Runs a script of asserts on `candidate`, which goes by the name `entry` in it.

    A script that defines `check(candidate)` has that called, as HumanEval's do.
    """
    module = _new_module("tests", setup)
    setattr(module, entry, candidate)
    _run(script, "tests.py", module)
    if callable(check := module.__dict__.get("check")):
        check(candidate)


def _compare_calls(
    candidate: Callable[..., Any], job: dict[str, Any], blame: Callable[[], str]
) -> tuple[str, int, str]:
    """(status of the first failure or "ok", how many calls give their result, what went wrong)."""
    status, passed, detail = "ok", 0, ""
    for number, (arguments, keywords, expected) in enumerate(job["calls"]):
        try:
            got = candidate(*arguments, **keywords)
            right = same_value(got, expected, job["tolerance"])
            problem = f"wrong result of test {number}"
        except Exception as error:
            right, problem = False, f"{type(error).__name__}: {error}"[:500]
        passed += right
        if not right and status == "ok":
            status, detail = blame(), problem
        if not right and job["stop"]:
            break
    return status, passed, detail


def same_value(got: Any, expected: Any, tolerance: float) -> bool:
    """Whether two plain values are equal; lists and tuples of equal items are.

    Two numbers may differ by `tolerance`, relative or absolute, if one of them is a float.
    """
    if isinstance(expected, list | tuple):
        return (
            isinstance(got, list | tuple)
            and len(got) == len(expected)
            and all(same_value(*pair, tolerance) for pair in zip(got, expected, strict=True))
        )
    if isinstance(expected, dict):
        return (
            isinstance(got, dict)
            and got.keys() == expected.keys()
            and all(same_value(got[key], expected[key], tolerance) for key in expected)
        )
    if tolerance and (isinstance(got, float) or isinstance(expected, float)):
        if isinstance(got, int | float) and isinstance(expected, int | float):
            return got == expected or math.isclose(
                got, expected, rel_tol=tolerance, abs_tol=tolerance
            )
        return False
    return got == expected


# --------------------------------------------------------------------------------------- channels


def _send(kind: str, value: Any) -> None:
    _send_encoded(kind, values.encode(value))


def _send_encoded(kind: str, text: bytes) -> None:
    data = memoryview(_LENGTH.pack(1 + len(text)) + kind.encode() + text)
    while data:
        data = data[os.write(_WORD, data) :]


def _receive() -> bytes | None:
    """The next frame; None if the other side has closed the channel."""
    head = _read_exactly(_LENGTH.size)
    return head and _read_exactly(_LENGTH.unpack(head)[0])


def _read_exactly(size: int) -> bytes | None:
    parts = []
    while size:
        part = os.read(_EXTRA, min(size, 1 << 20))
        if not part:
            return None
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _contents(file: int) -> bytes:
    return os.pread(file, os.fstat(file).st_size, 0)


def _report(error: BaseException) -> int:
    """The exit status that Python gives for an exception, which it prints."""
    if isinstance(error, SystemExit):
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    traceback.print_exception(error, limit=-5)
    return 1


def _finish(code: int) -> int:
    """What Python does at its end, in its order: join threads, run atexit, flush."""
    try:
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        return code or 1
    return code


_PARTS = {
    "program": _program,
    "functions": _functions,
    "tests": _tests,
    "binary": _binary,
    "compile": _compile,
}
