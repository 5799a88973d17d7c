"""Rows made on demand, and rows read from JSONL and Parquet files and from folders of them."""

import hashlib
import importlib
import json
import os
import re
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, overload


@dataclass(frozen=True)
class LazyRows(Sequence[dict[str, Any]]):
    """`num` rows, row i made by `make(i)` each time it is asked for, from any thread."""

    num: int
    make: Callable[[int], dict[str, Any]]
    files: tuple[Path, ...] = ()  # that the rows are read from

    def __len__(self) -> int:
        return self.num

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(index, slice):
            return [self.make(i) for i in range(self.num)[index]]
        return self.make(range(self.num)[index])


def jsonl(path: str | os.PathLike[str], need: Sequence[str] = ()) -> LazyRows:
    """The rows of a JSONL file: one JSON object a line, read again each time it is asked for.

    The whole file is checked here, so that a bad row is found now and not hours into a run; only
    the place of each row is kept in memory. Blank lines are skipped.

    Raises:
      ValueError: in one line, with the file and the line: there is no such file, it holds no rows,
        a line is not a JSON object, or a row lacks a field of `need`.
    """
    path = Path(path)
    starts = array("Q")
    try:
        for number, start, line in _lines(path):
            row = parse_line(line, f"{path}:{number}")
            missing = [field for field in need if field not in row]
            if missing:
                raise ValueError(
                    f"{path}:{number}: row has no field {missing[0]!r}; "
                    f"it has {', '.join(row) or 'none'}"
                )
            starts.append(start)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not starts:
        raise ValueError(f"{path} holds no rows")
    return LazyRows(len(starts), partial(_read, path, starts), (path,))


def parquet(path: str | os.PathLike[str], need: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The rows of a Parquet file, all of them in memory. Needs pyarrow: the extra `parquet`.

    Raises:
      ValueError: in one line, with the file: there is no such file, pyarrow is not installed, the
        file cannot be read or holds no rows, or it lacks a column of `need`.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        # By name: nothing else in the package needs it, and it is no small thing to install.
        reader = importlib.import_module("pyarrow.parquet")
    except ModuleNotFoundError:
        raise ValueError(
            f"{path}: Parquet files need pyarrow, which is not installed: "
            f"pip install pyarrow, or write the rows as JSONL"
        ) from None
    try:
        table = reader.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a Parquet file that can be read ({reason[:200]})") from None
    missing = [field for field in need if field not in table.column_names]
    if missing:
        raise ValueError(
            f"{path}: has no column {missing[0]!r}; it has {', '.join(table.column_names)}"
        )
    if not table.num_rows:
        raise ValueError(f"{path} holds no rows")
    return table.to_pylist()


def hub_folder(
    path: str | os.PathLike[str], *, split: str = "train", need: Sequence[str] = ()
) -> Sequence[dict[str, Any]]:
    """The rows of one split of a hub's data set that was downloaded to a folder.

    Its files are those in the folder or in a folder `data` of it that are named for the split, as
    hubs name them: `train.jsonl`, `train-00000-of-00002.parquet`, in the order of their names.

    Raises:
      ValueError: in one line: there is no such folder, it has no file of this split, or has some
        of both formats; or what `jsonl` and `parquet` raise.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    files = [f for place in (folder, folder / "data") for f in sorted(place.glob("*.*"))]
    known = [f for f in files if f.suffix in (".jsonl", ".parquet")]
    chosen = [f for f in known if re.fullmatch(rf"{re.escape(split)}(-\d+-of-\d+)?", f.stem)]
    if len({f.suffix for f in chosen}) != 1:
        names = ", ".join(str(f.relative_to(folder)) for f in chosen or known) or "no such files"
        raise ValueError(
            f"{folder}: need .jsonl or .parquet files of split {split!r}, one kind; it has {names}"
        )
    read = jsonl if chosen[0].suffix == ".jsonl" else parquet
    parts = [read(file, need) for file in chosen]
    rows = [row for part in parts for row in part] if len(parts) > 1 else parts[0]
    return rows


def digest(rows: Sequence[Any]) -> str:
    """A SHA-256 by which a run notices that its rows have changed.

    It is that of the files that rows are read from, or else of all rows in a list. Rows that are
    made on demand follow from their settings: it is that of their number and the first 256.
    """
    found = hashlib.sha256()
    if isinstance(rows, LazyRows) and rows.files:
        for file in rows.files:
            found.update(file_digest(file).encode())
        return found.hexdigest()
    few = rows[:256] if isinstance(rows, LazyRows) else rows
    found.update(f"{len(rows)}\n".encode())
    for row in few:
        found.update(json.dumps(row, sort_keys=True, default=str).encode() + b"\n")
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
      ValueError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    start = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, start, line
            start += len(line)


def _read(path: Path, starts: array, index: int) -> dict[str, Any]:
    # A handle of its own for each read: a shared one would be moved by other threads.
    with path.open("rb") as file:
        file.seek(starts[index])
        return parse_line(file.readline(), f"{path}: changed since it was opened: row {index}")


def parse_line(line: bytes, place: str) -> dict[str, Any]:
    """The JSON object that a line of JSONL holds.

    Raises:
      ValueError: it holds none; `place` says where the line is.
    """
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ValueError(f"{place}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise ValueError(f"{place}: not JSON that can be read ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{place}: need a JSON object, got {type(row).__name__}")
    return row
