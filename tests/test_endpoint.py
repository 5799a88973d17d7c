"""The judge's HTTP client, against a real server on this machine that misbehaves on order."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from r1jax.rewards.endpoint import Endpoint, ask, recall
from r1jax.rewards.judge import HELPFUL, pointwise
from r1jax.rewards.weighted import Batched, score, weighted


@dataclass
class Server:
    """What the server was asked, and what it does: (request body, number of it) -> action."""

    act: Callable[[dict[str, Any], int], Any] = lambda body, number: "fine"
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: Any = field(default_factory=threading.Lock)
    port: int = 0

    def asked(self) -> list[str]:
        return [body["messages"][0]["content"] for body in self.bodies]


class Handler(BaseHTTPRequestHandler):
    server: Any

    def do_POST(self) -> None:
        state: Server = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with state.lock:
            number = len(state.bodies)
            state.bodies.append(body)
            state.headers.append(dict(self.headers))
            state.paths.append(self.path)
            state.times.append(time.monotonic())
            state.at_once += 1
            state.most_at_once = max(state.most_at_once, state.at_once)
        try:
            action = state.act(body, number)
        finally:
            with state.lock:  # before the client has its answer, and asks again
                state.at_once -= 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the client has gone
            self.reply(action)

    def reply(self, action: Any) -> None:
        headers = {}
        if isinstance(action, str):
            status, text = 200, json.dumps({"choices": [{"message": {"content": action}}]})
        elif action is None:
            self.connection.close()
            return
        elif isinstance(action, float):  # a byte now and then, for so many seconds
            self.send_response(200)
            self.end_headers()
            until = time.monotonic() + action
            while time.monotonic() < until:
                self.wfile.write(b" ")
                time.sleep(0.02)
            return
        else:
            status, text, *rest = action
            headers = rest[0] if rest else {}
        data = text.encode("utf-8", "surrogatepass")
        self.send_response(status)
        self.send_header("Content-Length", headers.pop("Content-Length", str(len(data))))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass


class Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # 5 by default: a sixth connection at a time waits for seconds


@pytest.fixture
def server():
    httpd = Listener(("127.0.0.1", 0), Handler)
    state = Server(port=httpd.server_port)
    httpd.state = state  # type: ignore[attr-defined]
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield state
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def endpoint(server: Server, **settings: Any) -> Endpoint:
    quick = {"first_wait": 0.01, "longest_wait": 0.05, "attempts": 3, "seconds": 5.0}
    address = f"http://127.0.0.1:{server.port}/v1"
    return Endpoint(address=address, model="judge", **{**quick, **settings})


def prompts(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "user", "content": text}] for text in texts]


def echo(body: dict[str, Any], number: int) -> str:
    return f"to {body['messages'][0]['content']}"


# --------------------------------------------------------------------------- what is sent


def test_replies_come_in_the_order_of_the_prompts(server: Server):
    def slower_first(body, number):
        time.sleep(0.1 if body["messages"][0]["content"] == "0" else 0.0)
        return echo(body, number)

    server.act = slower_first
    texts = [str(i) for i in range(20)]
    assert ask(prompts(*texts), endpoint=endpoint(server)) == [f"to {text}" for text in texts]
    assert ask([], endpoint=endpoint(server)) == []


def test_the_request_is_a_chat_completion(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", " secret-1 \n")
    asked = endpoint(server, key="JUDGE_KEY", max_new=77, temperature=0.5, extra={"top_p": 0.9})
    ask(prompts("a"), endpoint=asked)
    assert server.bodies == [
        {
            "model": "judge",
            "messages": [{"role": "user", "content": "a"}],
            "temperature": 0.5,
            "max_tokens": 77,
            "top_p": 0.9,
        }
    ]
    assert server.paths == ["/v1/chat/completions"]
    assert server.headers[0]["Authorization"] == "Bearer secret-1"
    assert server.headers[0]["Content-Type"] == "application/json"
    ask(prompts("a"), endpoint=replace(endpoint(server), max_new=None))
    assert "max_tokens" not in server.bodies[1]
    assert "Authorization" not in server.headers[1]


def test_odd_text_arrives_as_it_is(server: Server):
    server.act = echo
    texts = ["\ud800", "数学 \U0001f600", "\x00\n\r", '"}]', ""]
    assert ask(prompts(*texts), endpoint=endpoint(server)) == [f"to {text}" for text in texts]
    assert sorted(server.asked()) == sorted(texts)


def test_no_more_requests_are_under_way_than_allowed(server: Server):
    server.act = lambda body, number: time.sleep(0.05) or "fine"
    ask(prompts(*map(str, range(12))), endpoint=endpoint(server, concurrency=3))
    assert server.most_at_once == 3


def test_equal_prompts_are_asked_once_at_temperature_zero_and_each_above_it(server: Server):
    server.act = lambda body, number: str(number)
    assert ask(prompts("a", "a", "a"), endpoint=endpoint(server)) == ["0", "0", "0"]
    got = ask(prompts("a", "a", "a"), endpoint=endpoint(server, temperature=1.0))
    assert sorted(got) == ["1", "2", "3"]


# --------------------------------------------------------------------------- faults

FAULTS = {
    "429": (429, '{"error": {"message": "slow down"}}'),
    "500": (500, "internal error"),
    "503": (503, ""),
    "closed": None,
    "not JSON": (200, "<html>"),
    "no choices": (200, '{"choices": []}'),
    "no text": (200, '{"choices": [{"message": {"content": null}}]}'),
    "a list": (200, "[]"),
    "nested": (200, "[" * 100_000),
    "cut short": (200, '{"choices"', {"Content-Length": "1000"}),
    "bad UTF-8": (200, '{"choices": "\ud800"}'),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_passing_fault_is_asked_again(server: Server, fault: str):
    def twice(body, number):
        action = FAULTS[fault]
        if number < 2:
            return action and (*action[:2], dict(action[2]) if len(action) > 2 else {})
        return "fine"

    server.act = twice
    assert ask(prompts("a"), endpoint=endpoint(server)) == ["fine"]
    assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("429", "status 429: slow down"),
        ("500", "status 500: internal error"),
        ("503", "status 503: (empty)"),
        ("not JSON", "the response holds no choices[0].message.content: <html>"),
        ("closed", "Remote end closed connection without response"),
    ],
)
def test_a_fault_that_stays_stops_the_run_in_one_line(server: Server, fault: str, reason: str):
    server.act = lambda body, number: FAULTS[fault]
    with pytest.raises(ConnectionError) as raised:
        ask(prompts("a"), endpoint=endpoint(server))
    assert len(server.bodies) == 3
    address = f"http://127.0.0.1:{server.port}/v1"
    assert str(raised.value) == f"judge at {address}: 3 attempts failed, the last with: {reason}"


def test_a_slow_server_is_given_up_even_if_it_dribbles(server: Server):
    for slow in (lambda body, number: time.sleep(5) or "late", lambda body, number: 5.0):
        server.act = slow
        start = time.monotonic()
        with pytest.raises(ConnectionError, match=r"no whole reply within 0\.2 s"):
            ask(prompts("a"), endpoint=endpoint(server, seconds=0.2, attempts=2))
        assert time.monotonic() - start < 4.0


def test_an_endless_reply_is_cut_off(server: Server, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("r1jax.rewards.endpoint.MAX_REPLY", 1000)
    server.act = lambda body, number: "x" * 2000
    with pytest.raises(ConnectionError, match="a reply of more than 1000 bytes"):
        ask(prompts("a"), endpoint=endpoint(server, attempts=1))


def test_an_unreachable_server_stops_the_run_or_leaves_the_answers_out():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = Server(port=free.getsockname()[1])
    with pytest.raises(
        ConnectionError, match=r"^judge at http://127.0.0.1:\d+/v1: 3 attempts failed"
    ):
        ask(prompts("a", "b"), endpoint=endpoint(nobody))
    out = endpoint(nobody, unreachable="leave_out")
    assert ask(prompts("a", "b"), endpoint=out) == [None, None]
    reward = Batched(partial(pointwise, rubric=HELPFUL, complete=partial(ask, endpoint=out)))
    row = {"question": "q"}
    assert score(weighted(judge=(1.0, reward)), row, "answer") == (None, {})


def test_a_server_that_is_down_is_not_waited_for_by_every_prompt_in_turn(server: Server):
    server.act = lambda body, number: (503, "")
    out = endpoint(server, unreachable="leave_out", concurrency=2)
    assert ask(prompts(*map(str, range(200))), endpoint=out) == [None] * 200
    assert len(server.bodies) <= (3 + 1) * 3


def test_the_reason_is_told_and_not_what_followed_from_it(server: Server):
    server.act = lambda body, number: (503, "overloaded")
    for _ in range(5):
        with pytest.raises(ConnectionError, match=r"3 attempts failed, .* status 503: overloaded"):
            ask(prompts(*map(str, range(30))), endpoint=endpoint(server, concurrency=10))


def test_one_prompt_that_fails_does_not_take_the_others_with_it(server: Server):
    def bad_seven(body, number):
        return (500, "") if body["messages"][0]["content"] == "7" else echo(body, number)

    server.act = bad_seven
    out = endpoint(server, unreachable="leave_out", concurrency=1)
    got = ask(prompts(*map(str, range(20))), endpoint=out)
    assert got == [None if i == 7 else f"to {i}" for i in range(20)]


def test_a_refused_prompt_is_not_asked_again(server: Server):
    server.act = lambda body, number: (
        (400, '{"error": {"message": "too long"}}')
        if body["messages"][0]["content"] == "long"
        else echo(body, number)
    )
    out = endpoint(server, unreachable="leave_out")
    assert ask(prompts("a", "long", "b"), endpoint=out) == ["to a", None, "to b"]
    assert len(server.bodies) == 3
    with pytest.raises(ConnectionError, match="status 400: too long"):
        ask(prompts("long"), endpoint=endpoint(server))


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_address_or_model_stops_the_run_at_once(server: Server, status: int):
    server.act = lambda body, number: (status, '{"error": {"message": "no such model"}}')
    with pytest.raises(ValueError, match=rf"^judge at http://\S+: status {status}: no such model"):
        ask(prompts("a"), endpoint=endpoint(server, unreachable="leave_out"))
    assert len(server.bodies) == 1


def test_waits_grow_and_a_server_may_ask_for_more(server: Server):
    server.act = lambda body, number: (429, "")
    with pytest.raises(ConnectionError):
        ask(prompts("a"), endpoint=endpoint(server, first_wait=0.1, longest_wait=9, attempts=3))
    assert server.times[1] - server.times[0] >= 0.05  # half to all of 0.1 s
    assert server.times[2] - server.times[1] >= 0.1  # half to all of 0.2 s
    server.times.clear()
    server.act = lambda body, number: (429, "", {"Retry-After": "3600" if number == 4 else "1"})
    with pytest.raises(ConnectionError):
        ask(prompts("a"), endpoint=endpoint(server, longest_wait=1.1, attempts=3))
    assert server.times[1] - server.times[0] >= 1.0
    assert 1.1 <= server.times[2] - server.times[1] < 60  # no more than longest_wait


def test_a_key_that_is_missing_or_odd_is_named_but_not_shown(
    server: Server, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(ValueError, match="environment variable JUDGE_KEY is not set"):
        ask(prompts("a"), endpoint=endpoint(server, key="JUDGE_KEY"))
    monkeypatch.setenv("JUDGE_KEY", "sec\nret")
    with pytest.raises(ValueError, match="JUDGE_KEY holds characters no key has") as raised:
        ask(prompts("a"), endpoint=endpoint(server, key="JUDGE_KEY"))
    assert "ret" not in str(raised.value)
    assert server.bodies == []


@pytest.mark.parametrize(
    "address",
    [
        "",
        "host/v1",
        "ftp://host",
        "http://",
        "http://a b/v1",
        "http://user:word@host/v1",
        "http://host/?a",
        "http://host:port/v1",
        "file:///etc/passwd",
        "http://host/v1\r\nX: y",
    ],
)
def test_an_address_that_is_none_is_refused(address: str):
    with pytest.raises(ValueError, match="address must be as in https://host:8000/v1, got"):
        Endpoint(address=address, model="judge")


@pytest.mark.parametrize("name", ["attempts", "concurrency", "seconds"])
def test_settings_below_one_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} must be > 0, got 0"):
        Endpoint(address="http://[::1]:8000/v1", model="judge", **{name: 0})


# --------------------------------------------------------------------------- stored replies


def test_a_stored_reply_is_not_asked_for_again(server: Server, tmp_path: Path):
    server.act = lambda body, number: str(number)
    stored = endpoint(server, cache=str(tmp_path))
    first = ask(prompts("a", "b"), endpoint=stored)
    assert ask(prompts("b", "a"), endpoint=stored) == first[::-1]
    assert len(server.bodies) == 2
    moved = replace(stored, address="http://127.0.0.1:1/v1")
    assert ask(prompts("a", "b"), endpoint=moved) == first
    for other in ({"model": "another"}, {"temperature": 0.5}, {"extra": {"top_p": 0.5}}):
        ask(prompts("a"), endpoint=replace(stored, **other))
    assert len(server.bodies) == 5


def test_each_sample_of_a_prompt_is_stored(server: Server, tmp_path: Path):
    server.act = lambda body, number: str(number)
    stored = endpoint(server, cache=str(tmp_path), temperature=1.0)
    first = ask(prompts("a", "a"), endpoint=stored)
    assert ask(prompts("a", "a", "a"), endpoint=stored)[:2] == first
    assert len(server.bodies) == 3


def test_replies_before_a_fault_are_kept(server: Server, tmp_path: Path):
    server.act = lambda body, number: echo(body, number) if number < 5 else (400, "")
    stored = endpoint(server, cache=str(tmp_path), concurrency=1)
    texts = [str(i) for i in range(9)]
    with pytest.raises(ConnectionError):
        ask(prompts(*texts), endpoint=stored)
    server.bodies.clear()
    server.act = echo
    assert ask(prompts(*texts), endpoint=stored) == [f"to {text}" for text in texts]
    assert sorted(server.asked()) == ["5", "6", "7", "8"]


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff", b"[]", b'{"request": {}, "reply": "x"}', b'{"reply": 1}']
)
def test_a_stored_file_that_is_not_whole_is_written_anew(
    server: Server, tmp_path: Path, content: bytes
):
    server.act = echo
    stored = endpoint(server, cache=str(tmp_path))
    ask(prompts("a"), endpoint=stored)
    [file] = tmp_path.rglob("*.json")
    good = file.read_bytes()
    file.write_bytes(content)
    assert ask(prompts("a"), endpoint=stored) == ["to a"]
    assert file.read_bytes() == good
    assert len(server.bodies) == 2


def test_a_killed_run_asks_only_for_what_it_lacks(server: Server, tmp_path: Path):
    server.act = lambda body, number: time.sleep(0.02) or echo(body, number)
    texts = [str(i) for i in range(60)]
    program = (
        f"import sys; sys.path[:0] = {sys.path!r}\n"
        "from r1jax.rewards.endpoint import Endpoint, ask\n"
        f"judge = Endpoint(address='http://127.0.0.1:{server.port}/v1', model='judge',\n"
        f"                 concurrency=2, cache={str(tmp_path)!r})\n"
        f"ask({prompts(*texts)!r}, endpoint=judge)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", program])
    while len(server.bodies) < 15:
        time.sleep(0.005)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    time.sleep(0.1)
    stored = len(list(tmp_path.rglob("*.json")))
    assert 10 <= stored < 60
    server.bodies.clear()
    judge = Endpoint(
        address=f"http://127.0.0.1:{server.port}/v1", model="judge", cache=str(tmp_path)
    )
    assert ask(prompts(*texts), endpoint=judge) == [f"to {text}" for text in texts]
    assert len(server.bodies) == 60 - stored


def test_no_key_is_stored(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JUDGE_KEY", "secret-1")
    ask(prompts("a"), endpoint=endpoint(server, key="JUDGE_KEY", cache=str(tmp_path)))
    [file] = tmp_path.rglob("*.json")
    assert b"secret-1" not in file.read_bytes()
    assert recall(str(tmp_path), file.stem, server.bodies[0]) == "fine"


def test_a_folder_that_cannot_be_written_stops_the_run(server: Server, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ask(prompts("a"), endpoint=endpoint(server, cache=str(tmp_path / "file")))
