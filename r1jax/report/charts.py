"""Line charts as SVG text, and numbers as people read them. Colours and strokes are the page's CSS.

A chart is plain markup without scripts: it scales with its column, and each step has a <title>
that a browser shows as a tooltip.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby, pairwise

WIDTH, HEIGHT = 380, 216  # in units of the drawing, about pixels in a column of the page
BROAD, TALL = 800, 420  # of a chart of many lines, as broad as the page's text
LEFT, TOP, BOTTOM = 46, 14, 28
LETTER = 6.4  # width of a letter in the labels' 11 px bold type
LABEL_GAP = 13  # between the baselines of two labels
MAX_LABELS = 12  # that fit at the lines' ends
MAX_POINTS = 300  # of a line; more cannot be told apart at this size
MAX_TOOLTIPS = 100
NUM_COLOURS = 8  # of the page's palette
NOISE = 0.015  # of a line's range; less is not smoothed
LARGEST = 1e30  # a diverged run's values beyond it would flatten all others

Points = Sequence[tuple[float, float]]


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line: (step, value) in the order of steps. `band` holds (step, low, high)."""

    label: str
    points: Points
    band: Sequence[tuple[float, float, float]] = ()
    colour: int = 0  # index into the page's palette
    marked: bool = False  # few exact values: a dot on each, and no smoothing
    dashed: bool = False  # another line has its colour


@dataclass(frozen=True, kw_only=True)
class Axis:
    """How values are drawn and written."""

    share: bool = False  # written in percent
    whole: bool = False  # from 0 to 1, whatever the data
    zero: bool = True  # zero is on the axis
    log: bool = False
    limit: float | None = None  # a level that is marked
    mark: float | None = None  # a step that is marked
    across: str = "step"  # what the points lie along
    doubling: bool = False  # along powers of two; the points lie above 0


# --------------------------------------------------------------------------- numbers


def number(value: float, *, share: bool = False) -> str:
    """Three figures, such as 0.0123, 4.56, 12,345 or 3.2×10⁻⁶; a share as 51.2%."""
    if not math.isfinite(value):
        return str(value)
    if share:
        return f"{value:.1%}"
    size = abs(value)
    if size == 0 or size >= 100:
        return f"{value:,.0f}" if size < 1e7 else power(value)
    if size < 1e-3:
        return power(value)
    return f"{value:.{decimals(value)}f}"


def decimals(value: float) -> int:
    """How many decimals show three figures of a value of this size; at least 2 below 10."""
    exponent = int(f"{value:.2e}".split("e")[1])  # after rounding: 0.9999 is as large as 1
    return max(0, 2 - max(exponent, -2))


def change(first: float, last: float, *, share: bool = False) -> str:
    """`1.00 → 2.68`: both with the larger one's decimals, or shares."""
    if share or not (math.isfinite(first) and math.isfinite(last)):
        return f"{number(first, share=share)} → {number(last, share=share)}"
    places = decimals(max(abs(first), abs(last)))
    return f"{first:,.{places}f} → {last:,.{places}f}"


def power(value: float) -> str:
    """Two figures and a power of ten: 3.2×10⁻⁶; the power alone where it is exact."""
    mantissa, exponent = f"{value:.1e}".split("e")
    ten = "10" + str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return ten if mantissa == "1.0" else f"{mantissa.removesuffix('.0')}×{ten}"


def ticks(low: float, high: float, *, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) that cover low to high.

    `whole` keeps them whole numbers, as steps are.
    """
    if high <= low:
        spread = abs(low) / 2 or 1.0
        low, high = low - spread * (low != 0), high + spread
    rough = (high - low) / count
    scale = 10 ** math.floor(math.log10(rough))
    gap = next(m * scale for m in (1, 2, 5, 10) if m * scale >= rough * (1 - 1e-9))
    gap = max(1.0, gap) if whole else gap
    first, last = math.floor(low / gap + 1e-9), math.ceil(high / gap - 1e-9)
    return [float(f"{i * gap:.12g}") for i in range(first, last + 1)]  # 0.3, not 3 * 0.1


def tick_texts(values: Sequence[float], *, share: bool = False) -> list[str]:
    """Tick labels, all with as many decimals as their distance needs."""
    scale = 100 if share else 1
    gap = abs(values[1] - values[0]) * scale if len(values) > 1 else abs(values[0]) or 1.0
    largest = max(map(abs, values))
    if not share and gap < 1e-4 and largest < 100 * gap:
        return ["0" if value == 0 else power(value) for value in values]
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9))
    suffix = "%" if share else ""
    if not share and largest >= 1e7:
        return ["0" if value == 0 else power(value) for value in values]
    if not share and largest >= 10_000:
        thousands = 0 if gap >= 1000 else 1
        return [f"{value / 1000:,.{thousands}f}k" if value else "0" for value in values]
    return [f"{value * scale:,.{decimals}f}{suffix}" for value in values]


def moving_mean(values: Sequence[float], window: int) -> list[float]:
    """Each value's mean with its neighbours, `window` in all; fewer at the ends."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    half = window // 2
    spans = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in spans]


