"""Counts words by their script, and scores whether an answer reasons in one language."""

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping
from typing import Any

# The scripts whose words belong to a language. Languages that share a script cannot be told apart
# by it: French words count as English.
LANGUAGES = {
    "ar": ("arabic",),
    "de": ("latin",),
    "el": ("greek",),
    "en": ("latin",),
    "es": ("latin",),
    "fr": ("latin",),
    "he": ("hebrew",),
    "it": ("latin",),
    "ja": ("han", "kana"),
    "ko": ("hangul",),
    "pt": ("latin",),
    "ru": ("cyrillic",),
    "zh": ("han",),
}

# Ranges of Unicode's blocks. Half-width and full-width forms are made plain ones before.
_HAN = "\u3005\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003347f"
_KANA = "\u3041-\u3096\u309d\u309e\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
_LATIN = "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff"
_SPACED = {  # scripts that put spaces between words
    "latin": _LATIN,
    "cyrillic": "\u0400-\u0482\u048a-\u052f",
    "greek": "\u0370-\u0373\u0376-\u037d\u037f\u0386-\u03ff\u1f00-\u1fff",
    "hangul": "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3",
    "arabic": "\u0620-\u064a\u066e-\u06d3\u06fa-\u06fc",
    "hebrew": "\u05d0-\u05ea\u05ef-\u05f2",
}
_MARK = "\u0300-\u036f\u0591-\u05bd\u064b-\u0652"  # accents and vowel points on a letter
_WORD = re.compile(
    # x1, foo_bar and 3D are names of code and formulas, no words. The `+` of `*+` and `++` keeps
    # what it took, so that a long run is read once.
    rf"(?P<name>[{_LATIN}]*+[0-9_][{_LATIN}0-9_]*+)"
    + "".join(
        rf"|(?P<{script}>[{letters}][{letters}{_MARK}]*+(?:['’\-][{letters}][{letters}{_MARK}]*+)*+)"
        for script, letters in _SPACED.items()
    )
    + rf"|(?P<han>[{_HAN}])|(?P<kana>[{_KANA}])|(?P<other>[^\W\d_]++)"
)

# Code and formulas. What is opened and never closed runs to the end and stays text, so that three
# backticks do not hide all that follows. The rule for $...$ is Pandoc's: no space inside next to
# the signs and no digit after them, so that "$5 and $7" stays text.
_NOT_PROSE = re.compile(
    r"```.*?(?:```|(?P<block>\Z))"
    r"|`[^`\n]*`"
    r"|\$\$.*?(?:\$\$|(?P<dollars>\Z))"
    r"|\\\[.*?(?:\\\]|(?P<display>\Z))"
    r"|\\\(.*?(?:\\\)|(?P<inline>\Z))"
    r"|\$(?!\s)[^$\n]*(?<!\s)\$(?!\d)"
    r"|\\[A-Za-z]+\*?(?:\{[^{}\n]*\})*"
    r"|https?://[!-~]+"  # ASCII only: Chinese text may follow without a space
    r"|</?[A-Za-z][\w-]*\s*/?>",
    re.DOTALL,
)


def consistency(row: Mapping[str, Any], answer: str, *, language: str | None = None) -> float:
    """The share of words in the target language among all words of the reasoning, 0.0 to 1.0.

    The language is that of the argument, or else of `row["language"]`: one of `LANGUAGES`. The
    reasoning is `reasoning(answer)`, its words are those of `count_words`. No words at all score
    0.0: silence is in no language, and must not earn what a consistent text earns.

    Raises:
      ValueError: no language is given, or one that is not known.

    Source: arXiv:2501.12948v1, section 2.3.2: number of words in the target language, divided by
    the number of words.
    """
    name = row.get("language") if language is None else language
    if not isinstance(name, str) or name not in LANGUAGES:
        raise ValueError(
            f"the target language must be one of {', '.join(LANGUAGES)}, got {name!r}; "
            f"pass language=, or give the row a field 'language'"
        )
    words = count_words(reasoning(answer))
    total = sum(words.values())
    return sum(words[script] for script in LANGUAGES[name]) / total if total else 0.0


def reasoning(answer: str) -> str:
    """The text before the first `</think>`, without what stands before a `<think>`.

    The prompt may have opened the tag already. An answer without `</think>` is all reasoning.
    """
    text = answer.partition("</think>")[0]
    before, opened, inside = text.partition("<think>")
    return inside if opened else before


def count_words(text: str) -> Counter[str]:
    """How many words each script has in a text, code and formulas left out.

    Left out are blocks and spans of code, $...$, $$...$$, \\(...\\), \\[...\\], LaTeX commands with
    their arguments, addresses, tags, names with digits or underscores in them, and single letters
    of scripts that write words with spaces (`n`, `α`, also `a` and `I`): in reasoning they are
    mostly variables.

    Chinese and Japanese have no spaces between words, and to segment them takes a dictionary: each
    of their characters is one word here. So in a mixed text a Chinese word of two characters
    counts as much as two English words. Korean words are told apart by spaces.
    """
    text = _NOT_PROSE.sub(lambda part: part[0] if part.lastgroup else " ", text)
    # Half-width kana and full-width letters become plain ones; accents join their letters.
    text = unicodedata.normalize("NFKC", text)
    found: Counter[str] = Counter()
    for word in _WORD.finditer(text):
        script = word.lastgroup or ""
        if script != "name" and not (script in _SPACED and len(word[0]) == 1):
            found[script] += 1
    return found
