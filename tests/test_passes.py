"""Passes over rows: choosing, changing, mixing, and what is compared with evaluation sets."""

import random
import re
from collections.abc import Sequence
from functools import partial

import pytest

from r1jax.data import duplicates, passes
from r1jax.data.filters import right
from r1jax.rewards.weighted import Batched


def answers(*groups: Sequence[tuple[str, float | None]]) -> list[dict]:
    """Rows of answers (text, accuracy) to problems 0, 1, ..."""
    return [
        {
            "prompt": f"problem {i}",
            "answer": text,
            "accuracy": accuracy,
            "num_tokens": len(text),
            "problem": i,
            "sample": j,
            "row": {"question": f"problem {i}", "answer": str(i)},
        }
        for i, group in enumerate(groups)
        for j, (text, accuracy) in enumerate(group)
    ]


def texts(rows) -> list[str]:
    return [row["answer"] for row in rows]


# --------------------------------------------------------------------------- counts


def test_each_pass_is_counted_in_order_under_its_name():
    rows = answers([("a", 1.0), ("bb", 0.0)], [("c", 1.0), ("c", 1.0)], [("d", None)])
    listed = {"wrong": partial(passes.keep, where=right), "twice": duplicates.distinct}
    found, counts = passes.apply(rows, listed, stage="cold")
    assert texts(found) == ["a", "c"]
    assert counts == [("wrong", 3), ("twice", 2)]


def test_a_pass_that_leaves_nothing_is_one_line():
    listed = {"wrong": partial(passes.keep, where=right)}
    with pytest.raises(ValueError, match=r"^cold: 'wrong' leaves none of 2 rows$"):
        passes.apply(answers([("a", 0.0), ("b", None)]), listed, stage="cold")


# --------------------------------------------------------------------------- choosing


def test_the_best_answers_are_the_shortest_and_of_equals_the_first():
    rows = answers([("ccc", 1.0), ("a", 1.0), ("b", 1.0)], [("dd", 1.0)])
    assert texts(passes.keep_best(rows)) == ["a", "dd"]
    assert texts(passes.keep_best(rows, number=2)) == ["a", "b", "dd"]
    longest = passes.keep_best(rows, by=lambda row: len(row["answer"]))
    assert texts(longest) == ["ccc", "dd"]


def test_a_judges_score_decides_and_silence_drops():
    scores = {"good": 0.9, "poor": 0.2, "odd": None}

    def many(rows, answers):
        assert [row["question"] for row in rows] == ["problem 0"] * 2 + ["problem 1"]
        return [scores[answer] for answer in answers]

    rows = answers([("good", 1.0), ("poor", 1.0)], [("odd", 1.0)])
    assert texts(passes.keep_judged(rows, reward=Batched(many), least=0.5)) == ["good"]


def test_a_pair_is_the_best_and_the_worst_answer_to_a_problem():
    def length(row, answer):
        return None if answer == "?" else float(len(answer))

    texts = [("a", "bbb", "ccc", "d"), ("ee", "ff"), ("?", "g"), ("?", "hh", "i")]
    rows = [
        {"prompt": f"p{i}", "answer": text, "problem": i, "sample": k, "row": {"number": i}}
        for i, group in enumerate(texts)
        for k, text in enumerate(group)
    ]
    assert passes.pairs(rows, reward=length) == [
        {"prompt": "p0", "chosen": "bbb", "rejected": "a", "row": {"number": 0}},
        {"prompt": "p3", "chosen": "hh", "rejected": "i", "row": {"number": 3}},
    ]


def test_pass_rate_keeps_problems_that_are_neither_too_easy_nor_too_hard():
    rows = answers(
        [("a", 1.0), ("b", 1.0)],  # 1
        [("c", 1.0), ("d", 0.0), ("e", 0.0), ("f", None)],  # 1/3 of those judged
        [("g", 0.0), ("h", 0.0)],  # 0
        [("i", None)],  # not known
    )
    kept = passes.keep_pass_rate(rows, least=0.1, most=0.6)
    assert texts(kept) == ["c", "d", "e", "f"]
    rates = [row["pass_rate"] for row in passes.problems(rows)]
    assert rates == [1.0, 1 / 3, 0.0, None]
    assert passes.problems(rows)[1]["question"] == "problem 1"


