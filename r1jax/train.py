"""Trains what a config file describes: `python -m r1jax.train --config configs/countdown_tiny.py`.

All stages are run in order, data building among them. The same command again goes on where the run
stopped; stages that are done stay as they are.
"""

import argparse
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from r1jax import config, host, manifest
from r1jax.stopping import catch_signals

STOPPED = 75  # EX_TEMPFAIL: run the same command again


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m r1jax.train", description=__doc__)
    config.arguments(parser)
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="the run's folder (default: runs/<name>)"
    )
    parser.add_argument(
        "--after",
        type=Path,
        metavar="RUN",
        help="begin after the stages that the run in this folder has done with the same settings",
    )
    parser.add_argument(
        "--check",
        type=int,
        nargs="?",
        const=0,
        metavar="DEVICES",
        help="say what each of so many devices would hold (default: those of this machine), read "
        "the data, try prompts, loss and rewards, and leave",
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
    if args.check is not None:
        return check(args.config, args.overrides, devices=args.check)
    folder = args.out or Path("runs") / checked.name
    config.same_or_fail(folder, text, begun=manifest.begun(folder))
    return train(args.config, args.overrides, folder, text, after=args.after)


def check(spec: str, overrides: list[str], *, devices: int) -> int:
    """Prints how a run would lie on `devices` (0: those here), and what is found before it.

    The first needs neither data nor weights.
    """
    host.prepare()
    cfg = config.load(spec, overrides)
    import jax

    from r1jax import plan, preflight

    print("\n".join(plan.plan(cfg, devices or jax.device_count())), flush=True)
    print("\n".join(preflight.check(cfg)))
    return 0


def train(
    spec: str, overrides: list[str], folder: Path, text: list[str], *, after: Path | None = None
) -> int:
    """Imports JAX and runs the stages; a report is written at the end, whatever ended them.

    A new run begins after the stages that it shares with the one in the folder `after`.

    The folder is made after everything was checked that can be.
    """
    host.prepare()
    cfg = config.load(spec, overrides)
    from r1jax import pipeline, preflight, report, reuse
    from r1jax.loops.run import Stopped

    preflight.check(cfg)
    if after is not None and not (folder / "config.txt").exists():
        done = reuse.take_over(folder, after, text)
        print(f"taken over from {after}: {', '.join(done)}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder), catch_signals() as stopping:
        if not config.is_saved(folder, text):  # new, or with changes to what has not begun
            config.save(folder, text, spec, overrides)
        try:
            pipeline.run(cfg, folder, text=text, stopping=stopping)
            code = 0
        except Stopped:
            code = STOPPED
        except ValueError:
            with suppress(ValueError, OSError):  # the first error is the one to tell
                report.write(folder)
            raise
    path = report.write(folder)
    print(f"report: {path}", file=sys.stderr)
    if code == STOPPED:
        print("stopped and saved; the same command goes on", file=sys.stderr)
    return code


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keeps a second process out of the folder. The lock goes with this one, however it ends.

    Raises:
      ValueError: another process is training there.
    """
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{folder}: another process is training here") from None
        yield


if __name__ == "__main__":
    sys.exit(main())
