"""Tokenizers in Hugging Face format: a small one built here, or one from a folder."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PAD, END, UNKNOWN = "<pad>", "<eos>", "<unk>"
FIRST_WORD = "make"
WORDS = ("from", *"+-*/()=.", "yes", "no", "give", "up", "none")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def tiny(
    *, numbers: int = 100, first: Sequence[str] = (FIRST_WORD,), words: Sequence[str] = WORDS
) -> Any:
    """A `transformers.PreTrainedTokenizerFast` for the tiny world of `r1jax.data.countdown`.

    One token for each whole number below `numbers`, so that a sum is a look-up, and one for each
    word, sign and tag: 22 and `numbers` in all. A token carries the space before it. Only the
    words that prompts begin with, `first`, have none, so pieces of text can be encoded apart and
    put together, and decoding gives back the text exactly. Anything else is the unknown token.
    """
    _quiet()
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    spaced = [*(str(number) for number in range(numbers)), *words, *TAGS]
    tokens = [PAD, END, UNKNOWN, *first, *(f" {word}" for word in spaced)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    # A model may write a word of `first` anywhere: 88make are two tokens.
    begins = "|".join(map(re.escape, first))
    pieces = Regex(f"{begins}| ?(?:(?!{begins})[^ ])+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,  # it would take the space before a full stop
    )


def from_folder(path: str | os.PathLike[str]) -> Any:
    """The tokenizer saved in a folder, in Hugging Face format. Nothing is downloaded.

    Raises:
      ValueError: there is no such folder, it holds no readable tokenizer, or one without an end
        token.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder, need one that holds a tokenizer")
    if not (folder / "tokenizer.json").is_file():
        raise ValueError(f"{folder}: holds no tokenizer.json")
    for file in folder.glob("tokenizer*.json"):
        try:
            json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{file}: cannot be read as JSON ({error})") from None
    _quiet()
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the Rust library raises no narrower class
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder}: not a tokenizer ({reason[:200]})") from error
    check(tokenizer)
    return tokenizer


def check(tokenizer: Any) -> None:
    """Makes sure that answers can end.

    Raises:
      ValueError: the tokenizer has no end token.
    """
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        raise ValueError(f"tokenizer {name} has no end token (eos_token): no answer could end")


def encode(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text, none added before or after.

    Raises:
      ValueError: the tokenizer knows no token for a part of the text.
    """
    ids = tokenizer.encode(text, add_special_tokens=False)
    unknown = tokenizer.unk_token_id
    # Some tokenizers name their end token as the unknown one and never need it.
    if unknown is not None and unknown != tokenizer.eos_token_id and unknown in ids:
        again = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        start, end = again["offset_mapping"][ids.index(unknown)]
        raise ValueError(f"the tokenizer has no token for {text[start:end]!r} in {text[:80]!r}")
    return ids


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, without end and padding tokens."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _quiet() -> None:
    # transformers warns on import that it found no PyTorch, which is as intended.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
