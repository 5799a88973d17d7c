import gzip
import json
import re
import sys
from pathlib import Path

import pytest

from r1jax.data import eval_sets
from r1jax.data.files import records
from r1jax.rewards.dispatch import VERIFIERS, by_verifier

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"
FILES = {
    "gsm8k": ("gsm8k_test.jsonl", 1319),
    "math500": ("math500.jsonl", 500),
    "aime": ("aime24.jsonl", 30),
    "amc": ("amc23.jsonl", 40),
    "minerva": ("minerva_math.jsonl", 272),
    "olympiadbench": ("olympiadbench.jsonl", 675),
    "cmath": ("cmath.jsonl", 600),
    "svamp": ("svamp.jsonl", 1000),
    "asdiv": ("asdiv.jsonl", 2215),
    "humaneval": ("humaneval.jsonl.gz", 164),
}
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no folder with the published files")

GPQA = {
    "Question": "Which is the largest?",
    "Correct Answer": "Jupiter",
    "Incorrect Answer 1": "Mars",
    "Incorrect Answer 2": "Venus",
    "Incorrect Answer 3": "Earth",
    "Subdomain": "Astrophysics",
}


def write(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --------------------------------------------------------------------------- the published files


def own_answer(name: str, record: dict) -> str:
    """A right answer, taken from the published record by other means than the loader's."""
    if name == "gsm8k":
        return f"\\boxed{{{record['answer'].rpartition('####')[2].strip()}}}"
    if name == "minerva":
        return record["solution"]
    if name == "olympiadbench":
        return f"\\boxed{{{record['final_answer'][0].strip('$')}}}"
    if name == "humaneval":
        return f"```python\n{record['prompt']}{record['canonical_solution']}\n```"
    return f"\\boxed{{{record.get('answer', record.get('Answer'))}}}"


@needs_data
@pytest.mark.parametrize("name", FILES)
def test_each_published_file_becomes_rows_that_accept_its_own_answers(name: str):
    file, count = FILES[name]
    rows = eval_sets.load(name, DATA / file)
    assert len(rows) == count and len({row["id"] for row in rows}) == count
    data = (DATA / file).read_bytes()
    data = gzip.decompress(data) if file.endswith("gz") else data
    published = [json.loads(line) for line in data.splitlines()]
    step = 90 if name == "humaneval" else max(1, count // 40)
    for record, row in list(zip(published, rows, strict=True))[::step]:
        assert by_verifier(row, own_answer(name, record)) == 1.0
        assert not by_verifier(row, "\\boxed{-98765}")
        prompt = eval_sets.SETS[name].prompt(row)
        story = record.get("problem") or record.get("question") or record.get("Question")
        assert (story or record["prompt"]).strip() in prompt
        assert eval_sets.SETS[name].direct(row) != prompt


@needs_data
def test_a_story_and_its_question_are_told_in_one_text():
    row = eval_sets.load("svamp", DATA / "svamp.jsonl")[0]
    assert row["question"].endswith(
        "organized into 93 groups. How big is each group of bananas?"  # the file has no full stop
    )
    assert row["answer"] == 145.0 and row["Type"] == "Common-Division"


# --------------------------------------------------------------------------- sets made here


def test_every_set_names_a_verifier_that_there_is():
    rows = {
        "gpqa": eval_sets.SETS["gpqa"].row(
            {"question": "?", "right": "a", "wrong1": "b", "wrong2": "c", "wrong3": "d"}
        ),
        "countdown": eval_sets.SETS["countdown"].row({"numbers": [1, 2], "target": 3}),
    }
    assert {row["verifier"] for row in rows.values()} <= VERIFIERS.keys()


def test_the_right_choice_of_gpqa_stands_under_the_letter_of_the_answer(tmp_path: Path):
    questions = [{**GPQA, "Question": f"Which is the largest, number {i}?"} for i in range(40)]
    rows = eval_sets.load("gpqa", write(tmp_path / "gpqa.jsonl", *questions))
    for row in rows:
        listed = dict(re.findall(r"^([A-D])\) (.*)$", row["question"], re.MULTILINE))
        assert sorted(listed.values()) == ["Earth", "Jupiter", "Mars", "Venus"]
        assert listed[row["answer"]] == "Jupiter"
        assert by_verifier(row, f"Let me see.\n\nAnswer: {row['answer']}") == 1.0
        wrong = next(letter for letter in "ABCD" if letter != row["answer"])
        assert by_verifier(row, f"Let me see.\n\nAnswer: {wrong}") == 0.0
    assert {row["answer"] for row in rows} == set("ABCD")
    # The order is the same in a copy of the file with other rows before it.
    again = eval_sets.load("gpqa", write(tmp_path / "part.jsonl", *questions[7:]))
    assert [row["question"] for row in again] == [row["question"] for row in rows[7:]]


@pytest.mark.parametrize(
    ("answer", "choices"),
    [("B", ["one", "two"]), (1, ["one", "two", "three"]), ("b", {"text": ["one", "two"]})],
)
def test_choices_are_given_by_letter_or_by_number(tmp_path: Path, answer, choices):
    row = {"question": "Two?", "choices": choices, "answer": answer}
    (made,) = eval_sets.load("choices", write(tmp_path / "c.jsonl", row))
    assert made["answer"] == "B" and "B) two" in made["question"]


def test_countdown_asks_as_tiny_zero_does(tmp_path: Path):
    file = write(tmp_path / "c.jsonl", {"nums": [44, 19, 35], "target": 98})
    (row,) = eval_sets.load("countdown", file)
    assert (
        eval_sets.SETS["countdown"]
        .prompt(row)
        .startswith(
            "Using the numbers [44, 19, 35], create an equation that equals 98. You can use basic"
        )
    )
    assert eval_sets.SETS["countdown"].prompt(row).endswith("<answer> (1 + 2) / 3 </answer>.")
    assert by_verifier(row, "<answer> 44 + 19 + 35 </answer>") == 1.0


# --------------------------------------------------------------------------- formats and bad input


def test_one_set_is_read_alike_from_jsonl_gzip_and_csv(tmp_path: Path):
    plain = write(tmp_path / "a.jsonl", GPQA)
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "a.csv"
    table.write_text(",".join(GPQA) + "\n" + ",".join(GPQA.values()) + "\n")
    rows = [eval_sets.load("gpqa", path) for path in (plain, packed, table)]
    assert rows[0] == rows[1] == rows[2]


def test_parquet_is_read_where_pyarrow_is(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    rows = [{"nums": [1, 2, 3], "target": 6}, {"nums": [4, 5], "target": 20}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    made = eval_sets.load("countdown", tmp_path / "a.parquet")
    assert [(row["numbers"], row["target"]) for row in made] == [([1, 2, 3], 6), ([4, 5], 20)]
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ValueError, match=r"b\.parquet: not a Parquet file"):
        records(tmp_path / "b.parquet")


def test_parquet_without_pyarrow_is_one_line(tmp_path: Path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet: Parquet files need pyarrow"):
        records(tmp_path / "a.parquet")


def test_unknown_columns_are_one_line_with_the_file_and_the_columns_expected(tmp_path: Path):
    file = write(tmp_path / "mine.jsonl", {"prompt": "1 + 1?", "gold": "2"})
    with pytest.raises(ValueError) as caught:
        eval_sets.load("math500", file)
    assert str(caught.value) == (
        f"{file} is no file of math500: record 1 needs columns problem or question, "
        "answer or solution; it has prompt, gold"
    )


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("gsm8k", {"question": "", "answer": "2"}, "question must be a text that is not empty"),
        ("gsm8k", {"question": "?", "answer": None}, "answer must be a text or a number, got None"),
        ("gsm8k", {"question": "?", "answer": " "}, "answer is empty"),
        ("countdown", {"nums": "1 2", "target": 3}, "need a list of whole numbers"),
        ("countdown", {"nums": [1, 2.5], "target": 3}, "need a list of whole numbers"),
        ("choices", {"question": "?", "choices": ["a"], "answer": 0}, "a list of 2 to 10"),
        ("choices", {"question": "?", "choices": ["a", "b"], "answer": "C"}, "a letter of AB"),
        ("olympiadbench", {"question": "?", "final_answer": []}, "a list of one final answer"),
    ],
)
def test_a_record_that_makes_no_sense_is_one_line(tmp_path: Path, name, row, said):
    good = {"question": "1?", "answer": "1"}
    rows = [good, row] if name == "gsm8k" else [row]
    file = write(tmp_path / "mine.jsonl", *rows)
    with pytest.raises(ValueError, match=said) as caught:
        eval_sets.load(name, file)
    assert str(caught.value).startswith(f"{file}: record {len(rows)} is none of {name}: ")


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("a.txt", b"", "need a file ending in one of .jsonl, .jsonl.gz, .csv, .parquet"),
        ("a.jsonl", b"\n", "holds no records"),
        ("a.jsonl", b'{"a": 1}\n{"a"', ":2: not JSON"),
        ("a.jsonl", b"[1]", ":1: need a JSON object, got list"),
        ("a.jsonl", b"\xff", "not UTF-8 text"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.csv", b"a,b\n1,2\n3\n", ":3: need 2 fields"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, name, data, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=said):
        records(tmp_path / name)


def test_unknown_names_are_one_line(tmp_path: Path):
    with pytest.raises(ValueError, match="unknown evaluation set 'gsm'; known: gsm8k, math500"):
        eval_sets.load("gsm", tmp_path)
    with pytest.raises(ValueError, match=r"none\.jsonl: no such file"):
        records(tmp_path / "none.jsonl")
