"""Math answers: what is the same, what is not, in the forms that models and data sets use."""

import random
import time
from fractions import Fraction

import pytest

from r1jax.rewards.math import accuracies, accuracy
from r1jax.rewards.math.expressions import parse
from r1jax.rewards.math.score import decide, gold_answer
from r1jax.rewards.math.values import equal

# --------------------------------------------------------------------------- the same

SAME = {
    "numbers": [
        ("5", ["5.", "5.0", "+5", "05", r"\frac{10}{2}", "10/2", "five", r"\mathbf{5}", "**5**"]),
        ("1000", ["1,000", "1{,}000", r"1\,000", "1 000", "1000.00", "10^3", r"1 \times 10^{3}"]),
        ("10,\\!080", ["10080", "10,080"]),
        ("1,000,000", ["1000000", "1 million", "1.0e6"]),
        (r"\frac12", ["0.5", ".50", "1/2", r"\dfrac{1}{2}", r"\tfrac12", "½", "2/4", "50%"]),
        (r"1\frac{4}{5}", ["9/5", "1.8", "1 4/5", r"\frac95"]),
        ("-(1/3)", ["-1/3", r"-\frac{1}{3}", r"\frac{-1}{3}", r"\frac{1}{-3}", r"-0.\overline{3}"]),
        ("4.5e33", [r"4.5 \times 10^{33}", "4.5*10^33", "4.5 x 10^33", r"45 \cdot 10^{32}"]),
        (".0000672", ["6.72e-5", r"6.72\times10^{-5}", "0.0000672"]),
        ("2^{1009}", [r"2 \cdot 2^{1008}", "4^{504.5}"]),
        ("24", ["4!", r"\binom{24}{1}", "twenty-four", r"\sqrt{576}", r"\lfloor 24.9 \rfloor"]),
        ("0.6666666667", ["2/3"]),
        ("2/3", ["0.666667", "0.66666666"]),
        ("6th", ["6", "6^{\\text{th}}"]),
        (27.0, ["27", "27.0"]),
        (0.25, ["1/4", "25%"]),
    ],
    "units": [
        ("18", ["$18", r"\$18", "18 dollars", r"18\text{ dollars}", "18 eggs", "€18", "18 km/h"]),
        ("36", [r"36\text{ square units}", r"36 \mathrm{~cm}^2", "36 cm²", "36 cm^2", "36 m"]),
        (r"864 \mbox{ inches}^2", ["864", r"864\text{ sq in}", "864 square inches"]),
        (r"5.4 \text{ cents}", ["5.4", "5.4 cents", r"\$0.054"]),
        (r"90^\circ", ["90", "90°", "90 degrees", r"90^{\circ}", r"\frac{\pi}{2}"]),
        ("5 m", ["500 cm", "5 meters", "0.005 km"]),
        (r"\$32,\!348", ["32348", "32,348 dollars", r"\$32{,}348.00"]),
        ("12%", ["12", "12 pct", r"12\%", "0.12", "12 percent", "3/25"]),
        ("9 (apples)", ["9", "9 apples", "nine apples", "There are 9 apples."]),
        ("45", ["45 minutes", "about 45", r"\approx 45", "It takes him 45 minutes"]),
        ("3千米", ["3 km", "3000米", "3公里", "3"]),
        ("52_8", ["52_{8}", r"52_{\text{eight}}", "52"]),
    ],
    "names": [
        ("5", ["x = 5", r"x \approx 5", "5 = x", "2 + 3 = 5", r"\angle ABC = 5", "P(A) = 5"]),
        ("x=5", ["5", "x = 5.0"]),
        ("y = 2x + 3", ["2x+3", "3 + 2x", "f(x) = 2x + 3", "2x - y + 3 = 0", "y - 3 = 2x"]),
        ("5x - 7y + 11z + 4 = 0", ["-10x + 14y - 22z = 8"]),
        ("$f(n)=n$, $g(n)=1$", ["f(n) = n, g(n) = 1", r"g(n)=1 \text{ and } f(n)=n"]),
        ("(2,3)", ["(x,y) = (2,3)", "x=2, y=3", "2, 3"]),
    ],
    "formulas": [
        (r"\frac{\sqrt{3}}{3}", [r"\frac{1}{\sqrt3}", "1/sqrt(3)", r"3^{-1/2}", "√3/3"]),
        ("11\\sqrt2", [r"\sqrt{242}", "11√2", r"11 \cdot 2^{0.5}"]),
        (r"\sqrt2", ["1.414214", "1.4142135"]),
        ("6 - 5i", ["-5i+6", r"6-5\mathrm{i}"]),
        ("x^2+2x+1", ["(x+1)^2", "(x + 1)(x + 1)", "x²+2x+1"]),
        ("$-(n-1) / 2$", [r"\frac{1-n}{2}", "(1-n)/2"]),
        (r"\binom{2n}{n}", [r"\frac{(2n)!}{n!\,n!}", r"\frac{(2n)!}{(n!)^2}"]),
        (r"\lfloor\frac{2 n}{3}\rfloor+1", [r"\lfloor 2n/3 \rfloor + 1"]),
        (r"\frac{\log 2}{\log 2-\log 3}", [r"\frac{\ln 2}{\ln (2/3)}"]),
        ("np.arcsin(10/13)", [r"\arcsin\frac{10}{13}", r"\sin^{-1}(10/13)"]),
        ("$(n-2) 2^{n}+1$", ["1 + 2^n (n-2)", r"n \cdot 2^n - 2^{n+1} + 1"]),
        (r"\sin 2x", [r"2\sin x\cos x", "sin(2x)"]),
        ("C_{1} e^{t}+C_{2} e^{-t}", ["c_2 e^{-t} + c_1 e^t"]),
        (r"\frac{20000}{\pi}", [r"20000\pi^{-1}"]),
        (r"e^{i\pi}", ["-1"]),
    ],
    "collections": [
        ("1,-2", ["-2, 1", r"\{-2,1\}", r"x=1 \text{ or } x=-2", "1 and -2", r"(1,-2)"]),
        (r"1 \pm \sqrt{19}", [r"1+\sqrt{19}, 1-\sqrt{19}", r"1\mp\sqrt{19}"]),
        (r"\{1\pm\sqrt{5},-2\}", [r"-2, 1-\sqrt5, 1+\sqrt5"]),
        ("(1,8,19), (2,7,13)", [r"(2,7,13) \text{ and } (1,8,19)"]),
        (r"\left( 3, \frac{\pi}{2} \right)", [r"(3,\pi/2)", r"\left(3.0, \dfrac{\pi}{2}\right)"]),
        (r"(3,4]", [r"3 < x \leq 4", "(3, 4.0]", r"\left(3,4\right]", r"x \in (3,4]"]),
        (r"x \in [-2,7]", [r"-2\le x\le7", "[-2,7]"]),
        (r"(2,\infty)", ["x > 2", "2 < x", r"(2,+\infty)"]),
        (r"(-\infty,2)\cup(3,\infty)", [r"(3,\infty) \cup (-\infty,2)", r"x<2 \text{ or } x>3"]),
        (r"(0,9) \cup (9,36)", ["(0, 9) U (9, 36)"]),
        (r"\mathbb{R}", [r"(-\infty,\infty)", "all real numbers"]),
        (
            r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}",
            [r"\begin{bmatrix} -\frac13 \\ \frac23 \end{bmatrix}", r"(-\frac{1}{3}, \frac{2}{3})"],
        ),
        (
            r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}",
            [
                r"\begin{bmatrix}-1&0\\0&-1.0\end{bmatrix}",
                r"\left[\begin{array}{cc}-1 & 0 \\ 0 & -1\end{array}\right]",
            ],
        ),
    ],
    "words and letters": [
        (r"\text{(C)}", ["C", "(C)", r"\text{C}", "C. 12", r"\textbf{(C)}\ 12", "option C", "c"]),
        ("B", [r"\mathrm{(B)}", "(B) both of them", "Answer: B"]),
        (r"\text{Evelyn}", ["Evelyn", "evelyn.", r"\textbf{Evelyn}"]),
        (r"\text{even}", ["Even", "an even function"]),
        ("The men's track team", ["men's track team"]),
        ("11:45 p.m.", ["11:45 PM", "11:45pm"]),
        ("3:2", ["3/2", "3 : 2", "6:4"]),
        ("12:30", ["12{:}30", "12 : 30"]),
        ("no solution", [r"\emptyset", r"\text{None}", "does not exist"]),
        ("12", ["12元", "十二", "12个苹果", "答案是12元。", "１２"]),
        ("1/3", ["三分之一", "3分之1"]),
        ("7/2", ["3又1/2", "3又2分之1", "三又二分之一", "3又\\frac{1}{2}"]),
        ("-12", ["负12", "负十二"]),
        ("120000000", ["一亿二千万", "1.2亿"]),
        ("10^{12}", ["一万亿"]),
        ("12%", ["百分之12", "百分之十二"]),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("gold", "answer"),
    [(gold, answer) for group in SAME.values() for gold, answers in group for answer in answers],
)
def test_answers_that_say_the_same_score_one(gold: str | float, answer: str):
    assert accuracy({"answer": gold}, answer) == 1.0
    assert accuracy({"answer": gold}, rf"Thus $\boxed{{{answer}}}$.") == 1.0


