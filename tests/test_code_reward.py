"""Programs that answers hold: what they are scored, and that HumanEval's are scored right.

Run as a program, it measures how fast: `python tests/test_code_reward.py`.
"""

import gzip
import json
import os
import shutil
import statistics
import time
from pathlib import Path

import pytest

from r1jax.data import eval_sets
from r1jax.rewards import code
from r1jax.rewards.code import LIMITS, Verdict, accuracy, judge, passed_share
from r1jax.rewards.sandbox import start
from r1jax.rewards.sandbox.programs import Limits, SandboxError, run_program

HUMANEVAL = Path(__file__).parents[2] / "shared" / "data" / "humaneval.jsonl.gz"
SUM = {"tests": [{"stdin": "1 2\n", "stdout": "3\n"}, {"stdin": "5 -7\n", "stdout": "-2\n"}]}
SQUARE = {"entry_point": "square", "tests": [{"args": [x], "result": x * x} for x in (2, 3, 4)]}


def fenced(source: str, tag: str = "python") -> str:
    return f"Let me think.\n```{tag}\n{source}\n```\nThat is it."


def verdict(row: dict, source: str, backend: str, **options) -> str:
    return judge(row, fenced(source), backend=backend, **options).status


# --------------------------------------------------------------------------- the answer's program


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```py\na\n```\nthen\n```python\nb\n```", "b\n"),
        ("```python\na\n```\nprints\n```text\nb\n```", "a\n"),
        ("```python\na\n```\n```cpp\nb\n```", "a\n"),
        ("```Python title=x\na\n```", "a\n"),
        ("~~~python\na\n~~~", "a\n"),
        ("````python\n```\na\n```\n````", "```\na\n```\n"),
        ("```python\ns = '''\n~~~\n'''\n```", "s = '''\n~~~\n'''\n"),
        ("  ```python\na\n  ```", "a\n"),
        ("```python\r\na\r\n```\r\n", "a\r\n"),
        ("```python\n```", "\n"),
        ("```python\na\n```\n```python\nb", "a\n"),
        ("text ```python a ``` text", None),
        ("```python\na", None),
        ("a", None),
        ("", None),
    ],
)
def test_the_last_closed_block_of_the_language_is_the_program(answer: str, expected) -> None:
    assert code.last_code_block(answer) == expected


def test_the_language_of_a_block_is_the_rows() -> None:
    answer = "```cpp\na\n```\n```python\nb\n```"
    assert code.last_code_block(answer, "cpp") == "a\n"


def test_an_answer_without_a_program_scores_0() -> None:
    assert accuracy(SUM, "print(3)") == 0.0


# --------------------------------------------------------------------------- comparing outputs


@pytest.mark.parametrize(
    ("got", "expected", "tolerance", "same"),
    [
        ("3\n", "3", 0, True),
        ("3  4 \n\n\n", "3 4", 0, True),
        ("3\r\n4", "3\n4", 0, True),
        ("", "\n", 0, True),
        ("3\n4", "3 4", 0, False),
        ("3\n\n4", "3\n4", 0, False),
        ("3", "3 3", 0, False),
        ("3.0", "3", 0, False),
        ("3.0", "3", 1e-6, True),
        ("0.3333333", "0.33333334", 1e-6, True),
        ("0.333", "0.33333334", 1e-6, False),
        ("1000001", "1000000", 1e-5, True),
        ("nan", "1", 1e-6, False),
        ("inf", "1", 1e-6, False),
        ("1", "inf", 1e-6, False),
        ("yes", "no", 1e-6, False),
        ("", "3", 0, False),
    ],
)
def test_outputs_are_compared_word_by_word_on_each_line(got, expected, tolerance, same) -> None:
    assert code.same_output(got, expected, tolerance) == same


