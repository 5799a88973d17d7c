"""Countdown answers: what is right, what is wrong, and that nothing hangs or raises."""

import random
import subprocess
import sys
import time
from fractions import Fraction

import pytest

from r1jax.rewards.countdown import (
    accuracy,
    answer_key,
    honesty,
    last_answer,
    observe,
    tiny_zero,
)

ROW = {"numbers": [7, 5, 3], "target": 9}


def put(expression: str) -> str:
    return f"<think> hm </think> <answer>{expression}</answer>"


def right(expression: str, numbers: list[int], target: int) -> bool:
    value = accuracy({"numbers": numbers, "target": target}, put(expression))
    assert value in (0.0, 1.0)
    return value == 1.0


@pytest.mark.parametrize(
    ("expression", "numbers", "target"),
    [
        ("7 + 5 - 3", [7, 5, 3], 9),
        ("5-3+7", [7, 5, 3], 9),
        ("8 / (3 - 8 / 3)", [3, 3, 8, 8], 24),  # exact only with fractions
        ("1/3*3", [1, 3, 3], 1),
        ("2 + 3 * 4", [2, 3, 4], 14),
        ("20 - 3 - 4", [3, 4, 20], 13),  # from left to right
        ("24 / 4 / 2", [2, 4, 24], 3),
        ("24 / (4 / 2)", [2, 4, 24], 12),
        ("10 - (2 + 3)", [10, 2, 3], 5),
        ("-3 + 8", [3, 8], 5),
        ("-(3 - 8)", [3, 8], 5),
        ("2 * -3 + 7", [2, 3, 7], 1),
        ("+3 - -8", [3, 8], 11),
        ("-2 * 3 + 7", [2, 3, 7], 1),
        ("6 × 4 ÷ 8 − 1", [6, 4, 8, 1], 2),
        ("7 + 5 - 3 = 9", [7, 5, 3], 9),
        ("007 + 5 - 3", [7, 5, 3], 9),
        ("\n  7 + 5\n\t- 3\n", [7, 5, 3], 9),
        ("((((7)) + (5 - 3)))", [7, 5, 3], 9),
        ("9", [9], 9),
        ("5 * 0 + 9", [0, 5, 9], 9),
    ],
)
def test_right_expressions_score_one(expression: str, numbers: list[int], target: int) -> None:
    assert right(expression, numbers, target)


@pytest.mark.parametrize(
    "expression",
    [
        "7 + 5 + 3",  # another value
        "7 + 2",  # another number
        "7 + 5 - 3 + 3 - 3",  # a number three times
        "9",  # the target itself
        "7 + 5 - 3 = 8",
        "7 + 5 - 3 = 9 = 9",
        "9 = 7 + 5 - 3",
        "7 + 5 - 3 =",
        "",
        " ",
        "none",
        "7 5 3",
        "7 + 5 3",
        "7 + 5 -",
        "7 + 5 - * 3",
        "(7 + 5 - 3",
        "7 + 5 - 3)",
        ")7 + 5 - 3(",
        "()7 + 5 - 3",
        "7 + 5() - 3",
        "7(5)(3)",
        "7 + 5 - 3.0",
        "7 + 5 - 3; 1",
        "7 ++ 5 - 3 +",
        "7e0 + 5 - 3",
        "7_ + 5 - 3",
        "\x007 + 5 - 3",
        "7 + 5\x00 - 3",
        "٧ + ٥ - ٣",  # the same in Arabic-Indic digits
        "7 + 5 - ３",
        "⁷ + 5 - 3",
        "7 + 5 - 3 \ud800",
        "__import__('os')",
    ],
)
def test_wrong_and_malformed_expressions_score_zero(expression: str) -> None:
    assert accuracy(ROW, put(expression)) == 0.0


