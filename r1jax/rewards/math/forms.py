r"""Reads an answer as what it is: a number with its unit, a tuple, an interval, a set, a matrix...

An answer can have several readings: `1,234` is a number and a list, `5 m` has a unit or a
variable, `E` is a choice or a name. `r1jax.rewards.math.compare` tries them all.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from r1jax.rewards.math import units
from r1jax.rewards.math.expressions import (
    INFINITY,
    Node,
    Unreadable,
    number,
    parse,
    parse_number,
)
from r1jax.rewards.math.text import is_balanced, matching, split

MAX_ITEMS = 64
MAX_DEPTH = 6  # of tuples in sets in lists


@dataclass(frozen=True, kw_only=True)
class Value:
    """A formula; `text` is how it was written, `unit` "" where there is none.

    `sure` is False where the reading is a guess that may serve an answer but not a gold answer:
    `5 m` as five metres, `There are 5 apples` as 5.
    """

    node: Node
    text: str
    unit: str = ""
    percent: bool = False
    sure: bool = True


@dataclass(frozen=True, kw_only=True)
class Group:
    """`(a, b)`, `[a, b)`: in this order. Also a column of numbers, as `(a, b)`."""

    opening: str
    items: tuple["Readings", ...]
    closing: str


@dataclass(frozen=True, kw_only=True)
class Collection:
    """`a, b`, `{a, b}` and the union of intervals: in any order."""

    items: tuple["Readings", ...]
    kind: str  # "list", "set" or "union"


@dataclass(frozen=True, kw_only=True)
class Matrix:
    rows: tuple[tuple["Readings", ...], ...]


@dataclass(frozen=True, kw_only=True)
class Equation:
    """`left = right`; `name` where the left is a variable or a function such as `f(x)`."""

    left: str
    right: "Readings"
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A letter of a multiple-choice question."""

    letter: str


@dataclass(frozen=True, kw_only=True)
class Base:
    """Digits with the base they are written in; base 0: not said."""

    digits: str
    base: int


@dataclass(frozen=True, kw_only=True)
class Words:
    """Text without a formula, in lower case, articles and punctuation left out."""

    text: str


Form = Value | Group | Collection | Matrix | Equation | Choice | Base | Words
Readings = tuple[Form, ...]

_CHOICE = re.compile(
    r"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer|选项?)\s*)?(?:\\text\{\s*)?\(?\s*([A-J])\s*"
    r"(?P<tail>\)?\s*\}.*|[).:]\s*.*|\s+\\text.*)?",
    re.DOTALL,
)
_MATRIX = re.compile(
    r"[\[(]?\s*\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}\s*[\])]?", re.DOTALL
)
_UNION = re.compile(r"\\cup(?![A-Za-z])|(?<=[)\]}])\s*(?:U|∪)\s*(?=[(\[\\])")
_WORD_AND = re.compile(
    r"\s*,?\s*(?:\\text\{ *(?:and|or) *\}|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|和|或)\s*"
)
_IN = re.compile(r"^[A-Za-z](?:_\w+)?\s*\\in(?![A-Za-z])")
_ORDER = re.compile(
    r"(\\le(?![A-Za-z])|\\ge(?![A-Za-z])|\\lt(?![A-Za-z])|\\gt(?![A-Za-z])|<=|>=|<|>)"
)
_APPROXIMATELY = re.compile(r"\\approx(?![A-Za-z])|≈|\\sim(?![A-Za-z])")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![A-Za-z])|\+/-|\+-")
_NAME = re.compile(
    r"\\?[A-Za-z]+(?:_(?:\w|\\?[A-Za-z]+|\{[^{}]*\}|\{\s*\\(?:text\s*\{[^{}]*\}|[a-z]+)\s*\}))?'?"
    r"(?:\([A-Za-z](?:,\s*[A-Za-z])*\))?|\\?angle[\s\w{}_]*|\([a-z](?:,\s*[a-z])+\)"
)  # fmt: skip
_BASE = re.compile(r"([0-9A-Fa-f]+)\s*_\s*\{?\s*(?:\\text\{)?(\w+)\}*")
_TIME = re.compile(r"\d{1,2}(?::\d\d){0,2}\s*[apAP]\.?\s*[mM]\.?")
_RATIO = re.compile(r"(\d+(?:\.\d+)?)\s*:\s*(\d+(?:\.\d+)?)")
_THOUSANDS_FIRST = re.compile(r"[-+]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?\s*[^\d,.\s][^,]*")
_NUMBER = r"[-+]?\s*(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?"
_LEADING_NUMBER = re.compile(
    rf"({_NUMBER}(?:\s*/\s*\d+)?(?:\s+\d+/\d+)?|-?\s*(?:\d+\s*)?\\frac\s*(?:\{{-?\d+\}}\s*\{{\d+\}}|\d\s*\d))"
    r"\s*(?P<tail>[^\d\\^_=+*|!].*)?"
)
_ANY_NUMBER = re.compile(rf"(?<![\w.]){_NUMBER}(?:\s*/\s*\d+)?%?")
_WORDS = re.compile(r"[^\W\d_][\w\s'’\".,;:!?()/&-]*", re.DOTALL)
_ORDINAL = re.compile(r"(\d+)\s*(?:\^\s*\{?\s*)?(?:\\text\{)?\s*(?:st|nd|rd|th)\s*\}*")
_PROSE = re.compile(r"[A-Za-z]{3,}|[\u4e00-\u9fff]")
_NEGATED = re.compile(r"\b(?:not|never|no|wrong|incorrect)\b|n't\b|不", re.IGNORECASE)
_FORMULA_SIGNS = re.compile(r"[\\^_=+*{}<>|\[\]]|(?<!\d)/|/(?!\d)")