# --------------------------------------------------------------------------- verdicts


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("print(sum(map(int, input().split())))", "ok"),
        ("print(3)", "wrong"),
        ("a, b = map(int, input().split())\nassert b > 0\nprint(a + b)", "error"),
        ("while True: pass", "timeout"),
        ("bytearray(1 << 45)", "memory"),
        ("print(", "error"),
    ],
)
def test_a_program_is_judged_by_what_it_prints(source: str, status: str, backend: str) -> None:
    assert verdict(SUM, source, backend, limits=Limits(cpu_seconds=1)) == status


@pytest.mark.parametrize(
    ("source", "status"),
    [
        ("def square(x): return x * x", "ok"),
        ("class Solution:\n    def square(self, x): return x * x", "ok"),
        ("square = lambda x: x * x\nif __name__ == '__main__': print(input())", "ok"),
        ("def square(x): return float(x * x)", "ok"),
        ("def square(x): print('noise'); return x * x", "ok"),
        ("def square(x): return x + x", "wrong"),
        ("def square(x): return str(x * x)", "wrong"),
        ("def square(x): raise ValueError(x)", "error"),
        ("def square(x): return bytearray(1 << 45)", "memory"),
        ("def square(x): return range(x)", "error"),
        ("def cube(x): return x * x", "error"),
        ("import os; os._exit(0)", "error"),
    ],
)
def test_a_function_is_judged_by_what_it_returns(source: str, status: str, backend: str) -> None:
    assert verdict(SQUARE, source, backend) == status
    assert accuracy(SQUARE, fenced(source), backend=backend) == float(status == "ok")


def test_partial_credit_is_the_share_of_tests_passed(backend: str) -> None:
    assert passed_share(SUM, fenced("print(-2)"), backend=backend) == 1 / 2
    right_for_two = fenced("def square(x): return x * x if x != 3 else 1 / 0")
    assert passed_share(SQUARE, right_for_two, backend=backend) == 2 / 3
    assert accuracy(SQUARE, right_for_two, backend=backend) == 0.0


def test_the_status_is_that_of_the_first_failure(backend: str) -> None:
    source = "def square(x): return [0, 1 / 0][x == 3] if x < 4 else 16"
    assert verdict(SQUARE, source, backend, stop=False) == "error"
    source = "def square(x): return 0 if x == 2 else 1 / 0"
    assert verdict(SQUARE, source, backend, stop=False) == "wrong"


def test_without_partial_credit_the_first_failure_ends_it(backend: str) -> None:
    source = "def square(x): return x * x if x != 2 else 0"
    assert judge(SQUARE, fenced(source), backend=backend).passed == 0
    assert judge(SQUARE, fenced(source), backend=backend, stop=False).passed == 2


@pytest.mark.parametrize(
    ("result", "expected", "tolerance", "right"),
    [
        ("(1, [2])", [1, (2,)], 0, True),
        ("[1, 2]", [1, 2, 3], 0, False),
        ("{1, 2}", {2, 1}, 0, True),
        ("{'a': (1,)}", {"a": [1]}, 0, True),
        ("{'a': 1}", {"b": 1}, 0, False),
        ("0.1 + 0.2", 0.3, 0, False),
        ("[0.1 + 0.2]", [0.3], 1e-9, True),
        ("'0.3'", 0.3, 1e-9, False),
        ("None", None, 0, True),
        ("float('nan')", float("nan"), 1e-9, False),
        ("10 ** 100", 10**100, 0, True),
    ],
)
def test_results_are_compared_as_values(result, expected, tolerance, right, backend) -> None:
    row = {"entry_point": "f", "tests": [{"args": [], "result": expected}], "tolerance": tolerance}
    answer = fenced(f"def f(): return {result}")
    assert accuracy(row, answer, backend=backend) == float(right)


