"""Runs a pipeline in processes of its own, one after the other, each killed at a chosen moment.

    python pipeline_driver.py CONFIG OUT PART:NUMBER PART:NUMBER

A process is killed by SIGKILL when it is about to open or rename, for the NUMBER-th time, a file
whose path holds PART; another one then goes on. The last is left alone. Their exit codes are
printed. They are forks of one process that imported everything and started nothing yet.
"""

import os
import signal
import sys
from typing import Any

from r1jax import host

host.prepare()

import transformers  # noqa: E402, F401

from r1jax import pipeline, report, train  # noqa: E402, F401


def kill_at(part: str, number: int) -> None:
    """From now on, ends this process at the `number`-th sight of `part`."""
    seen = 0

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename") and part in str(arguments[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def main() -> None:
    config, out, *moments = sys.argv[1:]
    for moment in [*moments, None]:
        child = os.fork()
        if not child:
            if moment:
                part, _, number = moment.rpartition(":")
                kill_at(part, int(number))
            sys.argv = ["train", "--config", config, "--out", out]
            code = 1
            try:
                code = train.main()
            finally:
                sys.stderr.flush()
                os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


main()
