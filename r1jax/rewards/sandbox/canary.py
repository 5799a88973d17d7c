"""A program that tries, in a new sandbox, what must fail there and what must work."""

import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Names of what must hold, one a line on stdout, in this order; anything else is a leak.
_HELD = ("read", "write", "passwd", "processes", "network", "signal", "fork", "kept")

_SOURCE = """
import os, socket, sys, threading

def tries(name, action):
    try:
        action()
    except OSError:
        print(name)
    else:
        # In one piece: where fork leaks, its child writes too.
        sys.stdout.write("LEAK " + name + "\\n")

def connect():
    with socket.socket() as s:
        s.settimeout(1)
        s.connect(("127.0.0.1", {port}))

tries("read", lambda: open({secret!r}).read())
tries("write", lambda: open({folder!r} + "/written", "w"))
tries("passwd", lambda: open("/etc/passwd").read())
tries("processes", lambda: open("/proc/{pid}/environ").read())
tries("network", connect)
tries("signal", lambda: os.kill({pid}, 0))
tries("fork", os.fork)

import heapq, json
assert sys.stdin.read() == "canary"
thread = threading.Thread(target=print, args=["kept"])
thread.start()
thread.join()
"""


@contextmanager
def bait() -> Iterator[tuple[str, bytes]]:
    """The canary's source, and what it prints on stdin `canary` in a sandbox that holds.

    While this is open there is a file for it to read, a folder to write in, a port to connect to.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.create_server(("127.0.0.1", 0)) as server,
    ):
        os.chmod(folder, 0o777)  # no permission of the file system may help
        secret = Path(folder, "secret")
        secret.write_text("secret")
        secret.chmod(0o666)
        source = _SOURCE.format(
            port=server.getsockname()[1], secret=str(secret), folder=folder, pid=os.getpid()
        )
        yield source, "".join(f"{name}\n" for name in _HELD).encode()
