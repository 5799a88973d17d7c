"""Texts as a supervised stage reads them: alone, with a label, or the two answers of a pair.

`answers`, `pairs` and `labels` say what is read of a row; `place` lays the texts out with all that
the losses of `r1jax.algos.preferences` want of a batch.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from r1jax.data.packing import Fields, Packing, Text, pack, place_texts, some_rows, text_size
from r1jax.data.sources import LazyRows

Row = Mapping[str, Any]
Rows = Sequence[Row]


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What a row gives, to lie in one packed row: a text, or the better and the worse of a pair."""

    texts: tuple[Text, ...]
    labels: tuple[float, ...]  # of each text, 0 to 1; 0 where it is of no use


# --------------------------------------------------------------------------- sources


def compared(*, chosen: Callable[[], Rows], rejected: Callable[[], Rows]) -> LazyRows:
    """Pairs of two sources of answers to the same prompts: row i prefers that of `chosen`.

    Raises:
      ValueError: the sources are not of one length; or, when a row is made, not of one prompt.
    """
    better, worse = chosen(), rejected()
    if len(better) != len(worse):
        raise ValueError(
            f"chosen and rejected must have as many rows, got {len(better)} and {len(worse)}"
        )

    def make(i: int) -> dict[str, Any]:
        good, bad = better[i], worse[i]
        if good["prompt"] != bad["prompt"]:
            raise ValueError(f"row {i} of chosen and of rejected have different prompts")
        return {"prompt": good["prompt"], "chosen": good["answer"], "rejected": bad["answer"]}

    return LazyRows(len(better), make, (*_files(better), *_files(worse)))


