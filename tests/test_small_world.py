"""The small world: problems that can be solved, texts that are what they claim, fair scores."""

import re

import pytest

from r1jax.data import small_world
from r1jax.data.tokenizer import decode, encode
from r1jax.rewards import small_world as scores
from r1jax.rewards.countdown import last_answer

KINDS = ("math", "code", "helpful", "harmless")


def greeting(language: str, **changes) -> dict:
    verb, name = {"en": ("thank", "ann"), "zh": ("感谢", "小安")}[language]
    row = {"kind": "helpful", "language": language, "verb": verb, "name": name}
    return row | {"reference": "thanks ann"} | changes


def said(text: str) -> str:
    return f" <think> ann hears this </think> <answer> {text} </answer>"


def test_what_a_reward_model_reads_can_be_read_wherever_an_answer_ends() -> None:
    tokenizer = small_world.small_tokenizer()
    tokens = encode(tokenizer, said("thanks ann") + " </think> </think>")
    for end in range(len(tokens) + 1):
        for kind in ("helpful", "harmless"):
            encode(tokenizer, scores.judged_part(kind, decode(tokenizer, tokens[:end])))


# --------------------------------------------------------------------------- problems and texts


def test_rows_depend_on_seed_split_and_index_alone() -> None:
    few = small_world.rows("train", num=8, seed=1, kinds=KINDS)
    many = small_world.rows("train", num=80, seed=1, kinds=KINDS)
    assert list(few) == many[:8]
    assert [row["kind"] for row in many[:8]] == [*KINDS, *KINDS]
    assert list(few) != list(small_world.rows("train", num=8, seed=2, kinds=KINDS))


def test_train_and_test_share_no_prompt() -> None:
    train = small_world.rows("train", num=4000, seed=1, kinds=KINDS)
    test = small_world.rows("test", num=400, seed=1, kinds=KINDS)
    asked = {small_world.prompt(row) for row in test}
    assert not asked & {small_world.prompt(row) for row in train}
    assert {row["language"] for row in test} == {"en", "zh"}


def test_texts_come_back_exactly_and_fit_the_configs() -> None:
    tokenizer = small_world.small_tokenizer()
    assert len(tokenizer) <= 224
    longest = 0
    for row in small_world.base_rows(800, seed=0, give_up=0.3, persistent=0.5):
        for text in row.values():
            assert decode(tokenizer, encode(tokenizer, text)) == text
        assert len(encode(tokenizer, row["prompt"])) <= 8
        longest = max(longest, len(encode(tokenizer, row["answer"])))
    assert 100 < longest < 144  # the end token is one more


def test_sums_and_verdicts_of_the_base_are_right() -> None:
    kinds = ("math", "code")
    problems = small_world.rows("train", num=200, seed=0, kinds=kinds)
    texts = small_world.base_rows(200, seed=0, kinds=kinds, give_up=0.5)
    verdicts = 0
    for row, text in zip(problems, texts, strict=True):
        answer = text["answer"]
        for a, sign, b, c in re.findall(r"(?=(?<!\d)(\d+) ([-+]) (\d+) = (\d+)(?!\d))", answer):
            assert int(a) + (int(b) if sign == "+" else -int(b)) == int(c), answer
        result = row["target"] if row["kind"] == "math" else row["examples"][1][1]
        for steps, verdict in re.findall(r"= (\d+) (wrong|不对|right|对了)", answer):
            assert (int(steps) == result) == (verdict in ("right", "对了")), answer
            verdicts += 1
        gave_up = last_answer(answer) == " none "
        if row["kind"] == "math":
            assert scores.accuracy(row, answer) == float(not gave_up)
    assert verdicts > 200


def test_programs_of_the_base_pass_their_tests_and_others_do_not() -> None:
    problems = small_world.rows("train", num=40, seed=0, kinds=("code",))
    texts = small_world.base_rows(40, seed=0, kinds=("code",), give_up=0.0, persistent=1.0)
    pairs = [(row, text["answer"]) for row, text in zip(problems, texts, strict=True)]
    pairs = [pair for pair in pairs if last_answer(pair[1]) != " none "]  # the longest give up
    assert len(pairs) > 35
    # Lines through two points: what fits both examples is right everywhere.
    assert all(scores.accuracy(row, answer) == 1.0 for row, answer in pairs)
    assert scores.accuracy(problems[0], said("def f ( x ) : return x + 99")) == 0.0
    assert scores.accuracy(problems[0], said("none")) == 0.0


def test_a_share_of_the_base_speaks_the_language_of_the_problem() -> None:
    kinds = ("math", "code")
    problems = small_world.rows("train", num=400, seed=0, kinds=kinds)

    def own(share: float) -> float:
        texts = small_world.base_rows(400, seed=0, kinds=kinds, own=share)
        pairs = zip(problems, texts, strict=True)
        found = [scores.own_language(row, text["answer"]) or 0.0 for row, text in pairs]
        return sum(found) / len(found)

    assert own(1.0) == 1.0
    # Of the others half are in the other language, half draw it at every turn.
    assert own(0.0) == pytest.approx(0.25, abs=0.06)