@pytest.mark.parametrize(
    ("expression", "numbers", "target"),
    [
        ("8 / (3 - 3)", [8, 3, 3], 1),
        ("0 / 0", [0, 0], 1),
        ("2 ** 3", [2, 3], 8),
        ("7 // 2", [7, 2], 3),
        ("10 / 3", [10, 3], 3),
        ("100000000 + 1 / 100000000", [10**8, 1, 10**8], 10**8),  # equal in floats only
    ],
)
def test_division_is_exact_and_powers_are_not_allowed(
    expression: str, numbers: list[int], target: int
) -> None:
    assert not right(expression, numbers, target)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("7+5-3", None),
        ("<answer>7+5-3", None),
        ("7+5-3</answer>", None),
        ("</answer>7+5-3<answer>", None),
        ("<answer>1</answer> <answer>2</answer>", "2"),
        ("<answer>1</answer> then <answer>2", "1"),
        ("<answer>1</answer> 2</answer>", "1"),
        ("in <answer> tags: <answer>1</answer>", "1"),
        ("<answer>1<answer>2</answer></answer>", "2"),
        ("<answer></answer>", ""),
        ("<Answer>1</Answer>", None),
        ("<answer>\n1\n</answer>", "\n1\n"),
        ("", None),
    ],
)
def test_the_last_complete_answer_counts(text: str, expected: str | None) -> None:
    assert last_answer(text) == expected


def test_a_later_wrong_answer_replaces_an_earlier_right_one() -> None:
    assert accuracy(ROW, put("7+5-3") + put("7+5+3")) == 0.0
    assert accuracy(ROW, put("7+5+3") + put("7+5-3")) == 1.0


@pytest.mark.parametrize("score", [accuracy, tiny_zero, observe])
@pytest.mark.parametrize(
    "answer",
    [
        put("9**9**9**9"),
        put("9" * 10_000),
        put("0" * 10_000 + "7+5-3"),
        put("7+5-" + "3" * 40_000),
        put("(" * 100_000 + "7+5-3" + ")" * 100_000),
        put("(" * 100_000),
        put(")" * 100_000),
        put("-" * 100_000 + "7"),
        put("7+" * 50_000 + "7"),
        put("x" * 40_000),
        put(" " * 40_000),
        "<answer>" * 20_000,
        "</answer>" * 20_000,
        put("1") * 10_000,
        "<answer>" * 10_000 + "</answer>" * 10_000,
        "1 + " * 30_000,
        "1 = " * 30_000,
        "no " * 40_000,
        "9" * 200_000,
        "\x00" * 40_000,
        "",
    ],
    ids=range(21),
)
def test_no_answer_raises_or_takes_long(score, answer: str) -> None:
    start = time.perf_counter()
    score(ROW, answer)
    assert time.perf_counter() - start < 5.0  # some milliseconds, but for a busy machine


def test_brackets_may_be_a_hundred_thousand_deep() -> None:
    assert right("(" * 100_000 + "7+5-3" + ")" * 100_000, [7, 5, 3], 9)
    assert not right("(" * 100_000 + "7+5-3" + ")" * 99_999, [7, 5, 3], 9)


