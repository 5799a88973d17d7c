"""How a signal asks a run to stop after its step, and a second one ends it at once."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def catch_signals(*, grace: float = 0.5) -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether SIGTERM or SIGINT (Ctrl-C) has come.

    The first signal only changes that answer, and says so on stderr: the caller finishes its step,
    saves and leaves with code 75. Another one, later by `grace` seconds or more, ends the process
    at once, even inside a long device call, with code 128 + its number. (`timeout` and some
    schedulers send each signal twice in a row; that counts as one.)

    Signals can be caught in the main thread only; in any other the answer is always no.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    came = threading.Event()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)  # the interpreter requires it
    watcher = threading.Thread(target=_watch, args=(reader, grace), name="signals", daemon=True)
    watcher.start()
    before_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {
        number: signal.signal(number, lambda *_: came.set())
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield came.is_set
    finally:
        for number, handler in before.items():
            # None: it was set by a C library, and Python cannot set it again.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.set_wakeup_fd(before_fd)
        os.close(writer)  # the watcher reads the end of the pipe
        watcher.join()
        os.close(reader)


def _watch(reader: int, grace: float) -> None:
    """Reads the number of each signal when it arrives.

    Python runs its handlers in the main thread between two bytecodes, hence only after a running
    device call; the pipe is written at once.
    """
    first = None
    while number := os.read(reader, 1):
        if number[0] not in (signal.SIGTERM, signal.SIGINT):
            continue
        if first is None:
            first = time.monotonic()
            os.write(2, b"stopping after this step; once more to stop at once\n")
        elif time.monotonic() - first >= grace:
            os._exit(128 + number[0])
