"""`r1jax.evaluate RUN --strategy ...`: which strategies, what they may spend, where it is kept."""

import argparse
import pkgutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

from r1jax import restore, settings
from r1jax.evaluate import curves, sampled
from r1jax.evaluate.problems import Problems
from r1jax.search.budget import Forcing
from r1jax.search.paths import Sample, Value, as_probability, by_text

PATHS_PER_SLOT = 4  # in one call of the engine


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what says how tokens are spent."""
    group = parser.add_argument_group(
        "accuracy against tokens",
        "One curve for each strategy over the same problems, instead of pass@k of one.",
    )
    group.add_argument(
        "--strategy",
        action="append",
        default=[],
        dest="strategies",
        metavar="NAME",
        help=f"one of {', '.join(curves.STRATEGIES)}; may be given again",
    )
    group.add_argument(
        "--sizes",
        type=counts,
        default=[1, 2, 4, 8],
        metavar="K,K",
        help="answers, a beam's width, a tree's rounds or a number of waits (default: 1,2,4,8)",
    )
    group.add_argument(
        "--budgets", type=counts, default=[], metavar="T,T", help="of thinking, in tokens, for cut"
    )
    group.add_argument(
        "--score",
        metavar="RUN|MODULE:FUNCTION",
        help="a reward model for best and weighted, a process model for guided and tree: a run "
        "that trained one, whose scores are read as log odds, or a function of the restored run "
        "that gives (prompts, answers) -> numbers",
    )
    group.add_argument(
        "--rollouts",
        type=restore.positive,
        default=0,
        metavar="N",
        help="tree: a node's value is the mean score of N ways to finish it (default: its own)",
    )
    group.add_argument(
        "--branch", type=restore.positive, default=4, help="continuations of a path (default: 4)"
    )
    group.add_argument(
        "--step", default="\n\n", metavar="TEXT", help="what ends a step (default: an empty line)"
    )
    forcing = Forcing(budget=0)
    for name, about in (
        ("close", "what ends thinking"),
        ("closing", "put in where thinking is cut"),
        ("wait", "put in where thinking is made to go on"),
    ):
        default = getattr(forcing, name)
        about = f"{about} (default: {default!r})"
        group.add_argument(f"--{name}", default=default, metavar="TEXT", help=about)


def counts(text: str) -> list[int]:
    """Numbers of at least 1, each once, in rising order, for argparse."""
    return sorted({restore.positive(part) for part in text.split(",")})


def check(args: argparse.Namespace) -> None:
    """Passes if the strategies asked for can be run.

    Raises:
      ValueError: as `curves.check`; `--samples`, `--k` or a single greedy answer beside them.
    """
    if args.samples or args.k:
        raise ValueError("--samples and --k are not for --strategy: --sizes says how many answers")
    curves.check(args.strategies, _plan(args, 1), scored=args.score is not None)


def main(
    args: argparse.Namespace, model: restore.Restored, found: Problems, out: Path, seed: int
) -> None:
    """Runs the strategies; a table on stdout, every answer in `out`, the points beside it, each as
    soon as it is there.

    Raises:
      ValueError: as `curves.run`; the scorer cannot be found.
    """
    from r1jax.loops.run import stream_key
    from r1jax.search.model import make_force, make_samples, root

    began = time.monotonic()
    task, engine = found.task, found.engine
    if engine.sampling.temperature == 0 and args.strategies != ["plain"]:
        raise ValueError("need --temperature above 0: greedy continuations are all the same")
    prompts = [settings.prompt_of(task, row, f"row {i}") for i, row in enumerate(found.rows, 1)]
    restore.check_prompts(model, prompts, engine.max_prompt)
    direct = None
    if found.direct is not None:
        texts = [found.direct(row) + task.prefill for row in found.rows]
        direct = [root(model, i, text) for i, text in enumerate(texts)]

    with_key = make_samples(model, engine, at_once=PATHS_PER_SLOT * engine.slots)

    def sample(name: str) -> Sample:
        return with_key(stream_key(seed, f"{found.stage}/search/{name}", 0))

    asked = curves.Asked(
        rows=found.rows,
        task=task,
        roots=[root(model, i, prompt) for i, prompt in enumerate(prompts)],
        direct=direct,
        sample=sample,
        force=make_force(model, engine),
        value=None if args.score is None else scorer(args.score, model),
    )
    about = {
        "stage": model.stage.name,
        "step": model.step,
        "task": found.stage,
        "data": found.data,
        "scorer": args.score,
        "sampling": asdict(engine.sampling),
        "max_new": engine.max_new,
        "seed": seed,
    }
    places = out.with_suffix(".curves.jsonl")
    print(f"{len(found.rows):,} problems of {found.data}; tokens sampled a problem\n{curves.HEAD}")
    points, records = [], []
    for some, seen in curves.run(asked, args.strategies, _plan(args, engine.max_new)):
        print("\n".join(map(curves.line, some)), flush=True)
        points += some
        records += seen
        # Whole files every time: whatever ends the command, what was paid for is there.
        elapsed = round(time.monotonic() - began, 3)
        sampled.write_lines(out, records)
        sampled.write_lines(places, curves.lines(points, about | {"time/elapsed": elapsed}))
    print(f"answers: {out}\ncurves: {places}", file=sys.stderr)


def _plan(args: argparse.Namespace, max_new: int) -> curves.Plan:
    return curves.Plan(
        sizes=args.sizes,
        budgets=args.budgets,
        branch=args.branch,
        step=args.step,
        forcing=Forcing(close=args.close, closing=args.closing, wait=args.wait, budget=max_new),
        rollouts=args.rollouts,
    )


def scorer(name: str, model: restore.Restored) -> Value:
    """The value of a path that `--score NAME` means: see its help.

    Raises:
      ValueError: there is no such function, or the run trained no reward model.
    """
    if Path(name).is_dir():
        from r1jax.reward_model import RewardModel, opened

        return by_text(as_probability(opened(RewardModel(run=name))))
    try:
        make = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--score {name} cannot be found: {error}") from None
    return by_text(make(model))
