"""Steps of building a data set: functions from rows to rows, listed by name in a `Build` stage.

    passes={
        "wrong": partial(keep, where=right),
        "mixed languages": partial(keep, where=partial(one_language, least=0.95)),
        "best": keep_best,
        "general": partial(mix, others=partial(jsonl, "general.jsonl"), ratio=(3, 1)),
    }

`apply` counts what each leaves. Filters of one row are in `filters`, those that compare texts in
`duplicates`.
"""

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from r1jax.data.filters import text
from r1jax.rewards.weighted import Reward, score_many

Row = Mapping[str, Any]
Rows = Sequence[Row]
Pass = Callable[[Rows], Rows]
Messages = Sequence[Mapping[str, str]]


class Count(NamedTuple):
    """How many rows a step left."""

    name: str
    rows: int


def apply(rows: Rows, passes: Mapping[str, Pass], *, stage: str) -> tuple[Rows, list[Count]]:
    """The rows after all passes of a stage, and how many each of them left, in order.

    Raises:
      ValueError: a pass left none; it is named.
    """
    counts = []
    for name, one in passes.items():
        before, rows = len(rows), one(rows)
        if not len(rows):
            raise ValueError(f"{stage}: {name!r} leaves none of {before:,} rows")
        counts.append(Count(name, len(rows)))
    return rows, counts


# --------------------------------------------------------------------------- choosing


def keep(rows: Rows, *, where: Callable[[Row], bool]) -> Rows:
    """The rows for which `where` says so."""
    return [row for row in rows if where(row)]


def keep_judged(rows: Rows, *, reward: Reward, least: float) -> Rows:
    """The rows whose answer gets a reward of at least `least`; without a reward it is dropped.

    A judge, which is a `Batched` reward, is asked about all of them at once.
    """
    problems = [row.get("row", row) for row in rows]
    scored = score_many(reward, problems, [text(row, "answer") for row in rows])
    return [
        row
        for row, (value, _) in zip(rows, scored, strict=True)
        if value is not None and value >= least
    ]


def shorter(row: Row) -> float:
    """Higher for a shorter answer: minus its tokens or, where they are not known, characters."""
    size = row.get("num_tokens")
    return -float(len(text(row, "answer")) if size is None else size)


def keep_best(rows: Rows, *, number: int = 1, by: Callable[[Row], float] = shorter) -> Rows:
    """The `number` answers to each problem that are highest by `by`; of equals, the first.

    Rows stay in their order.
    """
    chosen = set()
    for places in _by_problem(rows).values():
        chosen |= set(sorted(places, key=lambda i: (-by(rows[i]), i))[:number])
    return [row for i, row in enumerate(rows) if i in chosen]


def keep_pass_rate(rows: Rows, *, least: float, most: float) -> Rows:
    """All answers to those problems of which a share from `least` to `most` was answered right.

    To be used before wrong answers are dropped. Answers that could not be judged do not count;
    a problem without others is dropped. PRIME keeps 0.2 to 0.8, Open-R1 what lies between 0.1 and
    0.6 (there the two themselves are out).

    Source: scripts/pass_rate_filtering and recipes/dataset_filtering/filter_dapo.yaml,
    github.com/huggingface/open-r1; arXiv:2502.01456.
    """
    chosen = set()
    for places in _by_problem(rows).values():
        rate = _pass_rate([rows[i] for i in places])
        if rate is not None and least <= rate <= most:
            chosen |= set(places)
    return [row for i, row in enumerate(rows) if i in chosen]


def problems(rows: Rows) -> Rows:
    """The problems of answers, each once, as they were in the source, with a `pass_rate`.

    It is the share of right answers among those that were judged, None where none was.
    """
    groups = _by_problem(rows).values()
    return [
        {**rows[places[0]]["row"], "pass_rate": _pass_rate([rows[i] for i in places])}
        for places in groups
    ]


def sort(rows: Rows, *, by: str, descending: bool = False) -> Rows:
    """The rows in the order of a field; of equals, the first comes first.

    A curriculum is `by="pass_rate", descending=True`, the easy problems first, for an RL stage
    with `order="given"`.

    Raises:
      ValueError: a row lacks the field, or has None there.
    """
    for row in rows:
        if row.get(by) is None:
            raise ValueError(f"cannot sort by {by!r}: a row has {row.get(by, 'no such field')}")
    return sorted(rows, key=lambda row: row[by], reverse=descending)


def pairs(rows: Rows, *, reward: Reward) -> Rows:
    """The answers of the highest and of the lowest reward to each problem: `prompt`, `chosen`,
    `rejected`, and the problem's `row`.

    Of equals it is the first. A problem whose answers are all worth the same is left out, and so
    is an answer that could not be judged.
    """
    groups = _by_problem(rows).values()
    scored = score_many(reward, [row["row"] for row in rows], [text(row, "answer") for row in rows])
    worth = {i: value for i, (value, _) in enumerate(scored) if value is not None}
    found = []
    for places in groups:
        judged = [i for i in places if i in worth]
        best, worst = (pick(judged, key=worth.__getitem__, default=-1) for pick in (max, min))
        if judged and worth[best] > worth[worst]:
            chosen, rejected = text(rows[best], "answer"), text(rows[worst], "answer")
            problem = {"prompt": rows[best]["prompt"], "row": rows[best]["row"]}
            found.append({**problem, "chosen": chosen, "rejected": rejected})
    return found