# --------------------------------------------------------------------------- not the same

DIFFERENT = [
    ("5", ["6", "-5", "50", "0.5", "5x", "5!", "x = 6", "5, 6", "5 or 6", "not 5", "x + 5", "5^2"]),
    ("5", [r"\infty", r"\frac{5}{0}", "5i", "(5, 5)", r"\{5, 6\}", "no solution", "5 6", ""]),
    ("1,234", ["1,2345", "1234.5", "1", "234"]),
    ("1/3", ["0.33", "0.3334", "0.333334", "1/3/3", "3"]),
    ("1/8", ["0.125001", "0.1250001", "0.12"]),
    (r"\sqrt2", ["1.41", "1.414215", "2", r"\sqrt{2.0000001}", r"-\sqrt2"]),
    ("12%", ["12.5", "1.2", "0.012", "0.12%"]),
    ("0.5", ["50", "5", "0.50001"]),
    ("5 cm", ["5 kg", "5 m", "50 mm2"]),
    (r"\$36", ["36 cents", "37 dollars"]),
    ("3千米", ["3 m", "3 miles", "3小时"]),
    ("52_8", ["52_7", "42", "52_{10}"]),
    ("x=5", ["x=6", "y=5", "x=-5"]),
    ("0", ["2x - y = 0", "0.001", "O"]),
    ("y = 2x + 3", ["y = 3x + 2", "2x + 3 = 0", "2x - y + 4 = 0"]),
    ("f(x)=x+1", ["f(x)=x-1", "x"]),
    ("x^2+2x+1", ["x^2+2x-1", "(x-1)^2", "x^2", "y^2+2y+1"]),
    ("2k", ["2", "k", "2^k", "2 k + 1"]),
    ("6m", ["6"]),
    ("6 - 5i", ["6 + 5i", "6", "1"]),
    ("7", [r"3+4\mathrm{i}"]),
    (r"\lfloor\sqrt{n-1}\rfloor", [r"\lfloor\sqrt{n-2}\rfloor", r"\sqrt{n-1}"]),
    ("I(0) e^{-t}", ["I(0) e^{t}"]),
    ("1, 2, 3", ["1, 2, 3, ...", r"1, 2, 3, \dots"]),
    ("1,-2", ["1,2", "1", "1,-2,3", "(-2,1)"]),
    ("(2,4)", ["(4,2)", "[2,4]", "(2,4]", r"\{4,2\}", "2", "(2,4,6)"]),
    ("(3,4]", ["[3,4)", "(3,4)", r"3 \le x \le 4", "3 < x < 4", "(3,5]"]),
    (r"(-\infty,2)\cup(3,\infty)", [r"(-\infty,2]\cup(3,\infty)", r"(-\infty,2)", "x<2"]),
    (r"1 \pm \sqrt{19}", [r"1 + \sqrt{19}", r"-1 \pm \sqrt{19}"]),
    ("x=2,y=3", ["y=2,x=3"]),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", [r"\begin{pmatrix}1&3\\2&4\end{pmatrix}", "1"]),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", ["(2,1)", r"\begin{pmatrix}1&2\end{pmatrix} + 1"]),
    (r"\text{(C)}", ["D", "5", "(A) C", "C or D", "BC"]),
    (r"\text{even}", ["odd", "neither even nor odd", "even or odd", "not even"]),
    ("Yes", ["No", "yes no", "yes, maybe", "yes and no"]),
    ("120000000", ["一亿二千", "一亿零二千万零一"]),
    ("7/2", ["3又1/3", "31/2"]),
    (r"\text{Evelyn}", ["Briana", "Eve"]),
    ("No", ["no solution", "yes"]),
    ("11:45 p.m.", ["11:45 a.m.", "11:46 p.m."]),
    ("3:2", ["2:3", "3:4"]),
    ("12", ["1,2", "1 2", "120元", "二十"]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("gold", "answer"), [(gold, answer) for gold, answers in DIFFERENT for answer in answers]
)
def test_answers_that_say_something_else_score_zero(gold: str, answer: str):
    assert accuracy({"answer": gold}, rf"Thus $\boxed{{{answer}}}$.") == 0.0


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        (r"\int_0^1 x\,dx", "1/2", 1.0),
        (r"\int_0^1 x\,dx", "1/3", 0.0),
        (r"\frac{3}{4}", r"\sum_{n=1}^{2} \frac{1}{n(n+1)} + \frac{1}{12}", 1.0),
        (r"\frac{3}{4}", r"\sum_{n=1}^{2} \frac{1}{n(n+1)}", 0.0),
    ],
)
def test_what_is_not_read_here_is_told_by_math_verify(gold: str, answer: str, expected: float):
    assert decide(gold, answer) is None
    assert accuracy({"answer": gold}, rf"\boxed{{{answer}}}") == expected


