"""Packs sequences of different lengths into rows of equal length, with no work left for padding.

`pack` decides where each sequence goes, `pack_rollout` the same for answers that share prompts;
`place_texts` and `place_rollouts` then lay out arrays named as the fields of `r1jax.types.Batch`;
`collect` reads per-token results back. `r1jax.loops.stream` makes endless batches of packed rows.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

Fields = dict[str, np.ndarray]
Text = tuple[Sequence[int], Sequence[int]]  # token ids of the prompt and of the answer


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where sequence i lies: columns [offset[i], offset[i] + length[i]) of row row[i]."""

    row: Int[np.ndarray, " B"]
    offset: Int[np.ndarray, " B"]
    length: Int[np.ndarray, " B"]
    segment: Int[np.ndarray, " B"]  # 1 for the first sequence of a row, 2 for the next, ...
    num_rows: int
    row_length: int


def pack(lengths: Int[np.ndarray, " B"] | Sequence[int], row_length: int) -> Packing:
    """Best-fit decreasing: the longest sequences first, each into the fullest row that holds it.

    The same lengths give the same packing; ties go to the lower index and the lower row.

    Raises:
      ValueError: a sequence has no tokens or more than `row_length`; its index is named.

    Source: D. S. Johnson, "Near-optimal bin packing algorithms" (1973): at most 11/9 of the
    fewest rows possible, + 4.
    """
    length = np.asarray(lengths, np.int64).reshape(-1)
    unfit = np.flatnonzero((length < 1) | (length > row_length))
    if unfit.size:
        i = unfit[0]
        raise ValueError(f"sequence {i} has {length[i]} tokens, a row holds 1 to {row_length}")
    order = np.argsort(-length, kind="stable")
    count = max(len(length), 1)
    shortest = int(length.min(initial=row_length))
    rows, offsets, segments = [], [], []
    used: list[int] = []  # sequences in each row
    open_rows: list[int] = []  # room * count + row of the rows with room, in order
    for size in length[order].tolist():
        best = bisect.bisect_left(open_rows, size * count)
        if best == len(open_rows):
            room, row = row_length, len(used)
            used.append(0)
        else:
            room, row = divmod(open_rows.pop(best), count)
        used[row] += 1
        rows.append(row)
        offsets.append(row_length - room)
        segments.append(used[row])
        if room - size >= shortest:
            bisect.insort(open_rows, (room - size) * count + row)
    back = np.argsort(order, kind="stable")  # from the order of packing to that of `lengths`
    return Packing(
        row=np.asarray(rows, np.int32)[back],
        offset=np.asarray(offsets, np.int32)[back],
        length=length.astype(np.int32),
        segment=np.asarray(segments, np.int32)[back],
        num_rows=len(used),
        row_length=row_length,
    )


@dataclass(frozen=True, kw_only=True)
class RolloutPacking:
    """Where each copy of a prompt lies, and where each answer, in a row with one of its prompt."""

    prompts: Packing
    answers: Packing
    prompt_of: Int[np.ndarray, " C"]  # the prompt that each copy is of
    copy_of: Int[np.ndarray, " B"]  # the copy that each answer goes on from


