"""Rows made on demand, and rows read from JSONL files."""

import json
import os
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
            row = _parse(line, f"{path}:{number}")
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
    return LazyRows(len(starts), partial(_read, path, starts))


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
        return _parse(file.readline(), f"{path}: changed since it was opened: row {index}")


def _parse(line: bytes, place: str) -> dict[str, Any]:
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
