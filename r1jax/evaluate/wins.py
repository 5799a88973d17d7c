"""How often a run's answers beat those it began with, by a score that it may not have been given.

python -m r1jax.evaluate.wins runs/rlhf --part truth

Every evaluation of a reinforcement learning stage asks the same held-out problems. A line for each:
the mean reward, the mean of the part, and the win rate against the first evaluation, with their 95%
bootstrap intervals over problems.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from r1jax import metrics
from r1jax.config import one_line_errors
from r1jax.metrics import Estimate, estimate

Row = Mapping[str, Any]


class Wins(NamedTuple):
    """One evaluation of a stage."""

    step: int
    reward: Estimate
    part: Estimate
    wins: Estimate  # over the first evaluation; a tie is half a win


def wins(samples: Sequence[Row], part: str) -> list[Wins]:
    """Every evaluation of one stage, compared with the first problem by problem by `parts[part]`.

    `samples` are its held-out answers as in samples.jsonl. Problems that are not in both are left
    out, and so are answers without a reward.

    Raises:
      ValueError: an answer has no such part.
    """
    steps: dict[int, dict[str, Row]] = {}
    for sample in samples:
        if sample["reward"] is None:
            continue
        if part not in sample["parts"]:
            known = ", ".join(sample["parts"]) or "none"
            raise ValueError(f"an answer's reward has no part {part!r}; it has {known}")
        problem = json.dumps(sample["row"], sort_keys=True)
        steps.setdefault(sample["step"], {})[problem] = sample
    found = []
    for step in sorted(steps):
        first, here = steps[min(steps)], steps[step]
        both = [
            (first[one]["parts"][part], here[one]["parts"][part]) for one in here if one in first
        ]
        found.append(
            Wins(
                step=step,
                reward=estimate([sample["reward"] for sample in here.values()]),
                part=estimate([sample["parts"][part] for sample in here.values()]),
                wins=estimate([(new > old) + (new == old) / 2 for old, new in both]),
            )
        )
    return found


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command: prints a table for each run."""
    parser = argparse.ArgumentParser(
        prog="python -m r1jax.evaluate.wins",
        description="Prints each evaluation's mean reward, the mean of one of its parts, and by it "
        "the win rate against the first evaluation.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument("--part", required=True, metavar="NAME", help="a part of the reward")
    parser.add_argument("--stage", metavar="NAME", help="default: the last that was evaluated")
    args = parser.parse_args(arguments)
    for folder in args.folders:
        samples = [one for one in metrics.read_samples(folder) if one["split"] == "test"]
        stage = args.stage or (samples[-1]["stage"] if samples else None)
        rows = wins([one for one in samples if one["stage"] == stage], args.part)
        if not rows:
            raise ValueError(f"{folder} has no held-out answers of {stage or 'any stage'}")
        print(f"{folder}, stage {stage}, {rows[0].reward.problems} problems")
        print(f"{'step':>6}{'reward':>26}{args.part:>26}{'wins':>26}")
        for row in rows:
            numbers = [_written(row.reward), _written(row.part), _written(row.wins, share=True)]
            print(f"{row.step:>6}" + "".join(f"{number:>26}" for number in numbers))


def _written(found: Estimate, *, share: bool = False) -> str:
    form = ".1%" if share else ".3f"
    return f"{found.mean:{form}} [{found.low:{form}}, {found.high:{form}}]"


if __name__ == "__main__":
    main()
