"""Words by script, and the share of the target language in an answer's reasoning."""

import json
import time
import unicodedata
from pathlib import Path

import pytest

from r1jax.rewards.language import LANGUAGES, consistency, count_words, reasoning

DATA = Path(__file__).parents[2] / "shared" / "data"


def share(text: str, language: str) -> float:
    return consistency({"language": language}, text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("We add seven and two", {"latin": 5}),
        ("it's well-known, isn’t it", {"latin": 4}),
        ("我们把七加二", {"han": 6}),
        ("我们 check 一下", {"han": 4, "latin": 1}),
        ("これはテストです", {"kana": 8}),
        ("漢字かな", {"han": 2, "kana": 2}),
        ("ﾃｽﾄ", {"kana": 3}),  # half-width
        ("ｗｏｒｄ", {"latin": 1}),  # full-width
        ("안녕하세요 세계", {"hangul": 2}),
        ("привет, мир", {"cyrillic": 2}),
        ("καλημέρα", {"greek": 1}),
        ("שלום עולם", {"hebrew": 2}),
        ("مرحبا بالعالم", {"arabic": 2}),
        ("नमस्ते", {"other": 2}),  # its vowel signs are no letters to Python
        ("e\u0301te\u0301 et nai\u0308ve", {"latin": 3}),
        ("words 123 and 4.5 = 6 !", {"latin": 2}),
        ("let n be x or α", {"latin": 3}),  # n, x and α are single letters
        ("call foo_bar or x1 in 3D", {"latin": 3}),
        ("then $x = \\text{value}$ holds", {"latin": 2}),
        ("then $$x = value$$ holds", {"latin": 2}),
        (r"then \(x = value\) and \[ more \] holds", {"latin": 3}),
        (r"then \frac{some}{words} hold", {"latin": 2}),
        ("it costs $5 and $7 here", {"latin": 4}),
        ("run `some code` here", {"latin": 2}),
        ("run\n```python\nprint(word)\n```\nhere", {"latin": 2}),
        ("see https://example.com/some/words now", {"latin": 2}),
        ("见https://example.com/some/words。现在", {"han": 3}),
        ("<answer>nine</answer><br />", {"latin": 1}),
        ("<a text that is no tag>", {"latin": 5}),
        ("", {}),
        ("\ud800 \x00 !", {}),
    ],
)
def test_words_are_counted_by_script(text: str, words: dict[str, int]):
    assert dict(count_words(text)) == words


@pytest.mark.parametrize("opening", ["```", "$$", r"\(", r"\["])
def test_what_is_never_closed_hides_nothing(opening: str):
    assert dict(count_words(f"we {opening} go on thinking 思考")) == {"latin": 4, "han": 2}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("<think>some words</think> <answer>other</answer>", "some words"),
        ("some words</think> <answer>other</answer>", "some words"),  # the prompt opened the tag
        ("so <think>some words", "some words"),
        ("some words", "some words"),
        ("<think></think>rest", ""),
        ("", ""),
    ],
)
def test_the_reasoning_is_what_comes_before_the_end_of_thinking(text: str, part: str):
    assert reasoning(text) == part


def test_the_share_is_words_in_the_language_over_words():
    text = "<think>我们 check 一下 $x + word$</think><answer>many English words</answer>"
    assert share(text, "zh") == 4 / 5
    assert share(text, "en") == 1 / 5
    assert share(text, "ru") == 0.0
    assert share("漢字かな words", "ja") == 4 / 5
    assert share("漢字かな words", "zh") == 2 / 5


def test_no_words_are_in_no_language():
    for text in ("", "<think></think> words", "<think>$x + y$ 12</think>"):
        assert share(text, "en") == share(text, "zh") == 0.0


def test_the_argument_goes_before_the_row():
    assert consistency({"language": "zh"}, "some words", language="en") == 1.0
    assert consistency({}, "some words", language="en") == 1.0


@pytest.mark.parametrize("row", [{}, {"language": "english"}, {"language": 1}, {"language": []}])
def test_an_unknown_language_is_refused_with_those_there_are(row):
    with pytest.raises(ValueError, match=r"must be one of ar, .*, zh, got"):
        consistency(row, "text")


def test_letters_have_the_script_that_unicode_names():
    scripts = {
        "LATIN": "latin",
        "CYRILLIC": "cyrillic",
        "GREEK": "greek",
        "HEBREW": "hebrew",
        "ARABIC": "arabic",
        "HIRAGANA": "kana",
        "KATAKANA": "kana",
        "HANGUL": "hangul",
        "CJK": "han",
    }
    assert set(scripts.values()) == {script for each in LANGUAGES.values() for script in each}
    blocks = [(0x41, 0x250), (0x370, 0x530), (0x5D0, 0x6D4), (0x1100, 0x1200), (0x1E00, 0x2000)]
    blocks += [(0x3040, 0x3100), (0x3400, 0xA000), (0xAC00, 0xD7A4), (0xF900, 0xFA6E)]
    blocks += [(0x20000, 0x2A6E0)]
    checked = 0
    for code in (code for block in blocks for code in range(*block)):
        letter = chr(code)
        script = scripts.get(unicodedata.name(letter, "").partition(" ")[0])
        plain = unicodedata.is_normalized("NFKC", letter)
        if script is None or not plain or unicodedata.category(letter) not in ("Lu", "Ll", "Lo"):
            continue
        words = 2 if script in ("kana", "han") else 1
        assert dict(count_words(letter * 2)) == {script: words}, hex(code)
        checked += 1
    assert checked > 80_000


def rows(name: str) -> list[str]:
    file = DATA / name
    if not file.exists():
        pytest.skip(f"no {file}")
    return [json.loads(line)["question"] for line in file.read_text("utf-8").splitlines()]


def test_chinese_problems_are_chinese_by_the_names_of_their_characters():
    texts = rows("cmath.jsonl")
    for text in texts:
        han = sum(unicodedata.name(c, "").startswith("CJK UNIFIED") for c in text)
        assert count_words(text)["han"] == han
        if not any("a" <= c <= "z" for c in text.lower()):
            assert (share(text, "zh"), share(text, "en")) == (1.0, 0.0)
    assert len(texts) == 600


def test_english_problems_are_english():
    texts = rows("gsm8k_test.jsonl")
    assert all(share(text, "en") == 1.0 for text in texts)
    assert all(share(text, "zh") == 0.0 for text in texts)


def test_no_text_takes_long():
    pieces = ["a", "$", "`", "\\(", "\\[", "<a", "的", "a'", "a-", "```", "\\a{", "a_", "1", "αa"]
    pieces += ["$$", "https://", "\u0301", "a\u0301", "{", "$a ", "\ud800", "é"]
    start = time.process_time()
    for piece in pieces:
        count_words(piece * (64_000 // len(piece)))
    assert time.process_time() - start < 4.0
