"""Measures a run's model on held-out problems, or answers that exist already in a file.

python -m r1jax.evaluate runs/countdown_tiny
python -m r1jax.evaluate runs/countdown_tiny --stage base --samples 16 --k 1,4,16
python -m r1jax.evaluate runs/mine --dataset gsm8k --data gsm8k_test.jsonl --template chat
python -m r1jax.evaluate runs/countdown_tiny --strategy majority --strategy beam --step .
python -m r1jax.evaluate --answers answers.jsonl
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from r1jax import restore, settings
from r1jax.config import one_line_errors
from r1jax.data import eval_sets
from r1jax.evaluate import answers, sampled, strategies
from r1jax.evaluate.judging import measure
from r1jax.evaluate.problems import TEMPLATES, Problems, find_problems

SAMPLES = 8  # answers to each problem unless --samples says otherwise


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m r1jax.evaluate",
        description="Samples answers to held-out problems and prints pass@1, pass@k and maj@k, "
        "each with a 95% bootstrap interval over problems. All answers are kept. Or scores the "
        "answers of a file.",
    )
    restore.arguments(parser, required=False)
    parser.add_argument(
        "--answers",
        type=Path,
        metavar="FILE",
        help="score these and ask no model: records with question, gold or answer, responses (a "
        "list of texts) and perhaps scores (a number each, for best of k)",
    )
    parser.add_argument(
        "--samples",
        type=restore.positive,
        metavar="N",
        help=f"answers to each problem (default: {SAMPLES}; 1 if greedy)",
    )
    parser.add_argument(
        "--k",
        type=strategies.counts,
        metavar="K,K",
        help="the k of pass@k and maj@k (default: 1,2,4,... N)",
    )
    parser.add_argument(
        "--rows", type=restore.positive, help="problems (default: as many as the run's own test)"
    )
    parser.add_argument("--data", type=Path, metavar="FILE", help="problems (default: held-out)")
    parser.add_argument(
        "--dataset",
        choices=eval_sets.SETS,
        metavar="NAME",
        help="what --data is: one of %(choices)s (default: JSONL rows of the run's own task)",
    )
    parser.add_argument(
        "--template",
        choices=TEMPLATES,
        default="question",
        help="what a problem of --dataset is put into (default: nothing)",
    )
    parser.add_argument(
        "--direct", action="store_true", help="ask a --dataset for the answer without reasoning"
    )
    parser.add_argument(
        "--prefill", default="", metavar="TEXT", help="how every answer to a --dataset begins"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="the answers, as JSONL; the summary goes beside them, ending in .json "
        "(default: RUN/evaluations/STAGE-STEP-DATA-ROWSxN-tTEMPERATURE.jsonl; for --answers none)",
    )
    strategies.arguments(parser)
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command: a table on stdout, the answers and a summary in files."""
    args = parser().parse_args(arguments)
    if (args.folder is None) == (args.answers is None):
        raise ValueError("need either a run's folder or --answers FILE")
    if args.answers is not None:
        score_answers(args)
    else:
        sample_answers(args)


def score_answers(args: argparse.Namespace) -> None:
    """Prints what the answers of a file are worth; with --out, writes each one's verdict."""
    refuse_others(args)
    began = time.monotonic()
    given = answers.read(args.answers)
    given = given[: args.rows]
    ks = args.k or answers.sizes(given)
    fewest = answers.sizes(given)[-1]
    if ks[-1] > fewest:
        raise ValueError(f"--k {ks[-1]} needs as many responses to a question, got {fewest}")
    try:
        problems = answers.judge(given)
    except ValueError as error:
        raise ValueError(f"{args.answers}: {error}") from None
    found = measure(problems, ks)
    share = sampled.unjudged(problems)
    count = sum(len(problem) for problem in problems)
    print(f"{args.answers}: {len(given):,} questions, {count:,} responses")
    print("\n".join(sampled.intervals(found)))
    if share:
        print(f"{'unjudged':12}{share:8.1%}")
    unmarked = answers.unmarked(given)
    if unmarked:
        about = "no box, tag nor 'the answer is': judged as they stand"
        print(f"{'unmarked':12}{unmarked:8.1%}   {about}")
    if any(name.startswith("best@") for name in found) and "weighted@2" not in found:
        print("weighted@k is not measured: it needs scores >= 0", file=sys.stderr)
    if args.out:
        summary = {"answers": str(args.answers), "rows": len(given), "responses": count}
        summary |= {name: each._asdict() for name, each in found.items()}
        summary |= {"unjudged": share, "unmarked": unmarked}
        summary |= {"time/elapsed": round(time.monotonic() - began, 3)}
        prompts = [str(each.row.get("question", "")) for each in given]
        sampled.save(checked_out(args.out), [e.row for e in given], prompts, problems, summary)


