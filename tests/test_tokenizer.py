"""The tiny tokenizer, and tokenizers read from a folder."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from r1jax.data.countdown import attempts_rows, rows, short_prompt
from r1jax.data.tokenizer import WORDS, check, decode, encode, from_folder, tiny


@pytest.fixture(scope="module")
def tokenizer():
    return tiny()


@pytest.fixture(scope="module")
def saved(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


def test_each_number_word_and_tag_is_one_token(tokenizer) -> None:
    assert len(tokenizer) == 122
    for word in [*map(str, range(100)), *"+-*/()=.", "yes", "no", "give", "up", "none", "from"]:
        assert len(encode(tokenizer, f" {word}")) == 1, word
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        assert len(encode(tokenizer, f" {tag}")) == 1, tag
    assert len(encode(tokenizer, "make 9 from 7 5 3")) == 6
    assert len({tuple(encode(tokenizer, f" {number}")) for number in range(100)}) == 100


def test_whatever_tokens_a_model_writes_are_read_again(tokenizer) -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = rng.integers(3, len(tokenizer), size=20).tolist()
        assert encode(tokenizer, decode(tokenizer, ids)) == ids


@pytest.mark.parametrize("settings", [{}, {"counts": (3, 4), "operators": "+-*/", "high": 9}])
def test_texts_of_the_tiny_world_come_back_exactly(tokenizer, settings: dict) -> None:
    for row in attempts_rows(200, seed=0, **settings):
        prompt, answer = encode(tokenizer, row["prompt"]), encode(tokenizer, row["answer"])
        assert decode(tokenizer, prompt) == row["prompt"]
        assert decode(tokenizer, answer) == row["answer"]
        assert prompt + answer == encode(tokenizer, row["prompt"] + row["answer"])


def test_any_cut_of_a_text_comes_back_exactly(tokenizer) -> None:
    text = "make 9 from 7 5 3 <think> 7 + 5 = 12 - 3 = 9 yes </think> <answer> 7 + 5 - 3 </answer>"
    ids = encode(tokenizer, text)
    for cut in range(len(ids) + 1):
        assert decode(tokenizer, ids[:cut]) + decode(tokenizer, ids[cut:]) == text


def test_end_and_padding_are_special_and_not_shown(tokenizer) -> None:
    assert tokenizer.eos_token_id is not None
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    ids = [*encode(tokenizer, " 7 yes"), tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert decode(tokenizer, ids) == " 7 yes"


def test_tags_are_shown(tokenizer) -> None:
    assert decode(tokenizer, encode(tokenizer, " </think>")) == " </think>"


@pytest.mark.parametrize(
    ("text", "piece"), [("make 100 from 7", " 100"), ("hello", "hello"), (" 7  5", " ")]
)
def test_what_the_vocabulary_lacks_is_named(tokenizer, text: str, piece: str) -> None:
    with pytest.raises(ValueError, match=f"no token for '{piece}' in '{text}'"):
        encode(tokenizer, text)


def test_larger_numbers_can_be_had() -> None:
    tokenizer = tiny(numbers=101)
    assert len(tokenizer) == 123
    assert decode(tokenizer, encode(tokenizer, " 100")) == " 100"


def test_other_words_can_be_had(tokenizer) -> None:
    more = tiny(words=(*WORDS, "```"))
    assert len(more) == 123
    text = "make 9 from 7 ``` 7 ```"
    assert encode(more, text)[:4] == encode(tokenizer, "make 9 from 7")
    assert decode(more, encode(more, text)) == text


def test_a_saved_tokenizer_is_the_same_again(tokenizer, saved: Path) -> None:
    again = from_folder(saved)
    for row in rows("test", num=50, seed=0):
        prompt = short_prompt(row)
        assert encode(again, prompt) == encode(tokenizer, prompt)
        assert decode(again, encode(again, prompt)) == prompt
    assert again.eos_token_id == tokenizer.eos_token_id
    assert len(again) == len(tokenizer)


def test_a_tokenizer_without_an_end_token_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "endless"
    shutil.copytree(saved, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"endless has no end token \(eos_token\)"):
        from_folder(folder)


def test_check_passes_a_tokenizer_with_an_end_token(tokenizer) -> None:
    check(tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no tokenizer.json"),
        ('{"version":', "tokenizer.json: cannot be read as JSON"),
        ('{"version": "1.0"}', "not a tokenizer"),
        ("[]", "not a tokenizer"),
        ('{"version": "1.0", "added_tokens": [], "model": {"type": "No"}}', "not a tokenizer"),
    ],
)
def test_a_folder_without_a_tokenizer_is_one_line(
    tmp_path: Path, content: str | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError) as error:
        from_folder(tmp_path)
    assert message in str(error.value)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        from_folder(tmp_path / "nowhere")