def pack_rollout(
    prompt_length: Int[np.ndarray, " N"],
    answer_length: Int[np.ndarray, " B"],
    row_length: int,
    *,
    prompt_of: Int[np.ndarray, " B"] | None = None,
) -> RolloutPacking:
    """Prompts, each once in a row, with as many of their answers after them as find room.

    Answer i belongs to prompt prompt_of[i]; without `prompt_of`, to prompt i // (B // N). The
    prompt with the most tokens to its answers comes first. All its answers go into the fullest row
    that holds them; if none does, those that fit into the emptiest, as long as they are not fewer
    tokens than the prompt that is repeated for them; else into a new row. A prompt without answers
    is left out; an answer may be empty. The same lengths give the same packing.

    Raises:
      ValueError: a prompt is empty (an answer's first token would follow nothing), an answer and
        its prompt do not fit a row, or there are not as many answers to each prompt.
    """
    prompt_length = np.asarray(prompt_length, np.int64)
    answer_length = np.asarray(answer_length, np.int64)
    owner = _owner(len(answer_length), len(prompt_length), prompt_of)
    _check_rollout(prompt_length, answer_length, owner, row_length)
    copies: list[tuple[int, int, int]] = []  # prompt, row, offset
    answers = np.zeros((2, len(answer_length)), np.int64)  # copy, offset
    room: list[int] = []
    total = np.bincount(owner, answer_length, len(prompt_length))
    longest_first = np.argsort(-answer_length, kind="stable")
    for prompt in np.argsort(-total, kind="stable").tolist():
        size = int(prompt_length[prompt])
        left = longest_first[owner[longest_first] == prompt].tolist()
        while left:
            row, taken = _choose_row(room, row_length, size, left, answer_length)
            if row == len(room):
                room.append(row_length)
            copies.append((prompt, row, row_length - room[row]))
            room[row] -= size
            for i in taken:
                answers[:, i] = len(copies) - 1, row_length - room[row]
                room[row] -= int(answer_length[i])
            left = [i for i in left if i not in taken]
    where = np.asarray(copies, np.int64).reshape(-1, 3)
    return _numbered(where, answers, prompt_length, answer_length, len(room), row_length)


def _choose_row(
    room: Sequence[int], row_length: int, size: int, left: Sequence[int], length: np.ndarray
) -> tuple[int, list[int]]:
    """The row for a prompt of `size` tokens, perhaps a new one, and which answers it takes."""
    free = np.asarray(room, np.int64)
    whole = size + int(length[left].sum())
    fits = np.flatnonzero(free >= whole)
    if fits.size:
        return int(fits[np.argmin(free[fits])]), list(left)
    if free.size:
        row = int(np.argmax(free))
        taken = _fitting(left, length, int(free[row]) - size)
        if length[taken].sum() >= size:
            return row, taken
    return len(room), _fitting(left, length, row_length - size)


def _fitting(left: Sequence[int], length: np.ndarray, room: int) -> list[int]:
    """Those of the answers `left`, in their order, that fit into the room those before leave."""
    taken = []
    for i in left:
        if length[i] <= room:
            taken.append(i)
            room -= int(length[i])
    return taken


def _numbered(
    copies: Int[np.ndarray, "C 3"],
    answers: Int[np.ndarray, "2 B"],
    prompt_length: Int[np.ndarray, " N"],
    answer_length: Int[np.ndarray, " B"],
    num_rows: int,
    row_length: int,
) -> RolloutPacking:
    """The record, its segments numbered from left to right in each row."""
    prompt_of, copy_row, copy_offset = copies.T
    copy_of, answer_offset = answers
    row = np.concatenate([copy_row, copy_row[copy_of]])
    offset = np.concatenate([copy_offset, answer_offset])
    length = np.concatenate([prompt_length[prompt_of], answer_length])
    order = np.lexsort((length, offset, row))  # an empty answer before what stands in its place
    first = np.searchsorted(row[order], np.arange(num_rows))
    segment = np.empty(len(row), np.int64)
    segment[order] = np.arange(len(row)) - first[row[order]] + 1

    def packing(which: slice) -> Packing:
        fields = {"row": row, "offset": offset, "length": length, "segment": segment}
        chosen = {name: value[which].astype(np.int32) for name, value in fields.items()}
        return Packing(**chosen, num_rows=num_rows, row_length=row_length)

    return RolloutPacking(
        prompts=packing(slice(len(copies))),
        answers=packing(slice(len(copies), None)),
        prompt_of=prompt_of,
        copy_of=copy_of,
    )


