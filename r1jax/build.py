"""Makes a data set of verified answers from the model of a run, or from a teacher.

python -m r1jax.build runs/countdown_tiny --rows 512 --samples 4 --keep 1 --out data
python -m r1jax.build runs/mine --data problems.jsonl --filters wrong,code-blocks \\
    --against test.jsonl --mix general.jsonl --ratio 3:1 --out data
python -m r1jax.build runs/mine --teacher http://localhost:8000/v1 --model NAME --out data
python -m r1jax.build runs/mine --pass-rate 0.2:0.8 --problems --out data

The same command again goes on where it stopped. A `Build` stage of a config does this within a
run, with any function as a filter.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from r1jax import config, host, restore, settings
from r1jax.config import one_line_errors
from r1jax.data import filters, passes
from r1jax.data.duplicates import decontaminate, distinct
from r1jax.data.files import rows
from r1jax.rewards import judge as judging
from r1jax.rewards.endpoint import Endpoint, ask
from r1jax.rewards.weighted import Batched
from r1jax.stopping import catch_signals

STAGE = "build"
SAMPLES = 4  # answers to each problem unless --samples says otherwise
FILTERS: Mapping[str, Callable[[settings.Row], bool]] = {
    "wrong": filters.right,
    "unfinished": filters.finished,
    "mixed-languages": filters.one_language,
    "long-paragraphs": filters.short_paragraphs,
    "code-blocks": filters.no_code_block,
    "repetitive": filters.not_repetitive,
}
OF_ANSWERS = ("longest", "judge", "keep", "rewrite", "mix")  # options
ANEW = FILTERS.keys() - {"unfinished"}  # whether the model ended its answer does not change


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m r1jax.build",
        description="Samples answers to problems, verifies them by the rule of the run's task, "
        "and writes those that all filters leave to DIR/data/build/rows.jsonl, beside a count for "
        "each filter. DIR/manifest.json has the settings and the digests of all inputs. Files are "
        "JSONL, JSONL in gzip, CSV or Parquet; a folder is a hub's data set.",
    )
    restore.arguments(parser, checkpoint=False)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where it is made")
    parser.add_argument(
        "--data", type=Path, metavar="FILE", help="problems (default: those of training)"
    )
    parser.add_argument(
        "--rows", type=restore.positive, metavar="N", help="of the problems, the first N"
    )
    parser.add_argument("--samples", type=restore.positive, default=SAMPLES, metavar="N")
    parser.add_argument(
        "--filters",
        type=_names,
        default=["wrong"],
        metavar="NAME,NAME",
        help=f"what is dropped, of {', '.join(FILTERS)} (default: wrong)",
    )
    parser.add_argument(
        "--pass-rate",
        type=_shares,
        metavar="LOW:HIGH",
        help="which share of a problem's answers must be right, as 0.2:0.8",
    )
    parser.add_argument("--longest", type=restore.positive, metavar="TOKENS", help="of an answer")
    parser.add_argument(
        "--keep", type=restore.positive, metavar="N", help="the shortest N answers to a problem"
    )
    parser.add_argument(
        "--against",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="an evaluation set: what shares 10 words in a row with it is dropped",
    )
    parser.add_argument(
        "--judge",
        type=_share,
        metavar="SCORE",
        help="what the helper finds less helpful is dropped; 0 for the worst, 1 for the best",
    )
    parser.add_argument("--rubric", type=Path, metavar="FILE", help="what it is to score instead")
    parser.add_argument(
        "--rewrite",
        type=Path,
        metavar="FILE",
        help="a text that tells the helper how to write answers anew; they are verified again",
    )
    parser.add_argument(
        "--problems",
        action="store_true",
        help="instead of answers their problems, each with its pass_rate, the easy ones first",
    )
    parser.add_argument("--mix", type=Path, metavar="FILE", help="other rows")
    parser.add_argument(
        "--ratio", type=_ratio, default=(3, 1), metavar="A:B", help="rows to others; default: 3:1"
    )
    parser.add_argument("--teacher", metavar="ADDRESS", help="who answers, as in http://host/v1")
    parser.add_argument("--model", metavar="NAME", help="of the teacher")
    parser.add_argument("--key", metavar="NAME", help="environment variable with its API key")
    parser.add_argument("--helper", metavar="ADDRESS", help="who judges and rewrites")
    parser.add_argument("--helper-model", metavar="NAME", help="of the helper")
    parser.add_argument("--helper-key", metavar="NAME", help="as --key, of the helper")
    return parser


def _names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in FILTERS:
            raise argparse.ArgumentTypeError(f"no filter {name!r}; there are: {', '.join(FILTERS)}")
    return names


def _ratio(text: str) -> tuple[int, int]:
    first, _, second = text.partition(":")
    return restore.positive(first), restore.positive(second)


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"need a number from 0 to 1, got {text}")
    return value


def _shares(text: str) -> tuple[float, float]:
    low, _, high = text.partition(":")
    return _share(low), _share(high)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code: 0, or 75 if a signal stopped it."""
    args = parser().parse_args(arguments)
    if not args.folder.is_dir():
        raise ValueError(f"no such folder: {args.folder}")
    if args.teacher and not args.model:
        raise ValueError("--teacher needs --model, the name that its server knows it by")
    if args.helper and not args.helper_model:
        raise ValueError("--helper needs --helper-model, the name that its server knows it by")
    if not args.helper and (args.judge is not None or args.rewrite):
        raise ValueError(f"{'--rewrite' if args.rewrite else '--judge'} needs --helper")
    if args.problems and (
        unused := [name for name in OF_ANSWERS if getattr(args, name) is not None]
    ):
        raise ValueError(f"--problems writes no answers: leave out --{unused[0]}")
    spec, made = config.saved(args.folder)
    host.prepare()
    run = config.load(spec, [*made, *args.overrides])
    run = replace(
        run, stages=(stage(args, run),), seed=run.seed if args.seed is None else args.seed
    )

    from r1jax import pipeline, preflight
    from r1jax.loops.run import Stopped
    from r1jax.train import STOPPED, only_one

    preflight.check(run)
    args.out.mkdir(parents=True, exist_ok=True)
    with only_one(args.out), catch_signals() as stopping:
        try:
            pipeline.run(run, args.out, text=config.describe(run), stopping=stopping)
        except Stopped:
            print("stopped and saved; the same command goes on", file=sys.stderr)
            return STOPPED
    from r1jax import dataset

    out = args.out / "data" / STAGE
    print("rows that each step left:", file=sys.stderr)
    for count in dataset.counts(out):
        print(f"{count['rows']:10,}  {count['name']}")
    print(f"rows: {out / dataset.ROWS}", file=sys.stderr)
    return 0


