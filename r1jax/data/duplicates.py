"""Passes that compare texts: with evaluation sets, and rows with one another.

Words are runs of letters and digits in lower case; each Chinese or Japanese character is one, as
no spaces part them.
"""

import re
import unicodedata
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np

from r1jax.data.filters import text

Row = Mapping[str, Any]
Rows = Sequence[Row]
Gram = tuple[str, ...]

_SINGLE = "\u3005\u3007\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003347f"
_WORD = re.compile(rf"[{_SINGLE}]|[^\W_{_SINGLE}]+")

# Rows of a band and bands of a signature: two texts that share 0.8 of their grams meet in at least
# one band but for a chance of (1 - 0.8 ** 4) ** 32 = 5e-8, two that share 0.2 with one of 0.05.
BAND, NUM_BANDS = 4, 32
_PRIME = 4_294_967_311  # the first above 2 ** 32


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).lower())


def grams(words: Sequence[str], size: int) -> Iterator[Gram]:
    """Each run of `size` words; none where there are fewer."""
    return zip(*(islice(words, i, None) for i in range(size)), strict=False)


def texts(value: Any) -> Iterator[str]:
    """All texts in a row, in its lists and inner rows too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from texts(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from texts(item)


def prompt_and_answer(row: Row) -> str:
    """The text that a row trains on."""
    return f"{text(row, 'prompt')}\n{text(row, 'answer')}"


def prompt(row: Row) -> str:
    """The text that a row's answer is to."""
    return text(row, "prompt")


def decontaminate(rows: Rows, *, against: Sequence[Callable[[], Rows]], size: int = 10) -> Rows:
    """The rows that have no run of `size` words in common with any row of evaluation sets.

    All texts of a row are looked at, on both sides: question, solution, answer. A text of fewer
    words has no run; it cannot be told from chance, and passes.

    Raises:
      ValueError: `size` < 1, or there is nothing to compare with.

    Source: 10-grams of R1, arXiv:2501.12948v2, supplement; 8 words in Open-R1,
    scripts/decontaminate.py.
    """
    if size < 1:
        raise ValueError(f"size must be >= 1 word, got {size}")
    known: set[Gram] = set()
    for source in against:
        for row in source():
            for one in texts(row):
                known.update(grams(words(one), size))
    if not known:
        raise ValueError(f"nothing to compare with: no evaluation text has {size} words")
    return [
        row for row in rows if all(known.isdisjoint(grams(words(one), size)) for one in texts(row))
    ]


def distinct(rows: Rows, *, by: Callable[[Row], str] = prompt_and_answer) -> Rows:
    """The rows without those whose words are the same, in order, as an earlier row's."""
    seen: set[Gram] = set()
    found = []
    for row in rows:
        key = tuple(words(by(row)))
        if key not in seen:
            seen.add(key)
            found.append(row)
    return found


def dissimilar(
    rows: Rows, *, share: float = 0.8, size: int = 5, by: Callable[[Row], str] = prompt
) -> Rows:
    """The rows without those that are nearly the same as an earlier one that stays.

    Nearly the same are texts of which a share of at least `share` of all runs of `size` words that
    either has is in both. Pairs are found by hashing and then compared, so none is dropped for
    less. At 0.8 one pair in twenty million is missed; at 0.6 one in eighty, at 0.5 one in eight.

    Raises:
      ValueError: `share` is not in [0.5, 1], or `size` < 1.

    Source: Broder, On the resemblance and containment of documents (1997).
    """
    if not 0.5 <= share <= 1 or size < 1:
        raise ValueError(f"need share in [0.5, 1] and size >= 1, got {share} and {size}")
    buckets: dict[tuple[int, bytes], list[int]] = {}
    kept: list[list[str]] = []
    found = []
    for row in rows:
        one = words(by(row))
        mine = _grams_or_all(one, size)
        keys = _bands(mine)
        near = {i for key in keys for i in buckets.get(key, ())}
        if any(_overlap(mine, _grams_or_all(kept[i], size)) >= share for i in sorted(near)):
            continue
        for key in keys:
            buckets.setdefault(key, []).append(len(kept))
        kept.append(one)
        found.append(row)
    return found


def _grams_or_all(words: Sequence[str], size: int) -> set[Gram]:
    return set(grams(words, size)) or {tuple(words)}


def _overlap(first: set[Gram], second: set[Gram]) -> float:
    return len(first & second) / len(first | second)


def _bands(found: set[Gram]) -> list[tuple[int, bytes]]:
    """Keys that texts with many grams in common are likely to share one of.

    A key holds the least of the grams' hashes under each of `BAND` random functions a * h + b.
    """
    hashes = np.asarray([zlib.crc32(" ".join(gram).encode()) for gram in found], np.int64)
    rng = np.random.Generator(np.random.PCG64(0))
    a, b = rng.integers(1, 2**30, size=(2, BAND * NUM_BANDS, 1))
    least = ((a * hashes + b) % _PRIME).min(axis=1).reshape(NUM_BANDS, BAND)
    return [(i, band.tobytes()) for i, band in enumerate(least)]
