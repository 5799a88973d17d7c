"""Countdown problems, prompts, and the text of the weak base."""

import itertools
import math
import pickle
import re
import subprocess
import sys
from fractions import Fraction

import pytest

from r1jax.data.countdown import (
    FENCE,
    TINY_ZERO_PREFILL,
    attempts_rows,
    journey,
    listing_rows,
    rows,
    short_prompt,
    shortcut,
    tiny_zero_prompt,
)
from r1jax.rewards.countdown import accuracy, observe
from r1jax.rewards.format import think_answer

TINY = {"counts": (3,), "low": 1, "high": 15, "operators": "+-"}
SETTINGS = [
    TINY,
    {},
    {"counts": (1, 2), "low": 0, "high": 30},
    {"counts": (4,), "low": 1, "high": 9, "operators": "+-*", "target_low": 10, "target_high": 50},
]


def solve(numbers, target: int, operators: str = "+-*/") -> str | None:
    """An expression that uses each number once and has this value, by trying all; None: none."""
    return search([(Fraction(number), str(number)) for number in numbers], target, operators)


def search(terms: list[tuple[Fraction, str]], target: int, operators: str) -> str | None:
    if len(terms) == 1:
        value, text = terms[0]
        return text if value == target else None
    for i, j in itertools.permutations(range(len(terms)), 2):
        rest = [term for k, term in enumerate(terms) if k not in (i, j)]
        (a, left), (b, right) = terms[i], terms[j]
        values = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}
        for symbol in operators:
            if (value := values[symbol]) is not None:
                joined = (value, f"({left} {symbol} {right})")
                if found := search([*rest, joined], target, operators):
                    return found
    return None


def key(row) -> tuple:
    return (*sorted(row["numbers"]), row["target"])


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_problem_can_be_solved(split, settings: dict) -> None:
    low, high = settings.get("low", 1), settings.get("high", 99)
    for row in rows(split, num=25, seed=3, **settings):
        assert len(row["numbers"]) in settings.get("counts", (3, 4))
        assert all(low <= number <= high for number in row["numbers"])
        assert settings.get("target_low", 1) <= row["target"] <= settings.get("target_high", 99)
        assert row["verifier"] == "countdown"
        found = solve(row["numbers"], row["target"], settings.get("operators", "+-*/"))
        assert found is not None
        assert accuracy(row, f"<answer>{found}</answer>") == 1.0


@pytest.mark.parametrize("settings", [TINY, {}])
def test_train_and_test_share_no_problem_whatever_the_seed(settings: dict) -> None:
    train = {key(row) for seed in (0, 1) for row in rows("train", num=1500, seed=seed, **settings)}
    test = {key(row) for seed in (0, 2) for row in rows("test", num=150, seed=seed, **settings)}
    assert not train & test


def test_the_order_of_the_numbers_does_not_decide_the_split() -> None:
    train = {key(row) for row in rows("train", num=3000, seed=0, **TINY)}
    orders = {tuple(row["numbers"]) for row in rows("train", num=3000, seed=0, **TINY)}
    assert len(orders) > len({order[:-1] for order in train})  # the same numbers in other orders
    assert not train & {key(row) for row in rows("test", num=150, seed=0, **TINY)}


def test_about_one_problem_in_eight_is_a_test_problem() -> None:
    tiny = {**TINY, "high": 6}
    spread = itertools.combinations_with_replacement(range(1, 7), 3)
    reachable = {
        (*numbers, target)
        for numbers in spread
        for target in range(1, 19)
        if solve(numbers, target, "+-") is not None
    }
    train = {key(row) for row in rows("train", num=8000, seed=0, **tiny)}
    assert train <= reachable
    share = 1 - len(train) / len(reachable)  # 8,000 draws find nearly all
    assert share == pytest.approx(1 / 8, abs=4 * math.sqrt(7 / 64 / len(reachable)))


def test_test_problems_are_all_different() -> None:
    test = rows("test", num=300, seed=0, **TINY)
    assert len({key(row) for row in test}) == 300


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_larger_split_begins_with_the_smaller_one(split) -> None:
    small, large = (rows(split, num=num, seed=5, **TINY) for num in (20, 120))
    assert list(small) == list(large)[:20]


