"""Measures of how answers are written: reflection, steps, repetition, code, lengths."""

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from r1jax.rewards.language import reasoning

# The words whose count rose five to seven times in R1-Zero: arXiv:2501.12948v2.
REFLECTION_WORDS = (
    "wait",
    "mistake",
    "however",
    "but",
    "retry",
    "error",
    "verify",
    "wrong",
    "evaluate",
    "check",
)
# What stands for them in Chinese. The paper has no such list: these are dictionary words. Text
# without spaces is matched from the left, and "等等" is found where it means "and so on" too.
REFLECTION_WORDS_CHINESE = (
    "等一下",
    "等等",
    "且慢",
    "稍等",
    "失误",
    "出错",
    "错误",
    "错了",
    "不对",
    "然而",
    "不过",
    "但是",
    "可是",
    "重试",
    "再试",
    "重新",
    "验证",
    "验算",
    "评估",
    "检查",
    "核对",
)

_ENGLISH = re.compile(r"[a-z]+")
_CHINESE = re.compile("|".join(REFLECTION_WORDS_CHINESE))
# Open-R1's pattern. It has no MULTILINE flag, so the number of a list counts only where the whole
# text begins with it.
_STEP = re.compile(r"(Step \d+:|^\d+\.|\n-|\n\*|First,|Second,|Next,|Finally,)")
# What opens a block of code, and what may follow on the line: after backticks, no further ones.
_FENCE = re.compile(r"[^\S\n]*(?P<marks>`{3,}(?=[^`]*$)|~{3,})")


def observe(row: Mapping[str, Any], answer: str) -> dict[str, float]:
    """What the log shows of how an answer was written.

    reflections            words of R1's list, whole and in any case, and their Chinese counterparts
    waits                  the word "wait" alone, which the paper follows by itself
    steps                  marks of steps, as `reasoning_steps` counts them
    repeated               share of its 20-grams of words that stood in it before
    characters             length of the text
    reasoning_characters   length of its part before `</think>`
    text_characters        length without fenced blocks of code
    code_share             share of its characters in such blocks; 0.0 of an empty text
    code_answers           1.0 if it holds one, else 0.0

    A model that writes less and less code gives shorter answers while its reasoning grows: hence
    the two apart, for all answers, with code or without.

    Source of the list: arXiv:2501.12948v2.
    """
    code = code_characters(answer)
    return {
        "reflections": float(reflections(answer)),
        "waits": float(_ENGLISH.findall(answer.lower()).count("wait")),
        "steps": float(len(_STEP.findall(answer))),
        "repeated": repeated_share(answer.lower().split(), size=20),
        "characters": float(len(answer)),
        "reasoning_characters": float(len(reasoning(answer))),
        "text_characters": float(len(answer) - code),
        "code_share": code / len(answer) if code else 0.0,
        "code_answers": float(code > 0),
    }


def reflections(text: str) -> int:
    """How many of the words that R1 counts as reflection a text holds, English and Chinese."""
    english = sum(word in REFLECTION_WORDS for word in _ENGLISH.findall(text.lower()))
    return english + sum(1 for _ in _CHINESE.finditer(text))


def code_characters(text: str) -> int:
    """How many characters of a text are in fenced blocks of code, fences and line ends included.

    A block begins with a line of three or more backticks or tildes and ends with a line of nothing
    but as many of the same, or more, or with the text. Spaces before them do not count, so blocks
    in lists are found too. Code within a line (`x`) and indented code are text.

    Source: CommonMark 0.31, fenced code blocks, but for the spaces.
    """
    total, fence = 0, ""
    for line in re.split(r"(?<=\n)", text):  # splitlines knows other line ends too
        found = _FENCE.match(line.rstrip())
        marks = found["marks"] if found else ""
        total += len(line) if fence or marks else 0
        if not fence:
            fence = marks
        elif marks.startswith(fence) and line.strip() == marks:
            fence = ""
    return total


def reasoning_steps(row: Mapping[str, Any], answer: str, *, enough: int = 3) -> float:
    """The number of marks of steps divided by `enough`, at most 1.0.

    Marks are `Step 1:`, bullets at the start of a line, `First,`, `Second,`, `Next,`, `Finally,`,
    and one `1.` at the very start of the text: the published pattern finds no other.

    Source: `reasoning_steps_reward`, github.com/huggingface/open-r1, src/open_r1/rewards.py.
    """
    if enough < 1:
        raise ValueError(f"enough must be >= 1 step, got {enough}")
    return min(1.0, len(_STEP.findall(answer)) / enough)


def repetition(
    row: Mapping[str, Any],
    answer: str,
    *,
    size: int = 3,
    penalty: float = -1.0,
    split: Callable[[str], Sequence[str]] = str.split,
) -> float:
    """`penalty` times the share of the answer's n-grams of words that stood in it before.

    Words are what `split` makes of the text in lower case. A text with fewer than `size` words
    scores 0.0. `str.split` sees a whole Chinese sentence as one word: pass `list` to count
    characters, with a larger `size`.

    Raises:
      ValueError: `size` < 1 or `penalty` > 0.

    Source: arXiv:2502.03373, appendix C.2; `get_repetition_penalty_reward`,
    github.com/huggingface/open-r1, src/open_r1/rewards.py.
    """
    if penalty > 0:
        raise ValueError(f"penalty must be <= 0, got {penalty}")
    return penalty * repeated_share(split(answer.lower()), size=size)


def repeated_share(words: Sequence[str], *, size: int) -> float:
    """The share of the n-grams of `size` words that are not the first of their kind; 0.0 of none.

    Raises:
      ValueError: `size` < 1.
    """
    if size < 1:
        raise ValueError(f"size must be >= 1 word, got {size}")
    total = len(words) - size + 1
    if total < 1:
        return 0.0
    # Not slices: a long answer would be copied `size` times.
    distinct = set(zip(*(islice(words, i, None) for i in range(size)), strict=False))
    return 1.0 - len(distinct) / total