def _check_rollout(
    prompt_length: np.ndarray, answer_length: np.ndarray, owner: np.ndarray, row_length: int
) -> None:
    empty = np.flatnonzero(prompt_length < 1)
    if empty.size:
        raise ValueError(f"prompt {empty[0]} is empty: an answer needs a token before it")
    whole = prompt_length[owner] + answer_length
    unfit = np.flatnonzero(whole > row_length)
    if unfit.size:
        i = unfit[0]
        raise ValueError(
            f"answer {i} with its prompt has {whole[i]} tokens, a row holds at most {row_length}"
        )


def text_size(text: Text) -> int:
    """The tokens of a prompt and its answer."""
    prompt, answer = text
    return len(prompt) + len(answer)


def place_texts(
    packing: Packing,
    texts: Sequence[Text],
    *,
    num_rows: int | None = None,
    on_prompt: bool = False,
) -> Fields:
    """Rows of given texts (prompt ids, answer ids), for supervised training on the answers.

    Gives tokens, position, segment, mask, weight and num_tokens: `mask` is True on answers, with
    `on_prompt` on prompts too, but never on a text's first token, which nothing precedes.
    `weight` is 1 / num_tokens, so a loss is the mean over all tokens of these rows. `num_rows`
    appends empty rows; without it there are as many as the packing needs.

    Raises:
      ValueError: the texts are not those of the packing, or need more than `num_rows` rows.
    """
    _same_lengths([text_size(text) for text in texts], packing)
    fields = _empty_rows(packing, num_rows)
    for (prompt, answer), (row, start, end) in zip(texts, _spans(packing), strict=True):
        fields["tokens"][row, start:end] = [*prompt, *answer]
        first = 1 if on_prompt else max(len(prompt), 1)
        fields["mask"][row, start + first : end] = True
    num_tokens = np.asarray(max(fields["mask"].sum(), 1), np.float32)
    weight = fields["mask"] / num_tokens
    return {**fields, "weight": weight.astype(np.float32), "num_tokens": num_tokens}


def place_rollouts(
    packing: RolloutPacking,
    *,
    prompt: Int[np.ndarray, "N P"],
    answer: Int[np.ndarray, "B A"],
    extras: Mapping[str, Float[np.ndarray, "B A"]],
    num_rows: int | None = None,
) -> Fields:
    """Rows of prompts each followed by some of its answers, for training on the answers.

    Gives tokens, position, segment, prompt, before, mask (True on answers), num_tokens, and each
    of `extras` (weight, advantage, logp_rollout, ...) at its answer's tokens, 0 elsewhere. An
    answer's positions go on from its prompt's. `num_rows` appends empty rows.

    Raises:
      ValueError: the packing is of another number of answers, or needs more than `num_rows` rows.
    """
    prompts, answers = packing.prompts, packing.answers
    if len(answer) != len(answers.length):
        raise ValueError(f"the packing is of {len(answers.length)} answers, got {len(answer)}")
    fields = _empty_rows(prompts, num_rows)
    shape = fields["tokens"].shape
    fields |= {name: np.zeros(shape, np.float32) for name in extras}
    fields["prompt"] = np.zeros(shape, np.int32)
    column = np.arange(shape[1], dtype=np.int32)
    fields["before"] = np.tile(np.maximum(column - 1, 0), (shape[0], 1))
    for p, (row, start, end) in zip(packing.prompt_of.tolist(), _spans(prompts), strict=True):
        fields["tokens"][row, start:end] = prompt[p, : end - start]
    prompt_end = (prompts.offset + prompts.length).tolist()
    for i, (row, start, end) in enumerate(_spans(answers)):
        copy = packing.copy_of[i]
        fields["tokens"][row, start:end] = answer[i, : end - start]
        fields["position"][row, start:end] = prompts.length[copy] + column[: end - start]
        fields["segment"][row, start:end] = answers.segment[i]
        fields["prompt"][row, start:end] = prompts.segment[copy]
        fields["before"][row, start : min(start + 1, end)] = prompt_end[copy] - 1
        fields["mask"][row, start:end] = True
        for name, extra in extras.items():
            fields[name][row, start:end] = extra[i, : end - start]
    num_tokens = np.asarray(max(fields["mask"].sum(), 1), np.float32)
    return {**fields, "num_tokens": num_tokens}


