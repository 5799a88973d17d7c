"""Units of measure, numbers in words, and the words by which answers say that there is none."""

import re
from fractions import Fraction

# Unit -> what it measures and how many of the first of its kind it is.
_KINDS: dict[str, dict[str, str | int]] = {
    "length": {"m": 1, "km": 1000, "cm": "1/100", "mm": "1/1000", "dm": "1/10"},
    "imperial length": {"inch": 1, "foot": 12, "yard": 36, "mile": 63360},
    "mass": {"g": 1, "kg": 1000, "mg": "1/1000", "tonne": 1_000_000},
    "imperial mass": {"ounce": 1, "pound": 16},
    "time": {"second": 1, "minute": 60, "hour": 3600, "day": 86400, "week": 604800},
    "long time": {"month": 1, "year": 12},
    "dollars": {"dollar": 1, "cent": "1/100"},
    "yuan": {"元": 1, "角": "1/10"},
    "angle": {"degree": 1},
    "volume": {"liter": 1, "ml": "1/1000"},
}  # fmt: skip
_SCALES = {
    unit: (kind, Fraction(scale)) for kind, table in _KINDS.items() for unit, scale in table.items()
}
_SPELLINGS = {
    "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km", "centimeter": "cm",
    "centimetre": "cm", "millimeter": "mm", "millimetre": "mm", "in": "inch", "inche": "inch",
    "ft": "foot", "feet": "foot", "yd": "yard", "mi": "mile", "gram": "g", "kilogram": "kg",
    "kilo": "kg", "milligram": "mg", "oz": "ounce", "lb": "pound", "s": "second", "sec": "second",
    "min": "minute", "h": "hour", "hr": "hour", "yr": "year", "usd": "dollar", "buck": "dollar",
    "¢": "cent", "deg": "degree", "l": "liter", "litre": "liter", "milliliter": "ml",
    "millilitre": "ml", "米": "m", "千米": "km", "公里": "km", "分米": "dm", "厘米": "cm",
    "毫米": "mm", "克": "g", "千克": "kg", "公斤": "kg", "吨": "tonne", "秒": "second",
    "分钟": "minute", "小时": "hour", "天": "day", "度": "degree", "升": "liter", "毫升": "ml",
}  # fmt: skip
_LETTERS = set("mgshLlNJWVACKFT")
_NOT_WORDS = {"pi", "sqrt", "sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "exp", "lg"} | {
    "arcsin", "arccos", "arctan", "infty", "inf", "e", "mod", "abs"
}  # fmt: skip
_WORD = re.compile(r"[A-Za-z]+")
_UNIT = re.compile(r"[^\W\d_°¢£€%(]?(?:[^\W\d_]|[\s.,'/°¢£€%()&-])*(?:\^\s*\{?-?\d\}?)?[\s)]*")

BASES = {
    "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7", "eight": "8",
    "nine": "9", "ten": "10", "eleven": "11", "twelve": "12", "sixteen": "16",
}  # fmt: skip
NOTHING = {
    "none", "no solution", "no solutions", "no real solution", "no real solutions", "emptyset",
    "empty set", "the empty set", "does not exist", "dne", "undefined", "not defined", "no answer",
    "无解", "不存在", "空集",
}  # fmt: skip
ALL_REALS = {"\\mathbb{r}", "all real numbers", "all reals", "all real values"}


def name(unit: str) -> str:
    """One name for the spellings of a unit: `sq. inches`, `inches^2` and `in^2` are `inch^2`."""
    text = re.sub(r"[{}\\\s.,()]+", " ", unit.lower() if len(unit) > 1 else unit)
    power = re.search(r"\^ ?(-?\d)|([²³])", text)
    raised = (power[1] or {"²": "2", "³": "3"}[power[2]]) if power else ""
    text = re.sub(r"\^ ?-?\d|[²³]", " ", text)
    for word, value in (("square", "2"), ("sq", "2"), ("cubic", "3"), ("cu", "3")):
        if re.search(rf"\b{word}d?\b", text):
            text, raised = re.sub(rf"\b{word}d?\b", " ", text), value
    words = text.split()
    if len(words) != 1:
        return " ".join(words) + (f"^{raised}" if raised else "")
    word = words[0]
    for form in (word, word.removesuffix("s")):
        if form in _SPELLINGS or form in _SCALES:
            word = _SPELLINGS.get(form, form)
            break
    return f"{word}^{raised}" if raised else word