def random_formula(rng: random.Random, depth: int) -> tuple[str, Fraction | None]:
    """A formula in LaTeX and its value by Fraction's arithmetic; None where it has none."""
    if depth == 0 or rng.random() < 0.2:
        value = rng.randint(0, 12)
        return rng.choice(
            [(str(value), Fraction(value)), (f"{value}.5", Fraction(2 * value + 1, 2))]
        )
    (left, a), (right, b) = (random_formula(rng, depth - 1) for _ in range(2))
    power = rng.randint(0, 3)
    forms = [
        (f"({left} + {right})", lambda: a + b),
        (f"\\left({left}-{right}\\right)", lambda: a - b),
        (f"{left} \\cdot ({right})", lambda: a * b),
        (f"({left})({right})", lambda: a * b),
        (f"\\frac{{{left}}}{{{right}}}", lambda: a / b),
        (f"({left}) / ({right})", lambda: a / b),
        (f"({left})^{{{power}}}", lambda: a**power),
        (f"-({left})", lambda: -a),
        (f"\\left|{left}\\right|", lambda: abs(a)),
        (f"\\sqrt{{({left})^2}}", lambda: abs(a)),
        (f"\\lfloor {left} \\rfloor", lambda: Fraction(a.__floor__())),
    ]
    text, value = rng.choice(forms)
    try:
        return text, value()
    except (TypeError, ZeroDivisionError, AttributeError):
        return text, None


