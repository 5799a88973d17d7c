"""Finds the final answer in a text, writes it in one plain LaTeX, and takes it apart at brackets.

Nothing here takes more than linear time, whatever a model wrote.
"""

import re
import unicodedata

SHORT = 200  # characters: a text this long and of one line may be an answer without any marker

_BRACES = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_BOXES = ("\\boxed", "\\fbox", "\\framebox")
_SPACE = r"(?:[\s$.;]|\\[()\[\],;! ]|\\q?quad\b|[A-Za-z]\s*=)*"
_AND = r"(?:\band\b|\bor\b|\\(?:text|mbox)\{ *(?:and|or) *\}|和|或)"
_BETWEEN = re.compile(rf"{_SPACE}(?:[,、，]|[,、，]?{_SPACE}{_AND}){_SPACE}")
_PHRASE = re.compile(
    r"(?:answer|答案)[*_\s]{0,4}(?:to [^.:\n]{1,80} )?(?:is|are|=|是|为|為|：|:)[*_\s:：]{0,6}",
    re.IGNORECASE,
)
_SENTENCE_END = re.compile(r"[.](?=\s|$)|[。\n]")
# A formula in dollar signs, not the money of `$18 and $5`.
_OPENING_FORMULA = re.compile(
    r"\$\$?(?!\s)([^$\n]*[^$\s])\$(?!\d)|\\\(([^\n]+?)\\\)|\\\[([^\n]+?)\\\]"
)


def final_answer(text: str) -> str | None:
    r"""What a text gives as its answer, or None; "" of an empty box.

    If the text closes its thoughts with `</think>`, only what follows is read. The first of these
    that occurs decides, whatever else there is; where it occurs several times, its last one:
      1. `\boxed{...}` whose braces are balanced. Boxes joined by a comma, "and" or "or" are
         one answer: a list.
      2. `<answer>...</answer>`.
      3. `#### 18`: the rest of the line.
      4. `The answer is 18.`, `Answer: 18`, `答案是18`: the formula that follows at once,
         or the rest of the sentence.
      5. A text of one line and at most `SHORT` characters, as it stands.
    Inside a box or tags, 3 and 4 are looked for as well.
    """
    text = _after_thoughts(text)
    box = last_boxes(text)
    if box is not None:
        return _marked(box) or box
    inside = _in_tags(text)
    if inside is not None:
        return _marked(inside) or inside.strip() or None
    short = text.strip() if len(text) <= SHORT and "\n" not in text.strip() else ""
    return _marked(text) or short or None


def says_where(text: str) -> bool:
    """Whether one of the marks 1 to 4 of `final_answer` tells where a text's answer is."""
    text = _after_thoughts(text)
    return any(found is not None for found in (last_boxes(text), _in_tags(text), _marked(text)))


def _after_thoughts(text: str) -> str:
    return text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text


def _in_tags(text: str) -> str | None:
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return None
    return text[start + len("<answer>") : text.index("</answer>", start)]


def _marked(text: str) -> str | None:
    start = text.rfind("####")
    if start >= 0:
        return text[start + 4 :].strip().partition("\n")[0].strip() or None
    ends = [phrase.end() for phrase in _PHRASE.finditer(text)]
    if not ends:
        return None
    rest = text[ends[-1] : ends[-1] + 2000]
    formula = _OPENING_FORMULA.match(rest)
    if formula:
        return next(group for group in formula.groups() if group is not None)
    return _SENTENCE_END.split(rest, maxsplit=1)[0].strip() or None


def last_boxes(text: str) -> str | None:
    """The content of the last balanced box, and of those joined to it; None without one."""
    spans = _spans(text)
    if not spans:
        return None
    start, inner, end = spans.pop()
    found = [text[inner:end]]
    while spans:
        before, inner, end = spans.pop()
        gap = text[end + 1 : start]
        if len(gap) > 40 or not _BETWEEN.fullmatch(gap):
            break
        found.append(text[inner:end])
        start = before
    return ", ".join(dict.fromkeys(reversed(found)))


def _spans(text: str) -> list[tuple[int, int, int]]:
    """(start, start of the content, end of the content) of boxes at the end, by their start."""
    last = max(text.rfind(box) for box in _BOXES)
    if last < 0:
        return []
    near = _balanced(text, max(last - 400, 0))  # a few boxes at the end, as nearly always
    if near and near[-1][0] == last:
        return near
    return _balanced(text, 0)


def _balanced(text: str, start: int) -> list[tuple[int, int, int]]:
    waiting: list[tuple[int, int] | None] = []  # open braces; of a box, with its place
    found = []
    for token in _BRACES.finditer(text, start):
        sign = token.group()
        if sign == "}":
            box = waiting.pop() if waiting else None
            if box is not None:
                found.append((*box, token.start()))
        elif sign[-1] == "{" and sign != "\\{":
            waiting.append((token.start(), token.end()) if len(sign) > 1 else None)
    return sorted(found)


