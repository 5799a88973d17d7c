"""A first signal lets a step end, and a second one does not."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from r1jax.stopping import catch_signals


def test_the_first_signal_asks_to_stop_and_its_echo_does_no_harm(capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with catch_signals() as stopping:
            assert not stopping()
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert stopping()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert capfd.readouterr().err == 2 * "stopping after this step; once more to stop at once\n"


STUCK_IN_A_CALL = """
import hashlib
from r1jax.stopping import catch_signals

with catch_signals(grace=0.2):
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, in which no Python handler runs
"""


def test_a_second_signal_ends_the_process_at_once_inside_a_long_call():
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK_IN_A_CALL],
        cwd=Path(__file__).parents[1],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "stopping after this step; once more to stop at once\n"


def test_outside_the_main_thread_no_signal_is_caught_and_nothing_breaks():
    answers = []

    def work():
        with catch_signals() as stopping:
            answers.append(stopping())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]
