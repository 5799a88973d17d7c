"""Hostile programs (`attacks.toml`): none escapes, none is scored as right, nothing is left."""

import os
import random
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from r1jax.rewards import code
from r1jax.rewards.sandbox.programs import Limits

ROOT = Path(__file__).parents[1]
ATTACKS = tomllib.loads(Path(__file__).with_name("attacks.toml").read_text())
PROGRAMS = {attack["name"]: attack for attack in ATTACKS["programs"]}
FUNCTIONS = {attack["name"]: attack for attack in ATTACKS["functions"]}
LIMITS = Limits(cpu_seconds=1, wall_seconds=15.0, memory_bytes=256 << 20)

PRELUDE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
NUMBERS = dict(
    fork=57, clone=56, ptrace=101, shmget=29, shmctl=31, msgget=68, msgctl=71, mount=165,
    umount2=166, sethostname=170, tkill=200, tgkill=234, add_key=248, keyctl=250, unshare=272,
    rt_sigqueueinfo=129, inotify_init1=294, perf_event_open=298, open_by_handle_at=304, setns=308,
    process_vm_readv=310, bpf=321, userfaultfd=323, io_uring_setup=425, pidfd_open=434,
    clone3=435, openat2=437, pidfd_getfd=438,
)

def syscall(name, *arguments):
    found = libc.syscall(NUMBERS[name], *arguments)
    if found < 0:
        raise OSError(ctypes.get_errno(), name)
    return found

def won():
    print("ESCAPED", flush=True)

"""


@dataclass
class Bait:
    """What the attacks are after."""

    folder: Path
    server: socket.socket
    victim: subprocess.Popen

    def prelude(self) -> str:
        places = {
            "FOLDER": str(self.folder),
            "SECRET": str(self.folder / "secret"),
            "REPO": str(ROOT),
            "PORT": self.server.getsockname()[1],
            "PID": os.getpid(),
            "VICTIM": self.victim.pid,
        }
        return PRELUDE + "".join(f"{name} = {value!r}\n" for name, value in places.items())

    def harm(self) -> str:
        """What has happened to it; "" if nothing."""
        secret = self.folder / "secret"
        if sorted(os.listdir(self.folder)) != ["secret"]:
            return f"the folder holds {os.listdir(self.folder)}"
        if secret.read_text() != "hidden" or secret.stat().st_mode & 0o777 != 0o666:
            return "the file was changed"
        if self.victim.poll() is not None:
            return "the other process was killed"
        try:
            self.server.accept()
        except BlockingIOError:
            return ""
        return "somebody connected"


def sleeper() -> subprocess.Popen:
    """A process of the user whom programs run as."""
    user = 65534 if os.geteuid() == 0 else None
    return subprocess.Popen([shutil.which("sleep") or "sleep", "600"], user=user)


@pytest.fixture
def bait(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bait]:
    folder = tmp_path_factory.mktemp("bait")
    for each in (folder, *list(folder.parents)[:3]):  # nothing but the sandbox guards it
        if each.owner() != "root" or each.is_relative_to(tmp_path_factory.getbasetemp().parent):
            each.chmod(0o777)
    (folder / "secret").write_text("hidden")
    (folder / "secret").chmod(0o666)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        victim = sleeper()
        yield Bait(folder, server, victim)
        victim.kill()
        victim.wait()


def processes_of_sandboxes() -> list[str]:
    """Processes that came out of this process's sandboxes, whatever they have become."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes()
        except (OSError, NotADirectoryError):
            continue
        if f"# for process {os.getpid()}\0".encode() in command:
            found.append(entry.name)
    return found


def limits(attack: dict) -> Limits:
    own = LIMITS
    if "timeout" in attack.get("status", []):
        own = replace(own, wall_seconds=0.5)
    # Some virtual machines hand out memory for the first time at 256 MB a second of processor time.
    return replace(own, memory_bytes=attack["memory_mb"] << 20) if "memory_mb" in attack else own


def fenced(source: str) -> str:
    return f"````python\n{source}\n````"


def check_refused(attack: dict, verdict: code.Verdict) -> None:
    assert verdict.status not in ("ok", "sandbox_error"), verdict
    assert verdict.status in attack.get("status", ["wrong", "error", "memory"]), verdict


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_hostile_program_is_held(name: str, backend: str, bait: Bait) -> None:
    attack = PROGRAMS[name]
    row = {"tests": [{"stdin": "", "stdout": "ESCAPED"}]}
    answer = fenced(bait.prelude() + attack["source"])
    check_refused(attack, code.judge(row, answer, limits=limits(attack), backend=backend))
    assert bait.harm() == ""


@pytest.mark.parametrize("name", [name for name in PROGRAMS if PROGRAMS[name].get("plain")])
def test_the_attack_works_where_nothing_confines_it(name: str, bait: Bait) -> None:
    command = [sys.executable, "-I", "-c", bait.prelude() + PROGRAMS[name]["source"]]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if "Error: [Errno 1]" in done.stderr or "Error: [Errno 38]" in done.stderr:
        pytest.skip("this machine forbids it to everybody")
    assert done.stdout.strip().endswith("ESCAPED"), done.stderr


RESULTS = {x: random.Random(x).randrange(1 << 60, 1 << 61) for x in range(1, 5)}
# The last swallows exceptions that a plain `assert` does not: for attacks that raise.
FORMS = {
    "calls": {"tests": [{"args": [x], "result": right} for x, right in RESULTS.items()]},
    "script": {
        "test": f"EXPECTED = {RESULTS}\ndef check(candidate):\n"
        + "".join(f"    assert candidate({x}) == {right}\n" for x, right in RESULTS.items())
    },
    "map": {
        "test": f"EXPECTED = {RESULTS}\n"
        "assert all(map(lambda x: solve(x) == EXPECTED[x], EXPECTED))\n"
    },
}


CASES = [(name, form) for form in FORMS for name in FUNCTIONS if form != "map" or "raises" in name]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_forged_result_is_not_right(name: str, form: str, backend: str) -> None:
    row = FORMS[form] | {"entry_point": "solve"}
    answer = fenced(FUNCTIONS[name]["source"])
    verdict = code.judge(row, answer, limits=limits(FUNCTIONS[name]), backend=backend)
    check_refused(FUNCTIONS[name], verdict)
    assert verdict.passed == 0


@pytest.mark.parametrize("form", FORMS)
def test_the_right_function_is_right_where_attacks_fail(form: str, backend: str) -> None:
    row = FORMS[form] | {"entry_point": "solve"}
    answer = fenced(f"def solve(x): return {RESULTS}[x]")
    assert code.accuracy(row, answer, limits=LIMITS, backend=backend) == 1.0


def test_nothing_is_left_of_any_attack(backend: str) -> None:
    code.judge({"tests": [{"stdin": "", "stdout": ""}]}, fenced(""), backend=backend)
    assert processes_of_sandboxes()  # one waits for the next program
    code.close_idle()
    end = time.monotonic() + 10  # the kernel takes a moment to end a namespace
    while processes_of_sandboxes() and time.monotonic() < end:
        time.sleep(0.05)
    assert processes_of_sandboxes() == []


def test_there_are_at_least_sixty_attacks() -> None:
    assert len(PROGRAMS) + len(FUNCTIONS) >= 60
