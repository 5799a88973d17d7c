"""Trains what a config file describes: `python -m r1jax.train --config configs/countdown_tiny.py`.

The same command again goes on where the run stopped.
"""

import argparse
import sys
from pathlib import Path

from r1jax import config, host

STOPPED = 75  # EX_TEMPFAIL: run the same command again


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m r1jax.train", description=__doc__)
    config.arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run's folder (default: runs/<name>)"
    )
    return parser


@config.one_line_errors
def main() -> int:
    """Runs the command; returns its exit code: 0, or 75 if a signal stopped it."""
    args = parser().parse_args()
    checked = config.check(args.config, args.overrides)
    text = config.describe(checked)
    if args.print_config:
        print("\n".join(text))
        return 0
    folder = args.out or Path("runs") / checked.name
    config.same_or_fail(folder, text)
    if not (folder / "config.txt").exists():
        config.save(folder, text, args.config, args.overrides)
    return train(args.config, args.overrides, folder, text)


def train(spec: str, overrides: list[str], folder: Path, text: list[str]) -> int:
    """Imports JAX and runs the stages; a report is written at the end, stopped or not."""
    host.keep_freed_memory()
    cfg = config.load(spec, overrides)
    from r1jax import pipeline, report, state
    from r1jax.loops.run import Stopped

    with state.catch_sigterm() as stopping:
        try:
            pipeline.run(cfg, folder, text=text, stopping=stopping)
            code = 0
        except Stopped:
            code = STOPPED
    path = report.write(folder)
    print(f"report: {path}", file=sys.stderr)
    if code == STOPPED:
        print("stopped and saved; the same command goes on", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
