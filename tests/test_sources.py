"""Rows made on demand and rows of JSONL files."""

import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

from r1jax.data.sources import LazyRows, digest, hub_folder, jsonl, parquet
from r1jax.data.templates import r1_zero


def write(folder: Path, *lines: str) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes("".join(lines).encode())
    return path


def error_of(path: Path, need: tuple[str, ...] = ()) -> str:
    with pytest.raises(ValueError) as error:
        jsonl(path, need)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{path.parent}/", "")


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    written = [{"n": i, "text": "é" * (i % 7) + "\n", "deep": {"a": [i]}} for i in range(50)]
    path = write(tmp_path, *(json.dumps(row, ensure_ascii=False) + "\n" for row in written))
    rows = jsonl(path, need=("n", "text"))
    assert len(rows) == 50
    assert list(rows) == written
    assert rows[-1] == written[-1]
    assert rows[3:9:2] == written[3:9:2]
    with pytest.raises(IndexError):
        rows[50]


def test_blank_lines_other_line_ends_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeff{"a": 1}\r\n', "\n", "  \r\n", '{"a": 2}')
    assert list(jsonl(path)) == [{"a": 1}, {"a": 2}]


def test_many_threads_read_the_right_rows(tmp_path: Path) -> None:
    path = write(
        tmp_path, *(json.dumps({"n": i, "pad": "x" * (i % 91)}) + "\n" for i in range(500))
    )
    rows = jsonl(path)
    wanted = [(i * 7919) % 500 for i in range(4_000)]
    with ThreadPoolExecutor(8) as pool:
        assert [row["n"] for row in pool.map(rows.__getitem__, wanted)] == wanted


def test_rows_can_be_sent_to_another_process(tmp_path: Path) -> None:
    rows = jsonl(write(tmp_path, '{"a": 1}\n{"a": 2}\n'))
    assert list(pickle.loads(pickle.dumps(rows))) == [{"a": 1}, {"a": 2}]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path / "none.jsonl") == "none.jsonl: no such file"


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    assert error_of(tmp_path / "rows") == "rows: cannot be read (Is a directory)"


@pytest.mark.parametrize("text", ["", "\n\n", "  \n"])
def test_a_file_without_rows_is_refused(tmp_path: Path, text: str) -> None:
    assert error_of(write(tmp_path, text)) == "rows.jsonl holds no rows"


def test_a_line_that_is_not_json_is_named_with_its_number(tmp_path: Path) -> None:
    message = error_of(write(tmp_path, '{"a": 1}\n\n{"a": \n'))
    assert message.startswith("rows.jsonl:3: not JSON (")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2]", "rows.jsonl:1: need a JSON object, got list"),
        ("7", "rows.jsonl:1: need a JSON object, got int"),
        ("[" * 200_000, "rows.jsonl:1: not JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "rows.jsonl:1: not JSON"),
    ],
)
def test_a_line_that_is_no_row_is_refused(tmp_path: Path, line: str, message: str) -> None:
    assert error_of(write(tmp_path, line)).startswith(message)


def test_a_line_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\x1f\x8b\xff\n')
    assert error_of(path) == "rows.jsonl:2: not UTF-8 text"


def test_a_row_without_a_needed_field_is_named_with_those_it_has(tmp_path: Path) -> None:
    path = write(tmp_path, '{"numbers": [1], "target": 1}\n', '{"numbers": [1], "id": 3}\n')
    assert len(jsonl(path, ("numbers",))) == 2
    assert error_of(path, ("numbers", "target")) == (
        "rows.jsonl:2: row has no field 'target'; it has numbers, id"
    )
    assert error_of(write(tmp_path, "{}\n"), ("target",)) == (
        "rows.jsonl:1: row has no field 'target'; it has none"
    )


def test_a_file_that_was_replaced_is_noticed(tmp_path: Path) -> None:
    rows = jsonl(write(tmp_path, '{"a": 1}\n{"a": 2}\n'))
    write(tmp_path, '{"a": 10000}\n')
    with pytest.raises(ValueError, match="changed since it was opened: row 1"):
        rows[1]


def test_lazy_rows_make_only_what_is_asked_for() -> None:
    made: list[int] = []

    def make(index: int) -> dict[str, int]:
        made.append(index)
        return {"n": index}

    rows = LazyRows(10**9, make)
    assert len(rows) == 10**9
    assert rows[10**9 - 1] == rows[-1] == {"n": 10**9 - 1}
    assert rows[5:7] == [{"n": 5}, {"n": 6}]
    assert made == [10**9 - 1, 10**9 - 1, 5, 6]
    with pytest.raises(IndexError):
        rows[10**9]


