"""Texts with labels and pairs of them, in packed rows."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from r1jax.algos import weights
from r1jax.data import labelled, packing
from r1jax.loops.stream import packed_batches


class Letters:
    """A token for each letter; 1 ends a text."""

    eos_token_id = 1

    def __call__(self, texts: list[str], *, add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) for letter in text] for text in texts]}


def pair(number: int) -> dict[str, str]:
    """Every text of a pair is another one, of 1 to 3 letters."""
    letter = chr(ord("a") + number)
    return {
        "prompt": letter * (1 + number % 3),
        "chosen": letter + "y" * (number % 2),
        "rejected": letter + "n" * (number % 3),
    }


def found(fields: packing.Fields) -> list[tuple[int, int, str, str, float]]:
    """(row, pair, prompt, answer, label) of every text in packed rows, its own labels at each of
    its tokens."""
    texts = []
    for r, segments in enumerate(fields["segment"]):
        for s in range(1, segments.max() + 1):
            here = segments == s
            ids, mask = fields["tokens"][r][here], fields["mask"][r][here]
            (label,), (number,) = set(fields["target"][r][here]), set(fields["pair"][r][here])
            assert ids[-1] == 1 and mask[-1]
            prompt = "".join(map(chr, ids[~mask]))
            texts.append((r, int(number), prompt, "".join(map(chr, ids[mask][:-1])), float(label)))
    return texts


def test_both_answers_of_a_pair_lie_in_one_row_under_one_number() -> None:
    rows = [pair(i) for i in range(12)]
    stream = packed_batches(
        rows,
        partial(labelled.pairs, Letters()),
        batch_rows=3,
        row_length=24,
        seed=0,
        size=labelled.size,
        place=labelled.place,
    )
    wanted = {(r["prompt"], r["chosen"], r["rejected"]) for r in rows}
    seen = set()
    for i in range(6):
        fields = stream.batch(i)
        assert fields["tokens"].shape == (3, 24)
        pairs: dict[tuple[int, int], dict[float, tuple[str, str]]] = {}
        for row, number, prompt, answer, label in found(fields):
            both = pairs.setdefault((row, number), {})
            assert label not in both
            both[label] = prompt, answer
        for both in pairs.values():
            (prompt, chosen), (again, rejected) = both[1.0], both[0.0]
            assert prompt == again
            seen.add((prompt, chosen, rejected))
        assert not fields["pair"][fields["segment"] == 0].any()
        assert len(stream.texts(i)) == len(pairs)
    assert seen == wanted


def test_weights_are_those_of_all_texts_of_a_batch() -> None:
    items = labelled.pairs(Letters(), [pair(i) for i in range(4)])
    where = packing.pack([labelled.size(item) for item in items], 24)
    fields = labelled.place(where, items, weight=weights.sequence_mean)
    np.testing.assert_array_equal(fields["weight"] > 0, fields["mask"])
    for r, segments in enumerate(fields["segment"]):
        for s in range(1, segments.max() + 1):
            own = (segments == s) & fields["mask"][r]
            np.testing.assert_allclose(fields["weight"][r][own], 1 / 8 / own.sum(), rtol=1e-6)
    assert fields["num_tokens"] == fields["mask"].sum()


def test_answers_without_labels_are_what_plain_texts_are() -> None:
    rows = [{"prompt": "ab", "answer": "c"}, {"prompt": "d", "answer": "efg"}]
    items = labelled.answers(Letters(), rows)
    where = packing.pack([labelled.size(item) for item in items], 12)
    plain = packing.place_texts(where, [item.texts[0] for item in items])
    fields = labelled.place(where, items, labelled=False)
    assert fields.keys() == plain.keys()
    for name, value in plain.items():
        np.testing.assert_array_equal(fields[name], value, err_msg=name)


def test_two_sources_of_answers_make_pairs_and_pairs_make_labels() -> None:
    better, worse = ([{"prompt": p, "answer": p + letter} for p in "ab"] for letter in ("y", "n"))
    pairs = partial(labelled.compared, chosen=lambda: better, rejected=lambda: worse)
    assert list(pairs()) == [
        {"prompt": "a", "chosen": "ay", "rejected": "an"},
        {"prompt": "b", "chosen": "by", "rejected": "bn"},
    ]
    assert [(row["answer"], row["label"]) for row in labelled.apart(pairs)] == [
        ("ay", 1), ("an", 0), ("by", 1), ("bn", 0)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="as many rows, got 2 and 1"):
        labelled.compared(chosen=lambda: better, rejected=lambda: worse[:1])
    with pytest.raises(ValueError, match="row 0 of chosen and of rejected have different prompts"):
        labelled.compared(chosen=lambda: better, rejected=lambda: worse[::-1])[0]


def test_a_label_is_the_rows_own() -> None:
    rows = [{"prompt": "p", "answer": "x", "label": label} for label in (True, 0, 0.25)]
    assert [item.labels for item in labelled.labels(Letters(), rows)] == [(1,), (0,), (0.25,)]


def test_a_mismatched_text_is_a_prompt_with_the_answer_to_the_next_other_prompt() -> None:
    rows = [
        {"prompt": prompt, "answer": answer, "label": 1}
        for prompt, answer in (("a", "1"), ("a", "2"), ("b", "3"), ("c", "4"))
    ]
    items = labelled.labels(Letters(), rows)

    def texts(**sizes: int) -> list[str]:
        fields = labelled.mismatched(items, **sizes)
        assert fields["tokens"].shape == (sizes["num_rows"], sizes["row_length"])
        return sorted(
            "".join(map(chr, tokens[(segment == s) & (tokens != 1)]))
            for tokens, segment in zip(fields["tokens"], fields["segment"], strict=True)
            for s in range(1, segment.max() + 1)
        )

    assert texts(num_rows=2, row_length=6) == ["a3", "a3", "b4", "c1"]
    assert texts(num_rows=1, row_length=6) == ["a3", "a3"]  # no room for more
    assert texts(num_rows=4, row_length=2) == []
    items = items[:2]
    assert texts(num_rows=1, row_length=6) == []  # all prompts are equal


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (labelled.pairs, {"rejected": None}, "rejected must be text .str., got NoneType"),
        (labelled.pairs, {"chosen": ""}, "chosen is empty in the row with the prompt 'p'"),
        (labelled.pairs, {"rejected": ""}, "rejected is empty"),
        (labelled.labels, {"label": None}, "from 0 to 1, got None"),
        (labelled.labels, {"label": 1.5}, "from 0 to 1, got 1.5"),
        (labelled.labels, {"label": float("nan")}, "from 0 to 1, got nan"),
        (labelled.labels, {"answer": ""}, "answer is empty"),
        (labelled.answers, {"prompt": 3}, "prompt must be text .str., got int"),
    ],
)
def test_a_bad_row_is_one_clear_line(read: Any, row: dict[str, Any], message: str) -> None:
    good = {"prompt": "p", "answer": "a", "chosen": "a", "rejected": "b", "label": 1}
    read(Letters(), [good])
    with pytest.raises(ValueError, match=message) as caught:
        read(Letters(), [good, {**good, **row}])
    assert "\n" not in str(caught.value)


def test_a_missing_field_is_named() -> None:
    row = {"prompt": "p", "chosen": "a"}
    with pytest.raises(ValueError, match="no field 'rejected'; it has chosen, prompt"):
        labelled.pairs(Letters(), [row])
