"""The command that builds a data set from a run's model or a teacher."""

import json
from pathlib import Path

import pytest

from r1jax import build, dataset, manifest
from r1jax.data.sources import jsonl


def run(*arguments: object) -> None:
    assert build.main([str(argument) for argument in arguments]) == 0


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as caught:
        build.main([str(argument) for argument in arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    return error.partition("error: ")[2]


def test_right_answers_of_the_model_become_rows_that_can_be_trained_on(
    small_run: Path, tmp_path: Path, capsys
):
    out, general, held_out = tmp_path / "out", tmp_path / "general.jsonl", tmp_path / "test.jsonl"
    general.write_text("".join(f'{{"prompt": "p{i}", "answer": "a{i}"}}\n' for i in range(9)))
    held_out.write_text(json.dumps({"question": "a b c d e f g h i j"}) + "\n")
    command = (small_run, "--rows", 8, "--samples", 4, "--keep", 1, "--out", out)
    command = (*command, "--mix", general, "--ratio", "2:1", "--against", held_out)
    run(*command)
    names = ["source", "answers", "wrong", "duplicates", "contaminated", "best", "mixed"]
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [name for _, name in printed] == names
    counts = {name: int(rows) for rows, name in printed}
    assert counts["source"] == 8 and counts["answers"] == 32
    rows = list(jsonl(out / "data" / "build" / dataset.ROWS, need=("prompt", "answer")))
    sampled = [row for row in rows if "problem" in row]
    assert len(sampled) == counts["best"]
    assert len(rows) - len(sampled) == counts["best"] // 2
    assert all(len(row["answer"].split()) % 2 == 0 for row in sampled)  # what is right there
    assert len({row["problem"] for row in sampled}) == len(sampled)
    inputs = manifest.read(out)["build"].inputs
    files = {f"passes: {general}", f"passes: {held_out}"}
    assert set(inputs) == {"weights of another run", "source", *files}

    # The same again changes nothing; another command there, or another file, is refused.
    before = (out / manifest.FILE).read_bytes()
    run(*command)
    assert (out / manifest.FILE).read_bytes() == before
    capsys.readouterr()
    error = refused(capsys, *command, "--samples", 2)
    assert error.startswith(f"{out}: stage build was made with another setting: build.samples was ")
    general.write_text('{"prompt": "p", "answer": "a"}\n')
    assert f"another input: passes: {general} was " in refused(capsys, *command)
    assert (out / manifest.FILE).read_bytes() == before


def test_what_a_user_gets_wrong_is_one_line(small_run: Path, tmp_path: Path, capsys):
    out = tmp_path / "out"
    assert refused(capsys, tmp_path / "none", "--out", out).startswith("no such folder: ")
    assert "no filter 'rude'; there are: wrong, " in refused(
        capsys, small_run, "--out", out, "--filters", "wrong,rude"
    )
    assert "--teacher needs --model" in refused(
        capsys, small_run, "--out", out, "--teacher", "http://127.0.0.1:1/v1"
    )
    assert "none.jsonl: no such file" in refused(
        capsys, small_run, "--out", out, "--data", tmp_path / "none.jsonl"
    )
    for option, file in (("--against", "e.jsonl"), ("--mix", "m.csv"), ("--rewrite", "how.txt")):
        helper = ("--helper", "http://127.0.0.1:1/v1", "--helper-model", "m")
        command = (small_run, "--out", out, option, tmp_path / file, *helper)
        assert f"{file}: " in refused(capsys, *command)  # before anything is sampled
    assert "--judge needs --helper" in refused(capsys, small_run, "--out", out, "--judge", 0.5)
    assert "--problems writes no answers: leave out --keep" in refused(
        capsys, small_run, "--out", out, "--problems", "--keep", 1
    )
    assert "need a number from 0 to 1, got 2" in refused(
        capsys, small_run, "--out", out, "--pass-rate", "0:2"
    )
    assert "--rows 51 is more than the 50 that there are" in refused(
        capsys, small_run, "--out", out, "--rows", 51
    )
    assert not out.exists()


def test_a_teacher_that_does_not_answer_is_one_line(small_run, tmp_path, capsys, monkeypatch):
    def silent(prompts, *, endpoint):
        assert prompts[0][0]["content"].startswith("make ")
        assert endpoint.cache == str(tmp_path / "out" / "replies")
        raise ConnectionError(f"r1 at {endpoint.address}: 6 attempts failed")

    monkeypatch.setattr(build, "ask", silent)
    teacher = ("--teacher", "http://127.0.0.1:1/v1", "--model", "r1")
    error = refused(capsys, small_run, "--rows", 2, "--out", tmp_path / "out", *teacher)
    assert error == "build: r1 at http://127.0.0.1:1/v1: 6 attempts failed"


def test_problems_of_a_pass_rate_come_out_with_the_easy_ones_first(
    small_run: Path, tmp_path: Path, capsys
):
    all_of_them, some = tmp_path / "all", tmp_path / "some"
    run(small_run, "--rows", 20, "--samples", 4, "--problems", "--out", all_of_them)
    rows = list(jsonl(all_of_them / "data" / "build" / dataset.ROWS))
    rates = [row["pass_rate"] for row in rows]
    assert len(rows) == 20 and all("answer" not in row for row in rows)
    assert rates == sorted(rates, reverse=True) and 0 < sum(rates) < 20
    run(
        small_run,
        "--rows",
        20,
        "--samples",
        4,
        "--pass-rate",
        "0.25:0.75",
        "--problems",
        *("--out", some),
    )
    inner = [row for row in rows if 0.25 <= row["pass_rate"] <= 0.75]
    assert 0 < len(inner) < 20
    assert list(jsonl(some / "data" / "build" / dataset.ROWS)) == inner


def test_a_helper_judges_answers_and_writes_them_anew(
    small_run: Path, tmp_path: Path, capsys, monkeypatch
):
    asked: list[str] = []

    def reply(prompts, *, endpoint):
        assert endpoint.model == "v3"
        texts = [prompt[-1]["content"] for prompt in prompts]
        asked.extend(texts)
        return [
            text.rpartition("Solution:\n")[2] + " "
            if "Shorter." in text
            else json.dumps({"score": 9 if i % 2 else 2})
            for i, text in enumerate(texts)
        ]

    monkeypatch.setattr(build, "ask", reply)
    how = tmp_path / "how.txt"
    how.write_text("Shorter.\n")
    helper = ("--helper", "http://127.0.0.1:1/v1", "--helper-model", "v3")
    options = ("--rows", 8, "--samples", 4, "--judge", 0.5, "--rewrite", how, *helper)
    run(small_run, *options, "--out", tmp_path / "out")
    counts = {one["name"]: one["rows"] for one in dataset.counts(tmp_path / "out/data/build")}
    names = ["source", "answers", "wrong", "duplicates", "judged", "rewritten", "verified"]
    assert list(counts) == [*names, "wrong after"]
    assert counts["judged"] == counts["duplicates"] // 2 == counts["wrong after"] > 0
    assert len(asked) == counts["duplicates"] + counts["judged"]
    rows = list(jsonl(tmp_path / "out/data/build" / dataset.ROWS))
    assert all(row["accuracy"] == 1.0 and row["answer"] == row["original"].strip() for row in rows)
