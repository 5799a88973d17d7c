"""The parts of a run's report, each as HTML."""

import json
import shlex
from collections.abc import Sequence
from html import escape

from r1jax import manifest, monitors
from r1jax.metrics import TABLE
from r1jax.progress import duration
from r1jax.report import curves
from r1jax.report.charts import NUM_COLOURS, change, interval_chart, number
from r1jax.report.data import (
    TOKENS,
    Cost,
    Devices,
    Evaluations,
    Row,
    RunData,
    afterwards,
    costs,
    devices,
    evaluations,
    interval,
    pairs,
    total,
    unfinished,
)
from r1jax.report.takeoff import DEVIATIONS, FEWEST, SMOOTHED

NUM_PROBLEMS = 8  # shown with their answers before and after
KINDS = {
    "Build": "data building",
    "Compare": "models compared",
    "Reinforce": "reinforcement learning",
    "Supervised": "supervised training",
}
LONGEST = 6000  # characters of an answer that are shown


def _interval(row: Row) -> tuple[float, float, float]:
    share = row["test/accuracy"]
    return share, row.get("test/accuracy_low", share), row.get("test/accuracy_high", share)


def header(run: RunData) -> str:
    found = evaluations(run)
    parts = [f'<p class="kicker">{escape(run.name)} · an r1jax run</p>']
    if tables := [name for name in run.stages if table_of(run, name)]:
        models = list(table_of(run, tables[-1]))
        listed = f"{', '.join(models[:-1])} and {models[-1]}" if len(models) > 1 else models[0]
        parts.append(f"<h1>{escape(listed)}</h1>{_models(run, tables[-1])}")
    elif not run.stages:
        parts.append("<h1>Nothing measured yet</h1><p>metrics.jsonl has no lines so far.</p>")
    elif found is None:
        parts.append(_training_headline(run))
    elif found.first is found.last:
        value = f"<em>{found.first['test/accuracy']:.1%}</em>"
        parts.append(f"<h1>Held-out accuracy {value} at step {found.first['step']:,}</h1>")
        bounds = interval(found.first)
        text = f"95% interval {bounds}. " if bounds else ""
        parts.append(f"<p>{text}One evaluation so far.</p>")
    else:
        parts += _change(run, found)
    if left := unfinished(run):
        parts.append(f'<p class="soft">Unfinished: {escape(left)}.</p>')
    return "".join(parts) + _facts(run, found) + _warnings(run)


