"""Runs untrusted programs on Linux, confined; refuses where it cannot confine them.

`open_sandbox` starts a sandbox: one process (`inside`) that forks a child for each program. Two
backends, and in both the child is also under a filter of system calls and limits (`lockdown`):

  bubblewrap  namespaces of its own for files, processes, network and the rest; of the machine's
              files it sees /usr and the Python that runs it, read-only
  landlock    the same files by landlock rules, for containers that forbid user namespaces

Programs may not write any file nor start any process; they may start threads. Before a sandbox is
handed out, a canary program has tried in it what must fail. There is no third backend: a machine
with neither gets `SandboxError`, in one line that says what to install.

Not defended against: errors in the kernel itself, and timing channels.
"""

import fcntl
import json
import marshal
import os
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from r1jax.rewards import canary

Status = Literal["ok", "wrong", "timeout", "memory", "error", "sandbox_error"]
BACKENDS = ("bubblewrap", "landlock")

_ROOT = Path(__file__).parents[2]
_LENGTH = struct.Struct("!I")
_PROGRAM_BYTES = 64 << 20
_KEPT_STDERR = 2000
_GRACE = 40.0  # a sandbox later than this with its own deadline is given up: it has hung
_START_SECONDS = 60.0
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


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
    """A running sandbox: one program at a time. Made by `open_sandbox`, ended by `close`."""

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


# --------------------------------------------------------------------------- starting a sandbox


@contextmanager
def open_sandbox(backend: str | None = None, *, scratch: Path | None = None) -> Iterator[Sandbox]:
    """A sandbox of its own, closed at the end; `scratch` is a folder its compiler may write in.

    Raises:
      SandboxError: `backend` (by default, each) does not work here.
    """
    sandbox = start(backend or find_backend(), scratch)
    try:
        yield sandbox
    finally:
        sandbox.close()


@cache
def find_backend() -> str:
    """The first of `BACKENDS` in which the canary finds nothing that it should not.

    Raises:
      SandboxError: there is none.
    """
    problems = []
    for backend in BACKENDS:
        try:
            start(backend).close()
        except SandboxError as error:
            problems.append(f"{backend}: {error}")
        else:
            return backend
    raise SandboxError(
        "programs cannot be confined on this machine, so none is run: install bubblewrap"
        " (apt-get install bubblewrap) or use a kernel with landlock (Linux 5.13 or newer) and"
        f" seccomp. {'; '.join(problems)}"
    )


