"""Endless batches of packed rows for supervised training, and the order in which rows are read.

Both are functions of a number alone: a run that goes on reads what it would have read.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

import grain
import numpy as np

from r1jax.data.packing import Fields, Packing, pack, place_texts, some_rows, text_size

T = TypeVar("T")
Row = Mapping[str, Any]


def shuffled(count: int, *, seed: int) -> Callable[[int], int]:
    """item(i) of an endless shuffle of range(count): each epoch has each number once.

    A function of i and `seed` alone. Each epoch has an order of its own; none is kept in memory.

    Raises:
      ValueError: `count` < 1.
    """
    if count < 1:
        raise ValueError(f"need at least one item to shuffle, got {count}")
    order = grain.MapDataset.source(range(count)).seed(seed % 2**32).shuffle().repeat()

    def item(i: int) -> int:
        found = order[i]
        assert found is not None  # only a filter would leave some out
        return found

    return item


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Endless packed batches; each is a function of its number alone, so resuming needs no state.

    `batch(i)` is what `place` gives, of the texts `texts(i)`. Texts are read in windows of several
    batches: `dropped(i)` is how many texts of the window of batch i found no room. `epoch` is the
    number of batches in which as many texts are read as there are.
    """

    batch: Callable[[int], Fields]
    texts: Callable[[int], list[Any]]
    dropped: Callable[[int], int]
    epoch: float


def packed_batches(
    rows: Sequence[Row],
    encode: Callable[[Sequence[Row]], Sequence[T]],
    *,
    batch_rows: int,
    row_length: int,
    seed: int,
    size: Callable[[T], int] = text_size,
    place: Callable[[Packing, Sequence[T]], Fields] = place_texts,
    window: int = 4096,
) -> Stream:
    """Batches of `batch_rows` nearly full rows, of texts in an order drawn anew for each epoch.

    Some `window` texts, as many as make whole batches, are packed together and their rows
    shuffled. How many is fixed at the start, from how the first texts pack and 3% short of full:
    so batch i can be computed from i. In a window whose texts happen to be longer than that, a few
    rows drawn at random find no room, and their texts are left out until the next epoch. `encode`
    turns some rows into their texts at once, end tokens included. What it gives for a row may be
    several texts that are to lie in one packed row, if `size` counts their tokens and `place` lays
    them out.

    Raises:
      ValueError: there are no rows, or a text has no tokens or does not fit a row (when it is
        read; the index of its row is named).
    """
    if not len(rows):
        raise ValueError("no texts to train on: the source has 0 rows")
    order = shuffled(len(rows), seed=seed)

    def read(first: int, count: int) -> tuple[list[T], list[int]]:
        index = [order(i) for i in range(first, first + count)]
        texts = list(encode([rows[i] for i in index]))
        lengths = [size(text) for text in texts]
        for i, length in zip(index, lengths, strict=True):
            if not 1 <= length <= row_length:
                raise ValueError(
                    f"row {i} has {length} tokens, a packed row holds 1 to {row_length}"
                )
        return texts, lengths

    sample = read(0, min(window, len(rows)))[1]
    batches, window_texts = _window_size(sample, window, batch_rows, row_length)
    window_rows = batches * batch_rows
    row_order = shuffled(window_rows, seed=seed)

    @lru_cache(maxsize=2)
    def load(number: int) -> tuple[list[T], Packing, list[int]]:
        texts, lengths = read(number * window_texts, window_texts)
        packing = pack(lengths, row_length)
        rows = np.arange(window_rows)
        if packing.num_rows > window_rows:  # the last rows are those of the shortest texts
            rows = np.random.default_rng([seed, number]).permutation(packing.num_rows)
        return texts, packing, rows[:window_rows].tolist()

    def chosen(i: int) -> tuple[Packing, list[T]]:
        texts, packing, rows = load(i // batches)
        order = [row_order(i * batch_rows + r) for r in range(batch_rows)]
        which, part = some_rows(packing, [rows[r] for r in order])
        return part, [texts[j] for j in which]

    def dropped(i: int) -> int:
        texts, packing, rows = load(i // batches)
        return len(texts) - int(np.isin(packing.row, rows).sum())

    return Stream(
        batch=lambda i: place(*chosen(i)),
        texts=lambda i: chosen(i)[1],
        dropped=dropped,
        epoch=len(rows) * batches / window_texts,
    )


def _window_size(
    lengths: Sequence[int], window: int, batch_rows: int, row_length: int
) -> tuple[int, int]:
    """How many batches a window has, and how many texts fill 97% of them, judged by `lengths`."""
    # Few texts are packed in several copies, or a last row half full would count for much.
    copies = math.ceil(window / len(lengths))
    rows_per_text = pack([*lengths] * copies, row_length).num_rows / (len(lengths) * copies)
    # At least one batch, but no more than an epoch, or texts would be in a batch several times.
    batches = max(1, int(len(lengths) * rows_per_text / batch_rows))
    return batches, max(1, int(0.97 * batches * batch_rows / rows_per_text))