def factor(gold: str, answer: str) -> Fraction | None:
    """What a value in `answer` is multiplied by to be one in `gold`; None: not the same kind.

    Units that are not known are taken to be the same: `apples` and `fruits`.
    """
    if gold == answer or not gold or not answer:
        return Fraction(1)
    (gold_base, _, gold_power), (base, _, power) = gold.partition("^"), answer.partition("^")
    if gold_base not in _SCALES or base not in _SCALES:
        return Fraction(1)
    (gold_kind, gold_scale), (kind, scale) = _SCALES[gold_base], _SCALES[base]
    if kind != gold_kind or power != gold_power:
        return None
    return (scale / gold_scale) ** int(power or 1)


def is_letter(unit: str, text: str) -> bool:
    """Whether a single sign behind a number and a space can be a unit."""
    spaced = unit in _LETTERS and text.endswith(f" {unit}")
    return spaced or not unit.isascii() or unit == "%"


def is_word(unit: str) -> bool:
    """Whether a unit is plainly no product of variables."""
    return any(len(word) > 3 or name(word) in _SCALES for word in _WORD.findall(unit))


def names_functions(text: str) -> bool:
    """Whether one of a text's words is a function or a constant."""
    return not _NOT_WORDS.isdisjoint(_WORD.findall(text))


def are_words(text: str) -> bool:
    """Whether what stands behind a number is words, none of them a function or a constant."""
    found = set(_WORD.findall(text))
    return (
        _UNIT.fullmatch(text) is not None
        and not names_functions(text)
        and (not found or any(len(word) > 1 for word in found))
    )


# --------------------------------------------------------------------------- numbers in words

_BELOW_TWENTY = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SMALL = {word: value for value, word in enumerate(_BELOW_TWENTY)}
_SMALL |= {word: 10 * value for value, word in enumerate(_TENS, start=2)}
_LARGE = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_CHINESE_LARGE = {"万": 10**4, "亿": 10**8}
_CHINESE_DIGITS = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"两": 2}
_CHINESE_TENS = {"十": 10, "百": 100, "千": 1000}


def scaled(unit: str) -> tuple[str, int]:
    """The rest of a unit, and the factor that its first word stands for.

    `million dollars` gives `("dollars", 1000000)`, and `dollars` gives `("dollars", 1)`.
    """
    unit = unit.strip(" {}~")
    first, _, rest = unit.partition(" ")
    if first.lower() in _LARGE or first.lower() == "hundred":
        return rest, {**_LARGE, "hundred": 100}[first.lower()]
    if unit[:1] in _CHINESE_LARGE:
        return unit[1:], _CHINESE_LARGE[unit[0]]
    return unit, 1


def number_in_words(text: str) -> Fraction | None:
    """`twenty-one`, `three hundred and five`, `负三十二`, `三分之一`; None if it is not one.

    A word that follows is taken for a unit: `twelve apples`.
    """
    if re.fullmatch(r"负?[零一二三四五六七八九十百千万亿两分之又\s]+[\u4e00-\u9fff]?", text):
        size = _chinese(text.removeprefix("负").strip())
        return -size if size is not None and text[0] == "负" else size
    words = [word for word in re.split(r"[\s-]+", text.lower()) if word != "and"]
    total = part = count = 0
    for word in words:
        if word in _SMALL:
            part += _SMALL[word]
        elif word == "hundred" and part:
            part *= 100
        elif word in _LARGE and part:
            total, part = total + part * _LARGE[word], 0
        else:
            break
        count += 1
    if count == 0 or count < len(words) - 1:
        return None
    return Fraction(total + part)


def _chinese(text: str) -> Fraction | None:
    whole, mixed, rest = text.partition("又")
    values = [_chinese_fraction(part) for part in ((whole, rest) if mixed else (text,))]
    known = [value for value in values if value is not None]
    return sum(known, Fraction(0)) if len(known) == len(values) else None


def _chinese_fraction(text: str) -> Fraction | None:
    bottom, of, top = text.partition("分之")
    if not of:
        return _chinese_whole(text)
    values = _chinese_whole(top), _chinese_whole(bottom)
    return values[0] / values[1] if values[0] is not None and values[1] else None


def _chinese_whole(text: str) -> Fraction | None:
    if not text:
        return None
    total = part = digit = 0
    for place, sign in enumerate(text):
        if sign in _CHINESE_DIGITS:
            digit = _CHINESE_DIGITS[sign]
        elif sign in _CHINESE_TENS:
            part, digit = part + (digit or 1) * _CHINESE_TENS[sign], 0
        elif sign == "亿":  # of all before it, as 万亿 is
            total, part, digit = (total + part + digit) * _CHINESE_LARGE[sign], 0, 0
        elif sign == "万":
            total, part, digit = total + (part + digit) * _CHINESE_LARGE[sign], 0, 0
        elif place == len(text) - 1 and place > 0:
            break  # a unit
        else:
            return None
    return Fraction(total + part + digit)
