"""Writes the report of a run, or one page that compares several.

python -m r1jax.report runs/countdown_tiny
python -m r1jax.report runs/a runs/b --out compare.html
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from r1jax import metrics, report
from r1jax.config import one_line_errors


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m r1jax.report",
        description="Writes a run's report: one HTML file that needs no network and no scripts. "
        "Several runs are compared on one page.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run's folder, such as runs/debug")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="default: RUN/report.html; for several runs compare.html in this folder",
    )
    given = parser.parse_args(arguments)
    html = report.build(given.runs[0]) if len(given.runs) == 1 else report.compare(given.runs)
    one = Path(given.runs[0]) / "report.html"
    out = given.out or (one if len(given.runs) == 1 else Path("compare.html"))
    metrics.replace(out, html.encode("utf-8", "replace"))
    print(out)


if __name__ == "__main__":
    main()
