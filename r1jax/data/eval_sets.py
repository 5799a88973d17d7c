r"""The published evaluation sets: from their files to rows, prompts, and the rule that judges.

    rows = eval_sets.load("math500", "math500.jsonl")
    eval_sets.SETS["math500"].prompt(rows[0])

A row has the `question`, the `verifier` (a name that `r1jax.rewards.dispatch` knows), what that
rule needs (`answer`; `numbers` and `target`; `test` and `entry_point`), an `id`, and what is worth
breaking results down by, such as `level`. Columns are found under the names that they are published
with, which differ between sets and between copies of one set.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from r1jax.data import countdown
from r1jax.data.files import records

Row = dict[str, Any]

BOXED = r"Please reason step by step, and put your final answer within \boxed{}."
BOXED_CHINESE = r"请通过逐步推理来解答问题，并把最终答案放置于\boxed{}中。"
BOXED_ONLY = r"Give only the final answer, within \boxed{}, and nothing else."
BOXED_ONLY_CHINESE = r"只给出最终答案，放置于\boxed{}中，不要写任何别的内容。"
LETTER = (
    "Think step by step before answering. The last line of your reply must be 'Answer: X', "
    "where X is the letter of the right choice."
)
LETTER_ONLY = "Reply with 'Answer: X', where X is the letter of the right choice, and nothing else."
PROGRAM = (
    "Think step by step about how to complete this Python function. Then give the whole function, "
    "with its imports, in one ```python block."
)
PROGRAM_ONLY = (
    "Complete this Python function. Give the whole function, with its imports, in one ```python "
    "block, and nothing else."
)
EXPRESSION_ONLY = "Return only the equation's left side, in <answer> </answer> tags."


@dataclass(frozen=True, kw_only=True)
class EvalSet:
    """How one set is read and asked."""

    columns: Mapping[str, Sequence[str]]  # field -> names it is published under, the first wins
    row: Callable[[Mapping[str, Any]], Row]  # from the fields; ValueError: they make no sense
    prompt: Callable[[Mapping[str, Any]], str]  # asks for reasoning and then the answer
    direct: Callable[[Mapping[str, Any]], str]  # asks for the answer alone
    keep: Sequence[str] = ()  # columns that go into the row as they are, where the file has them


def load(name: str, path: str | Path) -> list[Row]:
    """The rows of a file of the set `name`, one of `SETS`. See `r1jax.data.files` for formats.

    Raises:
      ValueError: in one line: an unknown set; a file that cannot be read; a column that is
        missing, with those that were expected; a record that makes no sense, with its number.
    """
    if name not in SETS:
        raise ValueError(f"unknown evaluation set {name!r}; known: {', '.join(SETS)}")
    made = SETS[name]
    rows = []
    for number, record in enumerate(records(path), start=1):
        fields = _fields(made, record, f"{path} is no file of {name}: record {number}")
        try:
            row = made.row(fields)
        except ValueError as error:
            raise ValueError(f"{path}: record {number} is none of {name}: {error}") from None
        kept = {column: record[column] for column in made.keep if column in record}
        rows.append({"id": f"{name}-{number - 1}", **kept, **row})
    return rows


def _fields(made: EvalSet, record: Mapping[str, Any], place: str) -> dict[str, Any]:
    fields = {}
    for field, names in made.columns.items():
        column = next((name for name in names if name in record), None)
        if column is None:
            need = ", ".join(" or ".join(names) for names in made.columns.values())
            raise ValueError(f"{place} needs columns {need}; it has {', '.join(record) or 'none'}")
        fields[field] = record[column]
    return fields


# --------------------------------------------------------------------------- rows


def _math(fields: Mapping[str, Any]) -> Row:
    """A question with a gold answer, or with a solution that ends in it."""
    return {
        "question": _text(fields, "question"),
        "answer": _gold(fields["answer"]),
        "verifier": "math",
    }


def _story(fields: Mapping[str, Any]) -> Row:
    """SVAMP, ASDiv: the question follows the story that it is about."""
    story = _text(fields, "body").strip()
    question = _text(fields, "question").strip()
    joined = f"{story} {question}" if story[-1] in ".?!,;:" else f"{story}. {question}"
    return _math({"question": joined, "answer": fields["answer"]})


def _olympiad(fields: Mapping[str, Any]) -> Row:
    answers = fields["answer"]
    if not isinstance(answers, list) or len(answers) != 1:
        raise ValueError(f"need a list of one final answer, got {answers!r:.80}")
    return _math({"question": fields["question"], "answer": answers[0]})


def _humaneval(fields: Mapping[str, Any]) -> Row:
    """The prompt is the setup too: program and tests use its imports and helper functions."""
    prompt = _text(fields, "question")
    return {
        "question": prompt,
        "setup": prompt,
        "test": _text(fields, "test"),
        "entry_point": _text(fields, "entry_point"),
        "verifier": "code",
    }


def _gpqa(fields: Mapping[str, Any]) -> Row:
    """The right choice is published first: here all four are put in an order of their own.

    It depends on the texts alone, so it is the same in every copy and run.
    """
    question = _text(fields, "question")
    right = _text(fields, "right").strip()
    choices = [right, *(_text(fields, f"wrong{i}").strip() for i in (1, 2, 3))]
    ordered = sorted(choices, key=lambda choice: _digest(f"{question}\n{choice}"))
    return _choice_row(question, ordered, ordered.index(right))


def _choices(fields: Mapping[str, Any]) -> Row:
    choices, answer = fields["choices"], fields["answer"]
    if isinstance(choices, Mapping):  # {"text": [...], "label": [...]}, as ARC has them
        choices = choices.get("text")
    if not isinstance(choices, list) or not 2 <= len(choices) <= 10:
        raise ValueError(f"choices must be a list of 2 to 10, got {choices!r:.80}")
    letters = "ABCDEFGHIJ"[: len(choices)]
    if isinstance(answer, str) and answer.strip().upper() in tuple(letters):
        place = letters.index(answer.strip().upper())
    elif isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        place = answer
    else:
        raise ValueError(f"answer must be a letter of {letters} or its number, got {answer!r:.80}")
    return _choice_row(_text(fields, "question"), [str(choice) for choice in choices], place)


def _choice_row(question: str, choices: Sequence[str], place: int) -> Row:
    letters = "ABCDEFGHIJ"[: len(choices)]
    listed = "\n".join(f"{a}) {choice}" for a, choice in zip(letters, choices, strict=True))
    return {
        "question": f"{question.strip()}\n\n{listed}",
        "answer": letters[place],
        "verifier": "math",  # which knows choices by their letter
    }


def _countdown(fields: Mapping[str, Any]) -> Row:
    row = {"numbers": fields["numbers"], "target": fields["target"]}
    whole = [*row["numbers"], row["target"]] if isinstance(row["numbers"], list) else [None]
    if len(whole) < 2 or not all(type(number) is int for number in whole):
        raise ValueError(f"need a list of whole numbers and a whole target, got {row!r:.80}")
    return {"question": _countdown_question(row), **row, "verifier": "countdown"}


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not empty, got {value!r:.80}")
    return value


def _gold(value: Any) -> str | int | float:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"answer must be a text or a number, got {value!r:.80}")
    if isinstance(value, str) and not value.strip():
        raise ValueError("answer is empty")
    return value


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).digest()


# --------------------------------------------------------------------------- prompts


def _ask(row: Mapping[str, Any], *, ending: str) -> str:
    return f"{row['question']}\n\n{ending}"


def _code(row: Mapping[str, Any], *, beginning: str) -> str:
    return f"{beginning}\n\n```python\n{row['question'].strip()}\n```"


def _countdown_question(row: Mapping[str, Any]) -> str:
    """The user's part of TinyZero's prompt."""
    whole = countdown.tiny_zero_prompt(row)
    return whole.partition("User: ")[2].removesuffix("\nAssistant:")


def _question(row: Mapping[str, Any]) -> str:
    return row["question"]


def _plain_math(columns: Mapping[str, Sequence[str]], **rest: Any) -> EvalSet:
    rest = {
        "row": _math,
        "prompt": partial(_ask, ending=BOXED),
        "direct": partial(_ask, ending=BOXED_ONLY),
    } | rest
    return EvalSet(columns=columns, **rest)


_PROBLEM = ("problem", "question", "Problem", "Question")
_ANSWER = ("answer", "Answer", "expected_answer")

# Sources: arXiv 2110.14168 (GSM8K), 2103.03874 and 2305.20050 (MATH-500), 2206.14858 (Minerva),
# 2402.14008 (OlympiadBench), 2306.16636 (CMATH), 2103.07191 (SVAMP), 2106.15772 (ASDiv), 2107.03374
# (HumanEval), 2311.12022 (GPQA), github.com/Jiayi-Pan/TinyZero (Countdown). The sentence about the
# box is R1's (its README), the Chinese one DeepSeekMath's, arXiv:2402.03300.
SETS: Mapping[str, EvalSet] = {
    "gsm8k": _plain_math({"question": ("question",), "answer": ("answer",)}),
    "math500": _plain_math(
        {"question": ("problem", "question"), "answer": ("answer", "solution")},
        keep=("subject", "level", "unique_id"),
    ),
    "aime": _plain_math({"question": _PROBLEM, "answer": _ANSWER}, keep=("url",)),
    "amc": _plain_math({"question": _PROBLEM, "answer": _ANSWER}, keep=("url",)),
    "minerva": _plain_math(
        {"question": ("problem", "question"), "answer": ("solution", "answer")}, keep=("type",)
    ),
    "olympiadbench": _plain_math(
        {"question": ("question",), "answer": ("final_answer",)},
        row=_olympiad,
        keep=("subfield", "answer_type", "is_multiple_answer"),
    ),
    "cmath": _plain_math(
        {"question": ("question",), "answer": ("answer", "golden")},
        prompt=partial(_ask, ending=BOXED_CHINESE),
        direct=partial(_ask, ending=BOXED_ONLY_CHINESE),
        keep=("grade", "reasoning_step", "num_digits"),
    ),
    "svamp": _plain_math(
        {"body": ("Body", "body"), "question": ("Question", "question"), "answer": _ANSWER},
        row=_story,
        keep=("Type",),
    ),
    "asdiv": _plain_math(
        {"body": ("body", "Body"), "question": ("question", "Question"), "answer": _ANSWER},
        row=_story,
        keep=("solution_type",),
    ),
    "humaneval": EvalSet(
        columns={
            "question": ("prompt",),
            "test": ("test",),
            "entry_point": ("entry_point",),
        },
        row=_humaneval,
        prompt=partial(_code, beginning=PROGRAM),
        direct=partial(_code, beginning=PROGRAM_ONLY),
        keep=("task_id",),
    ),
    "gpqa": EvalSet(
        columns={
            "question": ("Question",),
            "right": ("Correct Answer",),
            "wrong1": ("Incorrect Answer 1",),
            "wrong2": ("Incorrect Answer 2",),
            "wrong3": ("Incorrect Answer 3",),
        },
        row=_gpqa,
        prompt=partial(_ask, ending=LETTER),
        direct=partial(_ask, ending=LETTER_ONLY),
        keep=("Record ID", "High-level domain", "Subdomain"),
    ),
    "choices": EvalSet(
        columns={
            "question": ("question", "Question"),
            "choices": ("choices", "options"),
            "answer": ("answer", "answerKey", "answer_index"),
        },
        row=_choices,
        prompt=partial(_ask, ending=LETTER),
        direct=partial(_ask, ending=LETTER_ONLY),
        keep=("subject", "category"),
    ),
    "countdown": EvalSet(
        columns={"numbers": ("nums", "numbers"), "target": ("target",)},
        row=_countdown,
        prompt=_question,
        direct=partial(_ask, ending=EXPRESSION_ONLY),
    ),
}
