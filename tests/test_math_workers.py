"""math-verify in its worker processes: what it says, and that nothing is executed or left over."""

import subprocess
import sys
import threading
import time
from pathlib import Path

from r1jax.rewards.math import accuracies
from r1jax.rewards.math.score import pool
from r1jax.rewards.math.verify import compared

ROOT = Path(__file__).parents[1]
SYMBOLIC = ({"answer": r"\int_0^1 x\,dx"}, r"\boxed{1/2}")  # only math-verify can tell


def test_formulas_are_the_same_different_or_not_to_be_read():
    golds, answers = ["x+x", "x", "", r"\frac{1}{2}"], ["2x", "y", "1", "@@"]
    assert pool().map(compared, golds, answers) == ["same", "different", "unreadable", "different"]


def test_what_a_model_wrote_is_never_executed(tmp_path: Path):
    mark = tmp_path / "executed"
    rows, answers = [], []
    for code in (f"__import__('os').system('touch {mark}')", f"open('{mark}', 'w')"):
        for form in (code, rf"\text{{{code}}}", rf"\operatorname{{{code}}}(x) + 1", rf"${code}$"):
            rows += [{"answer": r"\int x dx"}, {"answer": form}]
            answers += [rf"\boxed{{{form}}}", r"\boxed{\int x dx}"]
    before = pool().done
    accuracies(rows, answers)
    assert pool().done > before
    assert not mark.exists()


def test_equal_answers_are_looked_at_once():
    before = pool().done
    row = {"answer": r"\int_0^5 x\,dx"}
    assert accuracies([row] * 6, [r"\boxed{25/2}", r"\boxed{13}"] * 3) == [1.0, 0.0] * 3
    assert pool().done == before + 2


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
        "from r1jax.rewards.math.score import accuracy, pool\n"
        f"accuracy({SYMBOLIC[0]!r}, {SYMBOLIC[1]!r})\n"
        "job = {'answer': '5'}, r'\\boxed{9^{9^{9^{9}}}}'\n"
        "threading.Thread(target=accuracy, args=job, kwargs={'seconds': 1.0}).start()\n"
        "time.sleep(0.2)\n"
        "print(*pool().processes(), flush=True)\n"
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
        "from r1jax.rewards.math.score import accuracy, pool\n"
        "assert accuracy({'answer': '1/2'}, r'\\boxed{\\frac12}') == 1.0\n"
        "print(pool().processes(), 'sympy' in sys.modules, 'jax' in sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["[]", "False", "False"]


def test_a_forked_process_does_not_use_its_parents_workers():
    code = (
        "import os\n"
        "from r1jax.rewards.math.score import accuracy, pool\n"
        f"assert accuracy({SYMBOLIC[0]!r}, {SYMBOLIC[1]!r}) == 1.0\n"
        "mine = pool().processes()\n"
        "if os.fork() == 0:\n"
        "    print('child', len(pool().processes()), flush=True)\n"
        "    raise SystemExit\n"
        "os.wait()\n"
        "again = accuracy({'answer': r'\\int_0^2 x\\,dx'}, '2')\n"
        "print('parent', pool().processes() == mine, again)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == ["child", "0", "parent", "True", "1.0"]