def test_random_formulas_equal_their_value_and_no_other():
    rng = random.Random(0)
    seen = 0
    for _ in range(1500):
        text, value = random_formula(rng, 3)
        if value is None:
            continue
        seen += 1
        gold = f"{value.numerator}/{value.denominator}"
        assert decide(gold, text) is True, (gold, text)
        assert decide(f"{value.numerator + value.denominator}/{value.denominator}", text) is False
    assert seen > 1000


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("(x+y)^3", "x^3+3x^2y+3xy^2+y^3", True),
        ("(x+y)^3", "x^3+3x^2y+3xy^2+1.0000001y^3", None),  # nearly: nothing is said
        (r"\sin^2 x + \cos^2 x", "1", True),
        (r"\tan x", r"\frac{\sin x}{\cos x}", True),
        (r"\sqrt{x^2}", "x", True),  # for positive values
        (r"\ln(xy)", r"\ln x + \ln y", True),
        (r"\ln(x+y)", r"\ln x + \ln y", False),
        ("(10^{20}+1) - 10^{20}", "1", True),
        (r"\sqrt{10^{40}+1} - 10^{20}", "0", None),  # lost in rounding
        (r"\sqrt{10^{40}+1} - 10^{20}", "1", None),
        ("2000! / 1999!", "2000", True),
        ("9^{9^9}", "9", None),
        (r"\frac{1}{0}", "1", None),
        (r"\sqrt[3]{-8}", "-2", True),
        (r"\sqrt{-4}", "2i", True),
        (r"\sqrt2 \cdot 10^{-20}", r"\sqrt3 \cdot 10^{-20}", False),
        (r"\sin \pi", "0", True),
    ],
)
def test_values_decide_only_what_floating_point_can_tell(left: str, right: str, expected):
    assert equal(parse(left), parse(right)) is expected
    assert equal(parse(right), parse(left)) is expected


