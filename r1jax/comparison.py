"""Measures the models of several stages on the same problems: a table with intervals.

A stage's folder, `data/<stage>` in that of the run:
  <stage>.jsonl   for each model that is asked, a line for each problem with its answers
  table.json      {"models": {model: {measure: {mean, low, high, problems}}}}
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from r1jax import dataset, metrics, restore, settings

ANSWERS_PER_SLOT = 4  # between two saves: the slots that idle at the end of a call cost little

Model = Callable[[str], restore.Restored]  # of the stage with this name


def compare(
    cfg: settings.Compare, model: Model, out: Path, *, seed: int, stopping: Callable[[], bool]
) -> bool:
    """Writes the table of a stage into `out`, going on where it stopped; whether it is whole.

    All models get the same random keys, so what differs is theirs.

    Raises:
      ValueError: a measure is for none of the problems.
    """
    out.mkdir(parents=True, exist_ok=True)
    problems = cfg.source()
    table = {}
    for name, stage in cfg.models.items():
        file = answers_of(stage, out)
        asked = as_build(cfg, stage)
        if dataset.keep_whole(file, asked.at_once, len(problems)) < len(problems):
            ask = dataset.ask_model(asked, model(stage), seed=seed)
            if not dataset.answer_all(asked, problems, ask, file, stopping=stopping):
                return False
        table[name] = measured(cfg, list(dataset.read_answers(file, problems)))
    metrics.replace(out / metrics.TABLE, json.dumps({"models": table}, indent=1).encode())
    return True


def answers_of(stage: str, out: Path) -> Path:
    """The file of the answers of the model of a stage."""
    return out / f"{stage}.jsonl"


def check(cfg: settings.Compare, tokenizer: Any) -> str:
    """As `dataset.check`."""
    return dataset.check(as_build(cfg, None), tokenizer)


def as_build(cfg: settings.Compare, stage: str | None) -> settings.Build:
    """The data set of a model's answers to the problems."""
    return settings.Build(
        name=cfg.name,
        source=cfg.source,
        passes={},
        prompt=cfg.prompt,
        answers=settings.Sampled(engine=cfg.engine, prefill=cfg.prefill, stage=stage),
        samples=cfg.samples,
        at_once=ANSWERS_PER_SLOT * cfg.engine.slots,
    )


def measured(
    cfg: settings.Compare, answers: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """Each measure's mean over the problems that it is for, with a 95% bootstrap interval.

    Of several answers to a problem it is the mean that counts.

    Raises:
      ValueError: a measure is for none of the problems.
    """
    found = {}
    for name, measure in cfg.measures.items():
        groups: dict[int, list[float]] = {}
        for one in answers:
            value = measure(one["row"], one["answer"])
            if value is not None:
                groups.setdefault(one["problem"], []).append(float(value))
        if not groups:
            raise ValueError(f"{cfg.name}: measure {name!r} is for none of the problems")
        means = [sum(group) / len(group) for group in groups.values()]
        found[name] = metrics.estimate(means)._asdict()
    return found


def lines(out: Path) -> list[str]:
    """The table in lines for people."""
    table = json.loads((out / metrics.TABLE).read_bytes())["models"]
    columns = list(next(iter(table.values())))
    width = max(len(name) for name in table)
    text = [" " * width + "".join(f"  {column:>22}" for column in columns)]
    for name, values in table.items():
        cells = [
            f"{one['mean']:.1%} [{one['low']:.1%}, {one['high']:.1%}]" for one in values.values()
        ]
        text.append(f"{name:{width}}" + "".join(f"  {cell:>22}" for cell in cells))
    return text