def place_choices(
    packing: RolloutPacking,
    *,
    prompt: Int[np.ndarray, "N P E k"],
    answer: Int[np.ndarray, "B A E k"],
    num_rows: int,
) -> Int[np.ndarray, "R T E k"]:
    """The experts that each token of the rows of `place_rollouts` took; -1 where no token is."""
    shape = num_rows, packing.prompts.row_length, *answer.shape[2:]
    rows = np.full(shape, -1, answer.dtype)
    for p, (row, start, end) in zip(
        packing.prompt_of.tolist(), _spans(packing.prompts), strict=True
    ):
        rows[row, start:end] = prompt[p, : end - start]
    for i, (row, start, end) in enumerate(_spans(packing.answers)):
        rows[row, start:end] = answer[i, : end - start]
    return rows


def collect(
    packing: RolloutPacking, rows: Float[np.ndarray, "R T"], *, width: int
) -> Float[np.ndarray, "B A"]:
    """The inverse of `place_rollouts` for one field: a number per answer token, [B, width].

    Entries past an answer's end are 0.
    """
    answer = np.zeros((len(packing.answers.length), width), rows.dtype)
    for i, (row, start, end) in enumerate(_spans(packing.answers)):
        answer[i, : end - start] = rows[row, start:end]
    return answer


def some_rows(packing: Packing, rows: Sequence[int]) -> tuple[Int[np.ndarray, " K"], Packing]:
    """Which sequences lie in the given rows, and the packing of these; rows may be empty ones."""
    new_row = np.full(max(packing.num_rows, max(rows) + 1), -1, np.int32)
    new_row[rows] = range(len(rows))
    chosen = np.flatnonzero(new_row[packing.row] >= 0)
    return chosen, Packing(
        row=new_row[packing.row[chosen]],
        offset=packing.offset[chosen],
        length=packing.length[chosen],
        segment=packing.segment[chosen],
        num_rows=len(rows),
        row_length=packing.row_length,
    )


def _spans(packing: Packing) -> list[tuple[int, int, int]]:
    """Row, first column and end column of each sequence."""
    end = packing.offset + packing.length
    return list(zip(packing.row.tolist(), packing.offset.tolist(), end.tolist(), strict=True))


def _empty_rows(packing: Packing, num_rows: int | None) -> Fields:
    """Rows that have position and segment, but no tokens yet."""
    num_rows = packing.num_rows if num_rows is None else num_rows
    if num_rows < packing.num_rows:
        raise ValueError(f"the sequences need {packing.num_rows} rows, got num_rows={num_rows}")
    shape = num_rows, packing.row_length
    fields = {name: np.zeros(shape, np.int32) for name in ("tokens", "position", "segment")}
    count = np.arange(packing.row_length, dtype=np.int32)
    for segment, (row, start, end) in zip(packing.segment.tolist(), _spans(packing), strict=True):
        fields["position"][row, start:end] = count[: end - start]
        fields["segment"][row, start:end] = segment
    return {**fields, "mask": np.zeros(shape, bool)}


def _same_lengths(lengths: Int[np.ndarray, " B"] | Sequence[int], packing: Packing) -> None:
    if not np.array_equal(lengths, packing.length):
        raise ValueError(
            f"the packing is of other sequences: {len(packing.length)} with "
            f"{packing.length.sum()} tokens, got {len(lengths)} with {sum(lengths)}"
        )


def _owner(answers: int, prompts: int, prompt_of: np.ndarray | None) -> Int[np.ndarray, " B"]:
    if prompt_of is not None:
        return np.asarray(prompt_of)
    if answers % prompts:
        raise ValueError(f"need as many answers to each prompt, got B={answers}, N={prompts}")
    return np.arange(answers) // (answers // prompts)