def test_the_r1_zero_template_is_the_papers() -> None:
    prompt = r1_zero("What is {1} + 1?")
    assert prompt.startswith(
        "A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer. The reasoning process"
    )
    assert prompt.endswith(
        "i.e., <think> reasoning process here </think> <answer> answer here </answer>. "
        "User: What is {1} + 1?. Assistant:"
    )


def test_a_hubs_folder_gives_the_files_of_a_split_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    (folder / "README.md").write_text("---\n")
    for name, number in (("train-00001-of-00002", 2), ("train-00000-of-00002", 1), ("test", 3)):
        (folder / "data" / f"{name}.jsonl").write_text(f'{{"n": {number}}}\n')
    assert list(hub_folder(folder)) == [{"n": 1}, {"n": 2}]
    assert list(hub_folder(folder, split="test", need=["n"])) == [{"n": 3}]


def test_a_hubs_folder_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none: no such folder$"):
        hub_folder(tmp_path / "none")
    (tmp_path / "test.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"of split 'train', one kind; it has test.jsonl$"):
        hub_folder(tmp_path)
    for name in ("train.jsonl", "train-00000-of-00001.parquet"):
        (tmp_path / name).write_text("{}\n")
    with pytest.raises(ValueError, match=r"it has train-00000-of-00001.parquet, train.jsonl$"):
        hub_folder(tmp_path)


class Table:
    """What pyarrow's table shows of itself."""

    def __init__(self, rows: list[dict]) -> None:
        self.rows, self.num_rows = rows, len(rows)
        self.column_names = list(rows[0]) if rows else []

    def to_pylist(self) -> list[dict]:
        return self.rows


@pytest.fixture
def pyarrow(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict]]:
    """Tables by file name, which a stand-in for pyarrow reads; others are no Parquet files."""
    tables: dict[str, list[dict]] = {}

    def read_table(path: Path) -> Table:
        if path.name not in tables:
            raise ValueError("Parquet magic bytes\nnot found in footer")
        return Table(tables[path.name])

    module = ModuleType("pyarrow.parquet")
    module.read_table = read_table  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", ModuleType("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    return tables


def test_parquet_rows_are_those_that_pyarrow_reads(tmp_path: Path, pyarrow) -> None:
    for name, rows in (("train", [{"a": 1}, {"a": 2}]), ("empty", []), ("broken", None)):
        (tmp_path / f"{name}.parquet").touch()
        if rows is not None:
            pyarrow[f"{name}.parquet"] = rows
    assert parquet(tmp_path / "train.parquet", need=["a"]) == [{"a": 1}, {"a": 2}]
    assert hub_folder(tmp_path) == [{"a": 1}, {"a": 2}]
    with pytest.raises(ValueError, match=r"none.parquet: no such file$"):
        parquet(tmp_path / "none.parquet")
    with pytest.raises(ValueError, match=r"has no column 'b'; it has a$"):
        parquet(tmp_path / "train.parquet", need=["b"])
    with pytest.raises(ValueError, match=r"empty.parquet holds no rows$"):
        parquet(tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match=r"\(Parquet magic bytes not found in footer\)$"):
        parquet(tmp_path / "broken.parquet")


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)  # as if it were not there
    (tmp_path / "train.parquet").touch()
    with pytest.raises(ValueError, match=r"train.parquet: .* pip install pyarrow, or .* JSONL$"):
        parquet(tmp_path / "train.parquet")


def test_a_digest_changes_with_any_byte_of_a_file_and_any_row_of_a_list(tmp_path: Path) -> None:
    lines = [f'{{"n": {i}}}\n' for i in range(300)]
    path = write(tmp_path, *lines)
    before = digest(jsonl(path))
    assert digest(jsonl(path)) == before
    write(tmp_path, *lines[:-1], '{"n": 0}\n')
    assert digest(jsonl(path)) != before
    rows = [{"n": i} for i in range(300)]
    assert digest(rows) != digest([*rows[:-1], {"n": 0}])
    assert digest(rows) != digest(rows[:-1])


def test_rows_made_on_demand_are_not_all_made_for_a_digest() -> None:
    made = []
    rows = LazyRows(1_000_000, lambda i: made.append(i) or {"n": i})
    assert digest(rows) != digest(LazyRows(1_000_001, rows.make))
    assert len(made) == 2 * 256