def read(text: str, depth: int = 0) -> Readings:
    """All readings of a cleaned answer; () if there is none."""
    text = text.strip()
    if not text or depth > MAX_DEPTH:
        return ()
    return tuple(dict.fromkeys(_readings(text, depth)))


def _readings(text: str, depth: int) -> Iterator[Form]:
    choice = _CHOICE.fullmatch(text)
    if choice and depth < 2:
        yield Choice(letter=choice[1])
        if choice["tail"]:
            return
    whole = _number(text)
    if whole is not None:
        yield whole
    if depth < MAX_DEPTH:
        structure = _structure(text, depth)
        if structure is not None:
            yield from structure
            return
    if whole is None:
        yield from _values(text)


def _number(text: str) -> Value | None:
    """A number written with nothing but digits, sign, point and thousands separators."""
    if not text[-1].isdigit() and text[-1] != ".":
        return None
    minus = text[0] == "-"
    digits = text.lstrip("+-").strip().rstrip(".")
    if len(text) - len(digits) > 3:
        return None
    value = parse_number(digits)
    return None if value is None else Value(node=number(-value if minus else value), text=text)


def _structure(text: str, depth: int) -> Readings | None:
    """Readings as something made of parts; None if it has none."""
    matrix = _MATRIX.fullmatch(text)
    if matrix:
        return _matrix(matrix[2], depth)
    parts = split(text, _UNION)
    if len(parts) > 1:
        return _collection(parts, "union", depth)
    commas = [text] if _THOUSANDS_FIRST.fullmatch(text) else split(text, ",")
    parts = [part for comma in commas for part in split(comma, _WORD_AND)]
    if len(parts) == 1 and ";" in text:
        parts = split(text, ";")
    parts = [part for part in parts if part]
    if len(parts) > 1:
        listed = all(len(part.split()) <= 2 for part in parts) or not _is_prose(text)
        return _collection(parts, "list", depth) if listed else None
    if parts and parts[0] != text:
        return read(parts[0], depth + 1)
    member = _IN.match(text)
    if member:
        return read(text[member.end() :], depth + 1)
    relation = _relation(text, depth)
    if relation is not None:
        return relation
    enclosed = _enclosed(text, depth)
    if enclosed is not None:
        return enclosed
    both = _plus_minus(text)
    return _collection(both, "list", depth) if len(both) > 1 else None


def _matrix(body: str, depth: int) -> Readings:
    rows = [
        row for row in re.split(r"\\\\(?:\[[^\]]*\])?", body.replace("\\hline", "")) if row.strip()
    ]
    cells = tuple(tuple(read(cell, depth + 1) for cell in row.split("&")) for row in rows)
    if not cells or sum(map(len, cells)) > MAX_ITEMS:
        return ()
    matrix = Matrix(rows=cells)
    if len(cells) > 1 and all(len(row) == 1 for row in cells):
        return (matrix, Group(opening="(", items=tuple(row[0] for row in cells), closing=")"))
    if len(cells) == 1 and len(cells[0]) > 1:
        return (matrix, Group(opening="(", items=cells[0], closing=")"))
    return (matrix,)


def _collection(parts: list[str], kind: str, depth: int) -> Readings:
    if len(parts) > MAX_ITEMS:
        return ()
    items: list[Readings] = []
    for part in parts:
        both = _plus_minus(part)
        items += [read(each, depth + 1) for each in both]
    return (Collection(items=tuple(items), kind=kind),)


def _plus_minus(text: str) -> list[str]:
    r"""`a \pm b` as `a + b` and `a - b`."""
    signs = list(_PLUS_MINUS.finditer(text))
    if not signs or len(signs) > 4:
        return [text]
    upper, lower = [], []
    place = 0
    for sign in signs:
        before = text[place : sign.start()]
        swap = sign[1] == "mp"
        upper += [before, "-" if swap else "+"]
        lower += [before, "+" if swap else "-"]
        place = sign.end()
    return ["".join([*half, text[place:]]) for half in (upper, lower)]


