"""Gold answers of nine published sets: accepted in five paraphrases, refused when perturbed.

Run as a program, it does so with every row and lists each miss:
`python tests/test_math_data.py ../shared/data`. The test takes every seventh row.
"""

import json
import re
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest

from r1jax.rewards.math import accuracies
from r1jax.rewards.math.score import pool
from r1jax.rewards.math.text import last_boxes

DATA = Path(__file__).parents[1] / ".." / "shared" / "data"

NUMBER = re.compile(r"-?\d+(?:,\d{3})*(?:\.\d+)?|-?\.\d+")
FRACTION = re.compile(r"(-?)(?:(\d+)/(\d+)|\\d?frac\{(\d+)\}\{(\d+)\})")


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def golds(folder: Path) -> Iterator[tuple[str, str | float]]:
    """(set, gold answer as published) of each row that has one."""
    for name in ("gsm8k_train", "gsm8k_test"):
        for row in lines(folder, f"{name}.jsonl"):
            yield name, row["answer"]
    for name in ("math500", "aime24", "amc23", "cmath", "asdiv"):
        for row in lines(folder, f"{name}.jsonl"):
            yield name, row["answer"]
    for row in lines(folder, "svamp.jsonl"):
        yield "svamp", row["Answer"]
    for row in lines(folder, "olympiadbench.jsonl"):
        yield "olympiadbench", row["final_answer"][0]
    for row in lines(folder, "minerva_math.jsonl"):
        if last_boxes(row["solution"]):  # one solution has an empty box
            yield "minerva_math", row["solution"]


def bare(gold: str | float) -> str:
    """The gold answer as a person copies it out of the row."""
    if isinstance(gold, float):
        return str(int(gold)) if gold.is_integer() else str(gold)
    if "####" in gold:
        return gold.rpartition("####")[2].strip()
    return (last_boxes(gold) if "\\boxed" in gold else gold) or ""


def revalued(text: str) -> str:
    """Another way to write the same value: trailing zeros, an equivalent fraction, \\dfrac."""
    if NUMBER.fullmatch(text):
        return text + ("00" if "." in text else ".00")
    fraction = FRACTION.fullmatch(text)
    if fraction:
        sign, top, bottom, *_ = (part for part in fraction.groups() if part is not None)
        return f"{sign}\\frac{{{3 * int(top)}}}{{{3 * int(bottom)}}}"
    if "\\frac" in text:
        return text.replace("\\frac", "\\dfrac")
    words = re.fullmatch(r"(\d+) (\(.*\))", text)
    if words:
        return f"{words[1]}.0 {words[2]}"
    return f"{text}." if text.endswith(("}", ")")) else f"{{{text}}}"


def spaced(text: str) -> str:
    text = re.sub(r"(?<!\d),|,(?!\d{3}|\\!)", r", \\, ", text)
    text = re.sub(r"(?<=[\w})])([-+=])(?=[\w\\{(])", r" \1 ", text) if "e" not in text else text
    return f"\n  {text}  \n"


def with_unit(name: str, text: str) -> str:
    """With a unit or a name where one is natural; else in a sentence, without a marker's help."""
    if NUMBER.fullmatch(text) or FRACTION.fullmatch(text):
        kinds = [f"{text} \\text{{ units}}", f"{text} apples", f"\\${text}", f"x = {text}"]
        return f"{text}个" if name == "cmath" else kinds[sum(map(ord, text)) % 4]
    if "=" in text or "$" in text or re.search(r"[A-Za-z]{3}|:|,", text.replace("\\frac", "")):
        return f"${text}$" if "$" not in text and "\\" in text else f" {text} "
    return f"x = {text}" if "\\degree" not in text else text


def paraphrases(name: str, text: str) -> list[str]:
    return [
        f"So we add them up.\n\nThe result is $\\boxed{{{text}}}$.",
        f"<think> 2 + 2? {text} </think> <answer> {text} </answer>",
        f"Thus \\boxed{{{revalued(text)}}}",
        f"Hence\n\\[\\boxed{{{spaced(text)}}}\\]",
        f"It follows that \\boxed{{{with_unit(name, text)}}}",
    ]


def perturbed(text: str) -> str:
    """The first number is one more (a fraction's numerator, a decimal's last digit); or a word."""
    choice = re.fullmatch(r"\\text\{\((\w)\)\}", text)
    if choice:
        return f"\\text{{({'ABCDEA'['ABCDE'.index(choice[1]) + 1]})}}"
    match = re.search(r"\d+(?:\.\d+)?", text)
    if match is None:
        return f"{text} + 1" if re.search(r"[\\^]|^.$| - ", text) else f"not {text[::-1]}"
    digits = match[0]
    if "." in digits:
        places = len(digits.partition(".")[2])
        value = Fraction(digits) + Fraction(1, 10**places)
        whole = str(int(value * 10**places)).zfill(places + 1)
        digits = f"{whole[:-places]}.{whole[-places:]}"
    else:
        digits = str(int(digits) + 1)
    return text[: match.start()] + digits + text[match.end() :]


def judge(folder: Path, every: int) -> tuple[int, list[str]]:
    """How many answers were scored, and each that was scored wrongly."""
    rows, answers, wanted, names = [], [], [], []
    for place, (name, gold) in enumerate(golds(folder)):
        if place % every:
            continue
        text = bare(gold)
        for answer in paraphrases(name, text):
            rows.append({"answer": gold})
            answers.append(answer)
            wanted.append(1.0)
            names.append(name)
        rows.append({"answer": gold})
        answers.append(f"\\boxed{{{perturbed(text)}}}")
        wanted.append(0.0)
        names.append(name)
    scores = accuracies(rows, answers)
    misses = [
        f"{name}: {bare(row['answer'])!r} and {answer!r} scored {score}, not {want}"
        for name, row, answer, score, want in zip(names, rows, answers, scores, wanted, strict=True)
        if score != want
    ]
    return len(rows), misses


@pytest.mark.skipif(not DATA.is_dir(), reason="needs ../shared/data")
def test_gold_answers_are_accepted_in_five_paraphrases_and_refused_when_perturbed():
    count, misses = judge(DATA, every=7)
    assert count > 10_000
    assert len(misses) <= 0.005 * count, "\n".join(misses)


if __name__ == "__main__":
    start = time.perf_counter()
    number, missed = judge(Path(sys.argv[1]), every=1)
    print(*missed, sep="\n")
    seconds = time.perf_counter() - start
    right = number - len(missed)
    print(f"{right} of {number} right ({right / number:.3%}) in {seconds:.0f} s")
    print(f"math-verify: {pool().done} done, {pool().timeouts} ended, {pool().crashes} crashed")
