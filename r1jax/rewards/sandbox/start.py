"""Starts sandboxes, each tried by a canary before it is handed out; and compiles C++ in one."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from r1jax.rewards.sandbox import canary
from r1jax.rewards.sandbox.programs import (
    Limits,
    Run,
    Sandbox,
    SandboxError,
    receive,
    run_program,
    watch,
)

BACKENDS = ("bubblewrap", "landlock")

_ROOT = Path(__file__).parents[3]
_PROGRAM_BYTES = 64 << 20
_START_SECONDS = 60.0
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")


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
        f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from r1jax.rewards.sandbox import inside;"
        f" inside.main({theirs.fileno()})  # for process {os.getpid()}"
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
    if receive(sandbox, _START_SECONDS) != b"hello":
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
            run = watch(
                sandbox, "compile", limits, stdin, file_bytes=_PROGRAM_BYTES, command=command
            )
        if run.status != "ok":
            return b"", run
        file = os.open(Path(folder, "program"), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with open(file, "rb") as stream:
            return stream.read(_PROGRAM_BYTES), run
