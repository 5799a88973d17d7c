"""The part of a report about inference: accuracy against tokens, a curve for each strategy."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from r1jax.data.files import records
from r1jax.report.charts import NUM_COLOURS, Axis, Series, line_chart, number
from r1jax.report.data import Row

AXIS = Axis(share=True, zero=False, across="tokens", doubling=True)
FEW = 3  # lines; with more their shades hide each other
NEEDED = {"strategy", "size", "sampled", "read", "scored", "accuracy", "low", "high", "cut"}
SAME = ("stage", "step", "data", "problems", "sampling", "max_new", "seed")  # to be compared


def inference(folder: Path) -> str:
    """What `r1jax.evaluate --strategy` left in the run's folder; "" if that is nothing.

    Files that asked the same weights about the same problems are one section: a strategy may have
    been run with several scorers.

    Raises:
      ValueError: A file is damaged.
    """
    sections: dict[str, dict[tuple[str, int], Row]] = {}
    for file in sorted(folder.glob("evaluations/*.curves.jsonl")):
        for point in _points(file):
            about = json.dumps([point.get(name) for name in SAME], sort_keys=True)
            # What needs no scorer may be in several files, and is the same in all.
            sections.setdefault(about, {}).setdefault((_name(point), point["size"]), point)
    parts = [_section(list(points.values())) for points in sections.values()]
    return "<h2>Accuracy against tokens</h2>" + "".join(parts) if parts else ""


def _points(file: Path) -> Sequence[Row]:
    points = records(file)
    for number_, point in enumerate(points, start=1):
        if missing := NEEDED - point.keys():
            raise ValueError(f"{file}: point {number_} has no {', '.join(sorted(missing))}")
    return points


def _name(point: Row) -> str:
    """The strategy, with who scored for it: a run's folder or a function, without the way there."""
    name = str(point["strategy"])
    if point["scored"] and point.get("scorer"):
        name += f" by {Path(str(point['scorer']).rpartition(':')[2]).name}"
    return name


def _section(points: Sequence[Row]) -> str:
    first = points[0]
    text = f"{first.get('problems')} problems of {first.get('data')}. Tokens are those sampled for "
    text += "a problem, also for answers that were dropped; what was read again and what a scorer "
    text += "read is in the table. Intervals are of 95%, over problems."
    groups: dict[str, list[Row]] = {}
    for point in points:
        groups.setdefault(_name(point), []).append(point)
    groups = dict(sorted(groups.items(), key=lambda group: bool(group[1][0]["scored"])))
    chart = line_chart(
        "Accuracy", "share of problems answered rightly", _lines(groups), AXIS, broad=True
    )
    return (
        f"<h3>Stage {escape(str(first.get('stage')))}, step {first.get('step')}</h3>"
        f'<p class="soft">{escape(text)}</p><div class="charts">\n{chart}</div>\n{_table(groups)}'
    )


def _lines(groups: Mapping[str, Sequence[Row]]) -> list[Series]:
    lines = []
    for colour, (name, group) in enumerate(groups.items()):
        shown = sorted((p for p in group if p["sampled"] > 0), key=lambda point: point["sampled"])
        band = [(point["sampled"], point["low"], point["high"]) for point in shown]
        lines.append(
            Series(
                label=name,
                points=[(point["sampled"], point["accuracy"]) for point in shown],
                band=band if len(groups) <= FEW else (),
                colour=colour % NUM_COLOURS,
                marked=True,
                dashed=colour >= NUM_COLOURS,
            )
        )
    return lines


def _table(groups: Mapping[str, Sequence[Row]]) -> str:
    head = ["strategy", "size", "sampled", "read again", "scored", "accuracy", "interval", "cut"]
    titles = "".join(f"<th{' class=n' * (i > 0)}>{name}</th>" for i, name in enumerate(head))
    rows = []
    for colour, (name, group) in enumerate(groups.items()):
        chip = f'<i class="chip c{colour % NUM_COLOURS}"></i>'
        for point in group:
            tokens = [number(point[name]) for name in ("sampled", "read", "scored")]
            interval = f"[{point['low']:.1%}, {point['high']:.1%}]"
            ends = [f"{point['accuracy']:.1%}", interval, f"{point['cut']:.1%}"]
            cells = "".join(f'<td class="n">{x}</td>' for x in (point["size"], *tokens, *ends))
            rows.append(f"<tr><td>{chip}{escape(name)}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{titles}</tr>{"".join(rows)}</table></div>\n'
