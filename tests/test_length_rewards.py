"""Rewards for length, against the papers' formulas; SimpleRL's score; rules by verifier."""

import math
import sys
from functools import partial
from types import ModuleType

import pytest

from r1jax.rewards import countdown, dispatch
from r1jax.rewards.dispatch import VERIFIERS, by_verifier
from r1jax.rewards.length import characters, cosine, kimi, overlong, tokens, words
from r1jax.rewards.simple_rl import simple_rl
from r1jax.rewards.weighted import score, weighted


def right(row, answer):
    return 1.0


def wrong(row, answer):
    return 0.0


def unjudged(row, answer):
    return None


def of(num_tokens: float, *group: float) -> dict:
    return {"num_tokens": num_tokens, "group_num_tokens": list(group)}


# --------------------------------------------------------------------------- measures


def test_lengths_are_tokens_characters_or_words():
    row, answer = {"num_tokens": 7}, "<think> three 词语 \n</think>"
    assert tokens(row, answer) == 7
    assert characters(row, answer) == 26
    assert words(row, answer) == 4
    assert characters({}, "") == words({}, "") == 0


@pytest.mark.parametrize("value", [None, "7", -1, math.nan, math.inf, [7]])
def test_a_row_without_a_token_count_is_refused(value):
    with pytest.raises(ValueError, match="needs row\\['num_tokens'\\], a number >= 0"):
        tokens({} if value is None else {"num_tokens": value}, "")


# --------------------------------------------------------------------------- cosine


@pytest.mark.parametrize(
    ("share", "if_right", "if_wrong"),
    [
        (0.0, 1.0, -1.0),
        (1 / 3, 0.875, -0.875),  # cos(60 degrees) = 1/2
        (0.5, 0.75, -0.75),
        (2 / 3, 0.625, -0.625),
        (1.0, 0.5, -0.5),
        (2.0, 0.5, -0.5),  # where Open-R1 is back at 1.0 and -1.0
    ],
)
def test_the_cosine_goes_from_one_value_to_the_other(share, if_right, if_wrong):
    row = of(1200 * share)
    got = [cosine(row, "", accuracy=verdict, max_length=1200) for verdict in (right, wrong)]
    assert got == pytest.approx([if_right, if_wrong], abs=1e-12)


def test_the_cosine_is_open_r1s_up_to_max_length():
    for size in range(0, 1001, 50):
        for verdict, low, high in ((right, 0.5, 1.0), (wrong, -0.5, -1.0)):
            published = low + 0.5 * (high - low) * (1.0 + math.cos(size / 1000 * math.pi))
            got = cosine({}, "x" * size, accuracy=verdict, max_length=1000, length=characters)
            assert got == pytest.approx(published, abs=1e-12)


def test_the_papers_cosine_has_a_value_for_what_reaches_the_limit():
    paper = partial(cosine, max_length=100, right=(2, 1), wrong=(-10, 0), exceeding=-10)
    assert paper(of(0), "", accuracy=right) == 2
    assert paper(of(50), "", accuracy=wrong) == pytest.approx(-5)
    assert paper(of(99), "", accuracy=right) == pytest.approx(1, abs=1e-3)
    assert paper(of(100), "", accuracy=right) == paper(of(500), "", accuracy=wrong) == -10


def test_what_cannot_be_judged_has_no_cosine():
    assert cosine(of(5), "", accuracy=unjudged, max_length=10) is None
    with pytest.raises(ValueError, match="max_length must be > 0, got 0"):
        cosine(of(5), "", accuracy=right, max_length=0)


# --------------------------------------------------------------------------- overlong


@pytest.mark.parametrize(
    ("size", "expected"),
    [(0, 0), (16384, 0), (16385, -1 / 4096), (18432, -0.5), (20480, -1), (20481, -1), (99999, -1)],
)
def test_overlong_is_a_line_over_the_last_part_of_the_budget(size: int, expected: float):
    assert overlong(of(size), "", max_length=20480, buffer=4096) == expected
    assert overlong(of(size), "", max_length=20480, buffer=4096, factor=2.0) == 2 * expected


def test_overlong_in_characters_and_its_bounds():
    assert overlong({}, "x" * 15, max_length=20, buffer=10, length=characters) == -0.5
    assert overlong(of(5), "", max_length=10, buffer=10) == -0.5
    for buffer in (0, -1, 11):
        with pytest.raises(ValueError, match=r"buffer must be in \(0, max_length=10\], got"):
            overlong(of(5), "", max_length=10, buffer=buffer)