def apart(pairs: Callable[[], Rows]) -> LazyRows:
    """Each answer of a source of pairs by itself, the better one with label 1, the other with 0."""
    rows = pairs()

    def make(i: int) -> dict[str, Any]:
        row, name = rows[i // 2], ("chosen", "rejected")[i % 2]
        return {"prompt": row["prompt"], "answer": row[name], "label": 1 - i % 2}

    return LazyRows(2 * len(rows), make, _files(rows))


def _files(rows: Rows) -> tuple[Path, ...]:
    return rows.files if isinstance(rows, LazyRows) else ()


# --------------------------------------------------------------------------- rows


def answers(tokenizer: Any, rows: Sequence[Row]) -> list[Texts]:
    """One text a row: `prompt` and `answer`, with the end token behind it.

    Raises:
      ValueError: a row lacks one of them, or it is no text.
    """
    prompts, given = _encoded(tokenizer, rows, "prompt", "answer")
    return [Texts(texts=(text,), labels=(0.0,)) for text in zip(prompts, given, strict=True)]


def labels(tokenizer: Any, rows: Sequence[Row]) -> list[Texts]:
    """As `answers`, with the row's `label`: 1 good, 0 bad, or between.

    Raises:
      ValueError: a row lacks a field, a text is none, the answer is empty, or the label is no
        number from 0 to 1.
    """
    prompts, given = _encoded(tokenizer, rows, "prompt", "answer", filled=("answer",))
    found = []
    for row, *text in zip(rows, prompts, given, strict=True):
        label = _field(row, "label")
        if not isinstance(label, Real) or not 0 <= (number := float(label)) <= 1:
            raise ValueError(f"a row's label must be a number from 0 to 1, got {label!r}")
        found.append(Texts(texts=((text[0], text[1]),), labels=(number,)))
    return found


def pairs(tokenizer: Any, rows: Sequence[Row]) -> list[Texts]:
    """Two texts a row: `prompt` with `chosen`, the better answer, and with `rejected`.

    Raises:
      ValueError: a row lacks a field, a text is none, or an answer is empty.
    """
    fields = ("chosen", "rejected")
    prompts, better, worse = _encoded(tokenizer, rows, "prompt", *fields, filled=fields)
    return [
        Texts(texts=((prompt, good), (prompt, bad)), labels=(1.0, 0.0))
        for prompt, good, bad in zip(prompts, better, worse, strict=True)
    ]


def _encoded(
    tokenizer: Any, rows: Sequence[Row], prompt: str, *fields: str, filled: Sequence[str] = ()
) -> list[list[list[int]]]:
    """Token ids of each field of the rows, the end token behind all but the prompt's."""
    end = [tokenizer.eos_token_id]
    found = []
    for name in (prompt, *fields):
        texts = [_text(row, name) for row in rows]
        for row, text in zip(rows, texts, strict=True):
            if name in filled and not text:
                raise ValueError(f"{name} is empty in the row with the prompt {row[prompt]!r:.60}")
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        found.append(ids if name == prompt else [one + end for one in ids])
    return found


def _text(row: Row, name: str) -> str:
    text = _field(row, name)
    if not isinstance(text, str):
        raise ValueError(f"a row's {name} must be text (str), got {type(text).__name__}")
    return text


def _field(row: Row, name: str) -> Any:
    if name not in row:
        raise ValueError(f"a row has no field {name!r}; it has {', '.join(sorted(row))}")
    return row[name]


# --------------------------------------------------------------------------- packed rows


def size(item: Texts) -> int:
    """The tokens of all texts."""
    return sum(map(text_size, item.texts))


def place(
    packing: Packing,
    items: Sequence[Texts],
    *,
    on_prompt: bool = False,
    labelled: bool = True,
    weight: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Fields:
    """What `place_texts` gives for the texts of `items`, one after another in the items' places.

    With `labelled` also `target`, a text's label at each of its tokens, and `pair`, the number of
    its item in the row. `weight`, one of `r1jax.algos.weights`, gets the mask of all texts,
    [texts, tokens].
    """
    texts = [text for item in items for text in item.texts]
    inner = _of_texts(packing, items)
    fields = place_texts(inner, texts, on_prompt=on_prompt)
    shape = fields["tokens"].shape
    end = inner.offset + inner.length
    spans = list(zip(inner.row.tolist(), inner.offset.tolist(), end.tolist(), strict=True))
    if labelled:
        target, pair = np.zeros(shape, np.float32), np.zeros(shape, np.int32)
        numbers = [n for n, item in zip(packing.segment, items, strict=True) for _ in item.texts]
        known = [label for item in items for label in item.labels]
        for label, number, (row, start, stop) in zip(known, numbers, spans, strict=True):
            target[row, start:stop], pair[row, start:stop] = label, number
        fields |= {"target": target, "pair": pair}
    if weight is not None:
        mask = np.zeros((len(texts), int(inner.length.max(initial=1))), bool)
        for i, (row, start, stop) in enumerate(spans):
            mask[i, : stop - start] = fields["mask"][row, start:stop]
        each = weight(mask)
        fields["weight"] = np.zeros(shape, np.float32)
        for i, (row, start, stop) in enumerate(spans):
            fields["weight"][row, start:stop] = each[i, : stop - start]
    return fields


def mismatched(items: Sequence[Texts], *, num_rows: int, row_length: int) -> Fields:
    """Rows of each text's prompt, followed by the answer of the next text with another prompt.

    For KTO's reference point. A text that fits no row, or finds no room in `num_rows` rows, is left
    out, and so is one if all prompts are equal.

    Source: KTO, arXiv:2402.01306, section 4.
    """
    texts = [text for item in items for text in item.texts]
    found: list[Text] = []
    for i, (prompt, _) in enumerate(texts):
        others = (texts[(i + k) % len(texts)] for k in range(1, len(texts)))
        answer = next((answer for other, answer in others if other != prompt), None)
        if answer is not None and len(prompt) + len(answer) <= row_length:
            found.append((prompt, answer))
    which, packing = some_rows(
        pack([text_size(text) for text in found], row_length), range(num_rows)
    )
    return place_texts(packing, [found[i] for i in which])


def _of_texts(packing: Packing, items: Sequence[Texts]) -> Packing:
    """Where each text lies, given where its item does. Segments are numbered from left to right."""
    count = [len(item.texts) for item in items]
    length = np.asarray([text_size(text) for item in items for text in item.texts], np.int64)
    before = np.cumsum(length) - length  # the tokens of all texts before
    first = np.cumsum(count, dtype=np.int64) - count  # the first text of each item
    row = np.repeat(packing.row, count)
    offset = np.repeat(packing.offset - before[first], count) + before
    return Packing(
        row=row.astype(np.int32),
        offset=offset.astype(np.int32),
        length=length.astype(np.int32),
        segment=_numbered(row, offset),
        num_rows=packing.num_rows,
        row_length=packing.row_length,
    )


def _numbered(row: Int[np.ndarray, " B"], offset: Int[np.ndarray, " B"]) -> Int[np.ndarray, " B"]:
    order = np.lexsort((offset, row))
    start = np.searchsorted(row[order], row[order])  # of the first text of the same row
    segment = np.empty(len(row), np.int32)
    segment[order] = np.arange(len(row)) - start + 1
    return segment