def smoothing(values: Sequence[float]) -> int:
    """The window of the moving mean, odd, about a twelfth of the values; 1 leaves them as they are.

    Few values, and those that follow a smooth course (a learning rate, the fall of a loss), are
    left: a mean would only bend them. Noise is measured by how far values lie from the middle of
    their two neighbours.
    """
    if len(values) < 20:
        return 1
    bends = [abs(b - (a + c) / 2) for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    if statistics.median(bends) <= NOISE * (max(values) - min(values)):
        return 1
    return len(values) // 12 // 2 * 2 + 3


def thin(points: Points) -> Points:
    """At most MAX_POINTS of the points: of each bin the lowest and the highest."""
    if len(points) <= MAX_POINTS:
        return points
    bins = MAX_POINTS // 2
    kept = []
    for _, group in groupby(enumerate(points), key=lambda entry: entry[0] * bins // len(points)):
        part = [point for _, point in group]
        ends = {min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


# --------------------------------------------------------------------------- a chart


@dataclass(frozen=True, kw_only=True)
class _Frame:
    """Where a step and a value lie in the drawing."""

    x: Callable[[float], float]
    y: Callable[[float], float]
    right: float  # the end of the plot; labels follow
    foot: float  # where the plot ends below
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    axis: Axis


def line_chart(
    title: str, note: str, series: Sequence[Series], axis: Axis, *, broad: bool = False
) -> str:
    """A <figure> of lines over steps, each named by its end, or "" if there is nothing to draw.

    Values that are not finite are left out; on a log axis those that are not positive are drawn
    at the foot. A noisy line is drawn thin, with a thick moving mean (`smoothing`).
    """
    series = [_finite(line) for line in series]
    series = [line for line in series if line.points]
    if not series:
        return ""
    lines = [line if line.marked else _smooth(line) for line in series]
    longest = (28 if broad else 16) if len(series) > 1 else 0
    labels = [_label(line, axis, longest) for line in lines]
    described = escape(f"{title}: {', '.join(labels)} at the last {axis.across}", quote=True)
    if len(labels) > MAX_LABELS:
        labels = [""] * len(labels)
    width, height = (BROAD, TALL) if broad else (WIDTH, HEIGHT)
    right = width - 10 - LETTER * max(len(axis.across), *(len(text) for text in labels))
    frame = _frame(series, axis, right, height - BOTTOM)
    parts = [_grid(frame)]
    parts += [_band(line, frame) for line in series if line.band]
    for raw, line in zip(series, lines, strict=True):
        if line is not raw and len(series) <= 2:
            parts.append(_path(raw, frame, "raw"))
    parts += [_path(line, frame, "line dashed" if line.dashed else "line") for line in lines]
    parts += [_dots(line, frame) for line in lines]
    parts += _labels(lines, labels, frame, leaders=broad)
    parts += _tooltips(series, frame)
    return (
        f"<figure{' class=broad' * broad}><figcaption><b>{escape(title)}</b> "
        f"<span>{escape(note)}</span></figcaption>"
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{described}">'
        + "".join(parts)
        + "</svg></figure>\n"
    )


def _finite(line: Series) -> Series:
    return replace(
        line,
        points=[point for point in line.points if abs(point[1]) < LARGEST],
        band=[edge for edge in line.band if all(abs(end) < LARGEST for end in edge)],
    )


def _smooth(line: Series) -> Series:
    values = [value for _, value in line.points]
    window = smoothing(values)
    if window == 1:
        return line
    means = moving_mean(values, window)
    points = [(step, mean) for (step, _), mean in zip(line.points, means, strict=True)]
    return replace(line, points=points, band=())


def _label(line: Series, axis: Axis, longest: int) -> str:
    """The line's last value, behind so many letters of its name."""
    text = number(line.points[-1][1], share=axis.share)
    name = line.label if len(line.label) <= longest else line.label[: longest - 1] + "…"
    return f"{name} {text}" if longest else text


def _frame(series: Sequence[Series], axis: Axis, right: float, foot: float) -> _Frame:
    steps = [step for line in series for step, _ in line.points]
    values = [value for line in series for _, value in line.points]
    values += [edge for line in series for _, *edges in line.band for edge in edges]
    first, last = min(steps), max(steps)
    first = 0 if first <= last / 5 else first
    x_ticks = [tick for tick in ticks(first, last, whole=True) if first <= tick <= last]
    along = float
    if axis.doubling:
        along, first = math.log2, min(steps)
        powers = range(math.ceil(along(first)), math.floor(along(last)) + 1)
        x_ticks = [2.0**power for power in powers[:: -(-len(powers) // 6) or 1]]
        if len(x_ticks) < 2:  # all within a factor of two, or nearly
            x_ticks = [tick for tick in ticks(first, last) if first <= tick <= last] or [first]
    if axis.log:
        positive = [value for value in values if value > 0] or [1.0]
        low, high = min(positive), max(positive)
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        if len(decades) == 1:
            decades = range(decades[0] - 1, decades[0] + 1)
        every = -(-len(decades) // 6)
        y_ticks = [10.0**decade for decade in decades[::every]]
        floor, top = 10.0 ** decades[0], 10.0 ** decades[-1]

        def up(value: float) -> float:
            return math.log10(max(value, floor) / floor) / math.log10(top / floor)
    else:
        values += [0.0, 1.0] if axis.whole else [0.0] if axis.zero else []
        low, high = min(values), max(values)
        if high - low < 1e-6 * max(-low, high):  # float32's rounding is no shape to be seen
            high = low
        y_ticks = ticks(low, high)
        floor, top = y_ticks[0], y_ticks[-1]

        def up(value: float) -> float:
            return (value - floor) / (top - floor)

    def x(step: float) -> float:
        width = along(last) - along(first)
        share = (along(step) - along(first)) / width if width > 0 else 0.5
        return LEFT + (right - LEFT) * share

    def y(value: float) -> float:
        return foot - (foot - TOP) * up(value)

    return _Frame(x=x, y=y, right=right, foot=foot, x_ticks=x_ticks, y_ticks=y_ticks, axis=axis)


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<path class="{kind}" d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}"/>'


def _grid(frame: _Frame) -> str:
    axis, foot = frame.axis, frame.foot
    texts = (
        [power(value) for value in frame.y_ticks]
        if axis.log
        else tick_texts(frame.y_ticks, share=axis.share)
    )
    parts = []
    for value, text in zip(frame.y_ticks, texts, strict=True):
        y = frame.y(value)
        parts.append(_rule(LEFT, y, frame.right, y, "zero" if value == 0 else "grid"))
        parts.append(_text(LEFT - 7, y + 3.5, text, "tick end"))
    for value, text in zip(frame.x_ticks, tick_texts(frame.x_ticks), strict=True):
        parts.append(_rule(frame.x(value), foot, frame.x(value), foot + 4, "zero"))
        parts.append(_text(frame.x(value), foot + 16, text, "tick mid"))
    if frame.x_ticks:
        # Behind the last tick's text, which may reach beyond the plot.
        end = frame.x(frame.x_ticks[-1]) + LETTER * len(tick_texts(frame.x_ticks)[-1]) / 2 + 5
        parts.append(_text(max(frame.right + 7, end), foot + 16, axis.across, "tick"))
    if axis.limit is not None and frame.y_ticks[0] <= axis.limit <= frame.y_ticks[-1]:
        y = frame.y(axis.limit)
        parts.append(_rule(LEFT, y, frame.right, y, "limit"))
        parts.append(_text(frame.right + 7, y + 3.5, "limit", "tick"))
    if axis.mark is not None:
        x = frame.x(axis.mark)
        parts.append(_rule(x, TOP, x, foot, "limit"))
        parts.append(_text(x, TOP - 4, "take-off", "tick mid"))
    return "".join(parts)


def _band(line: Series, frame: _Frame) -> str:
    upper = [f"{frame.x(step):.1f} {frame.y(high):.1f}" for step, _, high in line.band]
    lower = [f"{frame.x(step):.1f} {frame.y(low):.1f}" for step, low, _ in reversed(line.band)]
    if len(line.band) == 1:
        step, low, high = line.band[0]
        return _rule(
            frame.x(step), frame.y(low), frame.x(step), frame.y(high), f"line c{line.colour}"
        )
    return f'<path class="band c{line.colour}" d="M{"L".join(upper + lower)}Z"/>'


def _path(line: Series, frame: _Frame, kind: str) -> str:
    places = [f"{frame.x(step):.1f} {frame.y(value):.1f}" for step, value in thin(line.points)]
    return f'<path class="{kind} c{line.colour}" d="M{"L".join(places)}"/>'


def _dots(line: Series, frame: _Frame) -> str:
    points = line.points if line.marked else line.points[-1:]
    return "".join(
        f'<circle class="dot c{line.colour}" cx="{frame.x(step):.1f}" '
        f'cy="{frame.y(value):.1f}" r="{2.6 if line.marked else 2.2}"/>'
        for step, value in points
    )


def _labels(
    lines: Sequence[Series], texts: Sequence[str], frame: _Frame, *, leaders: bool
) -> list[str]:
    """The texts right of the lines' ends, moved up or down where they would touch.

    With `leaders` a thin line leads from each line's end to its text.
    """
    ends = [(frame.x(line.points[-1][0]), frame.y(line.points[-1][1])) for line in lines]
    order = sorted(range(len(lines)), key=lambda i: ends[i][1])
    places = [ends[i][1] + 3.5 for i in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LABEL_GAP)
    if places:
        places[-1] = min(places[-1], frame.foot + 3.5)
    for i in reversed(range(len(places) - 1)):
        places[i] = min(places[i], places[i + 1] - LABEL_GAP)
    parts = []
    for i, place in zip(order, places, strict=True):
        if leaders:
            kind = f"raw c{lines[i].colour}"
            parts.append(_rule(*ends[i], frame.right + 4, place - 3.5, kind))
        parts.append(_text(frame.right + 7, place, texts[i], f"label c{lines[i].colour}"))
    return parts


def _tooltips(series: Sequence[Series], frame: _Frame) -> list[str]:
    """Invisible columns, one a step, that show the step's values when pointed at."""
    steps = sorted({step for line in series for step, _ in line.points})
    exact = {step for line in series if line.marked for step, _ in line.points}
    stride = -(-len(steps) // MAX_TOOLTIPS)
    steps = [s for i, s in enumerate(steps) if not i % stride or s in exact or s == steps[-1]]
    values = [dict(line.points) for line in series]
    bands = [{step: (low, high) for step, low, high in line.band} for line in series]
    share = frame.axis.share
    middles = [(frame.x(a) + frame.x(b)) / 2 for a, b in pairwise(steps)]
    edges = [LEFT, *middles, frame.right]
    parts = []
    for i, step in enumerate(steps):
        texts = [f"{frame.axis.across} {number(step) if frame.axis.doubling else f'{step:,}'}"]
        for line, value, band in zip(series, values, bands, strict=True):
            if step in value:
                text = f"{line.label} {number(value[step], share=share)}"
                if step in band:
                    text += " [" + ", ".join(number(end, share=share) for end in band[step]) + "]"
                texts.append(text)
        title = escape("\n".join(texts))
        x, width = edges[i], edges[i + 1] - edges[i]
        parts.append(
            f'<g class="tip"><title>{title}</title>'
            f'<rect x="{x:.1f}" y="{TOP}" width="{width:.1f}" height="{frame.foot - TOP}"/>'
            + _rule(frame.x(step), TOP, frame.x(step), frame.foot, "cursor")
            + "</g>"
        )
    return parts


def interval_chart(before: tuple[float, float, float], after: tuple[float, float, float]) -> str:
    """Two shares with their intervals (value, low, high) on one axis from 0 to 100%."""
    width, height, left, right = 720, 92, 20, 696
    parts = []
    for percent in range(0, 101, 20):
        x = left + (right - left) * percent / 100
        parts.append(_rule(x, 8, x, height - 24, "grid"))
        parts.append(_text(x, height - 8, f"{percent}%", "tick mid"))
    for (value, low, high), y, colour, name in (
        (before, 24, "before", "before"),
        (after, 50, "after", "after"),
    ):
        x, x_low, x_high = (left + (right - left) * share for share in (value, low, high))
        title = f"{name} {value:.1%} [{low:.1%}, {high:.1%}]"
        on_left = x_low > 150
        label = _text(
            x_low - 10 if on_left else x_high + 10, y + 4, name, "label" + " end" * on_left
        )
        parts.append(
            f'<g class="{colour}"><title>{title}</title>{_rule(x_low, y, x_high, y, "span")}'
            f'<circle cx="{x:.1f}" cy="{y}" r="5.5"/>{label}</g>'
        )
    described = f"held-out accuracy {before[0]:.1%} before and {after[0]:.1%} after"
    return (
        f'<svg class="wide" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{described}">{"".join(parts)}</svg>'
    )
