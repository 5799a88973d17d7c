"""Format rewards and weighted sums of rewards."""

import dataclasses
import functools
import math
import pickle
import random
import re
import time

import pytest

from r1jax.rewards.countdown import accuracy
from r1jax.rewards.format import (
    boxed,
    code_block,
    open_r1,
    open_r1_tag_count,
    tag_count,
    think_answer,
    think_first,
)
from r1jax.rewards.weighted import score, weighted

ROW = {"numbers": [7, 5, 3], "target": 9}
GOOD = "<think> try </think> <answer> 7 + 5 - 3 </answer>"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (GOOD, 1.0),
        (f"\n {GOOD} \n", 1.0),
        ("<think></think><answer></answer>", 1.0),
        ("<think>a\nb</think>\n\n<answer>c\nd</answer>", 1.0),
        ("", 0.0),
        (f"So: {GOOD}", 0.0),
        (f"{GOOD} done", 0.0),
        ("<think> a </think> so <answer> b </answer>", 0.0),
        ("<answer> b </answer> <think> a </think>", 0.0),
        ("<think> a <answer> b </answer> </think>", 0.0),
        ("<think> a </think> <answer> b", 0.0),
        ("a </think> <answer> b </answer>", 0.0),
        (GOOD + GOOD, 0.0),
        ("<think> <think> a </think> <answer> b </answer>", 0.0),
        ("<think> a </think> <answer> b </answer> </answer>", 0.0),
        ("<Think> a </Think> <answer> b </answer>", 0.0),
    ],
)
def test_only_the_whole_form_with_each_tag_once_scores(answer: str, expected: float) -> None:
    assert think_answer(ROW, answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>\nso\n</think>\n\nIt is 9.", 1.0),
        ("\n<think></think>9", 1.0),
        (GOOD, 1.0),
        ("", 0.0),
        ("It is 9.", 0.0),
        ("<think> so </think> \n", 0.0),
        ("<think> so", 0.0),
        ("so </think> 9", 0.0),
        ("</think> so <think> 9", 0.0),
        ("Well, <think> so </think> 9", 0.0),
        ("<think> so </think> 9 </think> 9", 0.0),
        ("<think> <think> so </think> 9", 0.0),
        ("<think> so </think> 9 <think> no", 0.0),
    ],
)
def test_thinking_comes_first_once_and_something_follows_it(answer: str, expected: float) -> None:
    assert think_first(ROW, answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (GOOD, 1.0),
        ("", 0.0),
        ("a </think> <answer> b </answer>", 0.75),
        ("<think> a", 0.25),
        ("<think> <think> a </think>", 0.25),
        (GOOD + GOOD, 0.0),
    ],
)
def test_each_tag_that_occurs_once_is_a_quarter(answer: str, expected: float) -> None:
    assert tag_count(ROW, answer) == expected


IN_LINES = "<think>\ntry\n</think>\n<answer>\n9\n</answer>"


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (IN_LINES, 1.0),
        ("<think>\na\nb\n</think>\n<answer>\nc\nd\n</answer>", 1.0),
        (f"{IN_LINES}\nmore", 1.0),  # the published `$` is the end of any line
        (f"{IN_LINES} more", 0.0),
        (f" {IN_LINES}", 0.0),
        (GOOD, 0.0),
        ("<think>\n</think>\n<answer>\n9\n</answer>", 0.0),
        ("<think>\n\n</think>\n<answer>\n\n</answer>", 1.0),
        ("<think>\ntry\n</think>\n\n<answer>\n9\n</answer>", 0.0),
        ("", 0.0),
    ],
)
def test_open_r1_wants_each_tag_on_a_line_of_its_own(answer: str, expected: float) -> None:
    assert open_r1(ROW, answer) == expected


def test_open_r1_forms_are_those_of_the_published_patterns() -> None:
    form = re.compile(
        r"^<think>\n.*?\n</think>\n<answer>\n.*?\n</answer>$", re.DOTALL | re.MULTILINE
    )
    code = re.compile(
        r"^<think>\n.*?\n</think>\n<answer>\n.*?```python.*?```.*?\n</answer>$",
        re.DOTALL | re.MULTILINE,
    )
    pieces = ["<think>\n", "\n</think>\n", "<answer>\n", "\n</answer>", "\n", "x"]
    pieces += ["```python", "```", "</answer>", "<think>"]
    whole = "<think>\nx\n</think>\n<answer>\n```python x```\n</answer>"
    generator = random.Random(0)
    found = [0, 0]
    for _ in range(20_000):
        text = "<think>\n" + "".join(generator.choices(pieces, k=generator.randint(0, 9)))
        if generator.random() < 0.5:  # a good form with one piece put in or cut out
            place, cut = generator.randrange(len(whole) + 1), generator.choice([0, 1, 3])
            text = whole[:place] + generator.choice(pieces) + whole[place + cut :]
        assert open_r1(ROW, text) == float(form.match(text) is not None), text
        assert code_block(ROW, text, language="python") == float(code.match(text) is not None), text
        found[0] += form.match(text) is not None
        found[1] += code.match(text) is not None
    assert min(found) > 1000  # both ways are tried


def test_open_r1_tags_count_with_their_line_breaks() -> None:
    assert open_r1_tag_count(ROW, IN_LINES) == 1.0
    assert open_r1_tag_count(ROW, IN_LINES.replace("</think>\n", "</think>")) == 0.5
    assert open_r1_tag_count(ROW, GOOD) == 0.0
    assert open_r1_tag_count(ROW, IN_LINES + IN_LINES) == 0.0