# What is written in many ways gets one: each sign, then each command.
_SIGNS = {
    "−": "-", "–": "-", "—": "-", "﹣": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ",
    "∙": r"\cdot ", "÷": "/", "∕": "/", "⁄": "/", "±": r"\pm ", "∓": r"\mp ", "√": " sqrt ",
    "π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ",
    "≠": r"\ne ", "≈": r"\approx ", "≃": r"\approx ", "∪": r"\cup ", "∩": r"\cap ",
    "∈": r"\in ", "∅": r"\emptyset ", "°": r"\degree ", "º": r"\degree ", "′": "'", "’": "'",
    "‘": "'", "“": '"', "”": '"', "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ",
    "⌉": r"\rceil ", "⟨": "(", "⟩": ")", "θ": r"\theta ", "α": r"\alpha ", "β": r"\beta ",
    "γ": r"\gamma ", "λ": r"\lambda ", "μ": r"\mu ", "σ": r"\sigma ", "ω": r"\omega ",
    "φ": r"\phi ", "ℝ": r"\mathbb{R}", "∶": ":", "、": ",", "。": ".", "\u00a0": " ",
    "\u200b": "", "\ufeff": "", "\u2009": " ", "\u202f": " ", "\u3000": " ", "\u2061": "",
    "【": "(", "】": ")", "％": "%",
}  # fmt: skip
_TABLE = {ord(sign): plain for sign, plain in _SIGNS.items()}
_TABLE |= {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F) if chr(code) not in _SIGNS}
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n", strict=True))
_SUBSCRIPTS = dict(zip("₀₁₂₃₄₅₆₇₈₉", "0123456789", strict=True))
_RAISED = re.compile(f"[{''.join(_SUPERSCRIPTS)}]+")
_LOWERED = re.compile(f"[{''.join(_SUBSCRIPTS)}]+")
_VULGAR = re.compile("[¼-¾⅐-⅞]")

_REWRITES = [
    (re.compile(pattern), new)
    for pattern, new in [
        (r"(?<=\d)\s*(?:\{\s*,\s*\}|,\s*\\!)\s*(?=\d{3})", ""),  # 1{,}000 10,\!080
        (r"(?<=\d)\\[,; ]\s*(?=\d{3}(?!\d))", ""),  # 12\,000
        (r"\{\s*([:=])\s*\}", r"\1"),  # 12{:}30
        (r"\\(?:left|right)\s*\\([{}|])", r"\\\1"),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![a-zA-Z])\s*\.?", ""),
        (r"\\(?:(?:display|text)style|(?:no)?limits|mathstrut)(?![a-zA-Z])", " "),
        (r"\\(?:boxed|fbox|checkmark)(?![a-zA-Z])", " "),
        (r"(?<!\\)\\!", ""),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\times "),
        (r"^(-?)\s*(?:[€£¥₹]|\\pounds(?![a-zA-Z]))\s*(?=[\d.])", r"\1"),
        (r"(?<![\w.])(?:np|numpy|math|sympy)\.(?=[a-z])", ""),
        (r"\\(?:quad|qquad|enspace|thinspace)(?![a-zA-Z])|(?<!\\)\\[,;: ]|~", " "),
        (r"\\(?:[hv]space|phantom|h?phantom)\*?\s*\{[^{}]*\}", " "),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\[dt]binom(?![a-zA-Z])", r"\\binom"),
        (r"\\(?:geqslant|geq)(?![a-zA-Z])", r"\\ge"),
        (r"\\(?:leqslant|leq)(?![a-zA-Z])", r"\\le"),
        (r"\\neq(?![a-zA-Z])", r"\\ne"),
        (r"\\(?:simeq|cong|doteq)(?![a-zA-Z])", r"\\approx"),
        (r"\\(?:varnothing)(?![a-zA-Z])|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\(?:lbrack)(?![a-zA-Z])", "["),
        (r"\\(?:rbrack)(?![a-zA-Z])", "]"),
        (r"\\langle(?![a-zA-Z])", "("),
        (r"\\rangle(?![a-zA-Z])", ")"),
        (r"\\(?:colon)(?![a-zA-Z])", ":"),
        (r"\\(?:dots|cdots|dotsc)(?![a-zA-Z])|\.{3,}|…", r"\\ldots "),
        (r"\\(?:boldsymbol|mathbf|bm|vec|mathit|mathsf|mathcal)\s*\{([A-Za-z])\}", r" \1"),
        (
            r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt|normal)|[mh]box|operatorname\*?)"
            r"(?![a-zA-Z])\s*(?=\{)",
            r"\\text",
        ),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![a-zA-Z]))|\\degrees?(?![a-zA-Z])", r"\\degree "),
        (r"\\%|\bper ?cent(?:age)?\b|\bpct\b", "%"),
        (r"百分之\s*(\d+(?:\.\d+)?)", r"\1%"),
        (r"(\d+)\s*分之\s*(\d+)", r"\\frac{\2}{\1}"),
        (r"(?<=\d)\s*又\s*(?=\d+/|\\frac)", " "),  # 3又1/2
        (r"^负\s*(?=[\d\\])", "-"),
        (r"\\text\{\s*\}", " "),
        (r"(?<!\\)\\[()\[\]]|\\\$", " "),
        (r"\s+", " "),
        (r"(?<=^\d{1}) (?=\d{3}$)|(?<=^\d{2}) (?=\d{3}$)|(?<=^\d{3}) (?=\d{3}$)", ""),  # 12 000
    ]
]  # fmt: skip
_PLAIN = re.compile(r"[-+\d.,/]*|[A-Za-z]*", re.ASCII)  # nothing to rewrite
_DOLLARS = re.compile(r"^\s*(-?)\s*(?:\\\$|US\$|\$(?=[\s\d.,-]*\d[^$]*$))\s*(-?)(.*)$", re.DOTALL)
_ENDS = " \t\n.,;:*`_?\"'"


