"""Verdicts on answers, which of them agree, and what the two say over many problems."""

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from r1jax.evaluate.estimators import best_at_k, majority_at_k, pass_at_k, weighted_at_k
from r1jax.metrics import Estimate, estimate
from r1jax.rewards import code, countdown, math
from r1jax.rewards.dispatch import by_verifier
from r1jax.rewards.math.score import decide
from r1jax.rewards.math.text import final_answer

Row = Mapping[str, Any]
Votes = list[Hashable | None]

MAX_ASKED = 8  # pairs of a problem's answers that math-verify compares


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One answer and what the task's rules say of it."""

    answer: str  # the prefill included
    length: int  # tokens
    finished: bool
    accuracy: float | None  # 1.0 right, 0.0 wrong; None: could not be judged
    vote: Hashable | None  # None: abstains
    observed: Mapping[str, float] = field(default_factory=dict)
    score: float | None = None  # a reward model's


# --------------------------------------------------------------------------- verdicts


def verdicts(rows: Sequence[Row], answers: Sequence[str]) -> list[float | None]:
    """`by_verifier` of each answer to the row beside it; formulas and programs in one batch each.

    Raises:
      ValueError: as `by_verifier`.
    """
    found: list[float | None] = [None] * len(answers)
    places: dict[Any, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(row.get("verifier"), []).append(i)
    for name, those in places.items():
        chosen = [rows[i] for i in those], [answers[i] for i in those]
        if name in _BATCHED:
            values = _BATCHED[name](*chosen)
        else:
            values = [by_verifier(row, answer) for row, answer in zip(*chosen, strict=True)]
        for i, value in zip(those, values, strict=True):
            found[i] = value
    return found


def _math_verdicts(rows: Sequence[Row], answers: Sequence[str]) -> list[float | None]:
    """`math.accuracies`, which reads an answer's final answer only: equal ones are judged once."""
    keys = [(id(row), final_answer(answer)) for row, answer in zip(rows, answers, strict=True)]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    found = math.accuracies([rows[i] for i in first.values()], [answers[i] for i in first.values()])
    by_key = dict(zip(first, found, strict=True))
    return [by_key[key] for key in keys]


_BATCHED: Mapping[Any, Callable[..., list[float | None]]] = {
    "math": _math_verdicts,
    "code": code.accuracies,
}


# --------------------------------------------------------------------------- votes


def votes_of(row: Row, answers: Sequence[str]) -> Votes | None:
    """What each answer to `row` votes for, by the rule of the row's verifier; None: it has none.

    Answers that the verifier takes for the same have the same vote: see `math_votes` and
    `r1jax.rewards.countdown.answer_key`. Programs have no vote.
    """
    rule = _VOTES.get(row.get("verifier"))
    return None if rule is None else rule(row, answers)


def math_votes(answers: Sequence[str]) -> Votes:
    r"""One text for each group of answers that say the same; None: no final answer.

    `0.5`, `1/2` and `\frac12` are one vote. A group is made of the final answers that the verifier
    (`r1jax.rewards.math.accuracy`) accepts where the group's most frequent one is the gold answer.
    To accept is not quite an equivalence (12% is 12 and is 0.12), so each final answer joins the
    first such group, the most frequent first: the order of the answers does not count. Pairs that
    only math-verify can tell are given to it up to `MAX_ASKED` a problem, then count as different.
    """
    texts = [final_answer(answer) for answer in answers]
    counts = Counter(text for text in texts if text)
    group: dict[str, str] = {}
    unsure: list[tuple[str, str]] = []
    for text in sorted(counts, key=lambda text: (-counts[text], text)):
        asked = []
        for first in dict.fromkeys(group.values()):
            same = _same(first, text)
            if same:
                group[text] = first
                break
            if same is None:
                asked.append((first, text))
        else:
            group[text] = text
            unsure += asked
    if unsure:
        _ask(group, unsure[:MAX_ASKED])
    return [group[text] if text else None for text in texts]


@lru_cache(maxsize=1 << 17)  # wrong numbers come again from problem to problem
def _same(first: str, text: str) -> bool | None:
    return decide(first, text)


def _ask(group: dict[str, str], pairs: Sequence[tuple[str, str]]) -> None:
    """Joins the groups of the pairs that math-verify takes for the same."""
    rows = [{"answer": first} for first, _ in pairs]
    found = math.accuracies(rows, [f"<answer>{text}</answer>" for _, text in pairs])
    for (first, text), same in zip(pairs, found, strict=True):
        if same and group[text] != group[first]:
            old, new = group[text], group[first]
            group.update({name: new for name, to in group.items() if to == old})


def _math(row: Row, answers: Sequence[str]) -> Votes:
    del row
    return math_votes(answers)


def _countdown(row: Row, answers: Sequence[str]) -> Votes:
    return [countdown.answer_key(row, answer) for answer in answers]


_VOTES: Mapping[Any, Callable[[Row, Sequence[str]], Votes]] = {
    "math": _math,
    "countdown": _countdown,
    "tiny_zero": _countdown,
}


# --------------------------------------------------------------------------- over many problems


def measure(problems: Sequence[Sequence[Judged]], ks: Sequence[int]) -> dict[str, Estimate]:
    """pass@k for every k; for k > 1 maj@k if any answer has a vote, and best@k and weighted@k if
    all answers have scores.

    Each is a mean over problems. Answers that could not be judged are left out, and so is, for
    one k, a problem with fewer than k answers left; a measure without problems is absent. Scores
    below 0 cannot be votes' weights: weighted@k is absent.
    """
    judged = [[answer for answer in problem if answer.accuracy is not None] for problem in problems]
    answers = [answer for problem in judged for answer in problem]
    scores = [answer.score for answer in answers if answer.score is not None]
    voting = any(answer.vote is not None for answer in answers)
    scored = bool(answers) and len(scores) == len(answers)
    names = ["pass"]
    names += ["maj"] if voting else []
    names += ["best"] if scored else []
    names += ["weighted"] if scored and voting and min(scores) >= 0 else []
    values: dict[str, list[float]] = {}
    for name in names:
        for k in ks:
            if k > 1 or name == "pass":
                enough = [problem for problem in judged if len(problem) >= k]
                values[f"{name}@{k}"] = [_at_k(name, problem, k) for problem in enough]
    return {name: estimate(each) for name, each in values.items() if each}


def _at_k(name: str, problem: Sequence[Judged], k: int) -> float:
    right = [answer.accuracy or 0.0 for answer in problem]
    votes = [answer.vote for answer in problem]
    scores = [answer.score or 0.0 for answer in problem]
    match name:
        case "pass":
            return pass_at_k(len(problem), sum(value == 1.0 for value in right), k)
        case "maj":
            return majority_at_k(votes, right, k)
        case "best":
            return best_at_k(scores, right, k)
        case _:
            return weighted_at_k(votes, scores, right, k)
