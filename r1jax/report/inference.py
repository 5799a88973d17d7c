"""The part of a report about inference: accuracy against tokens, a curve for each strategy."""

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from r1jax.data.files import records
from r1jax.report.charts import NUM_COLOURS, Axis, Series, line_chart, number
from r1jax.report.data import Row

AXIS = Axis(share=True, whole=True, across="tokens", doubling=True)
NEEDED = {"strategy", "size", "sampled", "read", "scored", "accuracy", "low", "high", "cut"}


def inference(folder: Path) -> str:
    """A section for every file that `r1jax.evaluate --strategy` left in the run's folder; "" if
    there is none.

    Raises:
      ValueError: A file is damaged.
    """
    files = sorted(folder.glob("evaluations/*.curves.jsonl"))
    parts = [_section(file, _points(file)) for file in files]
    return "<h2>Accuracy against tokens</h2>" + "".join(parts) if parts else ""


def _points(file: Path) -> Sequence[Row]:
    points = records(file)
    for number_, point in enumerate(points, start=1):
        if missing := NEEDED - point.keys():
            raise ValueError(f"{file}: point {number_} has no {', '.join(sorted(missing))}")
    return points


def _section(file: Path, points: Sequence[Row]) -> str:
    first = points[0]
    text = f"Stage {first.get('stage')}, step {first.get('step')}: {first.get('problems')} problems"
    text += f" of {first.get('data')}. Tokens are those sampled for a problem, also for answers"
    text += " that were dropped; what was read again and what a scorer read is in the table."
    series = []
    for colour, (name, group) in enumerate(groupby(points, key=lambda point: point["strategy"])):
        line = sorted(group, key=lambda point: point["sampled"])
        shown = [point for point in line if point["sampled"] > 0]
        series.append(
            Series(
                label=name,
                points=[(point["sampled"], point["accuracy"]) for point in shown],
                band=[(point["sampled"], point["low"], point["high"]) for point in shown],
                colour=colour % NUM_COLOURS,
                marked=True,
            )
        )
    chart = line_chart("Accuracy", "share of problems answered rightly", series, AXIS)
    return (
        f"<h3>{escape(file.name.removesuffix('.curves.jsonl'))}</h3>"
        f'<p class="soft">{escape(text)} Shades are 95% intervals over problems.</p>'
        f'<div class="charts">\n{chart}</div>\n{_table(points)}'
    )


def _table(points: Sequence[Row]) -> str:
    head = ["strategy", "size", "sampled", "read again", "scored", "accuracy", "interval", "cut"]
    titles = "".join(f"<th{' class=n' * (i > 0)}>{name}</th>" for i, name in enumerate(head))
    rows = []
    for point in points:
        tokens = [number(point[name]) for name in ("sampled", "read", "scored")]
        interval = f"[{point['low']:.1%}, {point['high']:.1%}]"
        ends = [f"{point['accuracy']:.1%}", interval, f"{point['cut']:.1%}"]
        cells = "".join(f'<td class="n">{each}</td>' for each in (point["size"], *tokens, *ends))
        rows.append(f"<tr><td>{escape(str(point['strategy']))}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr>{titles}</tr>{"".join(rows)}</table></div>\n'
