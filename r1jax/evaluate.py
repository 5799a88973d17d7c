"""Measures a run's model on held-out problems: pass@1, pass@k and maj@k with 95% intervals.

python -m r1jax.evaluate runs/countdown_tiny
python -m r1jax.evaluate runs/countdown_tiny --stage base --samples 16 --k 1,4,16
"""

import argparse
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from r1jax import metrics, restore, settings
from r1jax.config import one_line_errors

SAMPLES = 8  # answers to each problem unless --samples says otherwise
ANSWERS_PER_SLOT = 16  # in one call of the engine: the slots that idle at its end cost little


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One answer and what the task's rules say of it."""

    answer: str  # the prefill included
    length: int  # tokens
    finished: bool
    accuracy: float | None  # 1.0 right, 0.0 wrong; None: could not be judged
    vote: Hashable | None  # None: abstains
    observed: Mapping[str, float]


class Estimate(NamedTuple):
    """A mean over problems and its 95% bootstrap interval."""

    mean: float
    low: float
    high: float
    problems: int


# --------------------------------------------------------------------------- estimators


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n answers, c of which are right, hold a right one.

    The k are drawn without replacement, each set of k being as likely as any other, which makes
    this an unbiased estimate of the chance for k fresh answers: 1 - C(n - c, k) / C(n, k).

    Raises:
      ValueError: not 0 <= c <= n, or not 1 <= k <= n.

    Source: Evaluating Large Language Models Trained on Code, arXiv:2107.03374, equation 1.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"need 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def majority_at_k(votes: Sequence[Hashable | None], right: Sequence[float], k: int) -> float:
    """The mean accuracy of the answer that a majority of k of these answers elects.

    Answer i votes for `votes[i]`; None abstains. Of k answers, the vote that most of them give
    wins, and one of those that gave it is handed in. The result is the exact mean over all sets of
    k of the n answers, over which of several equally frequent votes wins, and over which of its
    voters is handed in, all equally likely: so it does not depend on the order of the answers, and
    is an unbiased estimate for k fresh ones. Where all k abstain the result is wrong.

    Raises:
      ValueError: `votes` and `right` differ in length, or not 1 <= k <= n.

    Source: the vote is that of self-consistency, arXiv:2203.11171.
    """
    n = len(votes)
    if len(right) != n or not 1 <= k <= n:
        raise ValueError(
            f"need as many votes as verdicts and 1 <= k <= n, "
            f"got {n} votes, {len(right)} verdicts, k={k}"
        )
    counts = Counter(vote for vote in votes if vote is not None)
    total = Fraction(0)
    for vote, count in counts.items():
        good = sum(Fraction(r) for v, r in zip(votes, right, strict=True) if v == vote)
        if good:
            others = [other for name, other in counts.items() if name != vote]
            wins = _sets_won(count, others, n - counts.total(), k)
            total += wins * good / count
    return float(total / math.comb(n, k))


def _sets_won(count: int, others: Sequence[int], abstaining: int, k: int) -> Fraction:
    """How many sets of k answers a vote given `count` times wins; shared with t others: 1/(t + 1).

    `others` holds how often each other vote was given.
    """
    won = Fraction(0)
    for height in range(1, min(count, k) + 1):  # how many of the k give this vote
        # Votes given fewer times cannot reach `height`: they are free, like abstentions.
        free = abstaining + sum(other for other in others if other < height)
        ways = Counter({(0, 0): 1})  # (answers taken from rivals, rivals that tie) -> sets
        for rival in (other for other in others if other >= height):
            longer: Counter[tuple[int, int]] = Counter()
            for (taken, ties), sets in ways.items():
                for more in range(min(height, k - height - taken) + 1):
                    tied = ties + (more == height)
                    longer[taken + more, tied] += sets * math.comb(rival, more)
            ways = longer
        for (taken, ties), sets in ways.items():
            rest = math.comb(free, k - height - taken)
            won += Fraction(math.comb(count, height) * sets * rest, ties + 1)
    return won


def measure(problems: Sequence[Sequence[Judged]], ks: Sequence[int]) -> dict[str, Estimate]:
    """pass@k for every k, then maj@k for every k > 1 if any answer has a vote.

    Each is a mean over problems. Answers that could not be judged are left out, and so is, for
    one k, a problem with fewer than k answers left; a measure without problems is absent.
    """
    judged = [[answer for answer in problem if answer.accuracy is not None] for problem in problems]
    voting = any(answer.vote is not None for problem in judged for answer in problem)
    values: dict[str, list[float]] = {}
    for k in ks:
        values[f"pass@{k}"] = [
            pass_at_k(len(problem), sum(answer.accuracy == 1.0 for answer in problem), k)
            for problem in judged
            if len(problem) >= k
        ]
    for k in ks if voting else ():
        if k > 1:
            values[f"maj@{k}"] = [
                majority_at_k([a.vote for a in problem], [a.accuracy or 0.0 for a in problem], k)
                for problem in judged
                if len(problem) >= k
            ]
    return {
        name: Estimate(sum(each) / len(each), *metrics.bootstrap_interval(each), len(each))
        for name, each in values.items()
        if each
    }


