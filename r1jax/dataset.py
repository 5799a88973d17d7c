"""Makes a data set: a model or a teacher answers problems, answers are verified, filtered, kept.

A stage's folder, `data/<stage>` in that of the run:
  answers.jsonl  a line for each problem with all answers to it, written as they come
  rows.jsonl     what the passes left: the data set
  counts.json    how many rows there were after each pass
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1jax import metrics, restore, settings
from r1jax.data import passes
from r1jax.data.sources import file_digest, jsonl
from r1jax.progress import progress
from r1jax.rewards.pool import Pool, open_pool

ANSWERS, ROWS, COUNTS = "answers.jsonl", "rows.jsonl", "counts.json"
FIRST = 256  # problems that are looked at before a run begins

Answer = Mapping[str, Any]
Ask = Callable[[Sequence[settings.Row], int], Sequence[Sequence[Answer]]]


def build(cfg: settings.Build, ask: Ask | None, out: Path, *, stopping: Callable[[], bool]) -> bool:
    """Writes the data set of a stage into `out`, going on where it stopped; whether it is whole.

    `ask` gives the answers to some problems, the first of which has this number, each with
    `answer`, `num_tokens` and `finished`. It is not whole if `stopping()` became true, which is
    looked at after each `cfg.at_once` problems: their answers are kept.

    Raises:
      ValueError: no answers came, or a pass left no rows.
    """
    out.mkdir(parents=True, exist_ok=True)
    problems = cfg.source()
    counts = [passes.Count("source", len(problems))]
    rows: settings.Rows = problems
    if ask is not None:
        if not answer_all(cfg, problems, ask, out / ANSWERS, stopping=stopping):
            return False
        rows = list(read_answers(out / ANSWERS, problems))
        counts.append(passes.Count("answers", len(rows)))
        if not rows:
            raise ValueError(f"{cfg.name}: no answers came to {len(problems):,} problems")
    rows, more = passes.apply(rows, cfg.passes, stage=cfg.name)
    write_rows(out / ROWS, rows)
    record = {"counts": [count._asdict() for count in (*counts, *more)]}
    metrics.replace(out / COUNTS, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return True


def check(cfg: settings.Build, tokenizer: Any) -> str:
    """What the problems are, in words.

    Raises:
      ValueError: there are none, or one of the first cannot be asked.
    """
    rows = cfg.source()
    if not len(rows):
        raise ValueError(f"{cfg.name}: no problems, the source has 0 rows")
    answers, first = cfg.answers, rows[:FIRST]
    found = f"{len(rows):,} rows"
    if answers is None or cfg.prompt is None:
        return found
    for i, row in enumerate(first):
        if cfg.accuracy is not None:
            with settings.located(f"{cfg.name}.source, row {i}, no answer", row):
                cfg.accuracy(row, "")  # refuses a row that lacks what it needs
    if isinstance(answers, settings.Taught):
        for i, row in enumerate(first):
            with settings.located(f"{cfg.name}.source, row {i}", row):
                answers.messages(row)
    elif answers.run is None:
        from r1jax.rollout.answers import encode_prompts

        texts = []
        for i, row in enumerate(first):
            with settings.located(f"{cfg.name}.source, row {i}", row):
                texts.append(cfg.prompt(row) + answers.prefill)
        size = answers.engine.max_prompt
        made = encode_prompts(tokenizer, texts, max_prompt=size, index=range(len(texts)))
        longest = int(made.length.max())
        found += f", the first {len(texts)} prompts of at most {longest:,} of {size:,} tokens"
    return found


def counts(out: Path) -> list[dict[str, Any]]:
    """How many rows each step of a data set that is whole left, in order."""
    return json.loads((out / COUNTS).read_bytes())["counts"]


def num_tokens(file: Path) -> int:
    """Tokens of all answers in a file of them; 0 without it. A teacher's are not known: 0."""
    if not file.exists():
        return 0
    answers = (one for line in jsonl(file) for one in line["answers"])
    return sum(one["num_tokens"] or 0 for one in answers)


# --------------------------------------------------------------------------- who answers


def ask_model(cfg: settings.Build, model: restore.Restored, *, seed: int) -> Ask:
    """The function (problems, number of the first) -> a model's answers to each.

    An answer depends on the weights, its prompt, the problem's number and the seed alone.
    """
    from r1jax.loops.run import stream_key

    answers, prompt = cfg.answers, cfg.prompt
    assert isinstance(answers, settings.Sampled) and prompt is not None
    sample = restore.make_answers(
        model,
        answers.engine,
        samples=cfg.samples,
        at_once=min(cfg.at_once, len(cfg.source())),
        key=stream_key(seed, f"{cfg.name}/sample", 0),
    )

    def ask(rows: Sequence[settings.Row], first: int) -> list[list[Answer]]:
        texts = [prompt(row) + answers.prefill for row in rows]
        return [
            [
                {
                    "answer": answers.prefill + one.text,
                    "num_tokens": one.length,
                    "finished": one.finished,
                }
                for one in group
            ]
            for group in sample(texts, first)
        ]

    return ask


