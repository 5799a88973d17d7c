"""r1jax.generate: what comes out for what goes in, on a pipe and on a terminal."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1jax import generate, host
from r1jax.rollout import engine

PROMPTS = ["make 9 from 7 5 3", "make 3 from 1 2", "make 4 from 8 4"]


class Input(io.TextIOWrapper):
    """Standard input that holds `text`."""

    def __init__(self, text: str | bytes, *, terminal: bool = False) -> None:
        super().__init__(io.BytesIO(text if isinstance(text, bytes) else text.encode()))
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def answers(capsys: pytest.CaptureFixture, *arguments: object) -> list[str]:
    """The lines that the command prints; its notes on stderr are dropped."""
    capsys.readouterr()
    generate.main([str(each) for each in arguments])
    return capsys.readouterr().out.split("\n")[:-1]


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    with pytest.raises(SystemExit) as left:
        generate.main([str(each) for each in arguments])
    assert left.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_answers_come_in_the_order_of_the_prompts_wherever_those_are_from(
    small_run: Path, tmp_path, capsys, monkeypatch
):
    each = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    flags = answers(capsys, small_run, *each)
    assert len(flags) == len(set(flags)) == 3
    (tmp_path / "prompts.txt").write_bytes("\r\n".join(PROMPTS).encode())
    assert answers(capsys, small_run, "--prompts", tmp_path / "prompts.txt") == flags
    for arguments in ([], ["--prompts", "-"]):
        monkeypatch.setattr(sys, "stdin", Input("\n".join(PROMPTS) + "\n"))
        assert answers(capsys, small_run, *arguments) == flags
    rows = ['{"numbers": [7, 5, 3], "target": 9}', '{"numbers": [1, 2], "target": 3}']
    made = answers(capsys, small_run, "--row", rows[0], "--row", rows[1])
    assert made == flags[:2]  # and the number of prompts changes nothing
    assert answers(capsys, small_run, "--seed", 1, *each) != flags


def test_several_answers_to_a_prompt_are_numbered_and_those_cut_off_are_counted(
    small_run: Path, capsys
):
    each = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    alone = answers(capsys, small_run, *each)
    generate.main([str(small_run), "--samples", "2", "--max-new", "1", *each])
    captured = capsys.readouterr()
    parts = [line.partition(": ") for line in captured.out.split("\n")[:-1]]
    assert [number for number, _, _ in parts] == ["1", "2"] * 3
    first, second = ([text for _, _, text in parts[i::2]] for i in (0, 1))
    # It begins as if it were alone; a token may have no text.
    assert any(first)
    assert all(x.lstrip().startswith(y) for x, y in zip(alone, first, strict=True))
    assert first != second
    assert captured.err == "6 cut off after 1 tokens (--max-new)\n"


def test_a_conversation_compiles_once_and_outlives_a_prompt_that_cannot_be_read(
    small_run: Path, capsys, monkeypatch
):
    made, traces = engine.make_engine, []

    def counting(*arguments, **keywords):
        function = made(*arguments, **keywords)

        def traced(*inputs):
            traces.append(1)
            return function(*inputs)

        return traced

    monkeypatch.setattr(engine, "make_engine", counting)
    typed = ["make 9 from 7 5 3", "", "make 9 from 7 5 3", "hello", "make 3 from 1 2"]
    waiting = iter(typed)

    def read(prompt: str) -> str:
        try:
            return next(waiting)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", Input("", terminal=True))
    generate.main([str(small_run)])
    captured = capsys.readouterr()
    first, second, third, end = captured.out.split("\n")[:-1]
    assert first != second and third and end == ""  # the same again is drawn anew
    assert len(traces) == 1
    assert "error: the tokenizer has no token for 'hello' in 'hello'\n" in captured.err


def test_what_a_user_gets_wrong_is_one_line(small_run: Path, tmp_path, capsys, monkeypatch):
    long = "make 9 from 7 5 3 1 2 4"
    assert "has 9 tokens, engine.max_prompt allows 1 to 8" in refused(
        capsys, small_run, "--prompt", long
    )
    assert "prompt '' has 0 tokens" in refused(capsys, small_run, "--prompt", "")
    assert "is not JSON" in refused(capsys, small_run, "--row", "{")
    assert "--row must be a JSON object" in refused(capsys, small_run, "--row", "[1]")
    row = refused(capsys, small_run, "--row", '{"numbers": [1]}')
    assert row == "error: --row: row has no field 'target'; it has numbers\n"
    missing = tmp_path / "none.txt"
    assert f"{missing}" in refused(capsys, small_run, "--prompts", missing)
    missing.write_bytes(b"")
    assert f"no prompts in {missing}" in refused(capsys, small_run, "--prompts", missing)
    missing.write_bytes(b"\xff")
    assert f"{missing}: not UTF-8 text" in refused(capsys, small_run, "--prompts", missing)
    monkeypatch.setattr(sys, "stdin", Input(""))
    assert refused(capsys, small_run) == "error: no prompts in standard input\n"
    assert "no such folder" in refused(capsys, tmp_path / "nothing", "--prompt", "make")
    assert "max_new must be >= 1" in refused(capsys, small_run, "--prompt", "make", "--max-new", 0)


def test_a_command_on_a_run_uses_a_device_for_each_core(small_run: Path):
    code = (
        "import sys; from pathlib import Path; from r1jax import restore\n"
        "restore.open_run(Path(sys.argv[1]))\n"
        "import jax; print(jax.device_count())"
    )
    chosen = ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    env = {name: value for name, value in os.environ.items() if name not in chosen}
    done = subprocess.run(
        [sys.executable, "-c", code, str(small_run)], env=env, capture_output=True, text=True
    )
    cores = min(len(os.sched_getaffinity(0)), host.MAX_DEVICES)
    assert int(done.stdout) == 1 << (cores.bit_length() - 1), done.stderr