# --------------------------------------------------------------------------- the contract


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "row has no field 'answer'; it has none"),
        ({"question": "?", "id": 1}, "row has no field 'answer'; it has question, id"),
        ({"answer": ""}, "must be a text or a finite number, got ''"),
        ({"answer": " \n"}, "must be a text or a finite number"),
        ({"answer": None}, "must be a text or a finite number, got None"),
        ({"answer": float("nan")}, "must be a text or a finite number, got nan"),
        ({"answer": float("inf")}, "must be a text or a finite number, got inf"),
        ({"answer": True}, "must be a text or a finite number, got True"),
        ({"answer": ["1"]}, r"must be a text or a finite number, got ['1']"),
        ({"answer": b"1"}, "must be a text or a finite number, got b'1'"),
        ({"answer": r"\boxed{}"}, "must be a text or a finite number"),
    ],
)
def test_a_row_without_a_gold_answer_is_named_in_one_line(row: dict, message: str):
    with pytest.raises(ValueError) as error:
        accuracy(row, "1")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("answer", [None, 5, b"5", ["5"]])
def test_an_answer_that_is_no_text_is_named(answer):
    with pytest.raises(ValueError, match="an answer must be text"):
        accuracy({"answer": "5"}, answer)


def test_rows_and_answers_go_in_pairs():
    with pytest.raises(ValueError, match="got 1 and 2"):
        accuracies([{"answer": "1"}], ["1", "2"])
    assert accuracies([], []) == []


@pytest.mark.parametrize(
    "answer", ["", " ", r"\boxed{}", r"\boxed{ }", "<answer></answer>", "####", "\ud800", "\x00"]
)
def test_an_empty_or_broken_answer_scores_zero(answer: str):
    assert accuracy({"answer": "5"}, answer) == 0.0


def test_surrogates_and_control_signs_pass_through_every_path():
    assert accuracy({"answer": "\ud800"}, "\\boxed{\ud800}") == 1.0
    assert accuracy({"answer": r"\int x dx"}, "\\boxed{\ud800 \\alpha \x00}") == 0.0


def test_a_gold_answer_that_nothing_can_read_is_not_judged():
    row = {"answer": r"\begin{cases} @@ \\"}
    assert accuracy(row, r"\boxed{5}") is None
    assert accuracy(row, row["answer"]) == 1.0


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        (18, "18"),
        (18.0, "18"),
        (0.5, "0.5"),
        ("Janet sells 9 eggs.\n#### 18", "18"),
        (r"We get \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (" x+1 ", " x+1 "),
    ],
)
def test_a_gold_answer_may_be_a_number_or_a_whole_solution(gold: str | float, expected: str):
    assert gold_answer({"answer": gold}) == expected


def test_a_batch_is_scored_like_its_answers_one_by_one():
    golds = ["5", r"\int_0^1 x\,dx", "5", r"\frac{3}{4}", r"\begin{cases} @@ \\"]
    texts = ["5", "1/2", "6", r"\sum_{n=1}^{3} \frac{1}{n(n+1)}", "1"]
    rows = [{"answer": gold} for gold in golds]
    answers = [rf"\boxed{{{text}}}" for text in texts]
    one_by_one = [accuracy(row, answer) for row, answer in zip(rows, answers, strict=True)]
    assert accuracies(rows, answers) == one_by_one == [1.0, 1.0, 0.0, 1.0, None]


# --------------------------------------------------------------------------- speed


def test_a_thousand_grade_school_answers_take_less_than_two_seconds():
    rng = random.Random(0)
    rows, answers = [], []
    for number in range(1000):
        form = rng.choice(["{} dollars", "${}$", "{}.00", "{}", "x = {}", "The total is {} eggs"])
        rows.append({"answer": f"She has 3 * 4.\n#### {number * 7:,}"})
        answers.append(
            "Step by step. " * 100 + rf"\boxed{{{form.format(number * 7 + number % 2)}}}"
        )
    start = time.process_time()
    scores = accuracies(rows, answers)
    assert time.process_time() - start < 2.0  # 0.2 s
    assert scores == [1.0 - number % 2 for number in range(1000)]


@pytest.mark.parametrize(
    "end", [r"\boxed{\frac{1}{2}}", "<answer>0.5</answer>", "#### 0.5", "The answer is 1/2."]
)
def test_an_answer_of_64_000_characters_takes_less_than_five_milliseconds(end: str):
    text = "We try {x} again: 2 + 2 = 4, so the answer so far is \\frac{1}{3}. Wait.\n" * 900
    text = text[-64_000:] + end
    times = []
    for _ in range(10):
        start = time.process_time()
        assert accuracy({"answer": r"\frac{1}{2}"}, text) == 1.0
        times.append(time.process_time() - start)
    assert min(times) < 0.005
