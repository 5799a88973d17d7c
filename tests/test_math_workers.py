"""Workers that hang or crash are replaced; nothing is executed or left over."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from r1jax.rewards.math import accuracies, accuracy, worker_processes
from r1jax.rewards.workers import Reply, Workers

ROOT = Path(__file__).parents[1]
SYMBOLIC = ({"answer": r"\int_0^1 x\,dx"}, r"\boxed{1/2}")  # only math-verify can tell

PROGRAM = """
import json, os, sys, time
print(json.dumps({"ready": True}), flush=True)
for line in sys.stdin:
    job = json.loads(line)["job"]
    if job == "hang": time.sleep(1000)
    if job == "crash": os._exit(3)
    if job == "babble": print("x" * (3 << 20), flush=True)
    print(json.dumps({"value": job}), flush=True)
"""


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("r1jax.rewards.workers.GRACE", 0.2)
    workers = Workers([sys.executable, "-c", PROGRAM], num_workers=2)
    yield workers
    workers.close()


def test_a_worker_that_hangs_crashes_or_babbles_is_replaced_and_counted(echo: Workers):
    assert echo.do("hang", seconds=0.05) == Reply(status="timeout")
    assert echo.do("crash", seconds=5) == Reply(status="crash")
    assert echo.do("babble", seconds=5) == Reply(status="crash")
    assert echo.do(["ok", "\ud800", 1.5], seconds=5) == Reply(
        status="done", value=["ok", "\ud800", 1.5]
    )
    counts = echo.counts()
    assert (counts.done, counts.timeout, counts.crash) == (1, 1, 2)
    assert len(echo.processes()) == 1


def test_replies_come_in_the_order_of_the_jobs_whoever_does_them(echo: Workers):
    jobs = [*range(40), "crash", *range(40, 60), "hang", 60]
    replies = echo.do_all(jobs, seconds=0.2)
    assert [reply.value for reply in replies] == [
        job if isinstance(job, int) else None for job in jobs
    ]


def test_one_job_at_a_time_starts_one_process_and_no_job_starts_none(echo: Workers):
    assert echo.do_all([], seconds=1) == [] and echo.processes() == []
    for job in range(5):
        echo.do(job, seconds=5)
    assert len(echo.processes()) == 1


def test_close_ends_every_process(echo: Workers):
    echo.do_all(list(range(20)), seconds=5)
    numbers = echo.processes()
    assert numbers
    echo.close()
    assert echo.processes() == []
    for number in numbers:
        with pytest.raises(ProcessLookupError):
            os.kill(number, 0)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit(7)", "ended with code 7"),
        ('print(\'{"error": "no such thing"}\', flush=True)', "cannot start: no such thing"),
    ],
)
def test_a_program_that_does_not_start_is_named_in_one_line(program: str, message: str):
    workers = Workers([sys.executable, "-c", program], num_workers=1)
    for _ in range(2):  # the place in the pool is not lost
        with pytest.raises(RuntimeError, match=message) as error:
            workers.do(1, seconds=1)
        assert "\n" not in str(error.value)
    assert workers.processes() == []


def test_a_pool_needs_a_worker():
    with pytest.raises(ValueError, match="got num_workers=0"):
        Workers(["true"], num_workers=0)


def test_what_a_model_wrote_is_never_executed(tmp_path: Path):
    mark = tmp_path / "executed"
    for code in (f"__import__('os').system('touch {mark}')", f"open('{mark}', 'w')"):
        for form in (code, rf"\text{{{code}}}", rf"\operatorname{{{code}}}(x) + 1", rf"${code}$"):
            accuracy({"answer": r"\int x dx"}, rf"\boxed{{{form}}}")
            accuracy({"answer": form}, r"\boxed{\int x dx}")
    assert not mark.exists()


def test_several_threads_share_the_workers():
    scores: list[list[float | None]] = []

    def score() -> None:
        scores.append(accuracies([SYMBOLIC[0]] * 3, [SYMBOLIC[1]] * 3))

    threads = [threading.Thread(target=score) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert scores == [[1.0, 1.0, 1.0]] * 4


def test_workers_end_with_their_parent_even_when_it_is_killed_while_they_work():
    code = (
        "import os, threading, time\n"
        "from r1jax.rewards import math\n"
        f"math.accuracy({SYMBOLIC[0]!r}, {SYMBOLIC[1]!r})\n"
        "job = {'answer': '5'}, r'\\boxed{9^{9^{9^{9}}}}'\n"
        "threading.Thread(target=math.accuracy, args=job, kwargs={'seconds': 1.0}).start()\n"
        "time.sleep(0.2)\n"
        "print(*math.worker_processes(), flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    number = int(run.stdout)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{number}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not Path(f"/proc/{number}").exists()


def test_scoring_easy_answers_starts_no_worker_and_loads_no_sympy():
    code = (
        "import sys\n"
        "from r1jax.rewards import math\n"
        "assert math.accuracy({'answer': '1/2'}, r'\\boxed{\\frac12}') == 1.0\n"
        "print(math.worker_processes(), 'sympy' in sys.modules, 'jax' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["[]", "False", "False"]


def test_worker_answers_are_lines_of_json():
    command = [sys.executable, "-P", str(ROOT / "r1jax/rewards/math_worker.py")]
    jobs = [["x+x", "2x"], ["x", "y"], ["", "1"]]
    lines = "".join(json.dumps({"job": job, "seconds": 20}) + "\n" for job in jobs)
    run = subprocess.run(command, input=lines, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in run.stdout.splitlines()] == [
        {"ready": True},
        {"value": True},
        {"value": False},
        {"value": None},
    ]


def test_worker_processes_are_those_that_run():
    accuracy(*SYMBOLIC)
    assert worker_processes()
    for number in worker_processes():
        os.kill(number, 0)
