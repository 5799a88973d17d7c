"""Prompts in, answers out, from the model of a run; or a conversation where nothing is asked.

python -m r1jax.generate runs/countdown_tiny --prompt "make 9 from 7 5 3"
python -m r1jax.generate runs/countdown_tiny < prompts.txt > answers.txt
python -m r1jax.generate runs/countdown_tiny
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path

from r1jax import restore, settings
from r1jax.config import one_line_errors

AT_ONCE = 64  # prompts in one call of the engine, at most


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m r1jax.generate",
        description="Prints the answers to prompts, in their order. A prompt is the text that the "
        "model continues. Without prompts, standard input is read: one a line from a pipe, and "
        "from a terminal one after another, each answered at once (Ctrl-D leaves).",
    )
    restore.arguments(parser)
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT", dest="prompts")
    parser.add_argument("--prompts", metavar="FILE", dest="file", help="one a line; - for stdin")
    parser.add_argument(
        "--row",
        action="append",
        default=[],
        metavar="JSON",
        dest="rows",
        help="a problem, from which the run's task makes the prompt",
    )
    parser.add_argument(
        "--samples",
        type=restore.positive,
        default=1,
        metavar="N",
        help="answers to each prompt; more than one are numbered",
    )
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command. Answers go to stdout, all else to stderr."""
    args = parser().parse_args(arguments)
    rows = [_row(text) for text in args.rows]
    model = restore.open_run(
        args.folder, stage=args.stage, checkpoint=args.checkpoint, overrides=args.overrides
    )
    stage = restore.task_stage(model)
    asked = None if stage is None else settings.evaluation_of(stage)
    engine = _engine(model, stage, asked, args)
    talk = not (args.prompts or args.file or rows) and sys.stdin.isatty()
    prompts = [] if talk else _prompts(args, rows, asked)
    if not talk:
        restore.check_prompts(model, prompts, engine.max_prompt)

    from r1jax.loops.run import stream_key

    seed = model.run.seed if args.seed is None else args.seed
    answers = restore.make_answers(
        model,
        engine,
        samples=args.samples,
        at_once=1 if talk else min(AT_ONCE, len(prompts)),
        key=stream_key(seed, "generate", 0),
    )
    if talk:
        converse(model, engine, answers)
    else:
        cut = sum(show(group) for group in answers(prompts, 0))
        _note_cut(cut, engine)


def converse(model: restore.Restored, engine: settings.Engine, answers: restore.Answers) -> None:
    """Answers each line that is typed until the input ends. The same line asked again is sampled
    anew: a prompt's number goes into its random keys."""
    with suppress(ImportError):
        import readline  # noqa: F401  input() then has a history and arrow keys

    print(f"{model.stage.name}, step {model.step}; Ctrl-D leaves", file=sys.stderr)
    for number in count():
        try:
            prompt = input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if not prompt:
            continue
        try:
            restore.check_prompts(model, [prompt], engine.max_prompt)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        _note_cut(sum(show(group) for group in answers([prompt], number)), engine)


def show(group: Sequence[restore.Answer]) -> int:
    """Prints the answers to one prompt, numbered if several; returns how many were cut off."""
    for i, answer in enumerate(group, 1):
        numbered = f"{i}: {answer.text.strip()}"
        print(numbered if len(group) > 1 else answer.text, flush=True)
    return sum(not answer.finished for answer in group)


def _note_cut(cut: int, engine: settings.Engine) -> None:
    if cut:
        print(f"{cut} cut off after {engine.max_new} tokens (--max-new)", file=sys.stderr)


def _engine(
    model: restore.Restored,
    stage: settings.Stage | None,
    asked: settings.Evaluation | None,
    args: argparse.Namespace,
) -> settings.Engine:
    """The engine of the task's stage with what the command line changes. A run without a task
    gets one that is as long as its training rows."""
    if isinstance(stage, settings.Reinforce):
        engine = stage.engine  # samples as in training
    elif asked is not None:
        engine = asked.engine
    else:
        assert isinstance(model.stage, settings.Supervised)
        length = model.stage.row_length
        engine = settings.Engine(max_prompt=length, max_new=length, slots=AT_ONCE)
    engine = replace(engine, sampling=restore.sampling(args, engine.sampling))
    return engine if args.max_new is None else replace(engine, max_new=args.max_new)


def _prompts(
    args: argparse.Namespace, rows: Sequence[settings.Row], asked: settings.Evaluation | None
) -> list[str]:
    """The prompts of the command line, of its file, and of its rows; else standard input's."""
    if rows and asked is None:
        raise ValueError(f"{args.folder} has no task, which would make a prompt of a --row")
    prompts = list(args.prompts)
    file = args.file or ("-" if not prompts and not rows else None)
    if file:
        prompts += _lines(file)
    if asked:
        prompts += [settings.prompt_of(asked.task, row, "--row") for row in rows]
    if not prompts:
        raise ValueError(f"no prompts in {'standard input' if file == '-' else file}")
    return prompts


def _row(text: str) -> settings.Row:
    try:
        row = json.loads(text)
    except ValueError as error:
        raise ValueError(f"--row {text[:60]!r} is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError(f"--row must be a JSON object, got {text[:60]!r}")
    return row


def _lines(file: str) -> list[str]:
    """The lines of a file or, for `-`, of standard input."""
    data = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise ValueError(f"{file}: not UTF-8 text") from None
    # Not splitlines: a prompt may hold other line separators.
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


if __name__ == "__main__":
    main()