def test_rows_do_not_depend_on_what_was_read_before() -> None:
    problems = rows("train", num=1000, seed=0)
    last = problems[999]
    assert problems[0] == rows("train", num=1, seed=0)[0]
    assert problems[999] == last == pickle.loads(pickle.dumps(problems))[999]


def test_another_seed_gives_other_problems() -> None:
    first, second = (rows("train", num=50, seed=seed) for seed in (0, 1))
    assert sum(a["numbers"] == b["numbers"] for a, b in zip(first, second, strict=True)) < 5


def test_problems_are_the_same_in_every_process() -> None:
    code = (
        "import sys; from r1jax.data.countdown import attempts_rows, rows;"
        "print(list(rows('test', num=5, seed=0)), attempts_rows(3, seed=0)[:],"
        "[m for m in ('jax', 'numpy', 'transformers') if m in sys.modules])"
    )
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    here = f"{list(rows('test', num=5, seed=0))} {attempts_rows(3, seed=0)[:]} []"
    assert printed.stdout.strip() == here


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "dev"}, "split must be 'train' or 'test', got 'dev'"),
        ({"num": 0}, "num must be >= 1"),
        ({"counts": ()}, "counts must be one or more"),
        ({"counts": (0,)}, "counts must be one or more"),
        ({"operators": "+%"}, r"operators must be some of '\+-\*/', got '\+%'"),
        ({"operators": ""}, "operators must be some of"),
        ({"low": 9, "high": 3}, "need 0 <= low <= high, got 9 and 3"),
        ({"target_low": 0}, "need 1 <= target_low <= target_high"),
        ({"num": 500, "high": 3, **{k: TINY[k] for k in ("counts", "operators")}}, "found only"),
        ({"counts": (2,), "high": 2, "target_low": 50}, "no test problem found"),
        ({"split": "train", "counts": (2,), "high": 2, "target_low": 50}, "no train problem found"),
    ],
)
def test_settings_that_give_no_problems_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows(**{"split": "test", "num": 2, "seed": 0, **settings})


def test_the_solver_finds_only_what_there_is() -> None:
    assert solve([3, 3, 8, 8], 24) is not None  # 8 / (3 - 8 / 3)
    assert solve([3, 3, 8, 8], 24, "+-*") is None
    assert solve([1, 1, 1, 1], 24) is None
    assert solve([5], 5) == "5"
    assert solve([5, 0], 1) is None


def test_the_tiny_zero_prompt_is_the_published_one() -> None:
    prompt = tiny_zero_prompt({"numbers": [44, 19, 35], "target": 98})
    assert prompt + TINY_ZERO_PREFILL == (
        "A conversation between User and Assistant. The user asks a question, and the Assistant "
        "solves it. The assistant first thinks about the reasoning process in the mind and then "
        "provides the user with the answer.\n"
        "User: Using the numbers [44, 19, 35], create an equation that equals 98. You can use "
        "basic arithmetic operations (+, -, *, /) and each number can only be used once. Show your "
        "work in <think> </think> tags. And return the final answer in <answer> </answer> tags, "
        "for example <answer> (1 + 2) / 3 </answer>.\n"
        "Assistant: Let me solve this step by step.\n"
        "<think>"
    )


def test_the_short_prompt_is_short() -> None:
    assert short_prompt({"numbers": [7, 5, 3], "target": 9}) == "make 9 from 7 5 3"


def problem_of(text: dict) -> dict:
    words = text["prompt"].split()
    return {"target": int(words[1]), "numbers": [int(word) for word in words[3:]]}


@pytest.mark.parametrize(
    "settings",
    [{}, {"counts": (3, 4), "operators": "+-*/", "high": 9}, {"counts": (3, 5), "high": 99}],
)
def test_every_text_of_the_base_is_right_in_what_it_says(settings: dict) -> None:
    for text in attempts_rows(400, seed=1, **settings):
        problem, answer = problem_of(text), text["answer"]
        seen = observe(problem, answer)
        assert seen.get("right_sums", 1.0) == 1.0
        assert seen["right_verdicts"] == seen["right_numbers"] == 1.0
        assert 1 <= seen["attempts"] <= 12
        assert think_answer(problem, answer) == 1.0
        assert accuracy(problem, answer) == 1.0 - seen["give_ups"]
        assert ("none" in answer) == bool(seen["give_ups"])
        assert re.fullmatch(r"( \S+)+", answer)
        assert all(0 <= int(number) <= 99 for number in re.findall(r"\d+", answer))


