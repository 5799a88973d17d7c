"""The program of a worker that compares two answers with math-verify.

Run as a file, apart from r1jax: `python -P math_worker.py`. It reads lines
`{"job": [gold, answer], "seconds": 3.0}` and writes `{"value": true}`, false, or null where the
gold answer cannot be read.

Two processes. The first imports math-verify and forks the second, which does the jobs under two
clocks of the kernel: `seconds` of processor time, so that a verdict does not depend on what else
the machine does, and `WALL` times that by the clock on the wall. Nothing that the second does, in
Python or in C, can put off their signals, and the end of the first's parent does not matter to
them. When it dies the first says so and forks another, which takes milliseconds where a new start
would take a second.
"""

import json
import os
import resource
import signal
import sys
from typing import Any, TextIO

MEMORY = 2 << 30  # bytes of address space
WALL = 8.0


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a library prints must not stand between the answers
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        same("x^{2}-1", "(x-1)(x+1)")  # fills caches that every child then has
    except ImportError as error:
        print(json.dumps({"error": f"{error} (install math-verify)"}), file=answers)
        return
    print(json.dumps({"ready": True}), file=answers)
    while True:
        child = os.fork()
        if child == 0:
            do_jobs(answers)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return  # no more jobs
        ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else None
        late = ended_by in (signal.SIGPROF, signal.SIGALRM)
        print(json.dumps({"status": "timeout" if late else "crash"}), file=answers)


def do_jobs(answers: TextIO) -> None:
    for clock_signal in (signal.SIGPROF, signal.SIGALRM):
        signal.signal(clock_signal, signal.SIG_DFL)  # ends the process
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, request["seconds"])
        signal.setitimer(signal.ITIMER_REAL, request["seconds"] * WALL)
        value = same(*request["job"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"value": value}), file=answers)


def same(gold: str, answer: str) -> bool | None:
    """Whether math-verify takes two LaTeX formulas for the same; None: it cannot read `gold`."""
    from math_verify import verify

    parsed_gold = read(gold)
    if not parsed_gold:
        return None
    parsed_answer = read(answer)
    return bool(parsed_answer) and verify(parsed_gold, parsed_answer, timeout_seconds=None)


def read(formula: str) -> list[Any]:
    """The formula as sympy objects, [] if it cannot be read.

    As LaTeX only: math-verify reads plain text with sympy's `parse_expr`, which is Python's
    `eval`, and would run what a model wrote.
    """
    from math_verify import LatexExtractionConfig, parse

    return parse(
        f"${formula}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # type: ignore[arg-type]  # means: no alarm of its own
    )


if __name__ == "__main__":
    main()
