"""Which answers a data set keeps: functions (row) -> bool, for `r1jax.data.passes.keep`.

A row is what a `Build` stage makes of one answer: `prompt`, `answer`, `accuracy`, `num_tokens`,
`finished`, and the problem's own fields in `row`. R1 dropped answers with mixed languages, long
paragraphs and code blocks (arXiv:2501.12948v1, section 2.3.3); no source says by which numbers, so
the bounds here are settings, and their defaults are this project's.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from r1jax.rewards.language import LANGUAGES, count_words
from r1jax.rewards.length import tokens
from r1jax.rewards.prose import repeated_share

Row = Mapping[str, Any]

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n")
_FENCE = re.compile(r"^[^\S\n]*(```|~~~)", re.MULTILINE)


def text(row: Row, name: str) -> str:
    """The text of a field.

    Raises:
      ValueError: the row has no such field, or it is not text.
    """
    if not isinstance(row.get(name), str):
        raise ValueError(f"a row has no text {name!r}; it has {', '.join(map(str, row)) or 'none'}")
    return row[name]


def right(row: Row, *, least: float = 1.0) -> bool:
    """Whether the answer was verified, with an accuracy of at least `least`."""
    return row.get("accuracy") is not None and row["accuracy"] >= least


def finished(row: Row) -> bool:
    """Whether the answer ended by itself and was not cut off."""
    return bool(row.get("finished"))


def one_language(row: Row, *, least: float = 0.95, language: str | None = None) -> bool:
    """Whether at least a share `least` of the answer's words are in one language.

    The language is that of the argument, or else of the problem's field `language`, or else the
    one that most words are in. Words are those of `r1jax.rewards.language.count_words`, which
    leaves out code and formulas. An answer without words mixes none: it passes.

    Raises:
      ValueError: the language is not one of `r1jax.rewards.language.LANGUAGES`.
    """
    words = count_words(text(row, "answer"))
    name = language or row.get("row", row).get("language")
    if name is not None and name not in LANGUAGES:
        raise ValueError(f"language must be one of {', '.join(LANGUAGES)}, got {name!r}")
    choices = LANGUAGES.values() if name is None else [LANGUAGES[name]]
    most = max(sum(words[script] for script in scripts) for scripts in choices)
    return most >= least * words.total()


def short_paragraphs(row: Row, *, most: int = 2000) -> bool:
    """Whether no paragraph, which is what stands between blank lines, has over `most` characters.

    White space around a paragraph is not counted.
    """
    parts = _BLANK_LINE.split(text(row, "answer"))
    return all(len(part.strip()) <= most for part in parts)


def no_code_block(row: Row) -> bool:
    """Whether no line of the answer opens or closes a fenced block of code."""
    return not _FENCE.search(text(row, "answer"))


def not_repetitive(
    row: Row,
    *,
    most: float = 0.2,
    size: int = 20,
    split: Callable[[str], Sequence[str]] = str.split,
) -> bool:
    """Whether at most a share `most` of the answer's n-grams of `size` words stood in it before.

    `split` makes words of the text in lower case; for Chinese, pass `list` and a larger `size`.
    """
    return repeated_share(split(text(row, "answer").lower()), size=size) <= most


def length_within(
    row: Row,
    *,
    most: float,
    least: float = 0,
    measure: Callable[[Row, str], float] = tokens,
) -> bool:
    """Whether the answer's length is from `least` to `most`.

    `measure` is one of `r1jax.rewards.length`: tokens, characters or words. A teacher's answers
    have no number of tokens.
    """
    return least <= measure(row, text(row, "answer")) <= most