def test_a_script_can_use_the_setup_random_numbers_and_exceptions(backend: str) -> None:
    row = {
        "entry_point": "half",
        "setup": "import random\ndef double(x): return x + x",
        "test": """
for _ in range(20):
    x = random.randrange(100)
    assert half(double(x)) == x
try:
    half(3)
except ValueError as error:
    assert "odd" in str(error)
else:
    assert False
""",
    }
    right = (
        "def half(x):\n    if x % 2: raise ValueError('odd')\n    return x // len([x, double(x)])"
    )
    assert verdict(row, right, backend) == "ok"
    assert verdict(row, "def half(x): return x // 2", backend) == "wrong"
    assert verdict(row, "def half(x):\n  assert x % 2 == 0\n  return x // 2", backend) == "error"


@pytest.mark.parametrize(
    "row",
    [
        {"entry_point": "f", "test": "assert unknown(1) == f(1)"},
        {"entry_point": "f", "test": "def check(candidate): pass"},
        {"entry_point": "f", "test": "this is no Python"},
        {"entry_point": "f", "test": "assert f(object())"},
        {"entry_point": "f", "test": "assert f(1)", "setup": "import nothing_of_this_name"},
    ],
)
def test_tests_that_fail_by_themselves_judge_nothing(row: dict, backend: str) -> None:
    assert accuracy(row, fenced("def f(x): return x"), backend=backend) is None
    assert passed_share(row, fenced("def f(x): return x"), backend=backend) is None


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({}, "needs one of 'test' .* and 'tests'"),
        ({"test": "", **SUM}, "needs one of 'test' .* and 'tests'"),
        ({"tests": []}, "at least one test"),
        ({"tests": "1"}, "at least one test"),
        ({"tests": [{"stdin": "1"}]}, "a test needs texts stdin and stdout"),
        ({"tests": [{"stdin": 1, "stdout": "1"}]}, "a test needs texts stdin and stdout"),
        ({"tests": [*SUM["tests"], *SQUARE["tests"]]}, "of one kind"),
        ({"tests": SQUARE["tests"]}, "no function's name"),
        ({"entry_point": "f", "tests": [{"args": [object()], "result": 1}]}, "not a plain value"),
        ({"entry_point": "f", "test": 5}, "must be a script's text, got int"),
        ({"entry_point": "f", "test": "", "code_language": "cpp"}, "in python only"),
        ({"entry_point": "f", "test": "", "setup": 1}, "'setup' must be a text, got int"),
        ({**SUM, "code_language": "ada"}, "unknown code_language 'ada'; known: python, cpp"),
        ({**SUM, "tolerance": -1}, "'tolerance' must be"),
    ],
)
def test_a_malformed_row_is_named(row: dict, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        accuracy(row, fenced("print(1)"))


@pytest.mark.parametrize(
    "answer", ["", "```python\n\ud800\n```", "```python\n\x00\n```", "```" * 9]
)
def test_a_strange_answer_scores_0(answer: str, backend: str) -> None:
    assert accuracy(SUM, answer, backend=backend) == 0.0
    assert accuracy(SQUARE, answer, backend=backend) == 0.0


@pytest.mark.parametrize("answer", [None, b"```python\nprint(3)\n```", 5])
def test_an_answer_that_is_no_text_is_named(answer) -> None:
    with pytest.raises(ValueError, match="an answer must be text"):
        accuracy(SUM, answer)


def test_a_sandbox_is_used_again(backend: str) -> None:
    code.close_idle()
    for _ in range(5):
        assert accuracy(SUM, fenced("print(1)"), backend=backend) == 0.0
    key = (os.getpid(), backend, "programs")
    assert len(code._idle[key]) == 1


def test_a_sandbox_that_dies_is_replaced(backend: str) -> None:
    assert verdict(SUM, "print(1)", backend) == "wrong"
    (box,) = code._idle[os.getpid(), backend, "programs"]
    box.process.kill()
    box.process.wait()
    assert verdict(SUM, "print(1)", backend) == "wrong"


# --------------------------------------------------------------------------- C++


needs_cpp = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ here")


@needs_cpp
def test_a_cpp_program_is_compiled_once_and_judged_by_what_it_prints(backend: str) -> None:
    source = '#include <cstdio>\n#include <cstdlib>\nint main() { int a, b; scanf("%d %d", &a, &b);'
    row = {**SUM, "code_language": "cpp"}
    right = judge(row, fenced(source + ' printf("%d", a + b); }', "cpp"), backend=backend)
    assert right == Verdict(status="ok", passed=2, total=2)
    # One program for the failures: what it does depends on its input.
    source += ' if (a == 1) return 3; if (a == 2) for (;;); if (a == 3) abort(); puts("4"); }'
    row["tests"] = [{"stdin": f"{a} 0", "stdout": "4"} for a in (4, 1, 2, 3, 4)]
    share = passed_share(row, fenced(source, "c++"), limits=Limits(cpu_seconds=1), backend=backend)
    assert share == 2 / 5


@needs_cpp
def test_a_source_that_reads_the_machines_files_does_not_compile(backend: str) -> None:
    row = {**SUM, "code_language": "cpp"}
    for source in ('#include "/etc/passwd"', 'asm(".incbin \\"/etc/passwd\\"");', "int main() {"):
        found = judge(row, fenced(source + "\nint main() {}", "cpp"), backend=backend)
        assert found.status == "error" and "error" in found.detail.lower(), found


def test_without_a_compiler_cpp_programs_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(start.shutil, "which", lambda name: None)
    with pytest.raises(SandboxError, match=r"apt-get install g\+\+"):
        accuracy({**SUM, "code_language": "cpp"}, fenced("int main() {}", "cpp"))


# --------------------------------------------------------------------------- HumanEval


def humaneval() -> tuple[list[dict], list[str], list[str]]:
    """Rows, answers with their own solutions, and answers with broken ones."""
    with gzip.open(HUMANEVAL, "rt") as file:
        records = [json.loads(line) for line in file]
    rows = eval_sets.load("humaneval", HUMANEVAL)
    right = [fenced(record["prompt"] + record["canonical_solution"]) for record in records]
    return rows, right, [fenced(record["prompt"] + "    return None") for record in records]


@pytest.mark.skipif(not HUMANEVAL.exists(), reason="the HumanEval file is not here")
def test_humaneval_solutions_pass_and_broken_ones_fail(backend: str) -> None:
    rows, right, broken = humaneval()
    assert len(rows) == 164
    assert code.accuracies(rows, right, backend=backend) == [1.0] * 164
    assert code.accuracies(rows, broken, backend=backend) == [0.0] * 164


def test_each_answer_needs_a_row() -> None:
    with pytest.raises(ValueError, match="got 1 and 0"):
        code.accuracies([SUM], [])


def test_the_limits_of_a_program_are_as_documented() -> None:
    assert Limits() == LIMITS


def measure(backend: str) -> None:
    """Prints how long a program takes to start, and how many a second are scored."""
    times = []
    with start.open_sandbox(backend) as box:
        for _ in range(100):
            began = time.perf_counter()
            assert run_program(box, "print(1)", b"", LIMITS).stdout == b"1\n"
            times.append(1000 * (time.perf_counter() - began))
    print(f"{backend}: print(1) from start to verdict, 100 runs, ms: {min(times):.1f} shortest,")
    print(f"    {statistics.median(times):.1f} median, {max(times):.1f} longest")
    rows, right, _ = humaneval()
    code.accuracies(rows[:4], right[:4], backend=backend)  # starts the sandboxes
    began = time.perf_counter()
    assert code.accuracies(rows, right, backend=backend) == [1.0] * len(rows)
    rate = len(rows) / (time.perf_counter() - began)
    print(f"    HumanEval: {rate:.0f} programs a second, each with its tests")


if __name__ == "__main__":
    for each in start.BACKENDS:
        measure(each)
