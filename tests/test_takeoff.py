"""Where a count leaves its first level for good, on made-up curves whose answer is known."""

import math
import random

import pytest

from r1jax.report.takeoff import take_off


def curve(*parts: tuple[int, float]) -> list[tuple[int, float]]:
    """Levels, each for some steps, one after another; steps count from 1."""
    values = [value for count, value in parts for _ in range(count)]
    return list(enumerate(values, 1))


def test_a_step_up_from_a_still_level_is_the_take_off():
    assert take_off(curve((50, 0.0), (50, 1.0))) == 51


def test_noise_delays_it_until_the_mean_of_five_is_three_deviations_up():
    # First tenth: 1, 3, ... has mean 2 and deviation 1. The means of five at steps 41 and 42 are
    # (1 + 3 + 1 + 3 + 12) / 5 = 4 and (3 + 1 + 3 + 12 + 12) / 5 = 6.2; the level is 2 + 3 * 1 = 5.
    points = [(step, 2 - (-1) ** (step + 1)) for step in range(1, 41)]
    points += [(step, 12) for step in range(41, 101)]
    assert take_off(points) == 42


@pytest.mark.parametrize(
    ("points", "step"),
    [
        (curve((40, 1.0), (20, 5.0), (40, 1.0)), None),  # it came back
        (curve((40, 1.0), (20, 5.0), (20, 1.0), (20, 5.0)), 81),  # the second time for good
        (curve((91, 1.0), (9, 5.0)), None),  # nine steps of the last tenth
        (curve((90, 1.0), (10, 5.0)), 91),
        (curve((100, 1.0)), None),
        (curve((50, 5.0), (50, 1.0)), None),  # down
        (curve((10, 0.0), (9, 1.0)), None),  # too few
        (curve((10, 0.0), (10, 1.0)), 11),
        (curve((4, 0.0), (96, 1.0)), None),  # the first level is of ten steps, which are not one
        ([], None),
    ],
)
def test_it_is_the_first_step_after_which_nothing_falls_back(points: list, step: int | None):
    assert take_off(points) == step


def test_a_straight_rise_takes_off_where_the_sum_says():
    # Steps 1 to 100 at their own height: mean 5.5, deviation sqrt(99 / 12) of 1 to 10. The mean of
    # five steps up to t is t - 2.
    level = 5.5 + 3 * math.sqrt(99 / 12)
    assert take_off([(step, step) for step in range(1, 101)]) == math.floor(level + 2) + 1


def test_the_unit_and_the_steps_between_values_do_not_matter():
    rng = random.Random(0)
    values = [rng.gauss(2, 0.3) + 4 / (1 + math.exp(-(i - 60) / 5)) for i in range(120)]
    step = take_off(list(enumerate(values)))
    assert step is not None and 50 < step < 65
    assert take_off([(10 * i, 7 * value - 3) for i, value in enumerate(values)]) == 10 * step


def test_noise_without_a_rise_hardly_ever_takes_off():
    found = 0
    for seed in range(500):
        rng = random.Random(seed)
        found += take_off([(i, rng.gauss(5, 1)) for i in range(80)]) is not None
    assert found == 0


def test_values_that_are_not_finite_are_left_out():
    points = curve((50, 0.0), (50, 1.0))
    odd = [(step + 0.5, math.nan) for step, _ in points]
    assert take_off(sorted(points + odd)) == 51
