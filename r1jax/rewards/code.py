"""Scores programs that a model wrote, Python and C++, by running them on tests in a sandbox.

A row holds tests of one of three kinds:

  tests        [{"stdin": text, "stdout": text}, ...]          a whole program, Python or C++
  tests        [{"args": [...], "result": value}, ...]         a Python function, `entry_point`
  test         a script of asserts; `check(candidate)` is called if it defines it, as HumanEval's

and, where they matter, `code_language` ("python" or "cpp"), `entry_point` (the function's name, or
that of a method of the class `Solution`), `setup` (Python that runs before the program and before
the script), `tolerance` (for floats; 0 by default).

What a program prints is compared here, after it has ended. For functions and scripts, the tests
run in a second sandbox and the program in the first; between them pass calls and plain values
(`values`), and the verdict comes from the second. So an expected result is never in a process that
runs the program, on its stack or in its memory; an overridden `__eq__`, a patched `assert` or
`builtins`, an early exit, a thread or a frame that the program writes by itself can change what it
answers, and nothing else. Scripts are not parsed nor rewritten: loops, random cases and helper
functions run as they are, where they cannot be reached. Values are compared there too, not in the
grader, because one can be made to be slow to compare (a set of colliding hashes).

What this cannot test: arguments that are changed in place, results or arguments that are no plain
values (functions, objects, iterators).
"""

import atexit
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from r1jax.rewards.sandbox import programs, start, values
from r1jax.rewards.sandbox.programs import Job, Limits, Sandbox, Status

