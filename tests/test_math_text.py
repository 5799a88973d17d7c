"""Where a text's final answer is found, and how it is written plainly."""

import time

import pytest

from r1jax.rewards.math.text import clean, final_answer, last_boxes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"so \boxed{18}.", "18"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{5} and then \boxed{\frac{1}{2", "5"),  # the last is not balanced
        (r"\boxed{ \boxed{5} }", "5"),
        (r"\fbox{7}", "7"),
        (r"\framebox{204}", "204"),
        (r"} \boxed{3} {", "3"),
        (r"\boxed{}", ""),
        (r"\boxed 5", None),
        ("", None),
        (r"$\boxed{2}$ and $\boxed{3}$", "2, 3"),
        (r"x = \boxed{2} or x = \boxed{3}", "2, 3"),
        (r"$\boxed{2}$, $\boxed{3}$, $\boxed{4}$", "2, 3, 4"),
        (r"\[ \boxed{-2} \quad \text{and} \quad \boxed{1}. \]", "-2, 1"),
        ("\\boxed{2}\n\n\\boxed{2}", "2"),
        (r"\boxed{2}, \boxed{2}", "2"),
        (r"\boxed{1} is wrong, so it is \boxed{3}", "3"),
        ("x" * 5_000 + r"\boxed{4}" + "{" * 5_000, "4"),
    ],
)
def test_the_last_balanced_box_counts_with_those_joined_to_it(text: str, expected: str | None):
    assert last_boxes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # each marker
        (r"<answer>1</answer> #### 2 The answer is 3. \boxed{4}", "4"),
        ("#### 2\nThe answer is 3. <answer>1</answer>", "1"),
        ("The answer is 3.\n#### 2", "2"),
        ("#### 2\nThe answer is 3.", "2"),
        ("It is 7. The answer is 3. Done.", "3"),
        ("42", "42"),
        (" $42$ \n", "$42$"),
        # thoughts do not count
        (r"<think>\boxed{1}</think> The answer is 2.", "2"),
        (r"<think> \boxed{1} </think>", None),
        (r"<think> cut off \boxed{1}", "1"),
        # tags
        ("<answer> 5 </answer>", "5"),
        ("<answer>\nThe answer is 5.\n</answer>", "5"),
        ("<answer>1</answer> or <answer>2</answer>", "2"),
        ("a line\n<answer> 5", None),
        # the line after ####
        ("a\n#### 18 dollars\nb", "18 dollars"),
        ("#### 1\n#### 2", "2"),
        # phrases
        ("so\nThe answer is 3.5 kg. Next", "3.5 kg"),
        ("so\n**Answer:** 18", "18"),
        ("so\nThe final answer is: **18**", "18**"),
        ("so\nThe answer is $18. She saved $5.", "$18"),
        ("so\nThe answer is $\\frac{1}{2}$ because", "\\frac{1}{2}"),
        ("so\nThe answer is \\(x+1\\), as said", "x+1"),
        ("Final Answer: The largest $n$ is 34.", "The largest $n$ is 34"),
        ("so\nAnswer to the question is 9.", "9"),
        ("所以\n答案是12元。", "12元"),
        ("所以\n答案：12", "12"),
        # nothing
        ("two lines\nwithout any marker", None),
        ("x" * 201, None),
        ("", None),
        (" \n ", None),
    ],
)
def test_markers_are_tried_in_their_order(text: str, expected: str | None):
    assert final_answer(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\left( 3, \dfrac{1}{2} \right]", r"( 3, \frac{1}{2} ]"),
        (r"10,\!080", "10080"),
        (r"1{,}000{,}000", "1000000"),
        (r"12\,000", "12000"),
        ("1,000", "1,000"),  # may be a list
        (r"\$18.90", r"18.90 \text{dollars}"),
        ("$-5", r"-5 \text{dollars}"),
        (r"90^\circ", r"90\degree"),
        ("90°", r"90\degree"),
        ("x² + ½", r"x^{2} + \frac{1}{2}"),
        ("（３，４）", "(3,4)"),
        ("2 ≤ x", r"2 \le x"),
        (r"$\textbf{18}$.", "18"),
        (r"{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"5\ \mathrm{~cm}", r"5 \text{ cm}"),
        (r"50\%", "50%"),
        ("4.5 x 10^33", r"4.5\times 10^33"),
    ],
)
def test_signs_and_commands_get_one_spelling(text: str, expected: str):
    assert clean(text) == expected


@pytest.mark.parametrize(
    "piece",
    [
        *(r"\boxed{", "}", "{", r"\boxed{6} ", r"\boxed{1}, ", "<answer>", "</answer>"),
        *("the answer is ", "answer to ", "答案是", "\\", "#### ", "</think>", "$", " "),
    ],
)
def test_an_answer_is_found_in_linear_time(piece: str):
    def seconds(length: int) -> float:
        text = piece * (length // len(piece))
        start = time.process_time()
        final_answer(text)
        return time.process_time() - start

    assert min(seconds(800_000) for _ in range(2)) < 2.0  # 0.3 s at most; quadratic: minutes
