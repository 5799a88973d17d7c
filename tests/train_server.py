"""Runs the train command in processes of its own, without importing JAX for each of them.

They are forks of this process, which imported everything and started nothing yet. It reads a line
of JSON for each thing asked, and answers with one:

    {"arguments": [...], "stdout": FILE, "stderr": FILE, "kill": null}   the process's id
    {"wait": ID, "seconds": 1.5}      its exit code, minus a signal's number; null if it still runs

With "kill" as [PART, NUMBER] a process ends itself by SIGKILL when it is about to open or rename,
for the NUMBER-th time, a file whose path holds PART. What still runs at the end of the input is
killed.
"""

import gc
import json
import os
import signal
import sys
import time
import warnings
from typing import Any

from r1jax import host


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


def run(asked: dict[str, Any]) -> int:
    """In the fork: the command, to its end."""
    from r1jax import train

    for number, file in (0, os.devnull), (1, asked["stdout"]), (2, asked["stderr"]):
        opened = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
    if asked["kill"]:
        kill_at(*asked["kill"])
    sys.argv = ["r1jax.train", *asked["arguments"]]
    try:
        return train.main()
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1


def start(asked: dict[str, Any]) -> int:
    with warnings.catch_warnings():  # later Pythons warn where a process has threads
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        code = 1
        try:
            code = run(asked)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def wait(child: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.005)


def main() -> None:
    host.prepare()
    import transformers  # noqa: F401

    from r1jax import pipeline, report, reuse, train  # noqa: F401

    gc.freeze()  # what the forks share, their collectors leave alone
    running = set()
    for line in sys.stdin:
        asked = json.loads(line)
        if "wait" in asked:
            answer = wait(asked["wait"], asked["seconds"])
            running -= {asked["wait"]} if answer is not None else set()
        else:
            answer = start(asked)
            running.add(answer)
        print(json.dumps(answer), flush=True)
    for child in running:
        os.kill(child, signal.SIGKILL)


if __name__ == "__main__":
    main()