def refuse_others(args: argparse.Namespace) -> None:
    """Raises ValueError for an option that says how a model is asked."""
    plain = vars(parser().parse_args(["--answers", str(args.answers)]))
    for name, value in vars(args).items():
        if name not in ("k", "rows", "out") and value != plain[name]:
            option = {"strategies": "strategy", "overrides": "set"}.get(name, name)
            raise ValueError(f"--answers asks no model: leave out --{option.replace('_', '-')}")


def sample_answers(args: argparse.Namespace) -> None:
    """Asks the run's model and prints what its answers are worth."""
    if args.strategies:
        strategies.check(args)
    elif args.k and args.samples and args.k[-1] > args.samples:
        raise ValueError(f"--k {args.k[-1]} needs as many answers, got --samples {args.samples}")
    model = restore.open_run(
        args.folder, stage=args.stage, checkpoint=args.checkpoint, overrides=args.overrides
    )
    found = find_problems(args, model)
    seed = model.run.seed if args.seed is None else args.seed
    if args.checkpoint == "best" and found.data == "test":
        print("the checkpoint was chosen by these problems: it is biased upward", file=sys.stderr)
    if args.strategies:
        by = "" if args.score is None else f"-{Path(args.score.rpartition(':')[2]).name}"
        out = checked_out(args.out or _file(args, model, found, f"search{by}"))
        strategies.main(args, model, found, out, seed)
        return
    samples, ks = _sizes(args, found.engine.sampling)
    out = checked_out(args.out or _file(args, model, found, str(samples)))

    from r1jax.loops.run import stream_key

    began = time.monotonic()
    prompts, problems = sampled.ask(
        model,
        found.task,
        found.rows,
        found.engine,
        samples=samples,
        key=stream_key(seed, f"{found.stage}/evaluate", 0),
    )
    measured = measure(problems, ks)
    summary = {
        "stage": model.stage.name,
        "step": model.step,
        "task": found.stage,
        "data": found.data,
        "rows": len(found.rows),
        "samples": samples,
        "sampling": asdict(found.engine.sampling),
        "max_new": found.engine.max_new,
        "seed": seed,
        **{name: each._asdict() for name, each in measured.items()},
        **sampled.means(problems),
        "time/elapsed": round(time.monotonic() - began, 3),
    }
    sampled.save(out, found.rows, prompts, problems, summary)
    print("\n".join(sampled.table(summary, measured)))
    if not any(name.startswith("maj@") for name in measured) and ks[-1] > 1:
        print("maj@k is not measured: no answer has a vote", file=sys.stderr)
    print(f"answers: {out}\nsummary: {out.with_suffix('.json')}", file=sys.stderr)


def checked_out(out: Path) -> Path:
    """The file that answers go to; its folder is made now, as later would be late to learn of."""
    if out.is_dir() or out.suffix == ".json":
        raise ValueError(f"--out must be a file, and not the summary's (.json), got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    return out


def _file(args: argparse.Namespace, model: restore.Restored, found: Problems, samples: str) -> Path:
    """Where answers go unless --out says."""
    temperature = f"t{found.engine.sampling.temperature:g}"
    size = f"{len(found.rows)}x{samples}"
    name = f"{model.stage.name}-{model.step}-{found.name}-{size}-{temperature}.jsonl"
    return args.folder / "evaluations" / name


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


if __name__ == "__main__":
    main()
