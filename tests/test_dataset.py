"""Data building with a made-up model: what is kept, counted, and not asked for twice."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from r1jax import dataset
from r1jax.data import passes
from r1jax.data.filters import right
from r1jax.data.sources import jsonl
from r1jax.settings import Build, Engine, Sampled, Taught

PROBLEMS = [{"question": f"{i} + 1", "gold": str(i + 1)} for i in range(10)]
ENGINE = Engine(max_prompt=8, max_new=8, slots=2)


def source() -> list[dict[str, Any]]:
    return PROBLEMS


def prompt(row) -> str:
    return f"{row['question']} ="


def exact(row, answer: str) -> float | None:
    return None if answer == "?" else float(answer == row["gold"])


def wrong_or_right(row, i: int) -> list[str]:
    """Three answers to problem i: right, wrong, and none that could be judged."""
    return [row["gold"], "0", "?"]


CFG = Build(
    name="cold",
    source=source,
    prompt=prompt,
    answers=Sampled(engine=ENGINE),
    samples=3,
    accuracy=exact,
    at_once=4,
    passes={"wrong": partial(passes.keep, where=right)},
)


class Model:
    """Answers with `wrong_or_right`, remembers what it was asked, and may stop being there."""

    def __init__(self, calls: int = 100) -> None:
        self.asked: list[int] = []
        self.calls = calls

    def __call__(self, rows: Sequence[Any], first: int) -> list[list[dict[str, Any]]]:
        if not self.calls:
            raise KeyboardInterrupt
        self.calls -= 1
        self.asked += range(first, first + len(rows))
        return [
            [
                {"answer": text, "num_tokens": len(text), "finished": True}
                for text in wrong_or_right(row, first + i)
            ]
            for i, row in enumerate(rows)
        ]


def never() -> bool:
    return False


def files(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture
def straight(tmp_path: Path) -> dict[str, bytes]:
    """The files of a data set that was built without a stop."""
    assert dataset.build(CFG, Model(), tmp_path / "straight", stopping=never)
    return files(tmp_path / "straight")


def test_right_answers_are_kept_with_their_problem_and_all_are_counted(straight, tmp_path):
    out = tmp_path / "straight"
    rows = list(jsonl(out / dataset.ROWS))
    assert rows[3] == {
        "prompt": "3 + 1 =",
        "answer": "4",
        "num_tokens": 1,
        "finished": True,
        "accuracy": 1.0,
        "problem": 3,
        "sample": 0,
        "row": PROBLEMS[3],
    }
    counts = [(count["name"], count["rows"]) for count in dataset.counts(out)]
    assert counts == [("source", 10), ("answers", 30), ("wrong", 10)]
    every = [json.loads(line) for line in straight[dataset.ANSWERS].splitlines()]
    assert [one["accuracy"] for one in every[0]["answers"]] == [1.0, 0.0, None]


def test_stopped_and_started_again_it_asks_only_for_what_it_lacks(straight, tmp_path):
    out, model = tmp_path / "again", Model()
    assert not dataset.build(CFG, model, out, stopping=lambda: len(model.asked) >= 8)
    assert {path.name for path in out.iterdir()} == {dataset.ANSWERS}
    assert dataset.build(CFG, model, out, stopping=never)
    assert model.asked == list(range(10))
    assert files(out) == straight


@pytest.mark.parametrize("lost", [1, 40, 200])
def test_a_half_written_call_is_asked_for_again(straight, tmp_path, lost):
    out = tmp_path / "again"
    with pytest.raises(KeyboardInterrupt):
        dataset.build(CFG, Model(calls=2), out, stopping=never)
    file = out / dataset.ANSWERS
    file.write_bytes(file.read_bytes()[:-lost])
    model = Model()
    assert dataset.build(CFG, model, out, stopping=never)
    assert model.asked == list(range(4, 10))
    assert files(out) == straight


def test_passes_alone_are_made_again_and_nobody_is_asked(straight, tmp_path):
    out = tmp_path / "straight"
    (out / dataset.ROWS).unlink()
    model = Model()
    assert dataset.build(CFG, model, out, stopping=never)
    assert model.asked == []
    assert files(out) == straight


def test_rows_without_answers_go_through_the_passes_as_they_are(tmp_path):
    cfg = Build(
        name="rows",
        source=source,
        passes={"few": partial(passes.keep, where=lambda row: int(row["gold"]) < 3)},
    )
    assert dataset.build(cfg, None, tmp_path / "out", stopping=never)
    assert list(jsonl(tmp_path / "out" / dataset.ROWS)) == PROBLEMS[:2]


def test_a_teacher_is_asked_for_each_sample_and_its_silence_is_no_answer(tmp_path):
    asked = []

    def complete(prompts):
        asked.extend(prompts)
        return [None if i % 2 else str(len(prompt)) for i, prompt in enumerate(prompts)]

    messages = lambda row: [{"role": "user", "content": row["question"]}]  # noqa: E731
    cfg = replace(CFG, answers=Taught(complete=complete, messages=messages), samples=2, passes={})
    assert dataset.build(cfg, dataset.ask_teacher(cfg), tmp_path / "out", stopping=never)
    assert [prompt[0]["content"] for prompt in asked[:4]] == ["0 + 1", "0 + 1", "1 + 1", "1 + 1"]
    rows = list(jsonl(tmp_path / "out" / dataset.ROWS))
    assert len(asked) == 20 and len(rows) == 10
    assert {row["num_tokens"] for row in rows} == {None}
    assert dataset.counts(tmp_path / "out")[1] == {"name": "answers", "rows": 10}


def test_a_teacher_that_never_answers_is_one_line(tmp_path):
    silent = Taught(complete=lambda prompts: [None] * len(prompts), messages=lambda row: [])
    cfg = replace(CFG, answers=silent)
    with pytest.raises(ValueError, match=r"^cold: no answers came to 10 problems$"):
        dataset.build(cfg, dataset.ask_teacher(cfg), tmp_path / "out", stopping=never)


def test_a_filter_that_leaves_nothing_is_one_line_and_writes_no_rows(tmp_path):
    cfg = replace(CFG, passes={"none": partial(passes.keep, where=lambda row: False)})
    with pytest.raises(ValueError, match=r"^cold: 'none' leaves none of 30 rows$"):
        dataset.build(cfg, Model(), tmp_path / "out", stopping=never)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [dataset.ANSWERS]


def test_a_data_set_that_cannot_be_is_refused_when_it_is_described():
    with pytest.raises(ValueError, match="samples must be >= 1, got 0"):
        replace(CFG, samples=0)
    with pytest.raises(ValueError, match="prompt is needed"):
        replace(CFG, prompt=None)
    with pytest.raises(ValueError, match="need answers"):
        replace(CFG, answers=None)
    empty = replace(CFG, source=lambda: [])
    with pytest.raises(ValueError, match="cold: no problems, the source has 0 rows"):
        dataset.check(empty, None)


def test_any_text_can_be_an_answer_and_comes_back_the_same(tmp_path):
    odd = "\ud800 \u2028 \x00 é 让"
    cfg = replace(CFG, passes={}, samples=1, accuracy=None)

    def ask(rows, first):
        return [[{"answer": odd, "num_tokens": 1, "finished": True}] for _ in rows]

    assert dataset.build(cfg, ask, tmp_path / "out", stopping=never)
    assert {row["answer"] for row in jsonl(tmp_path / "out" / dataset.ROWS)} == {odd}
