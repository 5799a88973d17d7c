import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from r1jax.data import packing


def realistic_lengths(rng, count, longest):
    """Long-tailed, as answers are: most near 90 tokens, some cut off at the limit."""
    return np.clip(rng.lognormal(4.5, 0.6, count).astype(int), 1, longest)


def tokens_by_cell(where):
    """Every (row, column) that a packing gives to a token, sequence after sequence."""
    return [
        (int(row), int(offset) + t)
        for row, offset, length in zip(where.row, where.offset, where.length, strict=True)
        for t in range(length)
    ]


# --------------------------------------------------------------------------- pack


@pytest.mark.parametrize("count", [1, 7, 300])
def test_every_token_gets_a_cell_of_its_own_inside_the_rows(count):
    lengths = realistic_lengths(np.random.default_rng(count), count, 256)
    where = packing.pack(lengths, 256)
    np.testing.assert_array_equal(where.length, lengths)
    cells = tokens_by_cell(where)
    assert len(set(cells)) == len(cells) == lengths.sum()
    assert all(0 <= row < where.num_rows and 0 <= column < 256 for row, column in cells)
    assert {row for row, _ in cells} == set(range(where.num_rows))


def test_segments_number_the_sequences_of_a_row_from_left_to_right():
    where = packing.pack(realistic_lengths(np.random.default_rng(0), 200, 256), 256)
    for row in range(where.num_rows):
        inside = np.flatnonzero(where.row == row)
        inside = inside[np.argsort(where.offset[inside])]
        np.testing.assert_array_equal(where.segment[inside], np.arange(1, len(inside) + 1))
        ends = np.cumsum(where.length[inside])  # no gaps
        np.testing.assert_array_equal(where.offset[inside], ends - where.length[inside])


def test_the_fullest_row_that_has_room_is_taken():
    # Rows of 10. By length: 7 -> row 0, 6 -> row 1, 4 -> row 1 (full), 3 -> row 0 (full), 2 -> 2.
    where = packing.pack([2, 7, 3, 6, 4], 10)
    np.testing.assert_array_equal(where.row, [2, 0, 0, 1, 1])
    np.testing.assert_array_equal(where.offset, [0, 0, 7, 0, 6])
    assert where.num_rows == 3
    # 8 and 7 leave 2 and 3: the 2 goes where it fits exactly.
    np.testing.assert_array_equal(packing.pack([7, 8, 2], 10).row, [1, 0, 0])


def test_ties_go_to_the_lower_index_and_the_lower_row():
    where = packing.pack([3] * 7, 6)
    np.testing.assert_array_equal(where.row, [0, 0, 1, 1, 2, 2, 3])
    np.testing.assert_array_equal(where.offset, [0, 3, 0, 3, 0, 3, 0])
    assert packing.pack([4, 4, 1], 5).row.tolist() == [0, 1, 0]


