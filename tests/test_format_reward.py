"""Format rewards and weighted sums of rewards."""

import dataclasses
import functools
import math
import pickle
import time

import pytest

from r1jax.rewards.countdown import accuracy
from r1jax.rewards.format import tag_count, think_answer
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


def test_a_hundred_thousand_tags_take_no_time() -> None:
    start = time.perf_counter()
    for text in ("<think>" * 100_000, "<think></think><answer>" * 30_000):
        assert think_answer(ROW, text) == 0.0
        tag_count(ROW, text)
    assert time.perf_counter() - start < 2.0


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
