"""Endless batches of packed rows: what a run reads, in which order."""

from functools import partial
from typing import Any

import numpy as np
import pytest

from r1jax.data import packing
from r1jax.loops.stream import packed_batches, shuffled


def long_tailed(seed, count, spread=0.6):
    """As answers are: most near 90 tokens, none of more than 512."""
    return np.random.default_rng(seed).lognormal(4.5, spread, count).astype(int).clip(1, 512)


def make_rows(lengths):
    """Row i becomes a text that begins with the token i + 1."""
    return [{"prompt": i + 1, "answer": int(n)} for i, n in enumerate(lengths)]


def encode(rows):
    return [([row["prompt"]], [0] * (row["answer"] - 1)) for row in rows]


def make_stream(lengths, **settings):
    defaults: dict[str, Any] = dict(batch_rows=16, row_length=512, seed=0)
    return packed_batches(make_rows(lengths), encode, **(defaults | settings))


def texts_of(batch):
    """Which rows' texts a batch has."""
    first = (batch["segment"] > 0) & (batch["position"] == 0)
    return (batch["tokens"][first] - 1).tolist()


def test_batches_are_over_ninety_percent_full_and_every_text_is_seen_about_once_an_epoch():
    # Means of 700 lengths differ by 0.8%, and a window is filled to 97%: nothing is left out.
    stream = make_stream(long_tailed(6, 3000, spread=0.2), window=700)
    batches = [stream.batch(i) for i in range(round(5 * stream.epoch))]
    assert all(batch["tokens"].shape == (16, 512) for batch in batches)
    assert np.mean([(batch["segment"] > 0).mean() for batch in batches]) > 0.9
    seen = np.bincount(np.concatenate([texts_of(batch) for batch in batches]), minlength=3000)
    assert seen.min() >= 4 and seen.max() <= 6 and (seen == 5).mean() > 0.9


def test_the_weights_of_each_batch_are_one_over_its_tokens():
    place = partial(packing.place_texts, on_prompt=True)
    stream = make_stream(long_tailed(6, 100), place=place)
    for i in range(3):
        batch = stream.batch(i)
        assert batch["num_tokens"] == batch["mask"].sum() > 0
        np.testing.assert_allclose(batch["weight"], batch["mask"] / batch["mask"].sum(), rtol=1e-6)


def test_a_batch_depends_on_nothing_but_its_number_and_the_seed():
    lengths = long_tailed(7, 500)
    stream = make_stream(lengths)
    forwards = [stream.batch(i) for i in range(20)]
    again = make_stream(lengths)
    for i in (19, 3, 11, 0):
        for name, value in again.batch(i).items():
            np.testing.assert_array_equal(value, forwards[i][name], err_msg=name)
    other = make_stream(lengths, seed=1).batch(0)
    assert not np.array_equal(other["tokens"], forwards[0]["tokens"])


def test_no_text_comes_twice_within_the_first_epoch():
    lengths = long_tailed(8, 2000)
    stream = make_stream(lengths, window=300)
    texts = [t for i in range(int(0.8 * stream.epoch)) for t in texts_of(stream.batch(i))]
    assert len(set(texts)) == len(texts) > 1000  # and those are most of them


def test_what_finds_no_room_is_counted():
    # The window that sets the number of texts has short ones; then come texts twice as long.
    lengths = np.full(64, 32)
    order = shuffled(64, seed=0)
    for i in range(32, 64):
        lengths[order(i)] = 64
    stream = make_stream(lengths, batch_rows=2, row_length=256, window=32)
    read = 64 / stream.epoch  # texts per batch
    windows = [sum(len(texts_of(stream.batch(2 * w + i))) for i in range(2)) for w in range(2)]
    assert stream.dropped(0) == 0 and stream.dropped(2) > 0
    assert windows[0] == round(2 * read)
    assert windows[1] + stream.dropped(2) == round(2 * read)


def test_no_text_is_left_out_for_being_short():
    # A quarter of the texts are short. The window that sets the number of texts has nothing else,
    # so that in the others about every second text finds no room.
    lengths = np.where(np.arange(200) % 4 == 0, 8, 16)
    order = shuffled(200, seed=0)
    for i in range(40):
        lengths[order(i)] = 8
    stream = make_stream(lengths, batch_rows=2, row_length=128, window=40)
    lost, texts = 0, []
    for i in range(round(20 * stream.epoch)):
        lost += stream.dropped(i)
        texts += texts_of(stream.batch(i))
    assert lost > 0.3 * 20 * 200
    assert np.bincount(texts, minlength=200).min() > 0


@pytest.mark.parametrize("lengths", [[10], [10, 300, 512], [512] * 5, [257] * 40])
def test_few_or_unwieldy_texts_still_make_batches(lengths):
    batch = make_stream(lengths, batch_rows=4).batch(5)
    assert batch["tokens"].shape == (4, 512)
    # One text of 257 tokens is all that a row of 512 can hold; 3 of 4 rows are in any case used.
    assert (batch["segment"] > 0).any(axis=1).sum() >= 3


def test_a_text_that_does_not_fit_is_named_by_its_row():
    with pytest.raises(ValueError, match="row 2 has 600 tokens, a packed row holds 1 to 512"):
        make_stream([10, 20, 600, 30])
    with pytest.raises(ValueError, match="0 rows"):
        make_stream([])


def test_shuffled_gives_each_number_once_an_epoch_in_a_new_order():
    item = shuffled(50, seed=3)
    epochs = [[item(50 * e + i) for i in range(50)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(50))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert item(7) == epochs[0][7]  # also after later epochs
    with pytest.raises(ValueError, match="at least one item"):
        shuffled(0, seed=0)
