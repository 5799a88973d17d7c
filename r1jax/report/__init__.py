"""A run's report: one HTML file with its curves, its answers before and after, and its cost."""

from collections.abc import Sequence
from pathlib import Path

from r1jax import metrics
from r1jax.report import parts
from r1jax.report.comparison import comparison
from r1jax.report.data import evaluations, load
from r1jax.report.inference import inference
from r1jax.report.page import page


def build(folder: str | Path) -> str:
    """The report of the run in `folder` as HTML, however far the run has come.

    Raises:
      ValueError: There is no such folder, or no metrics.jsonl in it, or a file is damaged.
    """
    run = load(folder)
    found = evaluations(run)
    # What people come for is first: the stage whose evaluations are in the headline.
    first = [found.stage] if found else []
    rest = [n for n in run.stages if n not in first and not parts.table_of(run, n)]
    body = [parts.header(run), *(parts.stage(run, name) for name in first)]
    body += [parts.answers(run, name) for name in first]
    body += [parts.stage(run, name) for name in rest]
    body += [inference(run.folder)]
    body += [parts.cost(run), parts.settings(run)]
    return page(run.name, "".join(body))


def compare(folders: Sequence[str | Path]) -> str:
    """One page with the curves of several runs over each other, as HTML.

    Raises:
      ValueError: As `build`, for any of the folders.
    """
    return page("Runs compared", comparison([load(folder) for folder in folders]))


def write(folder: str | Path) -> Path:
    """Writes the run's report.html whole or not at all, and gives its path.

    Raises:
      ValueError: As `build`.
      OSError: It could not be written.
    """
    path = Path(folder) / "report.html"
    metrics.replace(path, build(folder).encode("utf-8", "replace"))
    return path