def start(backend: str, scratch: Path | None = None) -> Sandbox:
    """A sandbox that holds the canary; the caller closes it.

    Raises:
      ValueError: no such backend.
      SandboxError: it does not work here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown sandbox backend {backend!r}; known: {', '.join(BACKENDS)}")
    if not sys.platform.startswith("linux"):
        raise SandboxError(f"the sandbox needs Linux, this is {sys.platform}")
    python = os.path.realpath(sys.executable)
    readable = [path for path in _SYSTEM if os.path.exists(path)]
    base = os.path.realpath(sys.base_prefix)
    readable += [] if Path(base).is_relative_to("/usr") else [base]
    around = _bubblewrap(readable, scratch) if backend == "bubblewrap" else []
    settings = {
        "hidden": [str(_ROOT)],
        "keep_reading": backend == "landlock" and not _public(Path(python)),
    }
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    code = (
        f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from r1jax.rewards import inside;"
        f" inside.main({theirs.fileno()})"
    )
    with theirs:
        process = subprocess.Popen(
            [*around, python, "-P", "-S", "-s", "-B", "-c", code, json.dumps(settings)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
            pass_fds=[theirs.fileno()],
            cwd="/",
            start_new_session=True,
        )
    sandbox = Sandbox(
        backend=backend,
        process=process,
        control=ours,
        readable=[*readable, *_DEVICES],
        scratch=scratch,
    )
    try:
        _say_hello(sandbox)
        _check(sandbox)
    except BaseException:
        sandbox.close()
        raise
    return sandbox


def _say_hello(sandbox: Sandbox) -> None:
    if _receive(sandbox, _START_SECONDS) != b"hello":
        sandbox.control.close()
        os.killpg(sandbox.process.pid, signal.SIGKILL)
        said = sandbox.process.stderr.read() if sandbox.process.stderr else b""
        lines = said.decode(errors="replace").strip().splitlines() or ["no answer from it"]
        raise SandboxError(f"does not start: {lines[-1][:300]}")


def _check(sandbox: Sandbox) -> None:
    with canary.bait() as (source, expected):
        run = run_program(sandbox, source, b"canary", Limits())
    if run.status != "ok" or run.stdout != expected:
        found = run.stdout.decode(errors="replace").strip().splitlines()
        raise SandboxError(f"the canary was not held: {', '.join(found)} {run.detail}"[:400])


def _bubblewrap(readable: list[str], scratch: Path | None) -> list[str]:
    """The command that puts what follows it into namespaces of its own."""
    bwrap = shutil.which("bwrap")
    if bwrap is None:
        raise SandboxError("not installed (no bwrap on PATH)")
    options = [bwrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts"]
    options += ["--unshare-cgroup-try", "--clearenv", "--setenv", "PYTHONHASHSEED", "0"]
    options += ["--setenv", "LC_ALL", "C.UTF-8", "--hostname", "sandbox", "--cap-drop", "ALL"]
    if os.geteuid() == 0:
        # Root needs no user namespace: `inside` becomes user 65534, on whom limits on the number
        # of threads act; within a user namespace root's stay off.
        options += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        options += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    made: set[Path] = set()
    package = str(Path(__file__).parent)
    for path in [*readable, package]:
        for parent in reversed(Path(path).parents[:-1]):
            if parent not in made and not any(parent.is_relative_to(each) for each in readable):
                options += ["--perms", "0755", "--dir", str(parent)]
                made.add(parent)
        if os.path.islink(path):
            options += ["--symlink", os.readlink(path), path]
        else:
            options += ["--ro-bind", path, path]
    for device in _DEVICES:
        options += ["--dev-bind", device, device]
    if scratch is not None:
        options += ["--perms", "0755", "--dir", str(scratch.parent)]
        options += ["--bind", str(scratch), str(scratch)]
    return [*options, "--remount-ro", "/", "--chdir", "/"]


def _public(path: Path) -> bool:
    """Whether any user may read the file, and enter the folders above it."""
    return all(each.stat().st_mode & 0o001 for each in path.parents) and bool(
        path.stat().st_mode & 0o004
    )


# ------------------------------------------------------------------------------ running programs


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
        reply = _receive(self.sandbox, self.limits.wall_seconds + _GRACE)
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
        return _watch(sandbox, "binary", limits, stdin, program=program)
    return _watch(sandbox, "program", limits, stdin, source=program)


def compile_cpp(source: str, limits: Limits, backend: str | None = None) -> tuple[bytes, Run]:
    """The program that g++ makes of a C++ source, and how g++ ended: b"" unless that is "ok".

    g++ runs confined too: a source can include any file that it may read, or never end.

    Raises:
      SandboxError: there is no g++ on PATH, or no sandbox.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise SandboxError("C++ programs need a compiler: install g++ (apt-get install g++)")
    command = [os.path.realpath(compiler), "-O2", "-std=gnu++17", "-x", "c++", "-o", "program", "-"]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)  # the compiler may run as another user
        with open_sandbox(backend, scratch=Path(folder)) as sandbox:
            stdin = source.encode(errors="replace")
            run = _watch(
                sandbox, "compile", limits, stdin, file_bytes=_PROGRAM_BYTES, command=command
            )
        if run.status != "ok":
            return b"", run
        file = os.open(Path(folder, "program"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(file, "rb") as stream:
            return stream.read(_PROGRAM_BYTES), run


def _watch(
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


def _receive(sandbox: Sandbox, seconds: float) -> bytes:
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