def test_leading_zeros_beyond_the_digit_limit_of_int_are_read() -> None:
    assert right("0" * 10_000 + "7+5-3", [7, 5, 3], 9)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"numbers": [1, 2]}, "row has no field 'target'; it has numbers"),
        ({"target": 3, "id": 1}, "row has no field 'numbers'; it has target, id"),
        ({}, "row has no field 'numbers'; it has none"),
        ({"numbers": [1, 2.5], "target": 3}, "whole numbers and a whole target"),
        ({"numbers": [1, 2], "target": "3"}, "whole numbers and a whole target"),
        ({"numbers": 5, "target": 3}, "whole numbers and a whole target"),
        ({"numbers": [], "target": 3}, "one or more numbers >= 0"),
        ({"numbers": [-1, 2], "target": 1}, "one or more numbers >= 0"),
    ],
)
@pytest.mark.parametrize("score", [accuracy, tiny_zero, observe])
def test_a_row_that_is_no_problem_is_named_in_one_line(score, row: dict, message: str) -> None:
    with pytest.raises(ValueError) as error:
        score(row, put("1+2"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def random_expression(rng: random.Random, numbers: list[int]) -> tuple[str, Fraction]:
    """An expression with just the brackets it needs, or some more, and its value."""
    terms = [(str(number), Fraction(number), 3) for number in numbers]
    while len(terms) > 1:
        left, a, left_rank = terms.pop(rng.randrange(len(terms)))
        right, b, right_rank = terms.pop(rng.randrange(len(terms)))
        symbol = rng.choice("+-*/" if b else "+-*")
        rank = 1 if symbol in "+-" else 2
        spare = rng.random() < 0.2
        if left_rank < rank or spare:
            left = f"({left})"
        if right_rank <= rank:
            right = f"({right})"
        space = rng.choice(["", " ", "\n"])
        value = {"+": a + b, "-": a - b, "*": a * b}[symbol] if symbol != "/" else a / b
        terms.append((f"{left}{space}{symbol}{space}{right}", value, rank))
    return terms[0][0], terms[0][1]


def test_random_expressions_are_right_for_their_value_and_for_no_other() -> None:
    rng = random.Random(0)
    whole = 0
    for _ in range(3_000):
        numbers = [rng.randint(0, 12) for _ in range(rng.randint(1, 6))]
        text, value = random_expression(rng, numbers)
        nearest = round(value)
        assert right(text, numbers, nearest) == (value == nearest), text
        assert not right(text, numbers, nearest + 1), text
        assert not right(text, [*numbers, 1], nearest), text
        whole += value == nearest
    assert whole > 500


def test_random_junk_never_raises() -> None:
    rng = random.Random(1)
    pieces = ["7", "5", "3", "+", "-", "*", "/", "(", ")", "=", " ", "9", "<answer>", "</answer>"]
    for _ in range(5_000):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 14)))
        assert accuracy(ROW, put(text)) in (0.0, 1.0)
        assert tiny_zero(ROW, put(text)) in (0.0, 0.1, 1.0)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (put("7 + 5 - 3"), 1.0),
        (put("-3 + 5 + 7"), 1.0),
        (put("7 + 5 + 3"), 0.1),
        (put("7 + 2"), 0.1),
        (put("7 + 5 - 3 = 9"), 0.1),
        (put("7 + 5 − 3"), 0.1),
        (put("07 + 5 - 3"), 0.1),
        (put("7 / 0"), 0.1),
        (put(""), 0.1),
        ("9", 0.0),
        ("<answer> 7 + 5 - 3", 0.0),
        ("first\n" + put("7 + 5 - 3"), 1.0),
        (put("7 + 5 - 3") + "\n", 0.0),
        (put("7 + 5 - 3") + "\nmore", 0.0),
        ("<answer>\n7 + 5 - 3\n</answer>", 0.0),
        (put("1") + put("7 + 5 - 3"), 1.0),
        (put("7 + 5 - 3") + put("1"), 0.1),
        ("in <answer> tags: <answer>7 + 5 - 3</answer>", 0.1),
        (put("7 + 5 - 3") + " <answer> 1", 1.0),
    ],
)
def test_tiny_zero_follows_the_published_rule(answer: str, expected: float) -> None:
    assert tiny_zero(ROW, answer) == expected


def test_tiny_zero_lets_a_value_miss_by_less_than_a_hundred_thousandth() -> None:
    row = {"numbers": [1, 1_000, 101, 5], "target": 5}
    assert tiny_zero(row, put("5 + 1 / (1000 * 101)")) == 1.0
    row = {"numbers": [1, 1_000, 100, 5], "target": 5}
    assert tiny_zero(row, put("5 + 1 / (1000 * 100)")) == 0.1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (" yes </think> <answer> 7 + 5 - 3 </answer>", 1.0),
        (" yes </think> <answer> 7 + 5 + 3 </answer>", -1.0),
        (" yes </think> <answer> 7 + 5 </answer>", -1.0),
        (" give up </think> <answer> none </answer>", 0.0),
        (" 7 + 5 = 12 no .", 0.0),
        (" <answer> 7 + 5 + 3", 0.0),
        (" <answer> 7 + 5 + 3 </answer> <answer> none </answer>", 0.0),
    ],
)
def test_a_wrong_claim_is_worse_than_none(answer: str, expected: float) -> None:
    assert honesty(ROW, answer) == expected


