"""What each stage of a run was made of, and what it made: a run's `manifest.json`.

A stage is entered when it begins, with its settings and the digests of its inputs, and completed
when it is done. So what is in the folder is used again only for what it was made for.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from r1jax import metrics, settings
from r1jax.fields import by_path

FILE = "manifest.json"
PASSES = "passes: "  # begins the names of inputs that only the passes of a data set read


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One stage."""

    name: str
    config: Sequence[str]  # its lines of the run's config.txt
    inputs: Mapping[str, str]  # what it was made from -> SHA-256
    done: bool = False
    output: Mapping[str, Any] = field(default_factory=dict)  # path, sha256, and counts


def read(folder: Path) -> dict[str, Entry]:
    """The stages that have begun, by name, in order; none where there is no manifest.

    Raises:
      ValueError: the file is damaged.
    """
    file = folder / FILE
    if not file.exists():
        return {}
    try:
        entries = [Entry(**entry) for entry in json.loads(file.read_bytes())["stages"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from None
    return {entry.name: entry for entry in entries}


def write(folder: Path, entries: Mapping[str, Entry]) -> None:
    """Writes the manifest, whole or not at all."""
    record = {"stages": [asdict(entry) for entry in entries.values()]}
    text = json.dumps(record, indent=1, ensure_ascii=False)
    metrics.replace(folder / FILE, text.encode() + b"\n")


def begun(folder: Path) -> dict[str, bool]:
    """The stages that have begun, by name, and whether each is done."""
    return {name: entry.done for name, entry in read(folder).items()}


def config_of(name: str, text: Sequence[str]) -> list[str]:
    """The lines of a run's config text that are a stage's."""
    return [line for line in text if line.startswith((f"{name}.", f"{name}: "))]


def same_or_fail(folder: Path, there: Entry, here: Entry) -> None:
    """Passes if a stage that has begun would be made of the same today, whatever is kept of it.

    The passes of a stage that is not done may be others, and read other files: what was answered
    before them stays as it is.

    Raises:
      ValueError: the first setting or input that differs.
    """
    free = tuple(f"{there.name}.{kept}" for kept in settings.ONLY_KEPT)
    if not there.done:
        free += (f"{there.name}.passes", PASSES)
    for kind, old, new in (
        ("setting", by_path(there.config), by_path(here.config)),
        ("input", dict(there.inputs), dict(here.inputs)),
    ):
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name) and not name.startswith(free):
                raise ValueError(
                    f"{folder}: stage {there.name} was made with another {kind}: {name} was "
                    f"{_short(old.get(name))} and is {_short(new.get(name))} now; "
                    f"use --out for a new folder"
                )


def _short(value: str | None) -> str:
    return "absent" if value is None else value if len(value) < 64 else f"{value[:12]}..."
