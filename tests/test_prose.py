"""Reflection, steps and repetition in answers, against counts by hand and by brute force."""

import random
import re
import time

import pytest

from r1jax.rewards.prose import (
    REFLECTION_WORDS,
    code_characters,
    observe,
    reasoning_steps,
    reflections,
    repeated_share,
    repetition,
)


def test_the_reflection_words_are_r1s():
    paper = "wait, mistake, however, but, retry, error, verify, wrong, evaluate, check"
    assert ", ".join(REFLECTION_WORDS) == paper


@pytest.mark.parametrize(
    ("text", "count"),
    [
        # wait, but, wrong, check, check; not button, waiter and mistakes
        ("Wait, but this button is wrong. Let me check, check again: waiter, mistakes.", 5),
        ("WAIT! However... retry", 3),
        ("等等，这里不对，我们重新检查一下", 4),  # 等等 不对 重新 检查
        ("Wait，等一下", 2),
        ("然而，但是", 2),
        ("一切顺利", 0),
        ("", 0),
        ("\ud800wait", 1),
    ],
)
def test_reflections_are_whole_words_in_any_case_and_their_chinese_counterparts(text, count):
    assert reflections(text) == count


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("Step 1: a Step 2: b Step 33: c", 3),
        ("1. a\n2. b\n3. c", 1),  # the published pattern finds a number at the very start only
        ("\n1. a", 0),
        ("- a\n- b\n* c", 2),  # and a bullet after a line break only
        ("First, a. Second, b. Next, c. Finally, d.", 4),
        ("first, step 1: Third,", 0),
        ("", 0),
    ],
)
def test_steps_are_those_of_the_published_pattern(text: str, count: int):
    assert observe({}, text)["steps"] == count
    assert reasoning_steps({}, text) == min(1.0, count / 3)
    assert reasoning_steps({}, text, enough=8) == count / 8
    pattern = r"(Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,)"
    assert len(re.findall(pattern, text)) == count


def test_steps_need_a_number_that_is_enough():
    with pytest.raises(ValueError, match="enough must be >= 1 step, got 0"):
        reasoning_steps({}, "", enough=0)


@pytest.mark.parametrize(
    ("text", "size", "share"),
    [
        ("a b c a b c", 3, 1 / 4),  # abc bca cab abc
        ("a a a a", 2, 2 / 3),
        ("a b c d", 2, 0.0),
        ("A a", 1, 1 / 2),  # in lower case
        ("a b", 3, 0.0),
        ("", 1, 0.0),
        ("a b a b", 4, 0.0),
    ],
)
def test_repetition_is_the_share_of_ngrams_that_were_there_before(text, size, share):
    assert repetition({}, text, size=size, penalty=-2.0) == pytest.approx(-2.0 * share)


def test_chinese_repeats_by_characters():
    text = "我们检查我们检查"
    assert repetition({}, text, size=2) == 0.0
    assert repetition({}, text, size=2, split=list) == pytest.approx(-3 / 7)


def test_the_repeated_share_is_that_of_brute_force():
    generator = random.Random(0)
    for _ in range(300):
        words = generator.choices("abc", k=generator.randint(0, 30))
        size = generator.randint(1, 5)
        grams = [words[i : i + size] for i in range(len(words) - size + 1)]
        before = [gram in grams[:i] for i, gram in enumerate(grams)]
        expected = sum(before) / len(before) if before else 0.0
        assert repeated_share(words, size=size) == pytest.approx(expected)


def test_bad_sizes_and_penalties_are_refused():
    with pytest.raises(ValueError, match="size must be >= 1 word, got 0"):
        repetition({}, "a", size=0)
    with pytest.raises(ValueError, match=r"penalty must be <= 0, got 0\.5"):
        repetition({}, "a", penalty=0.5)


def test_an_answer_is_observed_for_the_log():
    text = "<think>Wait. Step 1: go</think> 9"
    assert observe({}, text) == {
        "reflections": 1.0,
        "waits": 1.0,
        "steps": 1.0,
        "repeated": 0.0,
        "characters": 33.0,
        "reasoning_characters": 16.0,
        "text_characters": 33.0,
        "code_share": 0.0,
        "code_answers": 0.0,
    }
    coded = observe({}, "So:\n```python\nprint(1)\n```\n1")  # 4 of text, 23 of code, 1 of text
    assert (coded["characters"], coded["text_characters"]) == (28.0, 5.0)
    assert (coded["code_share"], coded["code_answers"]) == (23 / 28, 1.0)
    assert observe({}, "")["code_share"] == 0.0
    again = observe({}, "so we go on " * 100)
    assert again["repeated"] == 1.0 - 4 / 381  # 400 words, of which 4 begin a 20-gram of their own


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a\n```\nx\n```\nb", "```\nx\n```\n"),
        ("```py\nx\n``` \nb", "```py\nx\n``` \n"),
        ("~~~\n```\n~~~\nb\n", "~~~\n```\n~~~\n"),  # the other kind does not end it
        ("````\n```\n`````\nb", "````\n```\n`````\n"),  # nor do fewer marks; more do
        ("```\nx\n```py\ny\n```\nb", "```\nx\n```py\ny\n```\n"),  # nor marks with a word behind
        ("- 1:\n     ```\n     x\n     ```\nb", "     ```\n     x\n     ```\n"),
        ("a\n```py\nx = 1", "```py\nx = 1"),  # cut off
        ("```x``` and `y`\n``\nz\n``\n    indented", ""),
        ("a ```\nx\n", ""),  # not at the start of a line
        ("a\u2028```\nx", ""),
        ("``` `x`\ny", ""),
        ("```\na\n```\nb\n~~~\nc\n~~~", "```\na\n```\n~~~\nc\n~~~"),
        ("", ""),
        ("\ud800\n```\n\ud800", "```\n\ud800"),
    ],
)
def test_code_is_what_stands_in_fenced_blocks(text: str, code: str):
    assert code_characters(text) == len(code)


def test_long_answers_take_no_time():
    start = time.process_time()
    for text in (
        "wait " * 40_000,
        "等" * 200_000,
        "\n-" * 100_000,
        "1" * 200_000,
        "Step " * 40_000,
        "```\n" * 50_000,
        "`" * 200_000 + "x`",
        " " * 200_000 + "`",
    ):
        observe({}, text)
        repetition({}, text, size=40)
    assert time.process_time() - start < 4.0