# --------------------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m r1jax.evaluate",
        description="Samples answers to held-out problems and prints pass@1, pass@k and maj@k, "
        "each with a 95% bootstrap interval over problems. All answers are kept.",
    )
    restore.arguments(parser)
    parser.add_argument(
        "--samples",
        type=restore.positive,
        metavar="N",
        help=f"answers to each problem (default: {SAMPLES}; 1 if greedy)",
    )
    parser.add_argument(
        "--k", type=_counts, metavar="K,K", help="the k of pass@k and maj@k (default: 1,2,4,... N)"
    )
    parser.add_argument(
        "--rows", type=restore.positive, help="problems (default: as many as the run's own test)"
    )
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="problems from a JSONL file (default: held-out)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the answers, as JSONL; the summary goes beside them, ending in .json "
        "(default: RUN/evaluations/STAGE-STEP-DATA-ROWSxN-tTEMPERATURE.jsonl)",
    )
    return parser


def _counts(text: str) -> list[int]:
    return sorted({restore.positive(part) for part in text.split(",")})


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command: a table on stdout, the answers and a summary in files."""
    args = parser().parse_args(arguments)
    if args.k and args.samples and args.k[-1] > args.samples:
        raise ValueError(f"--k {args.k[-1]} needs as many answers, got --samples {args.samples}")
    model = restore.open_run(
        args.folder, stage=args.stage, checkpoint=args.checkpoint, overrides=args.overrides
    )
    stage = restore.task_stage(model)
    if stage is None:
        raise ValueError(f"{args.folder} has no task to be evaluated on: no Reinforce stage")
    sampling = restore.sampling(args, stage.evaluate_sampling)
    samples, ks = _sizes(args, sampling)
    rows = _rows(args, stage)
    engine = replace(stage.engine, sampling=sampling)
    if args.max_new is not None:
        engine = replace(engine, max_new=args.max_new)
    seed = model.run.seed if args.seed is None else args.seed
    name = args.data.stem if args.data else "test"
    name = f"{model.stage.name}-{model.step}-{name}-{len(rows)}x{samples}-t{sampling.temperature:g}"
    out = args.out or args.folder / "evaluations" / f"{name}.jsonl"
    if out.is_dir() or out.suffix == ".json":
        raise ValueError(f"--out must be a file, and not the summary's (.json), got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)  # if it cannot be made: better told now

    began = time.monotonic()
    prompts, problems = ask(model, stage, rows, engine, samples=samples, seed=seed)
    found = measure(problems, ks)
    summary = {
        "stage": model.stage.name,
        "step": model.step,
        "task": stage.name,
        "data": str(args.data) if args.data else "test",
        "rows": len(rows),
        "samples": samples,
        "sampling": asdict(sampling),
        "max_new": engine.max_new,
        "seed": seed,
        **{measured: estimate._asdict() for measured, estimate in found.items()},
        **_means(problems),
        "time/elapsed": round(time.monotonic() - began, 3),
    }
    save(out, rows, prompts, problems, summary)
    print("\n".join(table(summary, found)))
    if stage.task.vote is None and ks[-1] > 1:
        print("maj@k is not measured: the task has no `vote`", file=sys.stderr)
    print(f"answers: {out}\nsummary: {out.with_suffix('.json')}", file=sys.stderr)


def ask(
    model: restore.Restored,
    stage: settings.Reinforce,
    rows: Sequence[settings.Row],
    engine: settings.Engine,
    *,
    samples: int,
    seed: int,
) -> tuple[list[str], list[list[Judged]]]:
    """The prompt of each row, and the judged answers to it.

    With the run's seed, sampling and problems, the first answer to each problem is the one that
    the run's own evaluation got at this step.

    Raises:
      ValueError: a row lacks a field, or its prompt cannot be read.
    """
    from r1jax.loops.run import stream_key

    task = stage.task
    prompts = [restore.prompt_of(task, row, f"row {i}") for i, row in enumerate(rows, 1)]
    restore.check_prompts(model, prompts, engine.max_prompt)
    calls = -(-len(rows) * samples // (ANSWERS_PER_SLOT * engine.slots))
    at_once = -(-len(rows) // calls)
    answers = restore.make_answers(
        model,
        engine,
        samples=samples,
        at_once=at_once,
        key=stream_key(seed, f"{stage.name}/evaluate", 0),
    )
    problems = []
    for row, group in zip(rows, answers(prompts, 0), strict=True):
        problems.append([judge(task, row, answer) for answer in group])
        if len(problems) % at_once == 0 and len(problems) < len(rows):
            print(f"{len(problems)} of {len(rows)} problems", file=sys.stderr)
    return prompts, problems


def judge(task: settings.Task, row: settings.Row, answer: restore.Answer) -> Judged:
    """What the task says of an answer to `row`."""
    text = task.prefill + answer.text
    return Judged(
        answer=text,
        length=answer.length,
        finished=answer.finished,
        accuracy=task.accuracy(row, text),
        vote=task.vote(row, text) if task.vote else None,
        observed=task.observe(row, text) if task.observe else {},
    )


def save(
    out: Path,
    rows: Sequence[settings.Row],
    prompts: Sequence[str],
    problems: Sequence[Sequence[Judged]],
    summary: Mapping[str, Any],
) -> None:
    """Writes the answers, one JSON object a line, and the summary beside them, each file whole.

    Raises:
      OSError: it names the file; what was there before is left as it was.
    """
    lines = []
    for i, (row, prompt, problem) in enumerate(zip(rows, prompts, problems, strict=True)):
        for j, answer in enumerate(problem):
            vote = None if answer.vote is None else str(answer.vote)
            record = {"problem": i, "sample": j, "row": dict(row), "prompt": prompt}
            record |= {**asdict(answer), "vote": vote}
            lines.append(json.dumps(record, ensure_ascii=False, default=_number))
    # A lone surrogate in an answer has no UTF-8; backslashreplace writes it as JSON's own escape.
    text = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
    metrics.replace(out, text)
    metrics.replace(out.with_suffix(".json"), json.dumps(summary, indent=1).encode() + b"\n")


def table(summary: Mapping[str, Any], found: Mapping[str, Estimate]) -> list[str]:
    """What was measured, in lines for people."""
    source = "held-out problems" if summary["data"] == "test" else f"problems of {summary['data']}"
    samples, temperature = summary["samples"], summary["sampling"]["temperature"]
    lines = [
        f"{summary['stage']}, step {summary['step']:,}: {summary['rows']:,} {source}, "
        f"{samples} answer{'s' * (samples > 1)} each, temperature {temperature:g}",
        f"{'':12}{'mean':>8}   95% interval",
    ]
    for name, (mean, low, high, _) in found.items():
        lines.append(f"{name:12}{mean:8.1%}   {low:.1%} to {high:.1%}")
    lines.append(f"{'cut off':12}{summary['cut']:8.1%}")
    if summary["unjudged"]:
        lines.append(f"{'unjudged':12}{summary['unjudged']:8.1%}")
    lines.append(f"{'length':12}{summary['length']:8.1f}   tokens an answer")
    lines.append(f"{'tokens':12}{summary['tokens']:8,}")
    return lines


def _number(value: Any) -> float:
    return value.item()  # numpy's, as Python's


def _means(problems: Sequence[Sequence[Judged]]) -> dict[str, Any]:
    """Length, share cut off, share not judged and what was observed: means over all answers."""
    from r1jax.loops.rl import means

    answers = [answer for problem in problems for answer in problem]
    tokens = sum(answer.length for answer in answers)
    return {
        "cut": sum(not answer.finished for answer in answers) / len(answers),
        "unjudged": sum(answer.accuracy is None for answer in answers) / len(answers),
        "length": tokens / len(answers),
        "tokens": tokens,
        **means([answer.observed for answer in answers]),
    }


def _sizes(args: argparse.Namespace, sampling: settings.Sampling) -> tuple[int, list[int]]:
    """Answers to each problem, and every k to measure."""
    if sampling.temperature == 0 and (args.samples or 1) > 1:
        raise ValueError(
            f"greedy answers to a problem are all the same: need --samples 1 at temperature 0, "
            f"got {args.samples}"
        )
    samples = args.samples or (1 if sampling.temperature == 0 else SAMPLES)
    ks = args.k or sorted({2**i for i in range(samples.bit_length())} | {samples})
    if ks[-1] > samples:
        raise ValueError(f"--k {ks[-1]} needs as many answers, got --samples {samples}")
    return samples, ks


def _rows(args: argparse.Namespace, stage: settings.Reinforce) -> settings.Rows:
    """The problems to ask about."""
    from r1jax.data.sources import jsonl

    rows = jsonl(args.data) if args.data else stage.task.test()
    default = len(rows) if args.data else min(stage.evaluate_rows, len(rows))
    count = args.rows or default
    if count > len(rows):
        raise ValueError(f"--rows {count} is more than the {len(rows)} that there are")
    return rows[:count]


if __name__ == "__main__":
    main()