def clean(answer: str) -> str:
    r"""The answer in a plain LaTeX that has one way to write most things.

    Signs of Unicode become commands (`½` is `\frac{1}{2}`, `≤` is `\le`), sizes and spaces go,
    all upright text is `\text{...}`, money that begins with a dollar sign ends in
    `\text{dollars}`, thousands written `1{,}000` are joined. `1,000` stays, since it can be a list.
    """
    text = answer.strip()
    if not text.isascii():
        text = text.translate(_TABLE)
        text = _RAISED.sub(lambda m: "^{" + "".join(map(_SUPERSCRIPTS.get, m[0])) + "}", text)  # type: ignore[arg-type]
        text = _LOWERED.sub(lambda m: "_{" + "".join(map(_SUBSCRIPTS.get, m[0])) + "}", text)  # type: ignore[arg-type]
        text = _VULGAR.sub(_vulgar, text)
    if "$" in text:
        money = _DOLLARS.match(text)
        if money:
            text = f"{money[1]}{money[2]}{money[3]} \\text{{dollars}}"
    if not _PLAIN.fullmatch(text):
        for pattern, new in _REWRITES:
            text = pattern.sub(new, text)
    text = text.replace("$", " ").replace("**", " ").strip()
    for _ in range(8):
        bare = text.strip(_ENDS) if not text.startswith(".") else text.rstrip(_ENDS).lstrip()
        bare = _unwrapped(bare)
        if bare == text:
            break
        text = bare
    return text


def _vulgar(match: re.Match[str]) -> str:
    top, _, bottom = unicodedata.normalize("NFKC", match[0]).partition("⁄")
    return rf"\frac{{{top}}}{{{bottom}}}"


def _unwrapped(text: str) -> str:
    r"""Without the braces, or the `\text{...}`, that hold the whole of it."""
    for start in ("{", r"\text{"):
        if (
            text.startswith(start)
            and text.endswith("}")
            and matching(text, len(start) - 1) == len(text) - 1
        ):
            return text[len(start) : -1].strip()
    return text


def matching(text: str, start: int) -> int:
    """Where the brace that opens at `start` closes, or -1."""
    depth = 0
    escaped = False
    for place in range(start, len(text)):
        sign = text[place]
        if escaped:
            escaped = False
        elif sign == "\\":
            escaped = True
        elif sign == "{":
            depth += 1
        elif sign == "}":
            depth -= 1
            if depth == 0:
                return place
    return -1


_BRACKETS = {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}


def split(text: str, separator: str | re.Pattern[str]) -> list[str]:
    """The parts of a text between separators that stand in no brackets."""
    if isinstance(separator, str):
        if separator not in text:
            return [text]
        separator = re.compile(re.escape(separator))
    marks = list(separator.finditer(text))
    if not marks:
        return [text]
    parts, depth, start, place = [], 0, 0, 0
    for mark in marks:
        for sign in text[place : mark.start()]:
            depth += _BRACKETS.get(sign, 0)
        place = mark.start()
        if depth <= 0:
            parts.append(text[start:place].strip())
            start = mark.end()
    return [*parts, text[start:].strip()]


def is_balanced(text: str) -> bool:
    """Whether brackets close as often as they open and never before; `[0, 1)` is balanced."""
    depth = 0
    for sign in text:
        depth += _BRACKETS.get(sign, 0)
        if depth < 0:
            return False
    return depth == 0