def stage(args: argparse.Namespace, run: settings.Run) -> settings.Build:
    """What the command line asks for, as a stage of a run.

    Raises:
      ValueError: the run has no task, whose prompt and rule are used.
    """
    found = [one for one in run.stages if isinstance(one, settings.Reinforce)]
    chosen = [one for one in found if one.name == args.stage] or found[-1:]
    if not chosen:
        raise ValueError(f"{args.folder} has no task to be built from: no Reinforce stage")
    task, engine = chosen[0].task, chosen[0].engine
    source = partial(rows, args.data) if args.data else task.train
    return settings.Build(
        name=STAGE,
        source=source if args.rows is None else partial(first_rows, source, args.rows),
        prompt=task.prompt,
        answers=teacher(args, task) if args.teacher else sampled(args, task, engine),
        samples=args.samples,
        accuracy=task.accuracy,
        reward_workers=chosen[0].reward_workers,
        reward_seconds=chosen[0].reward_seconds,
        passes=steps(args, task),
    )


def first_rows(source: Callable[[], settings.Rows], num: int) -> settings.Rows:
    """The first `num` rows of a source.

    Raises:
      ValueError: there are fewer.
    """
    rows = source()
    if num > len(rows):
        raise ValueError(f"--rows {num} is more than the {len(rows)} that there are")
    return rows[:num]


def sampled(
    args: argparse.Namespace, task: settings.Task, engine: settings.Engine
) -> settings.Sampled:
    """The run's model, sampled as its task samples it but for what the command line says."""
    engine = replace(engine, sampling=restore.sampling(args, engine.sampling))
    if args.max_new is not None:
        engine = replace(engine, max_new=args.max_new)
    return settings.Sampled(
        engine=engine, prefill=task.prefill, run=str(args.folder), stage=args.stage
    )