def ask_teacher(cfg: settings.Build) -> Ask:
    """The function (problems, number of the first) -> a teacher's replies to each that came."""
    answers = cfg.answers
    assert isinstance(answers, settings.Taught)

    def ask(rows: Sequence[settings.Row], first: int) -> list[list[Answer]]:
        prompts = [answers.messages(row) for row in rows for _ in range(cfg.samples)]
        replies = iter(answers.complete(prompts))
        groups = [[next(replies) for _ in range(cfg.samples)] for _ in rows]
        return [
            [
                {"answer": reply, "num_tokens": None, "finished": True}
                for reply in group
                if reply is not None
            ]
            for group in groups
        ]

    return ask


# --------------------------------------------------------------------------- answers on disk


def answer_all(
    cfg: settings.Build,
    problems: settings.Rows,
    ask: Ask,
    file: Path,
    *,
    stopping: Callable[[], bool],
) -> bool:
    """Adds to `file` the answers to all problems that it lacks; False if it was stopped before."""
    prompt, total = cfg.prompt, len(problems)
    assert prompt is not None
    done = keep_whole(file, cfg.at_once, total)
    with (
        open_pool(workers=cfg.reward_workers, seconds=cfg.reward_seconds) as pool,
        progress(total, stage=cfg.name, start=done, unit="problem") as show,
    ):
        for first in range(done, total, cfg.at_once):
            if stopping():
                return False
            rows = problems[first : first + cfg.at_once]
            judged = judge(cfg, rows, ask(rows, first), pool)
            lines = [
                {"problem": first + i, "prompt": prompt(row), "answers": group}
                for i, (row, group) in enumerate(zip(rows, judged, strict=True))
            ]
            metrics.append(file, b"".join(map(_line, lines)))
            rights = [one["accuracy"] for group in judged for one in group]
            rights = [value for value in rights if value is not None]
            values = {"accuracy": sum(rights) / len(rights)} if rights else {}
            show(first + len(rows), values)
    return True


def judge(
    cfg: settings.Build,
    rows: Sequence[settings.Row],
    groups: Sequence[Sequence[Answer]],
    pool: Pool,
) -> list[list[Answer]]:
    """The answers with their accuracy; None where nothing judges them."""
    pairs = [(row, one) for row, group in zip(rows, groups, strict=True) for one in group]
    values: Sequence[float | None] = [None] * len(pairs)
    if cfg.accuracy is not None:
        values = pool.map(cfg.accuracy, [row for row, _ in pairs], [a["answer"] for _, a in pairs])
    found = iter(values)
    return [[{**one, "accuracy": next(found)} for one in group] for group in groups]


def keep_whole(file: Path, at_once: int, total: int) -> int:
    """Cuts a file of answers back to whole calls of `at_once` problems; how many problems stay.

    A process that was killed may leave a part of them.
    """
    if not file.exists():
        return 0
    ends = [0]
    with file.open("rb") as opened:
        for line in opened:
            if line.endswith(b"\n"):
                ends.append(ends[-1] + len(line))
    done = len(ends) - 1
    if done < total:
        done -= done % at_once
    with file.open("r+b") as opened:
        opened.truncate(ends[done])
    return done


def read_answers(file: Path, problems: settings.Rows) -> Iterator[settings.Row]:
    """A row for each answer in a file, as `settings.Build` says."""
    for line, problem in zip(jsonl(file), problems, strict=True):
        for sample, one in enumerate(line["answers"]):
            where = {"problem": line["problem"], "sample": sample, "row": dict(problem)}
            yield {"prompt": line["prompt"], **one, **where}


def write_rows(file: Path, rows: settings.Rows) -> None:
    """Writes rows as JSONL: the whole file or none of it."""
    new = file.with_name(f".{file.name}.new")
    with new.open("wb") as opened:
        for row in rows:
            opened.write(_line(row))
    new.replace(file)


def output(out: Path) -> dict[str, Any]:
    """What the manifest says of a data set that is whole."""
    return {"sha256": file_digest(out / ROWS), "counts": counts(out)}


def _line(row: Mapping[str, Any]) -> bytes:
    # A lone surrogate in an answer has no UTF-8; backslashreplace writes it as JSON's own escape.
    line = json.dumps(row, ensure_ascii=False, default=str) + "\n"
    return line.encode("utf-8", "backslashreplace")
