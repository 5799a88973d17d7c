"""Records of the files that data sets are published as: JSONL, gzipped JSONL, CSV and parquet."""

import csv
import gzip
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1jax.data.sources import hub_folder, jsonl, parquet, parse_line

Record = dict[str, Any]


def records(path: str | Path) -> list[Record]:
    """All records of a file, one dict each by column name, in the file's order.

    The ending says the format: one of `FORMATS`. CSV gives texts only; its first line holds the
    names. Blank lines of JSONL are skipped. Parquet needs pyarrow, the extra `parquet`.

    Raises:
      ValueError: in one line with the file's name: there is no such file, its ending is unknown,
        it holds no records, or a record is damaged (then with its line).
    """
    path = Path(path)
    name = path.name.lower()
    read = next((read for ending, read in FORMATS.items() if name.endswith(ending)), None)
    if read is None:
        raise ValueError(f"{path}: need a file ending in one of {', '.join(FORMATS)}")
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        found = read(path)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text") from None
    except (OSError, EOFError, zlib.error, csv.Error) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    if not found:
        raise ValueError(f"{path} holds no records")
    return found


def rows(path: str | Path) -> Sequence[Record]:
    """The rows of a file, or of the split `train` of a hub's data set in a folder.

    The file is JSONL unless its ending is another of `FORMATS`. Rows of JSONL are read again each
    time they are asked for.

    Raises:
      ValueError: what `records`, `sources.jsonl` and `sources.hub_folder` raise.
    """
    path = Path(path)
    if path.is_dir():
        return hub_folder(path)
    other = path.name.lower().endswith(tuple(ending for ending in FORMATS if ending != ".jsonl"))
    return records(path) if other else jsonl(path)


def _jsonl(path: Path) -> list[Record]:
    return _json_lines(path, path.read_bytes())


def _jsonl_gz(path: Path) -> list[Record]:
    return _json_lines(path, gzip.decompress(path.read_bytes()))


def _json_lines(path: Path, data: bytes) -> list[Record]:
    lines = enumerate(data.split(b"\n"), start=1)
    return [parse_line(line, f"{path}:{number}") for number, line in lines if line.strip()]


def _csv(path: Path) -> list[Record]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        found = []
        for record in reader:
            if None in record or None in record.values():
                raise ValueError(
                    f"{path}:{reader.line_num}: need {len(reader.fieldnames or ())} fields, "
                    f"as in the first line"
                )
            found.append(dict(record))
    return found


FORMATS: Mapping[str, Callable[[Path], list[Record]]] = {
    ".jsonl": _jsonl,
    ".jsonl.gz": _jsonl_gz,
    ".csv": _csv,
    ".parquet": parquet,
}
