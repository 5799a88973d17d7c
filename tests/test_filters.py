"""Filters of single answers, on texts written for them."""

import pytest

from r1jax.data import filters
from r1jax.rewards.length import characters, words

ENGLISH = "First we add the numbers, then we check that nothing was left out of the sum."
CHINESE = "首先我们把这些数加起来，然后检查有没有漏掉什么。"


def row(answer: str, **fields) -> dict:
    return {"prompt": "add", "answer": answer, "row": {}, **fields}


@pytest.mark.parametrize(
    ("accuracy", "least", "kept"),
    [(1.0, 1.0, True), (0.9, 1.0, False), (0.9, 0.5, True), (0.0, 1.0, False), (None, 0.0, False)],
)
def test_only_verified_answers_are_right(accuracy, least, kept):
    assert filters.right(row("72", accuracy=accuracy), least=least) is kept
    assert not filters.right(row("72"))


def test_an_answer_that_was_cut_off_is_not_finished():
    assert filters.finished(row("72", finished=True))
    assert not filters.finished(row("7", finished=False))


@pytest.mark.parametrize("text", [ENGLISH, CHINESE, "7 + 5 = 12", "", f"{ENGLISH} `让我` $x_让$"])
def test_one_language_passes_also_beside_code_and_formulas(text):
    assert filters.one_language(row(text))


@pytest.mark.parametrize(
    "text",
    [
        f"{ENGLISH} 让我再检查一遍。",
        f"{CHINESE} wait, let us check this again with care",
        f"{ENGLISH} Подождите, проверим это ещё раз.",
        "<think>\n两个数 and then 加起来 again\n</think>",
    ],
)
def test_mixed_languages_are_found_in_every_direction(text):
    assert not filters.one_language(row(text))


def test_the_share_of_the_language_is_of_its_words():
    # 16 English words of more than one letter, then 4 Chinese characters: 16 of 20.
    text = f"{ENGLISH} 再来一遍"
    assert filters.one_language(row(text), least=0.8)
    assert not filters.one_language(row(text), least=0.81)


def test_the_language_asked_for_is_the_problems_or_the_arguments():
    assert not filters.one_language(row(CHINESE), language="en")
    assert not filters.one_language(row(ENGLISH, row={"language": "zh"}))
    assert filters.one_language(row(CHINESE, row={"language": "zh"}))
    with pytest.raises(ValueError, match=r"language must be one of ar, .*, got 'latin'"):
        filters.one_language(row(ENGLISH), language="latin")


def test_paragraphs_end_at_blank_lines_and_not_at_line_ends():
    lines = "\n".join(["a" * 9] * 5)  # 49 characters
    assert filters.short_paragraphs(row(lines), most=49)
    assert not filters.short_paragraphs(row(lines), most=48)
    parted = lines.replace("\n", "\n \t\n")
    assert filters.short_paragraphs(row(parted), most=9)
    assert filters.short_paragraphs(row(f"  \n\n{lines}   "), most=49)


@pytest.mark.parametrize("text", ["```python\nx = 1\n```", "see\n  ```\nx\n```", "~~~\nx\n~~~"])
def test_fenced_code_is_found(text):
    assert not filters.no_code_block(row(text))


def test_code_inside_a_line_is_no_block():
    assert filters.no_code_block(row("call `f(x)` and write ``` for a fence"))


def test_repetition_is_the_share_of_n_grams_that_stood_before():
    # 8 words, 7 pairs: "a b", "b a" three times over and "b a", of which 2 are new.
    text = "a b a b a b a b"
    assert filters.not_repetitive(row(text), size=2, most=5 / 7)
    assert not filters.not_repetitive(row(text), size=2, most=0.7)
    assert filters.not_repetitive(row(ENGLISH))
    assert not filters.not_repetitive(row("再来一遍" * 20), split=list)


def test_length_is_by_the_measure_that_is_passed():
    assert filters.length_within(row("two words", num_tokens=30), most=30)
    assert not filters.length_within(row("two words", num_tokens=31), most=30)
    assert not filters.length_within(row("two words", num_tokens=3), least=4, most=30)
    assert filters.length_within(row("two words"), most=2, measure=words)
    assert not filters.length_within(row("two words"), most=8, measure=characters)
    with pytest.raises(ValueError, match="num_tokens"):
        filters.length_within(row("a teacher's", num_tokens=None), most=30)


def test_a_row_without_an_answer_is_one_line():
    with pytest.raises(ValueError, match=r"^a row has no text 'answer'; it has prompt$"):
        filters.no_code_block({"prompt": "add"})
