"""Samples answers to problems from a run's model, judges them, keeps them all."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from r1jax import metrics, restore, settings
from r1jax.evaluate.judging import Judged, verdicts, votes_of
from r1jax.metrics import Estimate
from r1jax.rewards.dispatch import by_verifier

ANSWERS_PER_SLOT = 16  # in one call of the engine: the slots that idle at its end cost little


def ask(
    model: restore.Restored,
    task: settings.Task,
    rows: Sequence[settings.Row],
    engine: settings.Engine,
    *,
    samples: int,
    key: Any,
) -> tuple[list[str], list[list[Judged]]]:
    """The prompt of each row, and the judged answers to it.

    With the run's seed, sampling and problems, the first answer to each problem is the one that
    the run's own evaluation got at this step.

    Raises:
      ValueError: a row lacks a field, or its prompt cannot be read.
    """
    prompts = [settings.prompt_of(task, row, f"row {i}") for i, row in enumerate(rows, 1)]
    restore.check_prompts(model, prompts, engine.max_prompt)
    calls = -(-len(rows) * samples // (ANSWERS_PER_SLOT * engine.slots))
    at_once = -(-len(rows) // calls)
    answers = restore.make_answers(model, engine, samples=samples, at_once=at_once, key=key)
    problems = []
    for row, group in zip(rows, answers(prompts, 0), strict=True):
        problems.append(judge(task, row, group))
        if len(problems) % at_once == 0 and len(problems) < len(rows):
            print(f"{len(problems)} of {len(rows)} problems", file=sys.stderr)
    return prompts, problems


def judge(
    task: settings.Task, row: settings.Row, answers: Sequence[restore.Answer]
) -> list[Judged]:
    """What the task says of each of the answers to `row`."""
    texts = [task.prefill + answer.text for answer in answers]
    if task.accuracy is by_verifier:
        accuracy = verdicts([row] * len(texts), texts)
    else:
        accuracy = [task.accuracy(row, text) for text in texts]
    return [
        Judged(
            answer=text,
            length=answer.length,
            finished=answer.finished,
            accuracy=value,
            vote=vote,
            observed=task.observe(row, text) if task.observe else {},
        )
        for answer, text, value, vote in zip(
            answers, texts, accuracy, votes(task, row, texts), strict=True
        )
    ]


def votes(task: settings.Task, row: settings.Row, texts: Sequence[str]) -> Sequence[Any]:
    """What each answer votes for: by the task's own rule, else by the row's verifier's."""
    if task.vote is not None:
        return [task.vote(row, text) for text in texts]
    return votes_of(row, texts) or [None] * len(texts)


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
            lines.append(record | {**asdict(answer), "vote": vote})
    write_lines(out, lines)
    metrics.replace(out.with_suffix(".json"), json.dumps(summary, indent=1).encode() + b"\n")


def write_lines(out: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes a JSONL file, whole or not at all."""
    lines = [json.dumps(record, ensure_ascii=False, default=_number) for record in records]
    # A lone surrogate in an answer has no UTF-8; backslashreplace writes it as JSON's own escape.
    text = "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")
    metrics.replace(out, text)


def means(problems: Sequence[Sequence[Judged]]) -> dict[str, Any]:
    """Length, share cut off, share not judged and what was observed: means over all answers."""
    from r1jax.loops.rl import means

    answers = [answer for problem in problems for answer in problem]
    tokens = sum(answer.length for answer in answers)
    return {
        "cut": sum(not answer.finished for answer in answers) / len(answers),
        "unjudged": unjudged(problems),
        "length": tokens / len(answers),
        "tokens": tokens,
        **means([answer.observed for answer in answers]),
    }


def unjudged(problems: Sequence[Sequence[Judged]]) -> float:
    """The share of answers that could not be judged."""
    answers = [answer for problem in problems for answer in problem]
    return sum(answer.accuracy is None for answer in answers) / len(answers)


def table(summary: Mapping[str, Any], found: Mapping[str, Estimate]) -> list[str]:
    """What was measured, in lines for people."""
    source = "held-out problems" if summary["data"] == "test" else f"problems of {summary['data']}"
    samples, temperature = summary["samples"], summary["sampling"]["temperature"]
    lines = [
        f"{summary['stage']}, step {summary['step']:,}: {summary['rows']:,} {source}, "
        f"{samples} answer{'s' * (samples > 1)} each, temperature {temperature:g}",
        *intervals(found),
        f"{'cut off':12}{summary['cut']:8.1%}",
    ]
    if summary["unjudged"]:
        lines.append(f"{'unjudged':12}{summary['unjudged']:8.1%}")
    lines.append(f"{'length':12}{summary['length']:8.1f}   tokens an answer")
    lines.append(f"{'tokens':12}{summary['tokens']:8,}")
    return lines


def intervals(found: Mapping[str, Estimate]) -> list[str]:
    lines = [f"{'':12}{'mean':>8}   95% interval"]
    for name, (mean, low, high, _) in found.items():
        lines.append(f"{name:12}{mean:8.1%}   {low:.1%} to {high:.1%}")
    return lines


def _number(value: Any) -> float:
    return value.item()  # numpy's, as Python's
