"""Scores answers that exist already: a file of questions, gold answers and responses. No JAX."""

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from r1jax.data.files import records
from r1jax.evaluate.judging import Judged, verdicts, votes_of
from r1jax.rewards.math.text import says_where

GOLD = ("gold", "answer")


@dataclass(frozen=True, kw_only=True)
class Given:
    """One question and the responses to it."""

    row: Mapping[str, Any]  # with the verifier's name and what its rule needs
    responses: Sequence[str]
    scores: Sequence[float] | None


def read(path: str | Path) -> list[Given]:
    """The questions of a file whose records have `question`, `gold` or `answer`, `responses`, and
    perhaps `scores`, one number for each response.

    A record may name its `verifier` ("math" otherwise) and hold what that needs; without a gold
    answer it must.

    Raises:
      ValueError: in one line: the file cannot be read, a record lacks a column (all that are
        expected are named) or holds something else than it should, or some have scores only.
    """
    found = []
    for number, record in enumerate(records(path), start=1):
        place = f"{path}: record {number}"
        gold = next((name for name in GOLD if name in record), None)
        missing = {"question", "responses"} - record.keys()
        if missing or (gold is None and "verifier" not in record):
            raise ValueError(
                f"{place} needs columns question, gold or answer, responses, and may have scores; "
                f"it has {', '.join(record) or 'none'}"
            )
        check_names(record, place)
        responses, scores = record["responses"], record.get("scores")
        if not isinstance(responses, list) or not responses:
            raise ValueError(f"{place}: responses must be a list of at least one text")
        if not all(isinstance(response, str) for response in responses):
            raise ValueError(f"{place}: every response must be a text")
        if scores is not None:
            _check_scores(scores, len(responses), place)
        row = {name: record[name] for name in record if name not in ("responses", "scores", "gold")}
        row |= {"answer": record[gold]} if gold else {}
        found.append(Given(row={"verifier": "math"} | row, responses=responses, scores=scores))
    scored = sum(given.scores is not None for given in found)
    if 0 < scored < len(found):
        raise ValueError(f"{path}: {scored} of {len(found)} records have scores: need all or none")
    return found


def judge(given: Sequence[Given]) -> list[list[Judged]]:
    """Each question's responses with their verdicts and votes, in order.

    Lengths are in characters here: a text does not say how many tokens it was.

    Raises:
      ValueError: a gold answer that no rule can read, or an unknown verifier, with its question.
    """
    rows = [each.row for each in given for _ in each.responses]
    found = iter(_verdicts(given, rows))
    problems = []
    for each in given:
        votes = votes_of(each.row, each.responses) or [None] * len(each.responses)
        scores = each.scores or [None] * len(each.responses)
        problems.append(
            [
                Judged(
                    answer=response,
                    length=len(response),
                    finished=True,
                    accuracy=next(found),
                    vote=vote,
                    score=score,
                )
                for response, vote, score in zip(each.responses, votes, scores, strict=True)
            ]
        )
    return problems


def unmarked(given: Sequence[Given]) -> float:
    """The share of responses to questions of mathematics that do not say where their answer is, as
    a box or "the answer is" does: those are judged as they stand, and wrong if they say more."""
    those = [r for each in given if each.row["verifier"] == "math" for r in each.responses]
    return sum(not says_where(response) for response in those) / max(len(those), 1)


def sizes(given: Sequence[Given]) -> list[int]:
    """Every k to measure: the powers of two up to the fewest responses to a question, and these."""
    fewest = min(len(each.responses) for each in given)
    return sorted({2**i for i in range(fewest.bit_length())} | {fewest})


def check_names(record: Mapping[str, Any], place: str) -> None:
    """Raises ValueError for a column that is nearly one of those that may be left out, and for two
    gold answers that differ."""
    for name in ("scores", "verifier"):
        near = difflib.get_close_matches(name, record, n=1, cutoff=0.8)
        if near and name not in record:
            raise ValueError(f"{place}: unknown column {near[0]!r}: should it be {name!r}?")
    golds = [record[name] for name in GOLD if name in record]
    if len(golds) == 2 and golds[0] != golds[1]:
        raise ValueError(f"{place}: gold is {golds[0]!r:.40} and answer {golds[1]!r:.40}: need one")


def _verdicts(given: Sequence[Given], rows: Sequence[Mapping[str, Any]]) -> list[float | None]:
    try:
        return verdicts(rows, [response for each in given for response in each.responses])
    except ValueError:
        # Which question it was is worth a second look: one response tells.
        for number, each in enumerate(given, start=1):
            try:
                verdicts([each.row], [each.responses[0]])
            except ValueError as error:
                raise ValueError(f"record {number}: {error}") from None
        raise


def _check_scores(scores: Any, count: int, place: str) -> None:
    if not isinstance(scores, list) or len(scores) != count:
        raise ValueError(
            f"{place}: scores must be a list of {count} numbers, one for each response"
        )
    for score in scores:
        if isinstance(score, bool) or not isinstance(score, Real) or not math.isfinite(score):
            raise ValueError(f"{place}: a score must be a finite number, got {score!r:.40}")