def test_no_more_rows_than_best_fit_decreasing_may_take():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 65, rng.integers(1, 200))
        fewest = -(-int(lengths.sum()) // 64)
        assert packing.pack(lengths, 64).num_rows <= 11 / 9 * max(fewest, (lengths > 32).sum()) + 4


@pytest.mark.parametrize(("count", "row_length"), [(128, 512), (1000, 512), (1000, 2048)])
def test_rows_of_realistic_lengths_are_over_ninety_percent_full(count, row_length):
    lengths = realistic_lengths(np.random.default_rng(1), count, 512)
    where = packing.pack(lengths, row_length)
    assert lengths.sum() > 0.9 * where.num_rows * row_length


def test_a_sequence_longer_than_a_row_is_named():
    with pytest.raises(ValueError, match="sequence 1 has 9 tokens, a row holds 1 to 8"):
        packing.pack([3, 9, 11], 8)


def test_a_sequence_without_tokens_is_named_and_no_sequences_need_no_rows():
    with pytest.raises(ValueError, match="sequence 2 has 0 tokens"):
        packing.pack([3, 1, 0], 8)
    assert packing.pack([], 8).num_rows == 0


# --------------------------------------------------------------------------- rollouts


def make_rollout(rng, *, prompts=5, group=4, longest=30, width=40) -> dict[str, Any]:
    """Ragged arrays as an engine gives them, with rubbish in the padding."""
    answers = prompts * group
    return dict(
        prompt=rng.integers(1, 100, (prompts, longest)),
        prompt_length=rng.integers(1, longest + 1, prompts),
        answer=rng.integers(1, 100, (answers, width)),
        answer_length=rng.integers(0, width + 1, answers),
        extras={
            name: rng.normal(size=(answers, width)).astype(np.float32)
            for name in ("weight", "advantage", "logp_rollout")
        },
    )


def naive_layout(where, rollout, num_rows, prompt_of):
    """`place_rollouts`, one token at a time; a sequence is a copy of a prompt, or an answer."""
    shape = (num_rows, where.answers.row_length)
    names = ("tokens", "position", "segment", "prompt")
    fields: dict[str, Any] = {name: np.zeros(shape, np.int32) for name in names}
    fields["before"] = np.asarray([[max(t - 1, 0) for t in range(shape[1])]] * num_rows, np.int32)
    fields["mask"] = np.zeros(shape, bool)
    fields |= {name: np.zeros(shape, np.float32) for name in rollout["extras"]}
    prompts, answers = where.prompts, where.answers
    for i, p in enumerate(where.prompt_of):
        for t in range(rollout["prompt_length"][p]):
            cell = prompts.row[i], prompts.offset[i] + t
            fields["tokens"][cell] = rollout["prompt"][p, t]
            fields["position"][cell] = t
            fields["segment"][cell] = prompts.segment[i]
    for i, n in enumerate(rollout["answer_length"]):
        copy = where.copy_of[i]
        assert where.prompt_of[copy] == prompt_of[i] and prompts.row[copy] == answers.row[i]
        size = rollout["prompt_length"][prompt_of[i]]
        for t in range(n):
            cell = answers.row[i], answers.offset[i] + t
            fields["tokens"][cell] = rollout["answer"][i, t]
            fields["position"][cell] = size + t
            fields["segment"][cell] = answers.segment[i]
            fields["prompt"][cell] = prompts.segment[copy]
            if t == 0:
                fields["before"][cell] = prompts.offset[copy] + size - 1
            fields["mask"][cell] = True
            for name, values in rollout["extras"].items():
                fields[name][cell] = values[i, t]
    return fields


def pack_rollout(rollout, row_length, prompt_of=None):
    return packing.pack_rollout(
        rollout["prompt_length"], rollout["answer_length"], row_length, prompt_of=prompt_of
    )


def place(where, rollout, **more):
    arrays = {name: rollout[name] for name in ("prompt", "answer", "extras")}
    return packing.place_rollouts(where, **arrays, **more)


@pytest.mark.parametrize("row_length", [70, 128, 1000])
@pytest.mark.parametrize("group", [1, 4, 7])
def test_prompts_and_their_answers_get_cells_of_their_own_in_one_row(row_length, group):
    rollout = make_rollout(np.random.default_rng(group), group=group)
    where = pack_rollout(rollout, row_length)
    owner = np.arange(5 * group) // group
    np.testing.assert_array_equal(where.answers.length, rollout["answer_length"])
    np.testing.assert_array_equal(where.prompts.length, rollout["prompt_length"][where.prompt_of])
    np.testing.assert_array_equal(where.prompt_of[where.copy_of], owner)
    np.testing.assert_array_equal(where.prompts.row[where.copy_of], where.answers.row)
    assert set(where.copy_of) == set(range(len(where.prompt_of)))  # no prompt without answers
    cells = tokens_by_cell(where.prompts) + tokens_by_cell(where.answers)
    assert len(set(cells)) == len(cells)
    assert {row for row, _ in cells} == set(range(where.answers.num_rows))
    assert all(0 <= column < row_length for _, column in cells)
    segments = [
        (int(row), int(segment))
        for part in (where.prompts, where.answers)
        for row, segment in zip(part.row, part.segment, strict=True)
    ]
    assert len(set(segments)) == len(segments) and min(s for _, s in segments) == 1
    prompt_end = (where.prompts.offset + where.prompts.length)[where.copy_of]
    assert (where.answers.offset >= prompt_end).all()  # causal from left to right


def test_a_prompt_stands_once_where_a_row_holds_all_of_its_answers():
    where = packing.pack_rollout([5, 3], [4, 4, 4, 2, 2, 2], 20)
    assert sorted(where.prompt_of.tolist()) == [0, 1]
    np.testing.assert_array_equal(where.answers.row, [0, 0, 0, 1, 1, 1])
    np.testing.assert_array_equal(where.answers.offset, [5, 9, 13, 3, 5, 7])
    np.testing.assert_array_equal(where.answers.segment, [2, 3, 4, 2, 3, 4])


def test_answers_without_room_beside_the_others_take_their_prompt_along():
    # 3 + 4 + 4 fill the row of 11; the third answer needs the prompt again.
    where = packing.pack_rollout([3], [4, 4, 4], 11)
    np.testing.assert_array_equal(where.prompt_of, [0, 0])
    np.testing.assert_array_equal(where.answers.row, [0, 0, 1])
    np.testing.assert_array_equal(where.prompts.offset, [0, 0])


def test_a_prompt_is_not_repeated_for_fewer_answer_tokens_than_it_has():
    # Row 0 has 5 free: for the second prompt (4 tokens) an answer of one token is too few.
    where = packing.pack_rollout([4, 4], [6, 5, 1, 1], 20)
    np.testing.assert_array_equal(where.answers.row, [0, 0, 1, 1])
    # Row 0 has 2 free: a prompt of one token pays for an answer of one.
    where = packing.pack_rollout([1, 1], [9, 8, 1, 9], 20)
    np.testing.assert_array_equal(where.answers.row, [0, 0, 0, 1])


def test_empty_answers_are_packed_and_give_nothing_back():
    where = packing.pack_rollout([2, 3], [0, 4, 0, 0], 9)
    assert (where.answers.length == [0, 4, 0, 0]).all()
    got = packing.collect(where, np.ones((where.answers.num_rows, 9), np.float32), width=4)
    np.testing.assert_array_equal(got, [[0] * 4, [1] * 4, [0] * 4, [0] * 4])


def test_rows_of_shared_prompts_are_nearly_full():
    rng = np.random.default_rng(1)
    lengths = np.clip(rng.geometric(1 / 65, 128), 1, 512)
    where = packing.pack_rollout(np.full(16, 40), lengths, 768)
    needed = 16 * 40 + lengths.sum()
    assert needed > 0.9 * where.answers.num_rows * 768


@pytest.mark.parametrize("extra_rows", [None, 0, 3])
def test_rollouts_lie_where_a_naive_loop_puts_them(extra_rows):
    rollout = make_rollout(np.random.default_rng(2))
    where = pack_rollout(rollout, 128)
    num_rows = where.answers.num_rows + (extra_rows or 0)
    fields = place(where, rollout, num_rows=None if extra_rows is None else num_rows)
    assert fields.pop("num_tokens") == rollout["answer_length"].sum()
    expected = naive_layout(where, rollout, num_rows, np.arange(20) // 4)
    assert fields.keys() == expected.keys()
    for name, value in expected.items():
        assert fields[name].dtype == value.dtype, name
        np.testing.assert_array_equal(fields[name], value, err_msg=name)


def test_a_minibatch_of_any_answers_is_placed_with_their_own_prompts():
    rollout = make_rollout(np.random.default_rng(3))
    chosen = np.random.default_rng(0).permutation(20)[:7]
    part = rollout | {
        "answer": rollout["answer"][chosen],
        "answer_length": rollout["answer_length"][chosen],
        "extras": {name: x[chosen] for name, x in rollout["extras"].items()},
    }
    where = pack_rollout(part, 128, prompt_of=chosen // 4)
    fields = place(where, part)
    for name, value in naive_layout(where, part, where.answers.num_rows, chosen // 4).items():
        np.testing.assert_array_equal(fields[name], value, err_msg=name)


def test_collect_reads_back_what_was_placed():
    rollout = make_rollout(np.random.default_rng(4))
    where = pack_rollout(rollout, 96)
    fields = place(where, rollout, num_rows=where.answers.num_rows + 1)
    inside = np.arange(40)[None, :] < rollout["answer_length"][:, None]
    for name, values in rollout["extras"].items():
        got = packing.collect(where, fields[name], width=40)
        np.testing.assert_array_equal(got, np.where(inside, values, 0))


def test_rollouts_that_cannot_be_placed_are_refused():
    rollout = make_rollout(np.random.default_rng(5))
    where = pack_rollout(rollout, 128)
    with pytest.raises(ValueError, match=f"need {where.answers.num_rows} rows, got num_rows=1"):
        place(where, rollout, num_rows=1)
    with pytest.raises(ValueError, match="the packing is of 20 answers, got 19"):
        place(where, rollout | {"answer": rollout["answer"][:19]})
    with pytest.raises(ValueError, match="B=19, N=5"):
        packing.pack_rollout(rollout["prompt_length"], rollout["answer_length"][:19], 128)
    with pytest.raises(ValueError, match="answer 1 with its prompt has 9 tokens, a row holds"):
        packing.pack_rollout([4], [3, 5], 8)
    empty = rollout["prompt_length"] * (np.arange(5) != 3)
    with pytest.raises(ValueError, match="prompt 3 is empty"):
        packing.pack_rollout(empty, rollout["answer_length"], 128)


# --------------------------------------------------------------------------- given texts


def test_texts_are_trained_on_their_answers():
    texts = [([5, 6], [7, 8, 9]), ([1], [2])]
    fields = packing.place_texts(packing.pack([5, 2], 8), texts, num_rows=2)
    expected = {
        "tokens": [[5, 6, 7, 8, 9, 1, 2, 0], [0] * 8],
        "position": [[0, 1, 2, 3, 4, 0, 1, 0], [0] * 8],
        "segment": [[1, 1, 1, 1, 1, 2, 2, 0], [0] * 8],
        "mask": [[False, False, True, True, True, False, True, False], [False] * 8],
        "weight": [[0, 0, 0.25, 0.25, 0.25, 0, 0.25, 0], [0] * 8],
    }
    assert fields.pop("num_tokens") == 4
    assert fields.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_array_equal(fields[name], value, err_msg=name)
    kinds = {name: x.dtype.name for name, x in fields.items()}
    assert kinds.pop("mask") == "bool" and kinds.pop("weight") == "float32"
    assert set(kinds.values()) == {"int32"}


def test_on_prompt_adds_all_tokens_but_each_first():
    texts = [([5, 6], [7, 8, 9]), ([1], [2])]
    fields = packing.place_texts(packing.pack([5, 2], 8), texts, on_prompt=True)
    np.testing.assert_array_equal(fields["mask"], [[False, True, True, True, True, False, True, 0]])
    np.testing.assert_allclose(fields["weight"].sum(), 1, rtol=1e-6)


def test_a_first_token_is_never_trained_on_even_without_a_prompt():
    fields = packing.place_texts(packing.pack([3], 4), [([], [7, 8, 9])])
    np.testing.assert_array_equal(fields["mask"], [[False, True, True, False]])


def test_texts_of_another_packing_are_refused():
    with pytest.raises(ValueError, match="1 with 3 tokens, got 1 with 2"):
        packing.place_texts(packing.pack([3], 4), [([1], [2])])


def test_packing_needs_no_jax():
    code = "import sys, r1jax.data.packing; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
