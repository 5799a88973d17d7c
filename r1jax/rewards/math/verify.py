"""math-verify's verdict on two formulas. It may hang or take all memory: for worker processes."""

import os
from typing import Any, Literal

Verdict = Literal["same", "different", "unreadable"]


def warm() -> None:
    """Imports math-verify and fills its caches. It says nothing any more on stdout and stderr.

    Raises:
      ImportError: it is not installed.
    """
    os.environ["SYMPY_GROUND_TYPES"] = "python"  # gmpy2 cannot be interrupted
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    try:
        compared("x^{2}-1", "(x-1)(x+1)")
    except ImportError as error:
        raise ImportError(f"{error} (pip install math-verify)") from error


def compared(gold: str, answer: str) -> Verdict:
    """Whether two LaTeX formulas are the same; "unreadable" if `gold` cannot be read."""
    from math_verify import verify

    parsed_gold = read(gold)
    if not parsed_gold:
        return "unreadable"
    parsed_answer = read(answer)
    same = bool(parsed_answer) and verify(parsed_gold, parsed_answer, timeout_seconds=None)
    return "same" if same else "different"


def read(formula: str) -> list[Any]:
    """The formula as sympy objects, [] if it cannot be read.

    As LaTeX only: math-verify reads plain text with sympy's `parse_expr`, which is Python's
    `eval`, and would run what a model wrote.
    """
    from math_verify import LatexExtractionConfig, parse

    return parse(
        f"${formula}$",
        extraction_config=[LatexExtractionConfig()],
        fallback_mode="no_fallback",
        parsing_timeout=None,  # type: ignore[arg-type]  # means: no alarm of its own
    )
