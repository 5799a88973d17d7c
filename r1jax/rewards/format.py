"""Scores the form of an answer: thinking in `<think>` tags, then the result in `<answer>` tags."""

from collections.abc import Mapping
from typing import Any

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


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


def tag_count(row: Mapping[str, Any], answer: str) -> float:
    """A quarter for each of the four tags that occurs exactly once, in any order: 0.0 to 1.0."""
    return sum(answer.count(tag) == 1 for tag in TAGS) / len(TAGS)
