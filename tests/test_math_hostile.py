"""Three hundred answers made to hang, exhaust or crash what scores them. None is 5.

Run as a program, it scores them as a run does: `python tests/test_math_hostile.py`.
"""

import time
from collections.abc import Iterator
from functools import partial

from r1jax.rewards.math import accuracies, accuracy
from r1jax.rewards.math.score import decide, pool
from r1jax.rewards.math.text import final_answer
from r1jax.rewards.pool import open_pool
from r1jax.rewards.weighted import score_many, weighted


def hostile_answers() -> list[str]:
    """At least 300 texts; the same in every run."""
    boxed = [f"\\boxed{{{formula}}}" for formula in _formulas()]
    return list(dict.fromkeys([*boxed, *_texts()]))


def _formulas() -> Iterator[str]:
    for base in (2, 3, 7, 9, 10, 99):
        for height in (2, 3, 4, 5, 8, 40):
            yield "^{".join([str(base)] * (height + 1)) + "}" * height
            yield "^".join([str(base)] * (height + 1))
            yield "(" * height + str(base) + f"^{base})" * height
    for size in (10**3, 10**5, 10**6, 10**8, 10**12, 10**30):
        yield f"{size}!"
        yield f"\\frac{{{size}!}}{{{size - 1}!}}"
        yield f"\\binom{{{size}}}{{{size // 2}}}"
        yield f"({size}!)!"
        yield f"2^{{{size}}} \\bmod 7"
        yield f"\\sum_{{k=1}}^{{{size}}} \\frac{{1}}{{k^k}}"
        yield f"\\prod_{{k=1}}^{{{size}}} k"
        yield f"\\int_0^{{{size}}} \\sin(x^{{x}})\\,dx"
        yield f"e^{{{size}}}"
        yield f"\\sin({size}^{{{size}}})"
        yield f"1.5e{size}"
        yield f"\\sqrt[{size}]{{2^{{{size}}}}}"
    for depth in (10, 30, 100, 1_000, 20_000):
        yield "(" * depth + "5" + "+0)" * depth + "+1"
        yield "{" * depth + "6" + "}" * depth
        yield "\\frac{1}{1+" * depth + "x" + "}" * depth
        yield "\\sqrt{" * depth + "2" + "}" * depth
        yield "\\sin(" * depth + "1" + ")" * depth
        yield "\\{" * depth + "6" + "\\}" * depth
        yield "[" * depth + "6" + "]" * depth
        yield "|" * depth + "6" + "|" * depth
        yield "\\left(" * depth + "6" + "\\right)" * depth
        yield "(" * depth
        yield ")" * depth
        yield "-" * depth + "6"
        yield "6" + "!" * depth
        yield "\\text{" * depth + "6" + "}" * depth
        yield "x_{" * depth + "1" + "}" * depth
        yield "1+" * depth + "x"
        yield "(x+1)" * depth
        yield "(x+1)^" * depth + "2"
        yield ",".join(["1"] * (depth + 1))
        yield " \\cup ".join(["(1,2)"] * depth) + " "
        yield "=".join(["x"] * (depth + 2))
        yield "1<" * depth + "x"
        yield "1 \\pm " * depth + "2"
        yield "又" * depth
        yield "一又" * depth + "一"
        yield "一分之" * depth + "一"
    for digits in (500, 5_000, 200_000):
        yield "7" * digits
        yield "7" * digits + "." + "7" * digits
        yield "0." + "3" * digits
        yield "7" * digits + "/" + "3" * digits
        yield f"\\frac{{{'7' * digits}}}{{{'3' * digits}}}"
        yield "1," + ",".join(["000"] * (digits // 3))
        yield f"x^{{{'7' * digits}}}"
        yield f"\\sqrt{{{'7' * digits}}}"
        yield f"1e{'9' * digits}"
        yield "七" * digits
        yield "two " * digits
    for side in (8, 40, 150):
        row = " & ".join(["x"] * side)
        yield "\\begin{pmatrix}" + " \\\\ ".join([row] * side) + "\\end{pmatrix}"
        yield "\\det\\begin{pmatrix}" + " \\\\ ".join([row] * side) + "\\end{pmatrix}"
        yield "\\begin{pmatrix} a & b \\\\ c & d \\end{pmatrix}^{" + "9" * side + "}"
    for power in (20, 300, 99_999):
        yield f"(a+b+c+d+e)^{{{power}}}"
        yield f"(x+1)^{{{power}}} - (x-1)^{{{power}}} = 0"
        yield f"\\int (\\sin x + \\cos x + e^x)^{{{power}}} dx"
        yield f"\\lim_{{x \\to 0}} \\frac{{\\sin^{{{power}}} x}}{{x^{{{power}}}}}"
        yield f"\\sum_{{n=1}}^{{\\infty}} \\frac{{1}}{{n^{{{power}}} + n + 1}}"
        yield f"\\{{x \\mid x^{{{power}}} - x - 1 = 0\\}}"
        yield f"\\log_{{{power}}}(\\log(\\log({power}^{{{power}}})))"
    for word in ("__import__('os').system('sleep 60')", "().__class__.__mro__", "lambda: 0"):
        yield word
        yield f"\\text{{{word}}}"
        yield f"\\operatorname{{{word}}}(5)"


def _texts() -> Iterator[str]:
    for many in (1_000, 30_000):
        yield "\\boxed{" * many
        yield "\\boxed{" * many + "6" + "}" * (many - 1)
        yield "}" * many
        yield "{" * many + "\\boxed{6}"
        yield "\\boxed{6} " * many
        yield "\\boxed{1}, " * many
        yield "<answer>" * many
        yield "</answer>" * many
        yield "<answer>" * many + "</answer>" * many
        yield "<think>" * many + "</think>" * many
        yield "#" * many
        yield "#### " * many
        yield "the answer is " * many
        yield "answer to " * many + " is 6"
        yield "答案是" * many
        yield "\\" * many
        yield "\\boxed{" + "\\" * many + "}"
        yield "\\boxed{" + "$" * many + "}"
        yield "\\boxed{" + " " * many + "6 x}"
        yield "\\boxed{6" + " " * many + "x}"
        yield "\\boxed{" + "a " * many + "}"
        yield "\\boxed{" + "6 apples " * many + "}"
        yield "\\boxed{6 " + "\\text{a}" * many + "}"
        yield "\\boxed{6 " + "\\text{a}^2" * many + "/}"
        yield "\\boxed{" + "=" * many + "}"
        yield "\\boxed{" + "，" * many + "}"
        yield "\\boxed{" + "^" * many + "}"
        yield "\\boxed{" + "⁵" * many + "}"
        yield "\\boxed{" + "½" * many + "}"
        yield "\\boxed{" + "\x00" * many + "}"
        yield "\\boxed{" + "\ud800" * many + "}"
        yield "\\boxed{" + "and " * many + "}"
        yield "\\boxed{" + "**" * many + "}"
        yield "\\boxed{" + "{,}" * many + "}"
        yield "$" * many


def test_hostile_answers_score_zero_and_the_pool_is_whole_afterwards():
    answers = hostile_answers()
    assert len(answers) >= 300
    timeouts = pool().timeouts
    scores = accuracies([{"answer": "5"}] * len(answers), answers, seconds=0.1)
    assert set(scores) == {0.0}
    assert pool().timeouts - timeouts >= 20  # some did hang
    workers, done = pool().processes(), pool().done
    golds = [{"answer": rf"\int_0^{n} x\,dx"} for n in (1, 2, 3, 4)]
    answers = [rf"\boxed{{{n * n}/2}}" for n in (1, 2, 3, 4)]
    assert accuracies(golds, answers) == [1.0] * 4
    assert (pool().processes(), pool().done) == (workers, done + 4)


def test_the_fast_path_spends_little_on_a_hostile_answer():
    for answer in hostile_answers():
        start = time.process_time()
        text = final_answer(answer)
        if text is not None:
            decide("5", text)
        assert time.process_time() - start < 1.0, answer[:80]  # 0.13 s at most


def test_a_rollout_with_hostile_answers_is_scored_and_no_scoring_worker_is_lost():
    reward = weighted(accuracy=(2.0, partial(accuracy, seconds=1.0)))
    symbolic = {"answer": r"\int_0^1 x\,dx"}, r"\boxed{1/2}"  # only math-verify can tell
    hostile = [({"answer": "5"}, rf"\boxed{{\int_0^{n} \sin(x^{{x}})\,dx}}") for n in range(2, 6)]
    rows, answers = zip(symbolic, *hostile, symbolic, strict=True)
    with open_pool(workers=1, seconds=120) as scoring:
        found = score_many(reward, rows, answers, each=scoring.map)
        assert [value for value, _ in found] == [2.0, 0.0, 0.0, 0.0, 0.0, 2.0]
        assert (scoring.timeouts, scoring.crashes) == (0, 0)


if __name__ == "__main__":
    texts = hostile_answers()
    start = time.perf_counter()
    found = accuracies([{"answer": "5"}] * len(texts), texts)
    seconds = time.perf_counter() - start
    print(f"{len(texts)} hostile answers, {len(texts) - found.count(0.0)} not scored 0")
    print(f"{seconds:.0f} s; math-verify: {pool().done} done, {pool().timeouts} ended at 3 s of")
    print(f"processor time, {pool().crashes} crashed; {len(pool().processes())} workers run")