def teacher(args: argparse.Namespace, task: settings.Task) -> settings.Taught:
    """A model behind an address; its replies are stored, so that none is asked for twice."""
    endpoint = Endpoint(
        address=args.teacher,
        model=args.model,
        key=args.key,
        temperature=1.0 if args.temperature is None else args.temperature,
        max_new=args.max_new,
        cache=str(args.out / "replies"),
    )
    return settings.Taught(
        complete=partial(ask, endpoint=endpoint), messages=partial(as_user, prompt=task.prompt)
    )


def helper(args: argparse.Namespace) -> judging.Complete:
    """Who judges and rewrites; its replies are stored as a teacher's are."""
    endpoint = Endpoint(
        address=args.helper,
        model=args.helper_model,
        key=args.helper_key,
        cache=str(args.out / "replies"),
    )
    return partial(ask, endpoint=endpoint)


def as_user(row: settings.Row, *, prompt: Callable[[settings.Row], str]) -> list[dict[str, str]]:
    """The messages of a conversation that begins with the row's prompt."""
    return [{"role": "user", "content": prompt(row)}]


def judged(
    rows: Sequence[settings.Row],
    answers: Sequence[str],
    *,
    prompt: Callable[[settings.Row], str],
    rubric: str,
    complete: judging.Complete,
) -> list[float | None]:
    """`judge.pointwise` of answers to the prompts that the model was asked with."""
    asked = [{"question": prompt(row)} for row in rows]
    return judging.pointwise(asked, answers, rubric=rubric, complete=complete)


def anew(row: settings.Row, *, how: str) -> list[dict[str, str]]:
    """What asks for an answer to be written in another way."""
    material = f"Question:\n{row['prompt']}\n\nSolution:\n{row['answer']}"
    return [{"role": "user", "content": f"{how}\n\n{material}"}]


def text_of(file: Path) -> str:
    """The text of a file.

    Raises:
      ValueError: it cannot be read, or holds none.
    """
    try:
        text = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from None
    if not text:
        raise ValueError(f"{file} holds no text")
    return text


def steps(args: argparse.Namespace, task: settings.Task) -> dict[str, Callable[..., Any]]:
    """The passes that the command line asks for, in order."""
    found: dict[str, Callable[..., Any]] = {}
    against = tuple(partial(rows, file) for file in args.against)
    clean = {"contaminated": partial(decontaminate, against=against)} if against else {}
    if args.pass_rate or args.problems:
        least, most = args.pass_rate or (0.0, 1.0)
        found["pass rate"] = partial(passes.keep_pass_rate, least=least, most=most)
    if args.problems:
        easy_first = partial(passes.sort, by="pass_rate", descending=True)
        return {**found, "problems": passes.problems, **clean, "sorted": easy_first}
    found |= {name: partial(passes.keep, where=FILTERS[name]) for name in args.filters}
    if args.longest:
        where = partial(filters.length_within, most=args.longest)
        found["long"] = partial(passes.keep, where=where)
    found |= {"duplicates": distinct, **clean}
    if args.judge is not None:
        rubric = text_of(args.rubric) if args.rubric else judging.HELPFUL
        many = partial(judged, prompt=task.prompt, rubric=rubric, complete=helper(args))
        found["judged"] = partial(passes.keep_judged, reward=Batched(many), least=args.judge)
    if args.keep:
        found["best"] = partial(passes.keep_best, number=args.keep)
    if args.rewrite:
        how = partial(anew, how=text_of(args.rewrite))
        found["rewritten"] = partial(passes.rewrite, complete=helper(args), messages=how)
        found["verified"] = partial(passes.verify, accuracy=task.accuracy)
        again = [name for name in args.filters if name in ANEW]
        found |= {f"{name} after": partial(passes.keep, where=FILTERS[name]) for name in again}
    if args.mix:
        found["mixed"] = partial(passes.mix, others=partial(rows, args.mix), ratio=args.ratio)
    return found


if __name__ == "__main__":
    sys.exit(main())