def _relation(text: str, depth: int) -> Readings | None:
    sides = _ORDER.split(text)
    if len(sides) > 1:
        return _interval(sides, depth)
    approximate = _APPROXIMATELY.split(text)
    if len(approximate) > 1:
        sides = [side.strip() for side in approximate if side.strip()]
        if len(sides) > 1 and _NAME.fullmatch(sides[0]):
            sides = sides[1:]
        return read(sides[0], depth + 1) if sides else ()
    sides = [side.strip() for side in split(text, "=")]
    if len(sides) == 1:
        return None
    if not sides[0] or (len(sides) > 2 and not _NAME.fullmatch(sides[0])):
        return read(sides[-1], depth + 1)
    name = sides[0] if _NAME.fullmatch(sides[0]) else ""
    left, right = sides[0], sides[-1]
    if not name and _NAME.fullmatch(right) and len(right) <= 2:
        name, left, right = right, right, sides[0]  # 5 = x
    return (Equation(left=left, right=read(right, depth + 1), name=name.replace(" ", "")),)


def _interval(sides: list[str], depth: int) -> Readings:
    r"""`2 < x \le 5` as `(2, 5]`, `x > 2` as `(2, \infty)`."""
    terms, signs = [side.strip() for side in sides[::2]], sides[1::2]
    less = [sign in ("<", "\\lt", "\\le", "<=") for sign in signs]
    closed = [sign in ("\\le", "\\ge", "<=", ">=") for sign in signs]
    if len(terms) > 3 or not all(terms) or len(set(less)) > 1:
        return ()
    if not less[0]:
        terms, closed = terms[::-1], closed[::-1]
    if len(terms) == 3:
        if not _NAME.fullmatch(terms[1]):
            return ()
        low, high = read(terms[0], depth + 1), read(terms[2], depth + 1)
        ends = "[" if closed[0] else "(", "]" if closed[1] else ")"
    elif _NAME.fullmatch(terms[0]):
        low, high = (_minus_infinity(),), read(terms[1], depth + 1)
        ends = "(", "]" if closed[0] else ")"
    elif _NAME.fullmatch(terms[1]):
        low, high = read(terms[0], depth + 1), (Value(node=INFINITY, text="\\infty"),)
        ends = "[" if closed[0] else "(", ")"
    else:
        return ()
    return (Group(opening=ends[0], items=(low, high), closing=ends[1]),)


def _minus_infinity() -> Value:
    return Value(node=Node("neg", (INFINITY,)), text="-\\infty")


def _enclosed(text: str, depth: int) -> Readings | None:
    """Readings of what stands in one pair of brackets; None if it does not."""
    if text.startswith("\\{") and text.endswith("\\}"):
        opening, inner, closing = "{", text[2:-2], "}"
    elif text[0] in "([" and text[-1] in ")]" and len(text) > 1:
        opening, inner, closing = text[0], text[1:-1], text[-1]
    else:
        return None
    if not is_balanced(inner):
        return None
    parts = [part for part in split(inner, ",") if part]
    if len(parts) == 1:
        parts = [part for part in split(inner, ";") if part]
    if len(parts) > MAX_ITEMS or not parts:
        return ()
    if opening == "{":
        if re.search(r"\\mid|\||(?<=[A-Za-z]):", inner):
            return ()  # a rule, not its members
        return _collection(parts, "set", depth)
    if len(parts) == 1:
        inside = read(inner, depth + 1)
        return inside if opening + closing == "()" else None
    items = tuple(read(part, depth + 1) for part in parts)
    return (Group(opening=opening, items=items, closing=closing),)


# --------------------------------------------------------------------------- numbers and words


def _values(text: str) -> Iterator[Form]:
    if text.lower() in units.ALL_REALS:
        infinity = Value(node=INFINITY, text="\\infty")
        yield Group(opening="(", items=((_minus_infinity(),), (infinity,)), closing=")")
        return
    base = _BASE.fullmatch(text)
    if base:
        found = units.BASES.get(base[2].lower(), base[2])
        if found.isdigit() and len(found) <= 2 and 2 <= int(found) <= 36:
            yield Base(digits=base[1].upper(), base=int(found))
            return
    if _TIME.fullmatch(text):
        yield Words(text=words(text))
        return
    ratio = _RATIO.fullmatch(text)
    if ratio:
        top, bottom = parse_number(ratio[1]), parse_number(ratio[2])
        yield Words(text=text.replace(" ", ""))
        if top is not None and bottom:
            yield Value(node=number(top / bottom), text=text)
        return
    ordinal = _ORDINAL.fullmatch(text)
    if ordinal and len(ordinal[1]) < 10:
        yield Value(node=number(int(ordinal[1])), text=ordinal[1])
        return
    if text.endswith("%"):
        node = _parsed(text[:-1])
        if node is not None:
            yield Value(node=node, text=text[:-1].strip(), percent=True)
            return
    in_words = units.number_in_words(text) if _is_prose(text) else None
    if in_words is not None:
        yield Value(node=number(in_words), text=str(in_words))
        return
    found = False
    for value in _with_unit(text):
        found = True
        yield value
    node = _parsed(text)
    if node is not None:
        yield Value(node=node, text=text)
        if _is_prose(text):
            yield Words(text=words(text))  # Rug B
    elif not found:
        yield from _prose(text)