LANGUAGES = {
    "python": ("", "python", "py", "python3"),
    "cpp": ("", "cpp", "c++", "cc", "cxx", "c"),
}
LIMITS = Limits()
_COMPILING = Limits(cpu_seconds=30, wall_seconds=60.0, memory_bytes=4 << 30)
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)[^`]*")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the tests say of an answer. `status` is the first failure's, "ok" if there is none."""

    status: Status
    passed: int
    total: int  # a script counts as one test
    detail: str = ""


def accuracy(
    row: Mapping[str, Any],
    answer: str,
    *,
    limits: Limits = LIMITS,
    backend: str | None = None,
) -> float | None:
    """1.0 if the last code block of the answer passes all tests, else 0.0; None if not judged.

    None is for what is not the program's fault: the sandbox broke before it ran, or the test
    script fails by itself. `limits` are for each run on a stdin, or for all calls together.

    Raises:
      ValueError: the row has no tests, or they are malformed; the answer is not a str.
      SandboxError: programs cannot be confined, or not compiled, on this machine.
    """
    verdict = judge(row, answer, limits=limits, backend=backend)
    return None if verdict.status == "sandbox_error" else float(verdict.status == "ok")


def passed_share(
    row: Mapping[str, Any],
    answer: str,
    *,
    limits: Limits = LIMITS,
    backend: str | None = None,
) -> float | None:
    """The share of tests that the last code block of the answer passes; None as in `accuracy`.

    A script of asserts is one test: 1.0 or 0.0.

    Raises:
      ValueError, SandboxError: as `accuracy`.
    """
    verdict = judge(row, answer, limits=limits, backend=backend, stop=False)
    return None if verdict.status == "sandbox_error" else verdict.passed / verdict.total


def accuracies(
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[str],
    *,
    workers: int | None = None,
    limits: Limits = LIMITS,
    backend: str | None = None,
) -> list[float | None]:
    """`accuracy` of each answer, with `workers` sandboxes at a time (default: one a core).

    Raises:
      ValueError: not one row for each answer; or as `accuracy`.
      SandboxError: as `accuracy`.
    """
    if len(rows) != len(answers):
        raise ValueError(f"need a row for each answer, got {len(rows)} and {len(answers)}")

    def score(row: Mapping[str, Any], answer: str) -> float | None:
        return accuracy(row, answer, limits=limits, backend=backend)

    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(score, rows, answers))


def last_code_block(answer: str, language: str = "python") -> str | None:
    """The text of the last fenced block marked as `language`, or not marked; None without one.

    A fence is a line of three or more backticks or tildes, as in CommonMark; a block ends at a
    fence of the same sign, at least as long. One that never ends is no block.
    """
    found, fence, tag, lines = None, "", "", []
    for line in answer.split("\n"):
        mark = _FENCE.fullmatch(line.rstrip())
        if not fence:
            if mark:
                fence, tag, lines = mark[1], mark[2].lower(), []
        elif mark and mark[1].startswith(fence) and mark[1] == line.strip():
            if tag in LANGUAGES[language]:
                found = "\n".join(lines) + "\n"
            fence = ""
        else:
            lines.append(line)
    return found


def same_output(got: str, expected: str, tolerance: float = 0.0) -> bool:
    """Whether two outputs have the same words on each line.

    White space between words and at the end does not count, nor do empty lines at the end. With
    `tolerance` two words that are numbers may differ by it, relative or absolute.
    """
    left, right = ([line.split() for line in text.rstrip().split("\n")] for text in (got, expected))
    return len(left) == len(right) and all(
        len(a) == len(b) and all(_same_word(*pair, tolerance) for pair in zip(a, b, strict=True))
        for a, b in zip(left, right, strict=True)
    )


def judge(
    row: Mapping[str, Any],
    answer: str,
    *,
    limits: Limits = LIMITS,
    backend: str | None = None,
    stop: bool = True,
) -> Verdict:
    """Runs the last code block of an answer on the row's tests; with `stop`, to the first failure.

    Raises:
      ValueError, SandboxError: as `accuracy`.
    """
    if not isinstance(answer, str):
        raise ValueError(f"an answer must be text (str), got {type(answer).__name__}")
    language, tests = _tests_of(row)
    total = 1 if isinstance(tests, str) else len(tests)
    source = last_code_block(answer, language)
    if source is None:
        return Verdict(status="error", passed=0, total=total, detail="no code block")
    if isinstance(tests, str) or "args" in tests[0]:
        return _judge_function(row, tests, source, limits, backend, stop)
    if language == "python":
        program = source
    else:
        program, run = start.compile_cpp(source, _COMPILING, backend)
        if not program:
            return Verdict(status=run.status, passed=0, total=total, detail=run.detail)
    return _judge_outputs(row, tests, program, limits, backend, stop)


# --------------------------------------------------------------------------- whole programs


def _judge_outputs(
    row: Mapping[str, Any],
    tests: Sequence[Mapping[str, Any]],
    program: str | bytes,
    limits: Limits,
    backend: str | None,
    stop: bool,
) -> Verdict:
    passed, status, detail = 0, "ok", ""
    with _borrow(backend, "programs") as box:
        for test in tests:
            run = programs.run_program(box, program, _bytes(test["stdin"]), limits)
            found = run.status
            if found == "ok":
                text = run.stdout.decode(errors="replace")
                right = same_output(text, test["stdout"], _tolerance(row))
                found = "ok" if right else "wrong"
            passed += found == "ok"
            if found != "ok" and status == "ok":
                status, detail = found, run.detail
            if found == "sandbox_error" or (stop and found != "ok"):
                break
    if found == "sandbox_error":
        status = found
    return Verdict(status=status, passed=passed, total=len(tests), detail=detail)


def _same_word(got: str, expected: str, tolerance: float) -> bool:
    if got == expected:
        return True
    if not tolerance:
        return False
    try:
        return math.isclose(float(got), float(expected), rel_tol=tolerance, abs_tol=tolerance)
    except ValueError:
        return False


def _bytes(text: str) -> bytes:
    return text.encode(errors="surrogateescape")


# --------------------------------------------------------------------------- functions


def _judge_function(
    row: Mapping[str, Any],
    tests: str | Sequence[Mapping[str, Any]],
    source: str,
    limits: Limits,
    backend: str | None,
    stop: bool,
) -> Verdict:
    setup, entry = row.get("setup", ""), row["entry_point"]
    calls, script, total = [], None, 1
    if isinstance(tests, str):
        script = tests
    else:
        calls = [(test["args"], test.get("kwargs", {}), test["result"]) for test in tests]
        total = len(tests)
    with _borrow(backend, "programs") as box, _borrow(backend, "tests") as tests_box:
        files = [_nowhere() for _ in range(3)]
        work = {"source": source, "setup": setup, "entry": entry}
        program = programs.begin(box, "functions", limits, files, talk=True, **work)
        try:
            files = [_nowhere() for _ in range(3)]
            work = {"setup": setup, "script": script, "entry": entry, "calls": calls}
            work |= {"tolerance": _tolerance(row), "stop": stop}
            # The program's own time is up before that of its tests, which wait for it.
            patient = replace(limits, wall_seconds=2 * limits.wall_seconds)
            tester = programs.begin(tests_box, "tests", patient, files, talk=True, **work)
            try:
                status, passed, detail = _relay(program, tester)
            finally:
                tester.end(kill=True)
        finally:
            program.end(kill=True)
    return Verdict(status=status, passed=passed, total=total, detail=detail)


def _relay(program: Job, tester: Job) -> tuple[Status, int, str]:
    """Carries frames between a program and its tests: (status, tests passed, detail).

    Nothing that the program says is decoded here: it is passed on. "sandbox_error" is possible
    only before a line of the program has run, or where the tests fail before they have had an
    answer from it: a program cannot bring it about.
    """
    if program.read(1) != b"R" or tester.read(1) != b"R":
        return "sandbox_error", 0, "the program was not confined, nor run"
    if (frame := program.receive())[:1] != b"s":
        return "sandbox_error", 0, f"the setup fails: {_text(frame)}"
    if (frame := program.receive())[:1] != b"d":
        return _failed(program, frame)
    answered = False
    while True:
        frame = tester.receive()
        if frame[:1] == b"r":
            status, passed, detail = values.decode(frame[1:])
            return status, passed, detail
        if frame[:1] != b"c":
            status, detail = programs.status_of(tester.end(kill=True), "", tester.limits)
            detail = f"the tests end without a verdict: {detail}"
            if not answered:
                return "sandbox_error", 0, detail
            return ("error" if status == "ok" else status), 0, detail
        reply = program.receive() if program.send(frame) else b""
        if not reply:
            return _failed(program, b"")
        answered = True
        tester.send(reply)


def _failed(program: Job, frame: bytes) -> tuple[Status, int, str]:
    """What ended a program that gave no answer, but perhaps an exception: (status, 0, detail)."""
    status, detail = programs.status_of(program.end(kill=True), "", program.limits)
    if program.flooded:
        return "error", 0, f"a value of more than {program.limits.output_bytes} bytes"
    if frame:
        return ("memory" if b'"MemoryError"' in frame[:40] else "error"), 0, _text(frame)
    if status == "ok":
        return "error", 0, "ended before it had answered"
    return status, 0, detail


def _text(frame: bytes) -> str:
    return frame[1:500].decode(errors="replace")


def _nowhere() -> int:
    return os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)


# --------------------------------------------------------------------------- rows


def _tests_of(row: Mapping[str, Any]) -> tuple[str, str | Sequence[Mapping[str, Any]]]:
    """A row's language, and its script or its tests, checked."""
    language = row.get("code_language", "python")
    if language not in LANGUAGES:
        raise ValueError(f"unknown code_language {language!r}; known: {', '.join(LANGUAGES)}")
    if ("test" in row) == ("tests" in row):
        raise ValueError("a row needs one of 'test' (a script) and 'tests' (a list)")
    tests = row["test"] if "test" in row else row["tests"]
    if "test" in row:
        if not isinstance(tests, str):
            raise ValueError(f"'test' must be a script's text, got {type(tests).__name__}")
    else:
        if not isinstance(tests, list | tuple) or not tests:
            raise ValueError("'tests' must be a list of at least one test")
        kinds = {_kind_of(test) for test in tests}
        if len(kinds) > 1:
            raise ValueError(f"all tests of a row must be of one kind, got {sorted(kinds)}")
        if kinds == {"stdin"}:
            return language, tests
    if not isinstance(row.get("setup", ""), str):
        raise ValueError(f"'setup' must be a text, got {type(row['setup']).__name__}")
    if language != "python":
        raise ValueError(
            f"functions are tested in python only, the row's code_language is {language}"
        )
    if not str(row.get("entry_point", "")).isidentifier():
        raise ValueError("the row has no function's name under 'entry_point'")
    return language, tests


def _tolerance(row: Mapping[str, Any]) -> float:
    tolerance = row.get("tolerance", 0.0)
    if not isinstance(tolerance, int | float) or not 0 <= tolerance < 1:
        raise ValueError(f"'tolerance' must be a number in [0, 1), got {tolerance!r}")
    return float(tolerance)


def _kind_of(test: Any) -> str:
    if isinstance(test, Mapping):
        if isinstance(test.get("stdin"), str) and isinstance(test.get("stdout"), str):
            return "stdin"
        if isinstance(test.get("args"), list | tuple) and "result" in test:
            values.encode(dict(test))  # raises ValueError where a part is no plain value
            return "args"
    raise ValueError(f"a test needs texts stdin and stdout, or args and result: {str(test)[:80]}")


# --------------------------------------------------------------------------- sandboxes in use

# Started sandboxes that nobody uses, by process, backend and role. What was forked from this
# process must not use them, hence its id; programs and tests never share one.
_idle: dict[tuple[int, str, str], list[Sandbox]] = {}


@contextmanager
def _borrow(backend: str | None, role: str) -> Iterator[Sandbox]:
    """A sandbox for one caller at a time; started if none is idle, kept for the next one."""
    key = os.getpid(), backend or start.find_backend(), role
    idle, box = _idle.setdefault(key, []), None
    while idle and box is None:
        box = idle.pop()
        if box.process.poll() is not None:  # somebody killed it
            box.close()
            box = None
    box = box or start.start(key[1])
    try:
        yield box
    except BaseException:
        box.close()  # it may be in the middle of a program
        raise
    if box.control.fileno() >= 0:
        idle.append(box)


@atexit.register
def close_idle() -> None:
    """Ends the sandboxes that this process keeps for its next programs."""
    for (process, _, _), boxes in _idle.items():
        while process == os.getpid() and boxes:
            boxes.pop().close()