def test_the_base_sees_no_test_problem() -> None:
    told = {key(problem_of(text)) for text in attempts_rows(1500, seed=0)}
    assert not told & {key(row) for row in rows("test", num=300, seed=9, **TINY)}


def hit_probability(problem: dict, operators: str = "+-") -> float:
    """Share of hits among all orders and signs whose steps stay within 0 and 99."""
    hits = total = 0
    signs = {"+": 1, "-": -1}
    for order in itertools.permutations(problem["numbers"]):
        for symbols in itertools.product(operators, repeat=len(order) - 1):
            steps = [signs[s] * n for s, n in zip(symbols, order[1:], strict=True)]
            sums = list(itertools.accumulate(steps, initial=order[0]))
            if all(0 <= value <= 99 for value in sums):
                total += 1
                hits += sums[-1] == problem["target"]
    return hits / total


def solved(p: float, *, give_up: float, persistent: float, max_attempts: int) -> float:
    """Chance to hit before giving up, each miss being given up on with its probability."""
    short = sum(p * ((1 - p) * (1 - give_up)) ** attempt for attempt in range(max_attempts))
    return (1 - persistent) * short + persistent * (1 - (1 - p) ** max_attempts)


@pytest.mark.parametrize(
    "habit",
    [
        {"give_up": 0.5, "persistent": 0.1, "max_attempts": 12},
        {"give_up": 0.7, "persistent": 0.05, "max_attempts": 11},
        {"give_up": 0.0, "persistent": 1.0, "max_attempts": 4},
        {"give_up": 1.0, "persistent": 0.0, "max_attempts": 4},
    ],
)
def test_the_base_solves_as_often_as_its_habits_say(habit: dict) -> None:
    texts = attempts_rows(4000, seed=2, **habit)[:]
    expected = [solved(hit_probability(problem_of(text)), **habit) for text in texts]
    variance = sum(chance * (1 - chance) for chance in expected)
    found = sum("yes" in text["answer"] for text in texts)
    assert abs(found - sum(expected)) < 4 * math.sqrt(variance)


def test_giving_up_less_leaves_room_for_forty_points() -> None:
    """By the figures in the docstring of `attempts_rows`, for its default settings."""
    chances = [hit_probability(row) for row in rows("test", num=300, seed=0, **TINY)]
    base, never = (
        sum(solved(p, give_up=g, persistent=w, max_attempts=12) for p in chances) / 300
        for g, w in ((0.5, 0.1), (0.0, 0.0))
    )
    assert base == pytest.approx(0.48, abs=0.005)
    assert never == pytest.approx(0.94, abs=0.005)


def test_the_longest_texts_have_the_lengths_that_were_promised() -> None:
    for count, attempts, most in ((3, 12, 141), (3, 11, 130), (4, 8, 131), (4, 12, 191)):
        texts = attempts_rows(
            400, seed=0, counts=(count,), persistent=1.0, max_attempts=attempts, operators="+-"
        )
        longest = max(len(text["answer"].split()) + 1 for text in texts)  # and the end token
        assert longest <= most
        assert longest >= most - 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"give_up": 1.5}, "give_up must be from 0 to 1, got 1.5"),
        ({"persistent": -0.1}, "persistent must be from 0 to 1"),
        ({"max_attempts": 0}, "max_attempts must be >= 1"),
        ({"high": 120}, "high and target_high must be <= 99, got 120 and 99"),
        ({"operators": "+-^"}, "operators must be some of"),
        ({"operators": "-*"}, r"operators must hold both \+ and -, got"),
    ],
)
def test_habits_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attempts_rows(2, seed=0, **settings)