# --------------------------------------------------------------------------- changing


def verify(rows: Rows, *, accuracy: Reward) -> Rows:
    """The rows with the accuracy of their answers as they are now, after a rewrite say."""
    return [{**row, "accuracy": accuracy(row.get("row", row), text(row, "answer"))} for row in rows]


def rewrite(
    rows: Rows,
    *,
    complete: Callable[[Sequence[Messages]], Sequence[str | None]],
    messages: Callable[[Row], Messages],
    read: Callable[[str], str | None] = str.strip,
) -> Rows:
    """The rows with the answers that a teacher makes of them; the old ones are in `original`.

    `read` takes the new answer out of a reply. A row without a reply, or without an answer in it,
    is dropped. Its accuracy and its number of tokens are those of the old answer: None from now
    on, until `verify`.
    """
    found = []
    replies = complete([messages(row) for row in rows])
    for row, reply in zip(rows, replies, strict=True):
        answer = None if reply is None else read(reply)
        if answer:
            changed = {"answer": answer, "accuracy": None, "num_tokens": None}
            found.append({**row, **changed, "original": text(row, "answer")})
    return found


def retell(rows: Rows, *, tell: Callable[[Sequence[str], str], str]) -> Rows:
    """One row for each problem that was answered right: its first right answer, told anew by
    `tell(wrong, right)`, which is also given the wrong answers that came before that one.

    What was tried in vain can so become a part of the text. Answers that could not be judged are
    passed over. As after `rewrite`, accuracy and number of tokens are None until `verify`, and the
    right answer as it was is in `original`.
    """
    found = []
    for places in _by_problem(rows).values():
        wrong: list[str] = []
        for row in (rows[i] for i in places):
            answer, value = text(row, "answer"), row.get("accuracy")
            if value is not None and value >= 1.0:
                changed = {"answer": tell(wrong, answer), "accuracy": None, "num_tokens": None}
                found.append({**row, **changed, "original": answer})
                break
            if value is not None:
                wrong.append(answer)
    return found


def mix(
    rows: Rows, *, others: Callable[[], Rows], ratio: tuple[float, float], seed: int = 0
) -> Rows:
    """As many rows and others as stand in `ratio` to each other, and none of them twice.

    `ratio=(600, 200)` takes three rows for one of the others, until one of them has no more. What
    is left out is chosen at random. The rows come first: training shuffles them.

    Raises:
      ValueError: a number of `ratio` is not > 0, or the result would hold none of one kind.
    """
    if not all(part > 0 for part in ratio):
        raise ValueError(f"ratio needs two numbers > 0, got {ratio}")
    kinds = (rows, others())
    shares = [Fraction(part) for part in ratio]
    unit = min(len(kind) / share for kind, share in zip(kinds, shares, strict=True))
    sizes = [int(unit * share) for share in shares]
    if not all(sizes):
        raise ValueError(
            f"{len(kinds[0]):,} rows and {len(kinds[1]):,} others are too few for {ratio}"
        )
    mixed: list[Row] = []
    for number, (kind, size) in enumerate(zip(kinds, sizes, strict=True)):
        chosen = sorted(random.Random(f"{seed} {number}").sample(range(len(kind)), size))
        mixed += [kind[i] for i in chosen]
    return mixed


def steps(rows: Rows, *, end: str) -> Rows:
    """Each answer up to the end of each of its steps, and whole, with its accuracy as `label`.

    A step ends with the text `end`. So a model of these labels learns, of an answer in the making,
    the chance that it comes out right: a process model. An answer that could not be judged is
    dropped.

    Raises:
      ValueError: `end` is empty.

    Source: Math-Shepherd, arXiv:2312.08935, with one completion of each step: the answer's own.
    """
    if not end:
        raise ValueError("need a text that ends a step, got an empty one")
    found = []
    for row in rows:
        if row.get("accuracy") is None:
            continue
        *pieces, last = text(row, "answer").split(end)
        parts = [end.join(pieces[: i + 1]) + end for i in range(len(pieces))]
        parts += [parts[-1] + last if parts else last] if last else []
        found += [{**row, "answer": part, "label": float(row["accuracy"])} for part in parts]
    return found


def _by_problem(rows: Rows) -> Mapping[Any, list[int]]:
    """The places of the answers to each problem, in the order in which problems come."""
    groups = defaultdict(list)
    for i, row in enumerate(rows):
        if "problem" not in row or "row" not in row:
            raise ValueError(
                f"this pass needs rows of answers, with `problem` and `row`; a row has "
                f"{', '.join(map(str, row)) or 'none'}"
            )
        groups[row["problem"]].append(i)
    return groups


def _pass_rate(answers: Rows) -> float | None:
    judged = [row["accuracy"] for row in answers if row.get("accuracy") is not None]
    return sum(value >= 1.0 for value in judged) / len(judged) if judged else None
