"""Scores the form of an answer: tags for thinking and result, a code block, a box."""

import re
from collections.abc import Mapping
from typing import Any

TAGS = ("<think>", "</think>", "<answer>", "</answer>")

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)


def think_answer(row: Mapping[str, Any], answer: str) -> float:
    """1.0 if the whole text is `<think>...</think> <answer>...</answer>`, else 0.0.

    Each tag occurs once, in this order, with only white space before, between and after the two
    pairs. What they enclose may be anything, also nothing.

    Source: the template of R1-Zero, arXiv:2501.12948, Table 1.
    """
    if any(answer.count(tag) != 1 for tag in TAGS):
        return 0.0
    places = [answer.index(tag) for tag in TAGS]
    if places != sorted(places):
        return 0.0
    before = answer[: places[0]]
    between = answer[places[1] + len("</think>") : places[2]]
    after = answer[places[3] + len("</answer>") :]
    return float(not (before + between + after).strip())


def think_first(row: Mapping[str, Any], answer: str) -> float:
    """1.0 if the text is `<think>...</think>` and then more, as R1 answers a chat, else 0.0.

    Each tag occurs once, nothing but white space stands before the first, and something else does
    after the second.

    Source: arXiv:2501.12948v2, section 2.2.
    """
    before, _, rest = answer.partition("<think>")
    _, closed, after = rest.partition("</think>")
    once = answer.count("<think>") == answer.count("</think>") == 1
    return float(once and bool(closed) and not before.strip() and bool(after.strip()))


def tag_count(row: Mapping[str, Any], answer: str) -> float:
    """A quarter for each of the four tags that occurs exactly once, in any order: 0.0 to 1.0."""
    return sum(answer.count(tag) == 1 for tag in TAGS) / len(TAGS)


def open_r1(row: Mapping[str, Any], answer: str) -> float:
    """1.0 if each tag has a line of its own, as Open-R1 asks for, else 0.0.

    The text begins `<think>\\n`; then come `\\n</think>\\n<answer>\\n`, with nothing else on those
    lines, and `\\n</answer>` at the end of a line. What surprises in the published rule is kept:
    more lines may follow, tags may occur more often, and `<think>\\n</think>`, with no line
    between them, is refused.

    Source: `format_reward`, github.com/huggingface/open-r1, src/open_r1/rewards.py.
    """
    return float(_in_lines(answer))


def open_r1_tag_count(row: Mapping[str, Any], answer: str) -> float:
    """A quarter for each tag that occurs exactly once with the line breaks of `open_r1`.

    Source: `tag_count_reward`, github.com/huggingface/open-r1, src/open_r1/rewards.py.
    """
    tags = ("<think>\n", "\n</think>\n", "\n<answer>\n", "\n</answer>")
    return sum(answer.count(tag) == 1 for tag in tags) / len(tags)


def code_block(row: Mapping[str, Any], answer: str, *, language: str | None = None) -> float:
    """1.0 if the text has the form of `open_r1` with a block of code in its answer, else 0.0.

    A block is what stands between ```` ```python ```` and the next ```` ``` ````. The language is
    that of the argument, or else of `row["code_language"]`. As in the published rule `c` also finds
    ```` ```cpp ````, since nothing needs to stand after the name.

    Raises:
      ValueError: no `language` is given and the row has none.

    Source: `get_code_format_reward`, github.com/huggingface/open-r1, src/open_r1/rewards.py.
    """
    name = row.get("code_language") if language is None else language
    if not isinstance(name, str) or not name:
        raise ValueError(f"code_block needs a language, as an argument or in the row, got {name!r}")
    return float(_in_lines(answer, f"```{name}", "```"))


def boxed(row: Mapping[str, Any], answer: str) -> float:
    r"""1.0 if the text has a `\boxed{...}` that is closed and not empty, else 0.0."""
    opened: list[int | None] = []  # where the content of each open brace begins, if it is a box
    for found in _BRACES.finditer(answer):
        token = found[0]
        if token == "{":
            opened.append(None)
        elif token == "}":
            start = opened.pop() if opened else None
            if start is not None and answer[start : found.start()].strip():
                return 1.0
        elif token.startswith("\\boxed"):
            opened.append(found.end())
    return 0.0


def _in_lines(text: str, *inside: str) -> bool:
    """Whether the text has the form of `open_r1`, with `inside` in its answer in this order.

    The earliest place of each part leaves the most room for the next, so that one pass finds what
    the published pattern finds by backtracking.
    """
    start, between = "<think>\n", "\n</think>\n<answer>\n"
    if not text.startswith(start):
        return False
    place = len(start)
    for part in (between, *inside):
        place = text.find(part, place)
        if place < 0:
            return False
        place += len(part)
    return re.compile(r"\n</answer>$", re.MULTILINE).search(text, place) is not None
