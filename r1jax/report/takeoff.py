"""Where a count leaves the level that it began at, for good: the "aha" of reflection words."""

import math
import statistics
from itertools import accumulate

from r1jax.report.charts import Points

FEWEST = 20  # values that a first level can be told from
DEVIATIONS = 3.0  # above the first level
SMOOTHED = 5  # values whose mean is taken
SHARE = 0.1  # of the values: the first level is theirs, and as many must lie above it at the end


def take_off(points: Points) -> float | None:
    """The first step from which on a noisy value stays above where it began; None: there is none.

    The rule: let m and s be the mean and the standard deviation of the first tenth of the values,
    five of them at least. Each value is replaced by the mean of itself and the four before it. The
    take-off is the first step after that tenth from which on all of these means are above
    m + 3 s, and they must be so for the last tenth of the values at least. With fewer than 20
    values there is none. Values that are not finite are left out.

    A value that has always grown takes off soon: the rule knows no other first level. It is this
    project's: R1 (arXiv:2501.12948v2) draws its words over the steps and names no such step.
    """
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if len(finite) < FEWEST:
        return None
    values = [value for _, value in finite]
    few = max(SMOOTHED, math.ceil(SHARE * len(values)))
    level = statistics.fmean(values[:few]) + DEVIATIONS * statistics.pstdev(values[:few])
    sums = [0.0, *accumulate(values)]
    above = len(values)  # where the values begin that are all above
    while above > few:
        mean = (sums[above] - sums[above - SMOOTHED]) / SMOOTHED
        if mean <= level:
            break
        above -= 1
    return finite[above][0] if len(values) - above >= few else None