# --------------------------------------------------------------------------- kimi


@pytest.mark.parametrize(
    ("size", "if_right", "if_wrong"),
    [(100, 0.5, 0.0), (150, 0.25, 0.0), (200, 0.0, 0.0), (250, -0.25, -0.25), (300, -0.5, -0.5)],
)
def test_kimi_compares_an_answer_with_its_group(size: int, if_right: float, if_wrong: float):
    row = of(size, 300, 100, 200, size)
    assert kimi(row, "", accuracy=right) == if_right
    assert kimi(row, "", accuracy=wrong) == if_wrong
    assert kimi(row, "", accuracy=unjudged) is None


def test_kimi_is_zero_where_all_are_of_one_length():
    for verdict in (right, wrong):
        assert kimi(of(5, 5, 5), "", accuracy=verdict) == 0.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"num_tokens": 5}, "kimi needs row\\['group_num_tokens'\\]"),
        (of(5), "kimi needs row\\['group_num_tokens'\\]"),
        ({"group_num_tokens": [5]}, "needs row\\['num_tokens'\\]"),
        (of(5, 1, 2), "num_tokens=5 is not among group_num_tokens, 1 to 2"),
        (of(5, 5, None), "needs row\\['group_num_tokens'\\], a number >= 0"),  # type: ignore
    ],
)
def test_kimi_refuses_a_row_without_its_group(row, message: str):
    with pytest.raises(ValueError, match=message):
        kimi(row, "", accuracy=right)


# --------------------------------------------------------------------------- SimpleRL


@pytest.mark.parametrize(
    ("answer", "verdict", "expected"),
    [
        (r"so \boxed{9}", right, 1.0),
        (r"so \boxed{8}", wrong, -0.5),
        ("no box: 9", wrong, -1.0),
        ("no box: 9", right, -1.0),  # published: found, but not in a box
        ("the word boxed is enough", right, 1.0),
        ("", wrong, -1.0),
        (r"\boxed{9}", unjudged, None),
        ("no box", unjudged, -1.0),
    ],
)
def test_simple_rl_scores_one_minus_a_half_and_minus_one(answer: str, verdict, expected):
    assert simple_rl({}, answer, accuracy=verdict) == expected


def test_another_mark_may_stand_for_the_box():
    assert simple_rl({}, "<answer> 9", accuracy=right, mark="<answer>") == 1.0
    assert simple_rl({}, r"\boxed{9}", accuracy=right, mark="<answer>") == -1.0


# --------------------------------------------------------------------------- dispatch

ROW = {"verifier": "countdown", "numbers": [7, 5, 3], "target": 9}
RIGHT = "<answer> 7 + 5 - 3 </answer>"


def test_a_row_is_scored_by_the_rule_that_it_names(monkeypatch: pytest.MonkeyPatch):
    dispatch._load.cache_clear()
    for name, value in (("math", 0.25), ("code", 0.75)):
        module = ModuleType(f"r1jax.rewards.{name}")
        module.accuracy = lambda row, answer, value=value: value  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
        assert by_verifier({"verifier": name}, "") == value
    dispatch._load.cache_clear()
    assert by_verifier(ROW, RIGHT) == 1.0
    assert by_verifier(ROW, "") == 0.0
    assert by_verifier({**ROW, "verifier": "tiny_zero"}, "<answer>1</answer>") == 0.1
    assert score(weighted(rule=(2.0, by_verifier)), ROW, RIGHT) == (2.0, {"rule": 1.0})


@pytest.mark.parametrize("name", [None, "", "Math", "os:system", 1, ["math"], "countdown.accuracy"])
def test_an_unknown_verifier_is_refused_with_those_there_are(name):
    with pytest.raises(ValueError, match="must be one of code, countdown, math, tiny_zero, got"):
        by_verifier({"verifier": name}, "")


def test_a_row_without_a_verifier_or_of_the_wrong_kind_is_refused():
    with pytest.raises(ValueError, match=r"row\['verifier'\] must be one of .*, got None"):
        by_verifier({}, "")
    with pytest.raises(ValueError, match="row has no field 'numbers'"):
        by_verifier({"verifier": "countdown", "answer": "9"}, "")


@pytest.mark.parametrize("name", VERIFIERS)
def test_every_verifier_is_there(name: str):
    assert callable(dispatch._load(name))
    if name == "countdown":
        assert dispatch._load(name) is countdown.accuracy