def test_a_code_block_has_the_language_of_the_argument_or_else_of_the_row() -> None:
    answer = "<think>\nx\n</think>\n<answer>\n```cpp\nint x;\n```\n</answer>"
    assert code_block({"code_language": "cpp"}, answer) == 1.0
    assert code_block({"code_language": "python"}, answer) == 0.0
    assert code_block({"code_language": "python"}, answer, language="cpp") == 1.0
    with pytest.raises(ValueError, match="code_block needs a language"):
        code_block({}, answer)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (r"so \boxed{9}", 1.0),
        (r"\boxed {9}", 1.0),
        (r"\boxed{\frac{1}{2}}", 1.0),
        (r"\boxed{\{1, 2\}}", 1.0),
        (r"\boxed{\boxed{9}", 1.0),
        (r"\boxed{} then \boxed{9}", 1.0),
        (r"{ \boxed{9}", 1.0),
        (r"} \boxed{9}", 1.0),
        (r"\boxed{}", 0.0),
        (r"\boxed{ }", 0.0),
        (r"\boxed{9", 0.0),
        (r"\boxed{9\}", 0.0),
        (r"\boxed{\frac{1}{2}", 0.0),
        (r"\\boxed{9}", 0.0),  # a line break, then a word
        (r"boxed{9}", 0.0),
        (r"\boxed 9", 0.0),
        ("", 0.0),
    ],
)
def test_a_box_is_closed_and_not_empty(answer: str, expected: float) -> None:
    assert boxed(ROW, answer) == expected


@pytest.mark.parametrize(
    "reward", [think_answer, think_first, tag_count, open_r1, open_r1_tag_count, boxed]
)
@pytest.mark.parametrize("answer", ["", "\x00", "\ud800", "<think>\ud800</think>", "\u202e", "\\"])
def test_odd_text_has_a_form_too(reward, answer: str) -> None:
    assert 0.0 <= reward(ROW, answer) <= 1.0


def test_a_hundred_thousand_tags_take_no_time() -> None:
    start = time.process_time()
    for text in (
        "<think>" * 100_000,
        "<think></think><answer>" * 30_000,
        "<think>\n" + "\n</think>\n<answer>\n" * 30_000,
        "<think>\n" + "\n</think>\n<answer>\n" + "\n</answer>x" * 60_000,
        r"\boxed{" * 100_000,
        "\\" * 400_000,
    ):
        assert think_answer(ROW, text) == open_r1(ROW, text) == boxed(ROW, text) == 0.0
        assert code_block(ROW, text, language="python") == 0.0
        tag_count(ROW, text)
        open_r1_tag_count(ROW, text)
    assert time.process_time() - start < 4.0


def test_a_weighted_reward_adds_its_parts() -> None:
    reward = weighted(accuracy=(1.0, accuracy), format=(0.5, think_answer))
    assert reward(ROW, GOOD) == 1.5
    assert reward.parts(ROW, GOOD) == {"accuracy": 1.0, "format": 1.0}
    assert score(reward, ROW, GOOD) == (1.5, {"accuracy": 1.0, "format": 1.0})
    assert score(reward, ROW, "<answer>7+5-3</answer>") == (1.0, {"accuracy": 1.0, "format": 0.0})
    assert score(weighted(a=(-2, tag_count)), ROW, GOOD) == (-2.0, {"a": 1.0})


def test_a_part_that_cannot_be_judged_leaves_the_whole_unjudged() -> None:
    reward = weighted(accuracy=(1.0, accuracy), judge=(1.0, lambda row, answer: None))
    assert reward(ROW, GOOD) is None
    assert score(reward, ROW, GOOD) == (None, {"accuracy": 1.0})


def test_a_plain_reward_has_no_parts() -> None:
    assert score(accuracy, ROW, GOOD) == (1.0, {})
    assert score(lambda row, answer: None, ROW, GOOD) == (None, {})
    assert score(lambda row, answer: True, ROW, GOOD) == (1.0, {})


def test_each_part_is_computed_once() -> None:
    calls = []
    reward = weighted(part=(1.0, lambda row, answer: calls.append(answer) or 1.0))
    score(reward, ROW, GOOD)
    assert calls == [GOOD]


@pytest.mark.parametrize("value", [math.nan, math.inf, "1.0"])
def test_a_reward_that_is_no_finite_number_is_refused(value) -> None:
    with pytest.raises(ValueError, match="reward must give a finite number or None"):
        score(lambda row, answer: value, ROW, GOOD)
    with pytest.raises(ValueError, match="part must give a finite number or None"):
        score(weighted(part=(1.0, lambda row, answer: value)), ROW, GOOD)


@pytest.mark.parametrize(
    "term", [accuracy, (accuracy, 1.0), (1.0,), (math.nan, accuracy), ("1", accuracy), 1.0]
)
def test_a_term_must_be_a_weight_and_a_function(term) -> None:
    with pytest.raises(ValueError, match=r"weighted: accuracy must be \(weight, function\)"):
        weighted(accuracy=term)


def test_weighted_needs_a_term() -> None:
    with pytest.raises(ValueError, match="at least one term"):
        weighted()


def test_a_weighted_reward_can_be_sent_to_another_process() -> None:
    reward = weighted(accuracy=(1.0, accuracy), format=(0.5, functools.partial(think_answer)))
    assert pickle.loads(pickle.dumps(reward))(ROW, GOOD) == 1.5
    assert dataclasses.is_dataclass(reward)