def _training_headline(run: RunData) -> str:
    """The reward's change, or the loss's: means over a few steps, as one step says little."""
    rows = [row for row in list(run.stages.values())[-1] if "reward" in row or "loss" in row]
    for name, title in (("reward", "Reward"), ("loss", "Loss")):
        values = [value for _, value in curves.points(rows, name)]
        if not values:
            continue
        few = max(1, min(5, len(values) // 4))
        first, last = number(sum(values[:few]) / few), number(sum(values[-few:]) / few)
        means = f"<p>Means of the first and the last {few} measurements.</p>" if few > 1 else ""
        if first == last:
            return f"<h1>{title} <em>{last}</em> at step {rows[-1]['step']:,}</h1>"
        return f"<h1>{title} went from {first} to <em>{last}</em></h1>{means}"
    return "<h1>A run without rewards or losses</h1>"


def _change(run: RunData, found: Evaluations) -> list[str]:
    first, last = _interval(found.first), _interval(found.last)
    points = (last[0] - first[0]) * 100
    verb = "stayed at" if first[0] == last[0] else "went from"
    ends = f"{first[0]:.1%}" if first[0] == last[0] else f"{first[0]:.1%} to <em>{last[0]:.1%}</em>"
    text = f"{points:+.1f} points in {found.last['step']:,} steps of {escape(found.stage)}"
    if num := run.settings.get(f"{found.stage}.evaluate_rows"):
        text += f", on {escape(num)} problems that were never trained on"
    if interval(found.first) and interval(found.last):
        apart = first[2] < last[1] or last[2] < first[1]
        text += (
            f". 95% intervals {interval(found.first)} and {interval(found.last)}: they "
            f"{'do not overlap' if apart else 'overlap'}"
        )
    chart = interval_chart(first, last)
    return [f"<h1>Held-out accuracy {verb} {ends}</h1>", chart, f"<p>{text}.</p>"]


FACTS = (
    ("test/attempts", "Attempts per answer", False),
    ("test/wrong_give_ups", "Wrong give-ups", True),
    ("test/reflections", "Reflections per answer", False),
    ("test/length", "Tokens per answer", False),
)


def _facts(run: RunData, found: Evaluations | None) -> str:
    facts = []
    for name, title, share in FACTS:
        if found and name in found.first and name in found.last:
            ends = found.first[name], found.last[name]
            one = found.first is found.last
            text = number(ends[0], share=share) if one else change(*ends, share=share)
            facts.append((title, text, "held-out problems"))
    seconds, here = total(costs(run)).seconds, devices(run)
    if seconds:
        note = ""
        if here is not None:
            unit = here.name if here.count == 1 else f"{here.name}s"
            note = f"{number(here.hours(seconds))} {here.name}-hours on {here.count:g} {unit}"
            note += f", {here.dollars(seconds)}" if here.price is not None else ""
        facts.append(("Time", duration(seconds), note))
    entries = [
        f"<div><dt>{title}</dt><dd>{text}<small>{note}</small></dd></div>"
        for title, text, note in facts
    ]
    return f'<dl class="facts">{"".join(entries)}</dl>\n' if entries else ""


def _warnings(run: RunData) -> str:
    spans = monitors.history(row for rows in run.stages.values() for row in rows)
    lines = []
    for span in spans:
        steps = f"step {span.first:,}" if span.first == span.last else ""
        steps = steps or f"steps {span.first:,} to {span.last:,}"
        lines.append(f"<li><b>{escape(span.stage)}, {steps}:</b> {escape(span.text)}.</li>")
    if lines:
        return f'<ul class="warnings">{"".join(lines)}</ul>\n'
    return '<p class="soft">The monitors found nothing wrong.</p>' if run.stages else ""


def stage(run: RunData, name: str) -> str:
    rows = run.stages[name]
    kind = KINDS.get(run.settings.get(name, ""))
    parts = [f"<h2>{escape(name)}: {kind}</h2>" if kind else f"<h2>Stage {escape(name)}</h2>"]
    if run.settings.get(name) == "Build":
        return "".join([*parts, _row_counts(run, name)])
    if run.settings.get(name) == "Compare":
        return "".join([*parts, _models(run, name)])
    text = (
        f"{rows[-1]['step']:,} steps. Noisy lines are drawn thin, with a thick moving mean; the "
        "number at a line's end is the thick line's last."
    )
    if any("test/accuracy_low" in row for row in rows):
        text += " Dots are evaluations on held-out problems; the shade is a 95% interval."
    parts.append(f'<p class="soft">{text}</p>{_aha(rows)}')
    for heading, specs in curves.sections(rows):
        charts = "".join(curves.chart(spec, rows) for spec in specs)
        if charts:
            parts.append(f'<h3>{heading}</h3><div class="charts">\n{charts}</div>\n')
    return "".join(parts)


def _aha(rows: Sequence[Row]) -> str:
    """Whether reflections take off, in words, where there are enough of them to tell."""
    if len(curves.points(rows, curves.REFLECTIONS)) < FEWEST:
        return ""
    step = curves.aha(rows)
    text = "Reflections do not take off: there is no step from which on"
    if step is not None:
        text = f"Reflections take off at step {step:,}: from there on"
    return (
        f"<p>{text} their mean over {SMOOTHED} steps stays more than {DEVIATIONS:g} standard "
        "deviations above the mean of the first tenth of the steps.</p>"
    )


def _row_counts(run: RunData, name: str) -> str:
    """How many rows each step of data building left."""
    entry = manifest.read(run.folder).get(name)
    counts = entry.output.get("counts", []) if entry else []
    lines = [f"<tr><td>{escape(one['name'])}</td><td>{one['rows']:,}</td></tr>" for one in counts]
    return f"<table><tr><th>step</th><th>rows left</th></tr>{''.join(lines)}</table>\n"


def table_of(run: RunData, name: str) -> dict[str, dict[str, dict[str, float]]]:
    """What a stage that compares models measured, {} if it is no such stage or is not done."""
    file = run.folder / "data" / name / TABLE
    if run.settings.get(name) != "Compare" or not file.is_file():
        return {}
    return json.loads(file.read_bytes())["models"]


def _models(run: RunData, name: str) -> str:
    """The table of a stage that compares models."""
    table = table_of(run, name)
    if not table:
        return '<p class="soft">Not done yet.</p>'
    columns = list(next(iter(table.values())))
    titles = "".join(f'<th class="n">{escape(column)}</th>' for column in columns)
    lines = []
    for model, values in table.items():
        cells = "".join(f'<td class="n">{_estimate(values[column])}</td>' for column in columns)
        lines.append(f"<tr><td>{escape(model)}</td>{cells}</tr>")
    counts = ", ".join(f"{column} {one['problems']}" for column, one in values.items())
    return (
        f'<div class="scroll"><table><tr><th>model</th>{titles}</tr>{"".join(lines)}</table></div>'
        f'<p class="soft">Means with 95% bootstrap intervals over the problems that a column is '
        f"for: {escape(counts)}.</p>\n"
    )


def _estimate(one: dict[str, float]) -> str:
    return f"{one['mean']:.1%}<br><small>{one['low']:.1%} to {one['high']:.1%}</small>"


def answers(run: RunData, stage: str) -> str:
    found = pairs(run.folder, stage)
    if not found:
        return ""
    shown = found[:NUM_PROBLEMS]
    problems = [
        f'<div class="problem"><pre>{escape(_shown(before.get("prompt", "")))}</pre>'
        f'<div class="pair">{_answer("Before", before)}{_answer("After", after)}</div></div>\n'
        for before, after in shown
    ]
    return (
        "<h2>Answers before and after</h2>"
        f'<p class="soft">The same held-out problems at step {found[0][0]["step"]:,} and at step '
        f"{found[0][1]['step']:,} of {escape(stage)}: the first {len(shown)}, not chosen.</p>"
        f"{_flows(found)}<div>{''.join(problems)}</div>"
    )


def _flows(found: Sequence[tuple[Row, Row]]) -> str:
    """How many problems went from wrong to right, and the other three ways."""
    judged = [(a["accuracy"], b["accuracy"]) for a, b in found if _judged(a) and _judged(b)]
    if not judged:
        return ""
    counts = {
        name: sum((a == 1, b == 1) == way for a, b in judged)
        for name, way in (
            ("became right", (False, True)),
            ("stayed right", (True, True)),
            ("became wrong", (True, False)),
            ("stayed wrong", (False, False)),
        )
    }
    text = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    return f"<p>Of {len(judged):,} problems logged both times, {text}.</p>\n"


def _judged(sample: Row) -> bool:
    return isinstance(sample.get("accuracy"), float | int)


def _answer(title: str, sample: Row) -> str:
    verdict = "not judged"
    if _judged(sample):
        right = sample["accuracy"] == 1
        verdict = '<span class="right">✓ right</span>' if right else ""
        verdict = verdict or '<span class="wrong">✗ wrong</span>'
    notes = [f"{title}: {verdict}"]
    if isinstance(sample.get("length"), int):
        notes.append(f"{sample['length']:,} tokens")
    if sample.get("finished") is False:
        notes.append("cut off")
    if isinstance(sample.get("reward"), float | int):
        notes.append(f"reward {sample['reward']:.3g}")
    text = escape(_shown(sample.get("answer", "")))
    return f'<div class="answer"><p>{" · ".join(notes)}</p><pre>{text}</pre></div>'


def _shown(text: str) -> str:
    """The text, or its two ends and how much lies between."""
    text = str(text).strip()
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n\n[{len(text) - 2 * half:,} characters left out]\n\n{text[-half:]}"


# --------------------------------------------------------------------------- cost and origin

SPENT = {  # what time is spent on -> the heading
    "training": "training",
    "rollout": "rollout",
    "building": "data building",
    "evaluation": "evaluation",
    "other": "other",
}


def cost(run: RunData) -> str:
    """Where the time went, for how many tokens, on what machine, and what it cost."""
    found = costs(run)
    if not total(found).seconds:
        return ""
    bar = _bar(found, total(found).seconds)
    if later := afterwards(run):
        found.append(later)
    sums, here = total(found), devices(run)
    kinds = [kind for kind in (*SPENT, *TOKENS) if getattr(sums, kind)]
    priced = here is not None and here.price is not None
    head = ["stage", "steps", "time", *((SPENT | TOKENS)[kind] for kind in kinds)]
    head += [f"{here.name}-hours"] if here else []
    head += ["cost"] if priced else []
    rows = [f"<tr>{_cost_cells(each, kinds, here)}</tr>" for each in found]
    if len(found) > 1:
        rows.append(f'<tr class="sum">{_cost_cells(sums, kinds, here)}</tr>')
    titles = "".join(f"<th{' class=n' * (i > 0)}>{name}</th>" for i, name in enumerate(head))
    machine = " · ".join(f"{escape(name)}: {escape(str(x))}" for name, x in run.machine.items())
    return (
        f'<h2>Time and cost</h2>{bar}<div class="scroll"><table>'
        f"<tr>{titles}</tr>{''.join(rows)}</table></div>"
        f'{_two_kinds(sums, here)}<p class="soft">{machine}</p>\n'
    )


def _two_kinds(sums: Cost, here: Devices | None) -> str:
    """What went into training and what into inference."""
    parts = []
    for name, seconds in (("Training", sums.training), ("inference", sums.inference)):
        text = f"{name} took {duration(seconds)}"
        if here is not None:
            text += f" ({number(here.hours(seconds))} {here.name}-hours"
            text += f", {here.dollars(seconds)})" if here.price is not None else ")"
        parts.append(text)
    return (
        f"<p>{', '.join(parts)}. Inference is rollouts, data building and evaluations; what is "
        "neither is scoring, compiling and saving. Tokens are those of sampled answers, and those "
        "that went through updates, each as often as it did.</p>"
    )


def _cost_cells(each: Cost, kinds: Sequence[str], here: Devices | None) -> str:
    texts = [f"{each.step:,}" if each.step is not None else "", duration(each.seconds)]
    spent = [(getattr(each, kind), number if kind in TOKENS else duration) for kind in kinds]
    texts += [text(value) if value else "" for value, text in spent]
    if here is not None:
        texts.append(number(here.hours(each.seconds)))
        texts += [here.dollars(each.seconds)] if here.price is not None else []
    cells = "".join(f'<td class="n">{text}</td>' for text in texts)
    return f"<td>{escape(each.stage)}</td>{cells}"


def _bar(found: Sequence[Cost], seconds: float) -> str:
    """Each stage's share of the run's time, by what it was spent on where that is known."""
    pieces = []
    for each in found:
        spent = {kind: getattr(each, kind) for kind in SPENT if getattr(each, kind)}
        whole = len(spent) == 1
        pieces += [
            (each.stage if whole else f"{each.stage}: {SPENT[kind]}", part)
            for kind, part in spent.items()
        ]
    bar, key = [], []
    for i, (name, part) in enumerate(pieces):
        share = f"{part / seconds:.1%}"
        title = f"{escape(name)}: {duration(part)}, {share}"
        colour = f"c{i % NUM_COLOURS}"
        bar.append(f'<i class="{colour}" style="flex-grow:{part:.3f}" title="{title}"></i>')
        key.append(f'<span><i class="chip {colour}"></i>{escape(name)} {share}</span>')
    return f'<div class="bar">{"".join(bar)}</div><p class="key">{"".join(key)}</p>'


def settings(run: RunData) -> str:
    """How to run it again, and every setting."""
    parts = []
    if "variant" in run.origin:
        command = ["python", "-m", "r1jax.train"]
        command += ["--config", f"{run.folder / 'config.py'}:{run.origin['variant']}"]
        for override in run.origin.get("overrides", ()):
            command += ["--set", str(override)]
        command += ["--out", f"{run.folder}-again"]
        parts.append("<h2>Run it again</h2>")
        if commit := run.origin.get("commit"):
            changed = str(commit).endswith("-dirty")
            note = ", with changes that were not committed" if changed else ""
            commit = escape(str(commit).removesuffix("-dirty"))
            parts.append(f'<p class="soft">Code at commit <code>{commit}</code>{note}.</p>')
        parts.append(f'<pre class="command">{escape(shlex.join(command))}</pre>\n')
    if run.settings:
        lines = "\n".join(f"{path}: {value}" for path, value in run.settings.items())
        parts.append(f'<h2>Settings</h2><pre class="settings">{escape(lines)}</pre>\n')
    return "".join(parts)
