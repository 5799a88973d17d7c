"""Asks a language model behind an OpenAI-compatible address, many prompts at a time.

Each reply is stored as it comes, so a run that is killed asks again only for what it lacks.
"""

import hashlib
import http.client
import json
import os
import random
import re
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

Messages = Sequence[Mapping[str, str]]  # of one prompt: {"role": ..., "content": ...}

_ADDRESS = re.compile(
    r"https?://([\w.-]+|\[[0-9a-fA-F:.]+\])(:[0-9]{1,5})?(/[\w./~%-]*)?", re.ASCII
)

MAX_REPLY = 16 * 2**20  # bytes of one response: an endless one must not fill the memory
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}  # worth asking again
MISTAKEN = {401, 403, 404, 405}  # of the address, the model or the key: no prompt would do better
DOWN_AFTER = 3  # prompts in a row that got no reply in all their attempts


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A model that is asked over HTTP, and how patiently."""

    address: str  # as in https://host/v1; /chat/completions is added
    model: str
    key: str | None = None  # name of the environment variable with the API key; None: no key
    temperature: float = 0.0
    max_new: int | None = 2048  # tokens of a reply; None: the server's own limit
    extra: Mapping[str, Any] = field(default_factory=dict)  # other fields of the request
    cache: str | None = None  # folder of stored replies; None: nothing is stored
    seconds: float = 120.0  # for one request, from its connection to the last byte of its reply
    attempts: int = 6  # requests for one prompt before it counts as failed
    first_wait: float = 1.0  # seconds before the second attempt; doubled for each one after it
    longest_wait: float = 60.0  # seconds; also the most that a server's Retry-After may ask for
    concurrency: int = 16  # requests under way at once
    unreachable: Literal["stop", "leave_out"] = "stop"

    def __post_init__(self) -> None:
        if not _ADDRESS.fullmatch(self.address):
            raise ValueError(f"address must be as in https://host:8000/v1, got {self.address!r}")
        for name in ("attempts", "concurrency", "seconds"):
            if not vars(self)[name] > 0:
                raise ValueError(f"{name} must be > 0, got {vars(self)[name]}")


class Failed(Exception):
    """A prompt got no reply. The text says why, in one line."""


class Exhausted(Failed):
    """It got none in all its attempts."""


def ask(prompts: Sequence[Messages], *, endpoint: Endpoint) -> list[str | None]:
    """The model's reply to each prompt, in order.

    Equal prompts are asked once at temperature 0, and once for each time they occur above it. A
    prompt that fails `attempts` times, or that the server refuses (too long, say), stops the run;
    with `unreachable="leave_out"` its reply is None. Stored replies are used first. They are kept
    by model, prompt and settings; the address is no part of that, so a server may move. Proxies
    that the environment names are not used.

    Raises:
      ConnectionError: in one line, where `unreachable` is "stop". What was under way is finished
        and stored before.
      ValueError: the key is not set; or the server knows no such address, model or key.
    """
    headers = _headers(endpoint)
    seen: Counter[str] = Counter()
    keys = []
    bodies: dict[str, dict[str, Any]] = {}
    for messages in prompts:
        text = json.dumps(_body(endpoint, messages), sort_keys=True)
        key = _digest(text, seen[text] if endpoint.temperature > 0 else 0)
        seen[text] += 1
        keys.append(key)
        bodies[key] = json.loads(text)  # as a stored one is read: no tuples
    replies: dict[str, str | None] = {}
    for key, body in bodies.items():
        stored = recall(endpoint.cache, key, body)
        if stored is not None:
            replies[key] = stored
    missing = {key: body for key, body in bodies.items() if key not in replies}
    if missing:
        replies |= _ask_all(missing, endpoint, headers)
    return [replies[key] for key in keys]


def _ask_all(
    bodies: Mapping[str, dict[str, Any]], endpoint: Endpoint, headers: Mapping[str, str]
) -> dict[str, str | None]:
    """The replies to requests, each stored as soon as it is there.

    Where `DOWN_AFTER` prompts in a row failed to their last attempt, the server is down, and the
    others are not kept waiting for it one after the other.
    """
    stop = threading.Event()  # wakes those who wait for another attempt
    in_a_row: list[Failed] = []  # since the last reply

    def one(key: str) -> str:
        if stop.is_set():
            raise Failed("not asked: other prompts failed before")
        try:
            reply = _attempts(bodies[key], endpoint, headers, key, stop)
        except Exhausted as failure:
            in_a_row.append(failure)
            if len(in_a_row) >= DOWN_AFTER:
                stop.set()
            raise
        in_a_row.clear()
        remember(endpoint.cache, key, bodies[key], reply)
        return reply

    replies: dict[str, str | None] = {}
    pool = ThreadPoolExecutor(max_workers=min(endpoint.concurrency, len(bodies)))
    try:
        futures = {pool.submit(one, key): key for key in bodies}
        for future in as_completed(futures):
            try:
                replies[futures[future]] = future.result()
            except Failed as failure:
                if endpoint.unreachable == "stop":
                    cause = in_a_row[0] if in_a_row else failure  # not one that only followed
                    who = f"{endpoint.model} at {endpoint.address}"
                    raise ConnectionError(f"{who}: {cause}") from None
                replies[futures[future]] = None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return replies


def _attempts(
    body: Mapping[str, Any],
    endpoint: Endpoint,
    headers: Mapping[str, str],
    key: str,
    stop: threading.Event,
) -> str:
    """The reply to one request, asked for again while there is hope.

    Raises:
      Failed: it was refused, or `stop` was set.
      Exhausted: it failed `attempts` times.
      ValueError: no request can succeed.
    """
    data = json.dumps(body).encode()  # ASCII: a lone surrogate is sent as its escape
    wait = endpoint.first_wait
    # Waits differ between prompts, so that those who failed together do not come back together;
    # by the prompt, and so the same every time.
    spread = random.Random(key)
    for attempt in range(endpoint.attempts):
        try:
            status, after, text = _post(endpoint, headers, data)
            if status == 200:
                return _content(text)
            reason = f"status {status}: {_error(text)}"
        except (OSError, http.client.HTTPException, _Garbled) as error:
            status, after, reason = 0, None, _short(str(error) or type(error).__name__)
        if status in MISTAKEN:
            raise ValueError(f"{endpoint.model} at {endpoint.address}: {reason}")
        if status and status not in PASSING:
            raise Failed(reason)
        if attempt + 1 < endpoint.attempts:
            pause = min(max(wait * spread.uniform(0.5, 1.0), after or 0.0), endpoint.longest_wait)
            if stop.wait(pause):
                raise Failed("given up: other prompts failed before")
            wait *= 2
    raise Exhausted(f"{endpoint.attempts} attempts failed, the last with: {reason}")


# --------------------------------------------------------------------------- one request


class _Garbled(Exception):
    """The server said 200 and something that is no reply of a model."""


def _body(endpoint: Endpoint, messages: Messages) -> dict[str, Any]:
    body = {
        "model": endpoint.model,
        "messages": [dict(message) for message in messages],
        "temperature": endpoint.temperature,
    }
    if endpoint.max_new is not None:
        body["max_tokens"] = endpoint.max_new
    return body | dict(endpoint.extra)


def _headers(endpoint: Endpoint) -> dict[str, str]:
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    if endpoint.key is not None:
        secret = os.environ.get(endpoint.key, "").strip()
        if not secret:
            raise ValueError(f"the judge's API key: environment variable {endpoint.key} is not set")
        if not (secret.isascii() and secret.isprintable()):
            # http.client would print it in its own error.
            raise ValueError(f"environment variable {endpoint.key} holds characters no key has")
        headers["Authorization"] = f"Bearer {secret}"
    return headers


def _post(
    endpoint: Endpoint, headers: Mapping[str, str], data: bytes
) -> tuple[int, float | None, str]:
    """Status, seconds of a Retry-After, and text of the response to one request."""
    parts = urlsplit(endpoint.address)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    began, late_by = time.monotonic(), f"no whole reply within {endpoint.seconds:g} s"
    connection = kind(parts.hostname or "", parts.port, timeout=endpoint.seconds)
    try:
        connection.connect()
        assert connection.sock is not None
        # A socket's own time limit is for each read: a byte now and then would never end.
        connection.sock.settimeout(None)
        with _cut_after(connection.sock, began + endpoint.seconds) as late:
            try:
                path = f"{parts.path.rstrip('/')}/chat/completions"
                connection.request("POST", path, body=data, headers=dict(headers))
                response = connection.getresponse()
                content = response.read(MAX_REPLY + 1)
            except (OSError, http.client.HTTPException):
                if late():
                    raise TimeoutError(late_by) from None
                raise
        if late():
            raise TimeoutError(late_by)
        if len(content) > MAX_REPLY:
            raise _Garbled(f"a reply of more than {MAX_REPLY} bytes")
        text = content.decode("utf-8", "replace")
        return response.status, _seconds(response.getheader("Retry-After")), text
    finally:
        connection.close()


@contextmanager
def _cut_after(sock: socket.socket, deadline: float) -> Iterator[Callable[[], bool]]:
    """Shuts the socket at the deadline; what is yielded says whether it did."""
    over = threading.Event()

    def cut() -> None:
        over.set()
        with suppress(OSError):  # closed already
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # TLS is not asked: it would wait

    timer = threading.Timer(max(0.0, deadline - time.monotonic()), cut)
    timer.daemon = True
    timer.start()
    try:
        yield over.is_set
    finally:
        timer.cancel()


def _seconds(header: str | None) -> float | None:
    """A Retry-After in seconds; None for one that is a date or nothing."""
    return float(header) if header and header.isascii() and header.isdigit() else None


def _content(text: str) -> str:
    """The text of a model's reply.

    Raises:
      _Garbled: the response is not of the form {"choices": [{"message": {"content": "..."}}]}.
    """
    try:
        content = json.loads(text)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        raise _Garbled(f"the response holds no choices[0].message.content: {_short(text)}")
    return content


def _error(text: str) -> str:
    """What a server says is wrong, on one line."""
    try:
        error = json.loads(text)["error"]
        return _short(str(error["message"] if isinstance(error, dict) else error))
    except (ValueError, KeyError, TypeError, RecursionError):
        return _short(text)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return f"{line[:200]}..." if len(line) > 200 else line or "(empty)"


# --------------------------------------------------------------------------- stored replies


def _digest(request: str, occurrence: int) -> str:
    return hashlib.sha256(f"{occurrence} {request}".encode()).hexdigest()


def recall(folder: str | None, key: str, request: Mapping[str, Any]) -> str | None:
    """The stored reply to a request; None if there is none.

    A file that cannot be read, or that holds another request, is as good as none: it is written
    anew when the reply comes.
    """
    if folder is None:
        return None
    try:
        entry = json.loads(_file(folder, key).read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    if not isinstance(entry, dict) or entry.get("request") != request:
        return None
    reply = entry.get("reply")
    return reply if isinstance(reply, str) else None


def remember(folder: str | None, key: str, request: Mapping[str, Any], reply: str) -> None:
    """Stores a reply: whole or not at all, whatever happens to the process or the machine."""
    if folder is None:
        return
    file = _file(folder, key)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as opened:
            opened.write(json.dumps({"request": request, "reply": reply}).encode())
            opened.flush()
            os.fsync(opened.fileno())
        os.replace(name, file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _file(folder: str, key: str) -> Path:
    return Path(folder) / key[:2] / f"{key}.json"
