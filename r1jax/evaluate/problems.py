"""Which problems a run's model is asked about, and how: its own task's, or a published set's."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from r1jax import restore, settings
from r1jax.data import eval_sets
from r1jax.data.sources import jsonl
from r1jax.data.templates import r1_zero
from r1jax.rewards.dispatch import by_verifier

SLOTS = 64  # answers decoded side by side, where a run has no stage that says


@dataclass(frozen=True, kw_only=True)
class Problems:
    """What is asked, of whom it is judged, and the engine that it is asked with."""

    rows: Sequence[settings.Row]
    task: settings.Task
    engine: settings.Engine
    stage: str  # the run's stage whose task it is, or the set's name: it names random keys
    data: str  # where the rows are from, for people
    name: str  # the same, for a file's name
    direct: Callable[[settings.Row], str] | None = None  # the prompt for the answer alone


def find_problems(args: argparse.Namespace, model: restore.Restored) -> Problems:
    """The problems that the command line asks for.

    Raises:
      ValueError: the run has no task and there is no --dataset; a file cannot be read; there are
        fewer problems than --rows.
    """
    stage = restore.task_stage(model)
    asked = None if stage is None else settings.evaluation_of(stage)
    if args.dataset is not None:
        found = _published(args, model, asked)
    elif args.direct or args.prefill or args.template != "question":
        raise ValueError("--direct, --prefill and --template are for a --dataset")
    elif stage is None or asked is None:
        raise ValueError(f"{args.folder} has no task to be evaluated on: give --dataset and --data")
    else:
        rows = jsonl(args.data) if args.data else asked.task.test()
        default = len(rows) if args.data else min(asked.rows, len(rows))
        found = Problems(
            rows=rows[: _count(args, rows, default)],
            task=asked.task,
            engine=asked.engine,
            stage=stage.name,
            data=str(args.data) if args.data else "test",
            name=args.data.stem if args.data else "test",
        )
    engine = replace(found.engine, sampling=restore.sampling(args, found.engine.sampling))
    if args.max_new is not None:
        engine = replace(engine, max_new=args.max_new)
    return replace(found, engine=engine)


def _published(
    args: argparse.Namespace, model: restore.Restored, asked: settings.Evaluation | None
) -> Problems:
    """A published set's problems; the engine reads prompts as long as the longest of them."""
    if args.data is None:
        raise ValueError(f"--dataset {args.dataset} needs its file: --data FILE")
    made = eval_sets.SETS[args.dataset]
    rows = eval_sets.load(args.dataset, args.data)
    rows = rows[: _count(args, rows, len(rows))]
    template = TEMPLATES[args.template](model.tokenizer)
    ask = made.direct if args.direct else made.prompt
    task = settings.Task(
        train=list,
        test=list,
        prompt=partial(_filled, template=template, ask=ask),
        prefill=args.prefill,
        accuracy=by_verifier,
    )
    if asked is not None:
        engine = asked.engine
    else:
        assert isinstance(model.stage, settings.Supervised)
        length = model.stage.row_length
        engine = settings.Engine(max_prompt=length, max_new=length, slots=SLOTS)
    texts = [_filled(row, template=template, ask=a) for row in rows for a in (ask, made.direct)]
    texts = [text + args.prefill for text in texts]
    longest = max(map(len, model.tokenizer(texts, add_special_tokens=False)["input_ids"]))
    return Problems(
        rows=rows,
        task=task,
        engine=replace(engine, max_prompt=max(longest, 1)),
        stage=args.dataset,
        data=str(args.data),
        name=f"{args.data.name.split('.')[0]}{'-direct' if args.direct else ''}",
        direct=partial(_filled, template=template, ask=made.direct),
    )


def _count(args: argparse.Namespace, rows: Sequence[Any], default: int) -> int:
    count = args.rows or default
    if count > len(rows):
        raise ValueError(f"--rows {count} is more than the {len(rows)} that there are")
    return count


# --------------------------------------------------------------------------- templates


def _filled(
    row: settings.Row, *, template: Callable[[str], str], ask: Callable[[settings.Row], str]
) -> str:
    return template(ask(row))


def _question(tokenizer: Any) -> Callable[[str], str]:
    del tokenizer
    return "{}\n".format


def _r1_zero(tokenizer: Any) -> Callable[[str], str]:
    del tokenizer
    return r1_zero


def _chat(tokenizer: Any) -> Callable[[str], str]:
    if not tokenizer.chat_template:
        raise ValueError("--template chat needs a tokenizer with a chat template; this has none")

    def template(question: str) -> str:
        # R1's advice: no system prompt, all instructions in the user's.
        messages = [{"role": "user", "content": question}]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    return template


TEMPLATES = {"question": _question, "r1_zero": _r1_zero, "chat": _chat}