def test_pairs_prefer_the_better_answer_but_for_the_noise() -> None:
    for kind in ("helpful", "harmless"):
        problems = small_world.rows("train", num=300, seed=6, kinds=(kind,))
        rows = small_world.compared_rows(kind, 300, seed=6, noise=0.1)
        right = [
            scores.quality(row, pair["chosen"]) > scores.quality(row, pair["rejected"])
            for row, pair in zip(problems, rows, strict=True)
        ]
        assert sum(right) / 300 == pytest.approx(0.9, abs=0.05)
        assert all(("<think>" in pair["chosen"]) == (kind == "harmless") for pair in rows)


@pytest.mark.parametrize(
    ("language", "thought", "readable"),
    [
        ("en", "3 + 5 = 8 不对 . 7 + 2 = 9 right", "3 + 5 = 8 wrong . 7 + 2 = 9 right"),
        ("zh", "3 + 5 = 8 wrong . 7 + 2 = 9 right", "3 + 5 = 8 不对 . 7 + 2 = 9 对了"),
    ],
)
def test_an_answer_is_translated_and_summed_up(language, thought, readable) -> None:
    row = {"kind": "math", "language": language, "numbers": [7, 2], "target": 9}
    answer = f" <think> {thought} </think> <answer> 7 + 2 </answer>"
    (found,) = small_world.readable_rows([{"row": row, "answer": answer, "accuracy": 1.0}])
    summary = {"en": "so it fits .", "zh": "所以 符合 ."}[language]
    assert found["answer"] == f" <think> {readable} </think> {summary} <answer> 7 + 2 </answer>"
    assert found["original"] == answer and found["accuracy"] is None
    assert scores.readable(row, answer) == 0.0 and scores.readable(row, found["answer"]) == 1.0
    assert not small_world.readable_rows([{"row": row, "answer": " 7 + 2"}])


# --------------------------------------------------------------------------- manners


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("thanks ann , have a nice day", 4.0),
        ("thanks ann", 3.0),
        ("thanks bob", 2.0),
        ("谢谢 ann", 2.0),  # the right words, in the other language
        ("hello ann", 2.0),
        ("hello thanks bravo courage ann", 2.0),  # to say everything is to say nothing
        ("thanks ann fool , have a nice day", 0.0),
        ("none", 1.0),
    ],
)
def test_points_of_a_helpful_answer(text: str, points: float) -> None:
    assert scores.quality(greeting("en"), said(text)) == points


@pytest.mark.parametrize(
    ("text", "points"),
    [
        ("sorry i will not , let us be kind", 4.0),
        ("sorry i will not", 3.0),
        ("抱歉 我 不 会", 2.0),
        ("let us be kind", 0.0),
        ("sorry i will not , fool", 0.0),
        ("ann fool", 0.0),
    ],
)
def test_points_of_a_harmless_answer(text: str, points: float) -> None:
    row = greeting("en", kind="harmless", verb="mock")
    assert scores.quality(row, said(text)) == points


def test_an_answer_is_compared_with_the_reference_of_its_row() -> None:
    row = greeting("en")  # 3 points
    texts = ("thanks ann , have a nice day", "thanks ann", "hello ann", "")
    assert [scores.won(row, said(text)) for text in texts] == [1.0, 0.5, 0.0, 0.0]
    assert scores.won({"kind": "math", "language": "en"}, said("1")) is None


def test_measures_are_for_their_kinds_only() -> None:
    row = greeting("en")
    assert scores.reasoned(row, said("x")) is scores.readable(row, said("x")) is None
    assert scores.own_language(row, said("x")) is None
    assert set(scores.observe(row, said("thanks ann"))) == {"quality", "win_rate"}


@pytest.mark.parametrize(
    ("answer", "form"),
    [
        (" <think> a </think> <answer> b </answer>", 1.0),
        (" <think> a </think> so b . <answer> b </answer>", 1.0),
        (" <think> a </think> <answer> b </answer> c", 0.0),
        (" <think> a <answer> b </answer>", 0.0),
        (" <answer> b </answer> <think> a </think>", 0.0),
        ("a </think> <answer> b </answer>", 0.0),
    ],
)
def test_one_thought_and_one_answer(answer: str, form: float) -> None:
    assert scores.one_thought({}, answer) == form


@pytest.mark.parametrize(
    "settings",
    [{"split": "dev"}, {"num": 0}, {"kinds": ()}, {"kinds": ("poetry",)}],
)
def test_bad_settings_of_rows_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match="must be"):
        small_world.rows(**{"split": "train", "num": 1, "seed": 0, "kinds": KINDS} | settings)


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="manners must be from 0 to 1, got 2"):
        small_world.base_rows(1, seed=0, manners=2)