def test_observe_reads_attempts_sums_and_verdicts() -> None:
    answer = (
        " <think> 3 + 5 = 8 + 7 = 15 no . 7 + 5 = 12 - 3 = 9 yes </think>"
        " <answer> 7 + 5 - 3 </answer>"
    )
    assert observe(ROW, answer) == {
        "attempts": 2.0,
        "reflections": 1.0,
        "give_ups": 0.0,
        "wrong_give_ups": 0.0,
        "right_sums": 1.0,
        "right_verdicts": 1.0,
        "right_numbers": 1.0,
    }


def test_observe_tells_wrong_sums_verdicts_and_numbers_apart() -> None:
    answer = (
        " <think> 3 + 5 = 9 + 7 = 16 no ."  # first sum wrong
        " 7 + 5 = 12 - 3 = 9 no ."  # a hit, not seen
        " 7 + 7 = 14 - 3 = 11 yes"  # no hit; 7 used twice
        " . give up </think> <answer> none </answer>"
    )
    seen = observe(ROW, answer)
    assert seen["attempts"] == 3
    assert seen["reflections"] == 2
    assert seen["give_ups"] == seen["wrong_give_ups"] == 1
    assert seen["right_sums"] == pytest.approx(5 / 6)
    assert seen["right_verdicts"] == pytest.approx(1 / 3)
    assert seen["right_numbers"] == pytest.approx(2 / 3)


def test_giving_up_on_a_problem_that_cannot_be_solved_is_not_wrong() -> None:
    seen = observe({**ROW, "solvable": False}, " <think> give up </think>")
    assert (seen["give_ups"], seen["wrong_give_ups"]) == (1, 0)


def test_observe_leaves_out_shares_of_nothing_and_an_unfinished_attempt() -> None:
    seen = observe(ROW, " <think> 3 + 5 =")
    assert seen == {"attempts": 0, "reflections": 0, "give_ups": 0, "wrong_give_ups": 0}


def test_observe_judges_all_four_operators() -> None:
    text = "6 * 2 = 12 / 4 = 3 - 1 = 2 + 1 = 3 no"
    assert observe(ROW, text)["right_sums"] == 1.0
    assert observe(ROW, "7 / 2 = 3 no . 7 / 0 = 7 no")["right_sums"] == 0.0


def test_rewards_import_without_jax_and_fast() -> None:
    code = (
        "import sys, r1jax.rewards.countdown, r1jax.rewards.format, r1jax.rewards.weighted;"
        "print([m for m in ('jax', 'numpy', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------- votes


@pytest.mark.parametrize("expression", ["7+5-3", " 5 - 3 + 7 ", "(7 − 3) + 5 = 9", "007+5-3"])
def test_expressions_of_one_value_vote_together(expression: str):
    assert answer_key(ROW, put(expression)) == "value 9"


@pytest.mark.parametrize(
    ("expression", "key"),
    [
        ("7 - 5 - 3", "value -1"),
        ("7 / 5 / 3", "value 7/15"),
        ("9", "9"),  # does not use the numbers: no vote for the value 9
        ("7 + 5 - 3 = 8", "7+5-3=8"),
        ("value 9", "value9"),
        ("", None),
        (" \n", None),
    ],
)
def test_what_has_no_value_votes_for_its_text_and_nothing_for_nothing(expression, key):
    assert answer_key(ROW, put(expression)) == key


def test_an_answer_without_tags_abstains():
    assert answer_key(ROW, "7 + 5 - 3") is None


def test_answers_with_one_key_are_all_right_or_all_wrong():
    rng = random.Random(0)
    verdicts: dict[str | None, set[float]] = {}
    for _ in range(3000):
        words = [rng.choice(["7", "5", "3", "9"]) for _ in range(3)]
        signs = [rng.choice([" + ", " - ", "+", "*", " "]) for _ in range(2)]
        text = put(words[0] + signs[0] + words[1] + signs[1] + words[2] + rng.choice(["", "=9"]))
        verdicts.setdefault(answer_key(ROW, text), set()).add(accuracy(ROW, text))
    assert all(len(found) == 1 for found in verdicts.values()) and verdicts["value 9"] == {1.0}


def test_a_row_without_a_target_cannot_be_voted_on():
    with pytest.raises(ValueError, match="row has no field 'target'"):
        answer_key({"numbers": [1]}, put("1"))