def _parsed(text: str) -> Node | None:
    try:
        return parse(text)
    except Unreadable:
        return None


def _with_unit(text: str) -> Iterator[Value]:
    r"""The value before `\text{...}`, a degree sign, or words."""
    head, unit = _split_unit(text)
    letter = unit.strip("{} ")
    if len(letter) == 1 and not units.is_letter(letter, f" {letter}"):
        return  # 4\mathrm{i}
    if unit:
        head, percent = (head[:-1], True) if head.endswith("%") else (head, False)
        _, scale = units.scaled(unit)
        node = _parsed(head)
        if node is not None:
            node = node if scale == 1 else Node("*", (node, number(scale)))
            yield Value(node=node, text=head, unit=units.name(unit), percent=percent)
        return
    match = _LEADING_NUMBER.fullmatch(text)
    if not match or not match["tail"]:
        return
    tail = match["tail"].strip()
    if len(tail) > 1 and not units.are_words(tail):
        return
    node = _parsed(match[1])
    if node is None or (len(tail) == 1 and not units.is_letter(tail, text)):
        return
    unit, scale = units.scaled(tail)
    node = node if scale == 1 else Node("*", (node, number(scale)))
    percent = unit.startswith("%")
    sure = not unit.isascii() or units.is_word(tail) or not tail.isalpha()
    yield Value(node=node, text=match[1].strip(), unit=units.name(unit), percent=percent, sure=sure)


def _split_unit(text: str) -> tuple[str, str]:
    r"""A value and the unit behind it in upright text or degrees; unit "" if there is none."""
    if text.endswith("\\degree") and not re.search(r"sin|cos|tan|cot|sec|csc", text):
        head = text.removesuffix("\\degree").strip()
        return (head, "degrees") if "\\degree" not in head else (text, "")
    start = text.find("\\text{")
    if start <= 0:
        return text, ""
    end = start
    while text.startswith("\\text{", end):
        end = matching(text, end + 5) + 1
        if end == 0:
            return text, ""
        power = re.compile(r"\s*(?:\^\s*\{?\s*(-?\d)\s*\}?|\\cdot(?![a-z])|[/.]|)*\s*").match(
            text, end
        )
        end = power.end() if power else end
    if end < len(text):
        return text, ""
    return text[:start].strip(), text[start:].replace("\\text", "").strip()


def _prose(text: str) -> Iterator[Form]:
    plain = re.sub(r"\\text\{([^{}]*)\}", r"\1", text).strip()
    none = plain.lower().strip(" .\\")
    if none in units.NOTHING:
        yield Words(text="none")
        return
    if "\\" in plain and not _is_prose(plain):
        return
    numbers = _ANY_NUMBER.findall(plain)
    if len(numbers) == 1 and _is_prose(plain) and not _NEGATED.search(plain):
        node = _parsed(numbers[0].rstrip("%").replace(" ", ""))
        if node is not None:
            after = plain.partition(numbers[0])[2]
            _, scale = units.scaled(after.strip())
            node = node if scale == 1 else Node("*", (node, number(scale)))
            percent = numbers[0].endswith("%")
            yield Value(node=node, text=numbers[0], percent=percent, sure=False)
    if _WORDS.fullmatch(plain) or _is_prose(plain):
        yield Words(text=words(plain))


def _is_prose(text: str) -> bool:
    """Whether a text is words, perhaps with numbers among them, and no formula."""
    return (
        _PROSE.search(text) is not None
        and not _FORMULA_SIGNS.search(text)
        and not units.names_functions(text)
    )


def words(text: str) -> str:
    """The words of a text in lower case, without articles and punctuation."""
    text = re.sub(r"\b([ap])\.?\s*m\b\.?", r"\1m", text.lower())
    text = re.sub(r"(?<=\d)\s+(?=[ap]m\b)", "", text)
    found = re.findall(r"[^\W_]+(?:[:'][^\W_]+)*", text)
    return " ".join(word for word in found if word not in ("the", "a", "an")) or text.strip()