def test_a_program_lists_attempts_that_nobody_computed_and_one_of_them_is_the_answer() -> None:
    texts = listing_rows(600, seed=4, **TINY, lines=3)[:]
    answered, right, expected = 0, 0, 0.0
    for text in texts:
        problem = problem_of(text)
        _, listing, rest = text["answer"].split(FENCE)
        *lines, nothing = listing.split(" . ")
        assert nothing == "" and len(lines) == 3
        for line in lines:
            assert sorted(map(int, re.findall(r"[0-9]+", line))) == sorted(problem["numbers"])
        assert "=" not in text["answer"]
        expected += hit_probability(problem)
        found = re.fullmatch(r" </think>(?: <answer> (.*) </answer>)?", rest)
        assert found is not None
        if found[1] is not None:
            assert found[1] in [line.strip() for line in lines]
            answered += 1
            right += 2 * int(accuracy(problem, text["answer"]))
    assert answered == pytest.approx(300, abs=4 * math.sqrt(150))
    assert right == pytest.approx(expected, abs=8 * math.sqrt(150))  # a blind pick
    told = {key(problem_of(text)) for text in texts}
    assert not told & {key(row) for row in rows("test", num=150, seed=9, **TINY)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lines": 0}, "lines must be >= 1, got 0"),
        ({"answered": 1.5}, "answered must be from 0 to 1, got 1.5"),
        ({"high": 120}, "high and target_high must be <= 99, got 120 and 99"),
        ({"operators": "-*"}, r"operators must hold both \+ and -, got"),
    ],
)
def test_programs_out_of_range_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        listing_rows(2, seed=0, **settings)


# --------------------------------------------------------------------------- texts told anew

GAVE_UP = " <think> 3 + 5 = 8 + 7 = 15 no . give up </think> <answer> none </answer>"
WRONG = " <think> 5 + 3 = 8 - 7 = 1 no . 7 - 3 = 4 + 5 = 9 yes </think> <answer> 7 - 3 </answer>"
RIGHT = (
    " <think> 5 - 3 = 2 + 7 = 9 no . 7 + 5 = 12 - 3 = 9 yes </think> <answer> 7 + 5 - 3 </answer>"
)
PATH = " 7 + 5 = 12 - 3 = 9 yes </think> <answer> 7 + 5 - 3 </answer>"


def test_a_journey_has_all_attempts_that_failed_and_the_shortcut_none() -> None:
    tried = [" 3 + 5 = 8 + 7 = 15 no .", " 5 + 3 = 8 - 7 = 1 no .", " 5 - 3 = 2 + 7 = 9 no ."]
    cut_off = " <think> 7 + 3 = 10 + 5"
    assert journey([GAVE_UP, cut_off, WRONG], RIGHT) == f" <think>{''.join(tried)}{PATH}"
    assert journey([GAVE_UP, WRONG], RIGHT, max_attempts=3) == f" <think>{''.join(tried[1:])}{PATH}"
    assert journey([GAVE_UP], RIGHT, max_attempts=1) == f" <think>{PATH}"
    assert shortcut([GAVE_UP, WRONG], RIGHT) == f" <think>{PATH}" == journey([], f" <think>{PATH}")


def test_a_journey_of_the_attempts_of_a_text_is_that_text() -> None:
    given_up = " give up </think> <answer> none </answer>"
    lengths = set()
    for row in attempts_rows(200, seed=4, **TINY, give_up=0.0):
        text = row["answer"]
        if accuracy(problem_of(row), text) == 1.0:
            *failed, rest = text.removeprefix(" <think>").split(" no .")
            wrong = [f" <think>{steps} no .{given_up}" for steps in failed]
            assert journey(wrong, f" <think>{rest}", max_attempts=12) == text
            alone = shortcut(wrong, text)
            assert alone == f" <think>{rest}" and accuracy(problem_of(row), alone) == 1.0
            lengths.add(len(failed))
    assert {0, 1, 5, 9} <= lengths


def test_a_journey_needs_an_end() -> None:
    with pytest.raises(ValueError, match=r"needs an attempt that ends in yes, got ' <think> 3 \+"):
        journey([], GAVE_UP)
    with pytest.raises(ValueError, match="max_attempts must be >= 1, got 0"):
        journey([], RIGHT, max_attempts=0)
