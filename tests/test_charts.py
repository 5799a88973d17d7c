"""r1jax.report.charts: numbers as people write them, and lines drawn to scale."""

import math
import random
import re
from itertools import pairwise

import pytest

from r1jax.report import charts


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.0123456, "0.0123"),
        (0.09999, "0.100"),
        (0.9999, "1.00"),
        (1, "1.00"),
        (48.24, "48.2"),
        (99.96, "100"),
        (-2.5, "-2.50"),
        (12_345.6, "12,346"),
        (3.2e-6, "3.2×10⁻⁶"),
        (1e-5, "10⁻⁵"),
        (-3e9, "-3×10⁹"),
        (math.inf, "inf"),
    ],
)
def test_numbers_have_three_figures(value: float, text: str):
    assert charts.number(value) == text


def test_a_change_has_the_decimals_of_its_larger_end():
    assert charts.change(0.998, 2.68) == "1.00 → 2.68"
    assert charts.change(40.66, 77.72) == "40.7 → 77.7"
    assert charts.change(0.418, 0.0361, share=True) == "41.8% → 3.6%"


@pytest.mark.parametrize(
    "low, high, expected",
    [
        (0, 1, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (0, 77, ["0", "20", "40", "60", "80"]),
        (-0.009, 0.012, ["-0.010", "-0.005", "0.000", "0.005", "0.010", "0.015"]),
        (0, 43_000, ["0", "10k", "20k", "30k", "40k", "50k"]),
        (0, 3e-5, ["0", "10⁻⁵", "2×10⁻⁵", "3×10⁻⁵"]),
        (5, 5, ["2", "3", "4", "5", "6", "7", "8"]),
        (0, 0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
    ],
)
def test_ticks_are_round_and_cover_the_data(low: float, high: float, expected: list[str]):
    ticks = charts.ticks(low, high)
    assert ticks[0] <= low <= high <= ticks[-1]
    assert charts.tick_texts(ticks) == expected


def test_ticks_of_steps_are_whole_numbers():
    assert charts.ticks(1, 3, whole=True) == [1, 2, 3]


def test_a_moving_mean_has_fewer_neighbours_at_the_ends():
    assert charts.moving_mean([0, 3, 6, 3], 3) == [1.5, 3, 4, 4.5]
    assert charts.moving_mean([1, 2], 1) == [1, 2]


def test_noise_is_smoothed_and_a_smooth_course_is_left_as_it_is():
    rng = random.Random(0)
    fall = [2.6 * math.exp(-i / 9) for i in range(80)]
    schedule = [min(i / 8, (88 - i) / 80) for i in range(80)]
    assert charts.smoothing(fall) == charts.smoothing(schedule) == charts.smoothing([1.0] * 80) == 1
    noisy = [i / 80 + rng.gauss(0, 0.1) for i in range(80)]
    assert charts.smoothing(noisy) == 9
    assert charts.smoothing(noisy[:19]) == 1


def test_thinning_keeps_every_bins_extremes_in_order():
    points = [(step, float(step * 7919 % 10_007)) for step in range(10_000)]
    thin = charts.thin(points)
    assert len(thin) <= charts.MAX_POINTS and list(thin) == sorted(thin)
    assert max(points, key=lambda p: p[1]) in thin and min(points, key=lambda p: p[1]) in thin


def places(chart: str, colour: int = 0) -> list[tuple[float, float]]:
    (path,) = re.findall(rf'<path class="line c{colour}" d="M([^"]*)"', chart)
    return [(float(x), float(y)) for x, y in (place.split() for place in path.split("L"))]


def test_a_line_is_drawn_to_scale():
    line = charts.Series(label="x", points=[(0, 0.0), (50, 0.25), (100, 1.0)])
    (x0, y0), (x1, y1), (x2, y2) = places(
        charts.line_chart("t", "", [line], charts.Axis(whole=True))
    )
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y0 - y1 == pytest.approx((y0 - y2) / 4, abs=0.2) and y2 < y0


@pytest.mark.parametrize(("size", "flat"), [(1e-7, True), (1e-5, False)])
def test_rounding_is_a_flat_line_and_no_two_marks_read_alike(size: float, flat: bool):
    line = charts.Series(label="x", points=[(0, 1.0), (1, 1 - size), (2, 1.0)])
    chart = charts.line_chart("t", "", [line], charts.Axis(zero=False))
    assert (len({y for _, y in places(chart)}) == 1) is flat
    marks = re.findall(r'class="tick end">([^<]*)<', chart)
    assert len(set(marks)) == len(marks) > 1


def test_a_log_axis_gives_each_power_of_ten_the_same_height_and_puts_zero_at_its_foot():
    line = charts.Series(label="x", points=[(1, 0.0), (2, 1e-7), (3, 1e-6), (4, 1e-5)])
    axis = charts.Axis(log=True, limit=1e-6)
    chart = charts.line_chart("t", "", [line], axis)
    heights = [y for _, y in places(chart)]
    assert heights[0] == heights[1]
    assert heights[1] - heights[2] == pytest.approx(heights[2] - heights[3], abs=0.2)
    assert "10⁻⁷" in chart and 'class="limit"' in chart


def test_labels_at_the_lines_ends_do_not_touch():
    lines = [
        charts.Series(label=f"run {i}", points=[(0, 0.0), (9, 0.5)], colour=i) for i in range(6)
    ]
    chart = charts.line_chart("t", "", lines, charts.Axis())
    heights = [float(y) for y in re.findall(r'y="([\d.]+)" class="label', chart)]
    gaps = [b - a for a, b in pairwise(heights)]
    assert len(heights) == 6 and min(gaps) >= 12.9


@pytest.mark.parametrize(
    ("ends", "marks"),
    [
        ((30.0, 240.0), ["32", "64", "128"]),
        ((33.0, 60.0), ["40", "50", "60"]),  # no power of two, or one alone
        ((40.0, 100.0), ["40", "60", "80", "100"]),
        ((58.5, 58.5), ["58"]),  # a single point stands at its own place
    ],
)
def test_an_axis_of_doublings_always_has_marks_to_read_it_by(ends, marks: list[str]):
    line = charts.Series(label="x", points=[(x, 0.5) for x in dict.fromkeys(ends)], marked=True)
    chart = charts.line_chart("t", "", [line], charts.Axis(doubling=True, across="tokens"))
    assert re.findall(r'class="tick mid">([^<]*)<', chart) == marks


def test_a_marked_step_is_a_rule_at_its_place():
    line = charts.Series(label="x", points=[(step, 0.0) for step in range(0, 101, 25)])
    chart = charts.line_chart("t", "", [line], charts.Axis(mark=75))
    (x,) = re.findall(r'class="limit" d="M([\d.]+) ', chart)
    assert float(x) == pytest.approx(places(chart)[3][0], abs=0.1)


def test_in_a_broad_chart_a_thin_line_leads_from_each_end_to_its_label():
    lines = [
        charts.Series(label=f"a long name, number {i}", points=[(1, 0.1), (2 + i, 0.5)], colour=i)
        for i in range(3)
    ]
    chart = charts.line_chart("t", "", lines, charts.Axis(), broad=True)
    ends = [places(chart, colour)[-1] for colour in range(3)]
    leaders = re.findall(r'class="raw c(\d)" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"', chart)
    heights = dict(re.findall(r'y="([\d.]+)" class="label c\d">a long name, number (\d)', chart))
    assert len(leaders) == 3 and "…" not in chart
    for colour, *place in leaders:
        x, y, right, height = map(float, place)
        assert (x, y) == pytest.approx(ends[int(colour)], abs=0.1)
        label = next(float(at) for at, name in heights.items() if name == colour)
        assert right > x and height == pytest.approx(label - 3.5, abs=0.11)


def test_a_chart_without_values_is_left_out():
    line = charts.Series(label="x", points=[(1, math.nan)])
    assert charts.line_chart("t", "", [line], charts.Axis()) == ""
    assert charts.line_chart("t", "", [], charts.Axis()) == ""