def test_a_curriculum_goes_from_easy_to_hard():
    rows = answers([("a", 0.0)], [("b", 1.0)], [("c", 1.0), ("d", 0.0)])
    easy_first = passes.sort(passes.problems(rows), by="pass_rate", descending=True)
    assert [row["answer"] for row in easy_first] == ["1", "2", "0"]
    with pytest.raises(ValueError, match="cannot sort by 'level': a row has no such field"):
        passes.sort(rows, by="level")


def test_rows_of_texts_have_no_problems_to_choose_by():
    with pytest.raises(ValueError, match="needs rows of answers, with `problem` and `row`"):
        passes.keep_best([{"prompt": "a", "answer": "b"}])


# --------------------------------------------------------------------------- changing


def test_a_rewritten_answer_has_to_be_verified_again():
    def complete(prompts):
        return [f" new {prompt[0]['content']} " for prompt in prompts[:-2]] + [None, "  "]

    rows = answers([("a", 1.0), ("b", 1.0)], [("c", 1.0), ("d", 1.0)])
    messages = lambda row: [{"role": "user", "content": row["answer"]}]  # noqa: E731
    found = passes.rewrite(rows, complete=complete, messages=messages)
    assert texts(found) == ["new a", "new b"]
    assert [row["original"] for row in found] == ["a", "b"]
    assert [row["accuracy"] for row in found] == [None, None]
    again = passes.verify(found, accuracy=lambda row, answer: float(answer.endswith("a")))
    assert [row["accuracy"] for row in again] == [1.0, 0.0]


def test_the_first_right_answer_is_told_with_the_wrong_ones_before_it():
    rows = answers(
        [("a", 0.0), ("b", None), ("c", 0.0), ("d", 1.0), ("e", 0.0), ("f", 1.0)],
        [("g", 0.0)],
        [("h", 1.0)],
    )
    found = passes.retell(rows, tell=lambda wrong, right: f"{' '.join(wrong)} > {right}")
    assert texts(found) == ["a c > d", " > h"]
    assert [row["original"] for row in found] == ["d", "h"]
    assert [row["problem"] for row in found] == [0, 2]
    assert {row["accuracy"] for row in found} == {row["num_tokens"] for row in found} == {None}


@pytest.mark.parametrize(
    ("num", "num_others", "ratio", "sizes"),
    [
        (600, 200, (600, 200), (600, 200)),
        (600, 200, (3, 1), (600, 200)),
        (600, 500, (3, 1), (600, 200)),
        (900, 200, (3, 1), (600, 200)),
        (10, 10, (0.5, 1.5), (3, 10)),
    ],
)
def test_rows_are_mixed_by_ratio_until_one_kind_has_no_more(num, num_others, ratio, sizes):
    rows = [{"n": i} for i in range(num)]
    others = [{"other": i} for i in range(num_others)]
    mixed = passes.mix(rows, others=lambda: others, ratio=ratio)
    kinds = [[r["n"] for r in mixed if "n" in r], [r["other"] for r in mixed if "other" in r]]
    assert tuple(map(len, kinds)) == sizes
    assert all(len(set(kind)) == len(kind) for kind in kinds)  # none twice
    assert mixed == passes.mix(rows, others=lambda: others, ratio=ratio)


def test_a_ratio_that_cannot_be_is_one_line():
    with pytest.raises(ValueError, match="two numbers > 0"):
        passes.mix([{}], others=lambda: [{}], ratio=(1, 0))
    with pytest.raises(ValueError, match="1 rows and 5 others are too few"):
        passes.mix([{}], others=lambda: [{}] * 5, ratio=(1, 9))


# --------------------------------------------------------------------------- comparing texts


def test_words_are_split_by_hand():
    assert duplicates.words("Tom's  x_1 = 3.50, ﬁne！") == ["tom", "s", "x", "1", "3", "50", "fine"]
    assert duplicates.words("芳芳有99页 and 书") == ["芳", "芳", "有", "99", "页", "and", "书"]


def test_decontamination_agrees_with_every_pair_of_runs_compared():
    rng = random.Random(0)
    text = lambda n: " ".join(rng.choices("abcd", k=n))  # noqa: E731
    tests = [{"question": text(12), "solution": text(9)} for _ in range(6)]
    rows = [
        {"prompt": text(8), "answer": text(14), "row": {"question": text(10)}} for _ in range(60)
    ]

    def runs(sentence: str) -> set[str]:
        split = sentence.split(" ")
        return {" ".join(split[i : i + 6]) for i in range(len(split) - 5)}

    bad = {run for test in tests for one in test.values() for run in runs(one)}
    clean = [
        row
        for row in rows
        if not any(
            run in bad
            for one in (row["prompt"], row["answer"], row["row"]["question"])
            for run in runs(one)
        )
    ]
    assert 0 < len(clean) < len(rows)
    assert duplicates.decontaminate(rows, against=[lambda: tests], size=6) == clean


