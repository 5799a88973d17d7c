"""How often a reward model prefers the better of two answers, on pairs that it has not seen.

python -m r1jax.evaluate.pairs runs/rlhf runs/rlhf/data/held_out/rows.jsonl --stage reward
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from r1jax import host
from r1jax.config import one_line_errors
from r1jax.data.sources import jsonl
from r1jax.metrics import estimate


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command: prints the share of pairs that the model tells right."""
    parser = argparse.ArgumentParser(
        prog="python -m r1jax.evaluate.pairs",
        description="Prints the share of pairs of which a reward model scores the better answer "
        "higher, with a 95% bootstrap interval.",
    )
    parser.add_argument("folder", type=Path, metavar="RUN", help="the folder of its run")
    parser.add_argument("pairs", type=Path, metavar="FILE", help="prompt, chosen, rejected (JSONL)")
    parser.add_argument("--stage", metavar="NAME", help="default: the last with a checkpoint")
    args = parser.parse_args(arguments)
    rows = jsonl(args.pairs, need=("prompt", "chosen", "rejected"))[:]
    host.prepare()

    from r1jax.reward_model import RewardModel, preferred

    right = estimate(preferred(rows, model=RewardModel(run=str(args.folder), stage=args.stage)))
    interval = f"[{right.low:.1%}, {right.high:.1%}]"
    print(f"{args.pairs}: {len(rows):,} pairs, right {right.mean:.1%} {interval}")


if __name__ == "__main__":
    main()
