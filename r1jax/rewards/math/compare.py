r"""Whether two answers, read as forms, are the same: True, False, or None if it cannot be told."""

import re
from collections.abc import Iterable
from fractions import Fraction

from r1jax.rewards.math import units
from r1jax.rewards.math.expressions import Node, Unreadable, number, parse
from r1jax.rewards.math.forms import (
    Base,
    Choice,
    Collection,
    Equation,
    Form,
    Group,
    Matrix,
    Readings,
    Value,
    Words,
)
from r1jax.rewards.math.values import equal, names, proportional, rounds_to

_NEGATIONS = {"or", "nor", "not", "but", "and", "neither", "no", "yes", "maybe"}


def same(gold: Readings, answer: Readings) -> bool | None:
    """Whether any reading of the answer is any reading of the gold answer.

    None: they are not found to be the same, and one of them is not understood well enough to say
    that they differ.
    """
    if not gold or not answer:
        return None
    sure = [form for form in gold if not (isinstance(form, Value) and not form.sure)] or gold
    return _any(_same(a, b) for a in sure for b in answer)


def _any(verdicts: Iterable[bool | None]) -> bool | None:
    """True if one is, else None if one is, else False."""
    result: bool | None = False
    for verdict in verdicts:
        if verdict:
            return True
        if verdict is None:
            result = None
    return result


def _all(verdicts: Iterable[bool | None]) -> bool | None:
    """False if one is, else None if one is, else True."""
    result: bool | None = True
    for verdict in verdicts:
        if verdict is False:
            return False
        if verdict is None:
            result = None
    return result


def _same(gold: Form, answer: Form) -> bool | None:
    match gold, answer:
        case Equation(), Equation():
            return _same_equations(gold, answer)
        case Equation(), _:
            return same(gold.right, (answer,)) if gold.name else False
        case _, Equation():
            return False if _says_zero(answer) else same((gold,), answer.right)
        case Value(), Value():
            return _same_values(gold, answer)
        case Group(), Group():
            return _same_groups(gold, answer)
        case Collection(), Collection():
            return _in_any_order(gold.items, answer.items)
        case (Group(), Collection()) | (Collection(), Group()):
            listed = gold if isinstance(gold, Collection) else answer
            ordered = listed.kind == "list"  # type: ignore[union-attr]
            return _in_order(gold.items, answer.items) if ordered else False
        case Collection(items=(only,)), _:
            return same(only, (answer,))
        case _, Collection(items=(only,)):
            return same((gold,), only)
        case Matrix(), Matrix():
            if [len(row) for row in gold.rows] != [len(row) for row in answer.rows]:
                return False
            pairs = zip(gold.rows, answer.rows, strict=True)
            return _all(_in_order(a, b) for a, b in pairs)
        case Words(), Words():
            return _same_words(gold.text, answer.text)
        case Words(), Choice():
            return gold.text.split()[-1:] == [answer.letter.lower()]
        case Choice(), Value():
            return answer.text.upper() == gold.letter
        case (Base(digits=digits), Value(text=text)) | (Value(text=text), Base(digits=digits)):
            return text.upper() == digits
        case _:
            return gold == answer


def _in_order(gold: tuple[Readings, ...], answer: tuple[Readings, ...]) -> bool | None:
    if len(gold) != len(answer):
        return False
    return _all(same(a, b) for a, b in zip(gold, answer, strict=True))


def _in_any_order(gold: tuple[Readings, ...], answer: tuple[Readings, ...]) -> bool | None:
    if len(gold) != len(answer):
        return False
    left = list(answer)
    unsure = False
    for item in gold:
        verdicts = [same(item, other) for other in left]
        if True in verdicts:
            left.pop(verdicts.index(True))
        elif None in verdicts:
            unsure = True
        else:
            return False
    return None if unsure else True


def _same_groups(gold: Group, answer: Group) -> bool | None:
    """Of two things the brackets say whether ends belong to an interval; of more, nothing."""
    brackets = (gold.opening, gold.closing) == (answer.opening, answer.closing)
    if len(gold.items) == 2 and not brackets:
        return False
    return _in_order(gold.items, answer.items)


def _same_values(gold: Value, answer: Value) -> bool | None:
    factor = units.factor(gold.unit, answer.unit)
    if factor is None:
        return False
    a, b = gold.node, _times(answer.node, factor)
    pairs = [(a, b)]
    if gold.percent and not answer.percent:
        pairs.append((_times(a, Fraction(1, 100)), b))
    elif answer.percent and not gold.percent:
        pairs.append((a, _times(b, Fraction(1, 100))))
    verdict = _any(equal(*pair) for pair in pairs)
    if verdict is not True and factor == 1:
        if rounds_to(gold.text, b) or rounds_to(answer.text, a):
            return True
        renamed = _with_case_of(a, b)
        if renamed is not None:
            return equal(a, renamed)
    return verdict


def _times(node: Node, factor: Fraction) -> Node:
    return node if factor == 1 else Node("*", (node, number(factor)))


def _with_case_of(gold: Node, answer: Node) -> Node | None:
    """The answer with `c` for `C` where the gold answer has a `c` and no `C`; None if no such."""
    here, there = names(gold), names(answer)
    missing = {name.casefold(): name for name in here - there}
    change = {name: missing[name.casefold()] for name in there - here if name.casefold() in missing}
    if not change or len(set(change.values())) < len(change):
        return None
    return _renamed(answer, change)


def _renamed(node: Node, change: dict[str, str]) -> Node:
    args = tuple(
        _renamed(each, change)
        if isinstance(each, Node)
        else change.get(each, each)
        if isinstance(each, str)
        else each
        for each in node.args
    )
    return Node(node.kind, args)


def _same_equations(gold: Equation, answer: Equation) -> bool | None:
    if gold.name and answer.name:
        here, there = _plain_name(gold.name), _plain_name(answer.name)
        if here == there or (_names_a_graph(here) and _names_a_graph(there)):
            return same(gold.right, answer.right)
        return False
    sides = [_sides(gold), _sides(answer)]
    if None in sides:
        return None
    return proportional(*sides)  # type: ignore[arg-type]


def _says_zero(equation: Equation) -> bool:
    """Whether an equation such as `2x - y = 0` states a line, not that the answer is 0."""
    sides = _sides(equation)
    return (
        not equation.name
        and sides is not None
        and sides[1] == number(0)
        and names(sides[0]) != frozenset()
    )


def _plain_name(name: str) -> str:
    return re.sub(r"\\text|[\\{}\s]", "", name)


def _names_a_graph(name: str) -> bool:
    return name == "y" or re.fullmatch(r"[a-zA-Z]\(x\)", name) is not None


def _sides(equation: Equation) -> tuple[Node, Node] | None:
    right = next((form.node for form in equation.right if isinstance(form, Value)), None)
    if right is None:
        return None
    try:
        return parse(equation.left), right
    except Unreadable:
        return None


def _same_words(gold: str, answer: str) -> bool:
    """Equal, or the answer goes on after the gold answer's words: `even` and `even function`."""
    if gold == answer:
        return True
    here, there = gold.split(), answer.split()
    rest = there[len(here) :]
    return there[: len(here)] == here and len(rest) <= 5 and not _NEGATIONS & set(rest)