def test_ten_words_in_a_row_are_too_many_and_nine_are_not():
    question = "Janet's ducks lay 16 eggs per day; she eats three for breakfast."
    nine = "JANET S ducks, lay 16 eggs per day - she"
    assert len(duplicates.words(nine)) == 9
    against = [lambda: [{"question": question}]]
    short, long = ({"prompt": "p", "answer": text} for text in (nine, f"so {nine} eats one"))
    assert duplicates.decontaminate([short, long], against=against) == [short]
    chinese = [lambda: [{"question": "芳芳买了一本书有99页，看了90页"}]]
    copied = {"prompt": "题：芳芳 买了一本书 有99页。", "answer": "九"}
    assert duplicates.decontaminate([copied, short], against=chinese) == [short]


def test_an_empty_evaluation_set_is_no_reason_to_keep_all():
    with pytest.raises(ValueError, match="no evaluation text has 10 words"):
        duplicates.decontaminate([{}], against=[lambda: [{"answer": "72"}]])


def test_exact_duplicates_differ_in_case_and_signs_at_most():
    rows = [
        {"prompt": "Add 2 and 3.", "answer": "5"},
        {"prompt": "add 2 and 3", "answer": " 5!"},
        {"prompt": "add 2 and 3", "answer": "6"},
    ]
    assert duplicates.distinct(rows) == [rows[0], rows[2]]
    assert duplicates.distinct(rows, by=duplicates.prompt) == rows[:1]


@pytest.mark.parametrize("share", [0.6, 0.8, 1.0])
def test_near_duplicates_agree_with_every_pair_compared(share):
    rng = random.Random(1)
    rows = []
    for _ in range(12):
        base = rng.choices([f"w{i}" for i in range(50)], k=30)
        for changes in (0, 0, 1, 2, 4, 9):
            copy = list(base)
            for place in rng.sample(range(30), changes):
                copy[place] = f"new{rng.randrange(1000)}"
            rows.append({"prompt": " ".join(copy)})
    rng.shuffle(rows)

    def runs(row) -> set[str]:
        split = re.findall(r"\w+", row["prompt"])
        return {" ".join(split[i : i + 3]) for i in range(len(split) - 2)}

    kept = []
    for row in rows:
        overlaps = [len(runs(row) & runs(k)) / len(runs(row) | runs(k)) for k in kept]
        if not any(overlap >= share for overlap in overlaps):
            kept.append(row)
    assert 12 <= len(kept) < len(rows)
    assert duplicates.dissimilar(rows, share=share, size=3) == kept


def test_texts_shorter_than_a_run_are_near_duplicates_only_if_equal():
    rows = [{"prompt": text} for text in ("one two", "One, two", "one three", "", "!")]
    found = duplicates.dissimilar(rows, size=5)
    assert found == [rows[0], rows[2], rows[3]]
    with pytest.raises(ValueError, match=r"share in \[0.5, 1\]"):
        duplicates.dissimilar(rows, share=0.1)


def test_an_answer_is_cut_after_each_of_its_steps_and_has_its_outcome_everywhere():
    rows = answers([(" 7 + 5 no . 7 - 3 no . give up", 0.0), ("9 yes", 1.0), ("x", None)])
    found = passes.steps(rows, end=" .")
    assert [(row["answer"], row["label"]) for row in found] == [
        (" 7 + 5 no .", 0.0),
        (" 7 + 5 no . 7 - 3 no .", 0.0),
        (" 7 + 5 no . 7 - 3 no . give up", 0.0),
        ("9 yes", 1.0),
    ]
    assert [row["sample"] for row in found] == [0, 0, 0, 1]
    # What ends with a step is there once, and nothing is lost or added.
    (row,) = answers([("a .\n\n. b .", 1.0)])
    cut = texts(passes.steps([row], end="."))
    assert cut == ["a .", "a .\n\n.", "a .\n\n. b ."]
    with pytest.raises(ValueError, match="need a text that ends a step"):
        passes.steps(rows, end="")
