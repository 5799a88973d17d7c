"""Runs programs in a sandbox that has been started, and says how they ended."""

import fcntl
import json
import marshal
import os
import select
import signal
import socket
import struct
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "wrong", "timeout", "memory", "error", "sandbox_error"]

_LENGTH = struct.Struct("!I")
_KEPT_STDERR = 2000
_GRACE = 40.0  # a sandbox later than this with its own deadline is given up: it has hung


class SandboxError(RuntimeError):
    """Programs cannot be confined here; says how to mend that."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one program may use. Passing any of them ends it."""

    cpu_seconds: int = 6  # processor time of all its threads: does not depend on a busy machine
    wall_seconds: float = 20.0  # for programs that wait
    memory_bytes: int = 1 << 30  # address space
    output_bytes: int = 8 << 20  # stdout and stderr together; or one value returned
    threads: int = 64

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            whole = isinstance(value, int) or (name == "wall_seconds" and isinstance(value, float))
            if not whole or not 0 < value < 1 << 50:
                raise ValueError(f"{name} must be a positive number, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Run:
    """How a program ended. `status` is never "wrong" here: nothing was compared yet."""

    status: Status
    stdout: bytes = b""
    detail: str = ""  # the end of its stderr, or what happened to it
    cpu_seconds: float = 0.0
    peak_bytes: int = 0


@dataclass(kw_only=True)
class Sandbox:
    """A running sandbox: one program at a time. Made by `start`, ended by `close`."""

    backend: str
    process: subprocess.Popen
    control: socket.socket
    readable: list[str]
    scratch: Path | None = None

    def close(self) -> None:
        """Ends the sandbox and all that runs in it."""
        self.control.close()
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.process.stderr:
            self.process.stderr.close()


@dataclass(kw_only=True)
class Job:
    """A program that has been started; `end` must be called. `word` and `extra` are our ends."""

    sandbox: Sandbox
    limits: Limits
    word: int  # what the child says
    extra: int = -1  # what it is told
    ended: dict[str, Any] | None = None
    flooded: bool = False

    def send(self, frame: bytes) -> bool:
        """Sends a frame; False if the child has gone."""
        view = memoryview(_LENGTH.pack(len(frame)) + frame)
        try:
            while view:
                view = view[os.write(self.extra, view) :]
        except BrokenPipeError:
            return False
        return True

    def receive(self) -> bytes:
        """The child's next frame; b"" if none comes, or one longer than the limit on output."""
        head = self.read(_LENGTH.size)
        size = _LENGTH.unpack(head)[0] if head else 0
        self.flooded = size > self.limits.output_bytes
        return b"" if self.flooded else self.read(size)

    def read(self, size: int) -> bytes:
        """Exactly so many bytes of what the child says; b"" if it ends before."""
        parts = []
        poll = select.poll()
        poll.register(self.word, select.POLLIN)
        while size:
            ready = poll.poll((self.limits.wall_seconds + _GRACE) * 1000)
            part = os.read(self.word, min(size, 1 << 20)) if ready else b""
            if not part:
                return b""
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def end(self, *, kill: bool = False) -> dict[str, Any]:
        """How the program ended, once it has; with `kill`, now."""
        if self.ended is not None:
            return self.ended
        _close(self.extra)
        if kill:
            with suppress(OSError):
                self.sandbox.control.send(b"kill")
        reply = receive(self.sandbox, self.limits.wall_seconds + _GRACE)
        _close(self.word)
        self.word = self.extra = -1
        # A sandbox that is lost under a program counts against it: it may have done that.
        ended = {"code": 1, "late": False, "cpu_seconds": 0.0, "peak_bytes": 0}
        if reply:
            ended = json.loads(reply)
        else:
            self.sandbox.close()
        self.ended = ended
        return ended


def begin(
    sandbox: Sandbox,
    part: str,
    limits: Limits,
    files: list[int],
    *,
    talk: bool = False,
    file_bytes: int = 0,
    **work: Any,
) -> Job:
    """Starts a child in the sandbox: `inside` has the parts it can play and what each is told.

    `files` are its stdin, stdout and stderr, and are closed here. With `talk` it can be told more
    while it runs.
    """
    word_read, word_write = os.pipe2(os.O_CLOEXEC)
    sent = [*files, word_write]
    extra = -1
    if talk:
        extra_read, extra = os.pipe2(os.O_CLOEXEC)
        sent.append(extra_read)
    elif part == "binary":
        sent.append(sealed(work.pop("program")))
    work |= {
        "part": part,
        "wall_seconds": limits.wall_seconds,
        "landlock": sandbox.backend == "landlock",
        "readable": sandbox.readable,
        "writable": [] if sandbox.scratch is None else [str(sandbox.scratch)],
        "limits": {
            "cpu_seconds": limits.cpu_seconds,
            "memory_bytes": limits.memory_bytes,
            "file_bytes": file_bytes,
            "threads": limits.threads + _threads_of(65534 if os.geteuid() == 0 else os.getuid()),
        },
    }
    sent.insert(0, sealed(marshal.dumps(work)))
    try:
        socket.send_fds(sandbox.control, [b"job"], sent)
    except OSError as error:
        _close(word_read, extra)
        raise SandboxError(f"the sandbox is gone: {error}") from error
    finally:
        _close(*sent)
    return Job(sandbox=sandbox, limits=limits, word=word_read, extra=extra)


def run_program(sandbox: Sandbox, program: str | bytes, stdin: bytes, limits: Limits) -> Run:
    """Runs a Python script (str) or a compiled program (bytes) on `stdin`.

    "ok" is an exit with status 0; "error" any other, also more output than allowed.
    """
    if isinstance(program, bytes):
        return watch(sandbox, "binary", limits, stdin, program=program)
    return watch(sandbox, "program", limits, stdin, source=program)


def watch(
    sandbox: Sandbox, part: str, limits: Limits, stdin: bytes, *, file_bytes: int = 0, **work: Any
) -> Run:
    """Starts a child, collects its output and waits for its end."""
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    err_read, err_write = os.pipe2(os.O_CLOEXEC)
    files = [sealed(stdin), out_write, err_write]
    try:
        job = begin(sandbox, part, limits, files, file_bytes=file_bytes, **work)
        try:
            room, word, stdout, stderr = _collect(job, out_read, err_read)
            ended = job.end(kill=room < 0)
        finally:
            job.end(kill=True)
    finally:
        _close(out_read, err_read)
    said = stderr[-_KEPT_STDERR:].decode(errors="replace").strip()
    status, detail = status_of(ended, said, limits)
    if word != b"R":
        status, detail = "sandbox_error", f"the program was not confined, nor run: {said[-300:]}"
    elif room < 0:
        status, detail = "error", f"more than {limits.output_bytes} bytes of output"
    return Run(
        status=status,
        stdout=stdout,
        detail=detail,
        cpu_seconds=ended["cpu_seconds"],
        peak_bytes=ended["peak_bytes"],
    )


def _collect(job: Job, out: int, err: int) -> tuple[int, bytes, bytes, bytes]:
    """Reads until a child has closed its outputs: (bytes left of its share, word, out, err)."""
    parts: dict[int, list[bytes]] = {job.word: [], out: [], err: []}
    room = job.limits.output_bytes
    poll = select.poll()
    for file in parts:
        poll.register(file, select.POLLIN)
    reading = set(parts)
    late = time.monotonic() + job.limits.wall_seconds + _GRACE
    while reading and room >= 0 and time.monotonic() < late:
        for file, _ in poll.poll(1000):
            data = os.read(file, 1 << 16)
            if not data:
                poll.unregister(file)
                reading.discard(file)
            room -= len(data)
            parts[file].append(data)
    word, stdout, stderr = (b"".join(each) for each in parts.values())
    return room, word, stdout, stderr


def status_of(ended: dict[str, Any], said: str, limits: Limits) -> tuple[Status, str]:
    """The status and a word on it, from how a child ended and what it wrote to stderr."""
    code = ended["code"]
    if ended["late"]:
        return "timeout", "out of time"
    if code == -signal.SIGXCPU or (code < 0 and ended["cpu_seconds"] >= limits.cpu_seconds):
        return "timeout", "out of processor time"
    if code == 0:
        return "ok", said
    if said.rpartition("\n")[2].startswith("MemoryError") or "std::bad_alloc" in said:
        return "memory", "out of memory"
    return "error", said or f"ended with status {code}"


def sealed(data: bytes) -> int:
    """A file in memory that holds `data` and that nobody can change; for a program to read."""
    file = os.memfd_create("sealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
    os.lseek(file, 0, os.SEEK_SET)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(file, fcntl.F_ADD_SEALS, seals)
    return file


def _threads_of(user: int) -> int:
    """Threads that the user has on this machine: a limit on threads counts them all."""
    count = 0
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with suppress(OSError):
                if entry.stat().st_uid == user:
                    count += os.stat(f"/proc/{entry.name}/task").st_nlink - 2
    return count


def receive(sandbox: Sandbox, seconds: float) -> bytes:
    """The sandbox's next message; b"" if there is none in time, or never will be."""
    poll = select.poll()
    poll.register(sandbox.control.fileno(), select.POLLIN)
    if not poll.poll(seconds * 1000):
        return b""
    try:
        return sandbox.control.recv(1 << 16)
    except ConnectionError:
        return b""


def _close(*files: int) -> None:
    for file in files:
        if file >= 0:
            os.close(file)
