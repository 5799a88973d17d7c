"""Several runs on one page: a table, their curves over each other, and where settings differ."""

from collections.abc import Sequence
from html import escape

from r1jax.progress import duration
from r1jax.report import curves
from r1jax.report.charts import NUM_COLOURS, number
from r1jax.report.data import (
    TOKENS,
    Row,
    RunData,
    costs,
    devices,
    evaluations,
    interval,
    total,
    unfinished,
)


def comparison(runs: Sequence[RunData]) -> str:
    """The page's body."""
    names = _names(runs)
    parts = [f"<h1>{len(runs)} runs compared</h1>"]
    parts.append(_table(RESULTS, [_results(run) for run in runs], names))
    parts.append(_cost_table(runs, names))
    parts.append(
        '<p class="soft">Noisy lines are moving means; pointing at a chart shows each step.</p>\n'
    )
    stages = list(dict.fromkeys(stage for run in runs for stage in run.stages))
    shown = [found.stage for run in runs if (found := evaluations(run))]
    for stage in sorted(stages, key=lambda stage: stage not in shown):
        parts.append(f"<h2>Stage {escape(stage)}</h2>")
        rows = [run.stages.get(stage, ()) for run in runs]
        for heading, specs in curves.sections([row for each in rows for row in each]):
            charts = "".join(curves.overlay(spec, rows, names) for spec in specs)
            if charts:
                parts.append(f'<h3>{heading}</h3><div class="charts">\n{charts}</div>\n')
    return "".join(parts) + _differences(runs, names)


def _names(runs: Sequence[RunData]) -> list[str]:
    """The folders' names, with their parents' where two are the same."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    return [str(run.folder) for run in runs]


def _table(head: Sequence[str], runs: Sequence[Sequence[str]], names: Sequence[str]) -> str:
    """A line for each run, with its colour and what is said of it."""
    lines = []
    for i, (texts, name) in enumerate(zip(runs, names, strict=True)):
        cells = [f'<td><i class="chip c{i % NUM_COLOURS}"></i>{escape(name)}</td>']
        cells += [f'<td class="n">{text}</td>' for text in texts]
        lines.append(f"<tr>{''.join(cells)}</tr>")
    titles = "".join(f"<th{' class=n' * (i > 0)}>{name}</th>" for i, name in enumerate(head))
    return f'<div class="scroll"><table><tr>{titles}</tr>{"".join(lines)}</table></div>\n'


RESULTS = (
    *("run", "held-out accuracy", "95% intervals", "points"),
    *("attempts", "tokens", "reflections take off"),
)


def _cost_table(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """What each run took: training and inference apart, device-hours, and dollars where known."""
    known = [here for run in runs if (here := devices(run)) is not None]
    head = ["run", "time", "training", "inference", *TOKENS.values()]
    head += [f"{' or '.join(sorted({here.name for here in known}))}-hours"] if known else []
    head += ["cost"] if any(here.price is not None for here in known) else []
    lines = []
    for run in runs:
        spent, here = total(costs(run)), devices(run)
        time = duration(spent.seconds) + (" (unfinished)" if unfinished(run) else "")
        texts = [time, duration(spent.training), duration(spent.inference)]
        tokens = [getattr(spent, name) for name in TOKENS]
        texts += [number(count) if count else "" for count in tokens]
        texts.append(number(here.hours(spent.seconds)) if here else "")
        texts.append(here.dollars(spent.seconds) if here else "")
        lines.append(texts[: len(head) - 1])
    return _table(head, lines, names)


def _take_off(rows: Sequence[Row]) -> str:
    """The step at which a stage's reflections take off."""
    if not any(curves.REFLECTIONS in row for row in rows):
        return ""
    step = curves.aha(rows)
    return "none" if step is None else f"step {step:,}"


def _results(run: RunData) -> list[str]:
    found = evaluations(run)
    if found is None:
        return [""] * (len(RESULTS) - 1)
    first, last = found.first, found.last

    def change(name: str, form: str) -> str:
        if name not in first or name not in last:
            return ""
        return f"{first[name]:{form}} → {last[name]:{form}}"

    intervals = [interval(row) for row in (first, last)]
    points = (last["test/accuracy"] - first["test/accuracy"]) * 100
    return [
        change("test/accuracy", ".1%"),
        " → ".join(intervals) if all(intervals) else "",
        f"{points:+.1f}",
        change("test/attempts", ".2f"),
        change("test/length", ".1f"),
        _take_off(run.stages[found.stage]),
    ]


def _stages(run: RunData) -> set[str]:
    return {*run.settings.get("stages", "").split(", ")}


def _above(path: str) -> list[str]:
    """The records in which a setting is."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts))]


def _differences(runs: Sequence[RunData], names: Sequence[str]) -> str:
    """The settings that are not the same in all runs.

    Those of a stage, or of a record, that a run does not have are left out: that it has none is
    told.
    """
    paths = sorted({path for run in runs for path in run.settings} - {"name"})
    stages = [_stages(run) for run in runs]
    own = stages[0].union(*stages) - stages[0].intersection(*stages)
    missing = {path for path in paths if any(path not in run.settings for run in runs)}
    differ = [
        path
        for path in paths
        if len({run.settings.get(path) for run in runs}) > 1
        and path.partition(".")[0] not in own
        and missing.isdisjoint(_above(path))
    ]
    if not differ:
        known = all(run.settings for run in runs)
        return "<h2>Settings</h2><p>The same in all runs.</p>" if known else ""
    titles = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = []
    for path in differ:
        cells = "".join(
            f"<td><code>{escape(run.settings.get(path, 'absent'))}</code></td>" for run in runs
        )
        lines.append(f"<tr><td><code>{escape(path)}</code></td>{cells}</tr>")
    return (
        '<h2>Settings that differ</h2><div class="scroll"><table>'
        f"<tr><th>setting</th>{titles}</tr>{''.join(lines)}</table></div>\n"
    )
