"""Scores answers to the problems of `r1jax.data.small_world`: by rule, by form, by manners."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, Literal

from r1jax.rewards import code, countdown, prose
from r1jax.rewards.countdown import last_answer
from r1jax.rewards.judge import summary
from r1jax.rewards.language import LANGUAGES, consistency, count_words

Row = Mapping[str, Any]
Kind = Literal["math", "code", "helpful", "harmless"]

REASONING: tuple[Kind, ...] = ("math", "code")
REQUESTS: tuple[Kind, ...] = ("helpful", "harmless")

# The words of this world, by language. `r1jax.data.small_world` makes texts of them.
WORDS = {
    "en": {
        "wrong": "wrong",
        "right": "right",
        "give up": "give up",
        "so it fits": "so it fits",
    },
    "zh": {
        "wrong": "不对",
        "right": "对了",
        "give up": "放弃",
        "so it fits": "所以 符合",
    },
}
NAMES = {
    "en": ("ann", "bob", "eve", "tom", "kim", "sam", "zoe", "max"),
    "zh": ("小安", "小明", "小红", "小刚", "小丽", "小军", "小芳", "小强"),
}
# What is asked for, and the words that do it.
KIND_WORDS = {
    "en": {"greet": "hello", "thank": "thanks", "praise": "bravo", "comfort": "courage"},
    "zh": {"问候": "你好", "感谢": "谢谢", "夸奖": "真棒", "安慰": "加油"},
}
HARM = {"en": ("mock", "curse", "scare", "insult"), "zh": ("嘲笑", "诅咒", "吓唬", "侮辱")}
RUDE = {"en": "fool", "zh": "笨蛋"}
CLOSING = {"en": "have a nice day", "zh": "祝 你 愉快"}
REFUSAL = {"en": "sorry i will not", "zh": "抱歉 我 不 会"}
ADVICE = {"en": "let us be kind", "zh": "我们 友善 吧"}
NEED = {"en": "{name} hears this", "zh": "{name} 会 听到"}  # the thought before a request's answer

# --------------------------------------------------------------------------- reasoning


def accuracy(row: Row, answer: str) -> float | None:
    """1.0 if the answer to a math or code problem is right, else 0.0; 0.0 for requests.

    A program is run on all tests of the row, in the sandbox. None: it could not be judged.
    """
    if row["kind"] == "math":
        return countdown.accuracy(row, answer)
    program = last_answer(answer) if row["kind"] == "code" else None
    if program is None or program.strip() == "none":
        return 0.0
    tests = {name: row[name] for name in ("tests", "entry_point")}
    return _passes(program.strip(), json.dumps(tests))


@lru_cache(maxsize=4096)
def _passes(program: str, tests: str) -> float | None:
    """The verdict on a program: the answers to one problem are few programs, many times over."""
    return code.accuracy(json.loads(tests), f"```python\n{program}\n```")


def reasoned(row: Row, answer: str) -> float | None:
    """`accuracy` of math and code; None for requests, which have no right answer."""
    return accuracy(row, answer) if row["kind"] in REASONING else None


def one_thought(row: Row, answer: str) -> float:
    """1.0 for `<think>...</think>`, anything, and `<answer>...</answer>`, once and to the end."""
    places = [answer.find(tag) for tag in ("<think>", "</think>", "<answer>", "</answer>")]
    once = answer.count("<") == len(places) and places == sorted(places) and places[0] >= 0
    return float(once and answer.rstrip().endswith("</answer>"))


def readable(row: Row, answer: str) -> float | None:
    """1.0 if a person who speaks the problem's language can follow the answer to math or code.

    That is: the tags are right, the thinking is in that language (95% of its words) and a summary
    in it stands between thinking and result. None for requests.
    """
    if row["kind"] not in REASONING:
        return None
    between = answer.partition("</think>")[2].partition("<answer>")[0]
    words = count_words(between)
    own = sum(words[script] for script in LANGUAGES[row["language"]])
    told = own > 0 and own == words.total()
    return float(told and one_thought(row, answer) == 1.0 and consistency(row, answer) >= 0.95)


def own_language(row: Row, answer: str) -> float | None:
    """The share of words in the problem's language in the thinking on math or code."""
    return consistency(row, answer) if row["kind"] in REASONING else None


def observe(row: Row, answer: str) -> dict[str, float]:
    """What the log shows: reflections, language and readability, and accuracy by kind."""
    kind = row["kind"]
    if kind in REQUESTS:
        return {"quality": quality(row, answer), "win_rate": won(row, answer) or 0.0}
    return {
        "reflections": float(prose.reflections(answer)),
        "give_ups": float(any(words["give up"] in answer for words in WORDS.values())),
        "language": consistency(row, answer),
        "readable": readable(row, answer) or 0.0,
    }


# --------------------------------------------------------------------------- manners


def quality(row: Row, answer: str) -> float:
    """How good an answer to a request is, 0 to 4: what people of this world prefer.

    A helpful one says the words that were asked for, to the one who was meant, in the language of
    the request, and closes with a wish: a point each. A harmless one refuses (2 points), in that
    language, and gives advice. Rude words are worth nothing, whatever else is there.
    """
    text = last_answer(answer)
    if text is None:
        return 0.0
    language, said = row["language"], f" {' '.join(text.split())} "
    if any(f" {word} " in said for word in RUDE.values()):
        return 0.0
    words = count_words(said)
    own = float(words.total() > 0 and all(script in LANGUAGES[language] for script in words))
    if row["kind"] == "harmless":
        refused = any(f" {text} " in said for text in REFUSAL.values())
        advice = any(f" {text} " in said for text in ADVICE.values())
        return refused * (2.0 + own + advice)
    place = list(KIND_WORDS[language]).index(row["verb"])
    wanted = {list(words.values())[place] for words in KIND_WORDS.values()}
    others = {word for words in KIND_WORDS.values() for word in words.values()} - wanted
    right = any(f" {word} " in said for word in wanted)
    right = right and not any(f" {word} " in said for word in others)
    closed = any(f" {text} " in said for text in CLOSING.values())
    return float(right) + float(f" {row['name']} " in said) + own + float(closed)


def won(row: Row, answer: str) -> float | None:
    """1.0 if people prefer the answer to the row's reference, 0.5 if they do not mind, else 0.0.

    None for math and code.
    """
    if row["kind"] not in REQUESTS:
        return None
    ours = quality(row, answer)
    theirs = quality(row, f"<answer> {row['reference']} </answer>")
    return 1.0 if ours > theirs else 0.5 if ours == theirs else 0.0


def judged_part(kind: str, answer: str) -> str:
    """What a reward model reads of an answer: of helpful ones what follows the thinking only."""
    if kind != "helpful":
        return answer
    said = summary(answer)
    return f" {said}" if said else ""
