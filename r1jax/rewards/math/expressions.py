r"""Reads formulas such as `\frac{\sqrt3}{2}x^2 - 1`, in LaTeX or as a person types them.

Length, depth and digits are bounded, so that reading takes no longer than some milliseconds.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

MAX_TOKENS = 300
MAX_DEPTH = 40
MAX_DIGITS = 400  # of a number as written, and of its exponent in scientific notation


class Unreadable(ValueError):
    """The text is no formula that is understood here."""


@dataclass(frozen=True, slots=True)
class Node:
    """A formula: an operator and what it is applied to.

    `number` holds a Fraction, `name` a string, `infinity` nothing; all others hold Nodes.
    """

    kind: str
    args: tuple = ()


def number(value: Fraction | int) -> Node:
    return Node("number", (Fraction(value),))


INFINITY = Node("infinity")

# --------------------------------------------------------------------------- reading

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d[\d,]*(?:\.\d*)?(?:[eE][-+]?\d+(?![\d.]))?|\.\d+(?:[eE][-+]?\d+)?)"
    r"|(?P<command>\\[A-Za-z]+|\\[{}|])|(?P<word>[A-Za-z]+)"
    r"|(?P<sign>\*\*|[-+*/^_(){}\[\]|!':])|(?P<other>\S))"
)
_THOUSANDS = re.compile(r"[1-9]\d{0,2}(?:,\d{3})+(?:\.\d+)?")
_PLAIN = re.compile(r"\d*\.?\d*(?:[eE][-+]?\d+)?")
_FUNCTIONS = {
    "sin", "cos", "tan", "cot", "sec", "csc", "arcsin", "arccos", "arctan", "sinh", "cosh",
    "tanh", "ln", "log", "lg", "exp", "sqrt", "abs",
}  # fmt: skip
_ALIASES = {
    "asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log", "cosec": "csc",
    "arcsinh": "asinh", "inf": "infty", "infinity": "infty", "oo": "infty", "Pi": "pi",
}  # fmt: skip
_GREEK = {
    "alpha", "beta", "gamma", "delta", "epsilon", "varepsilon", "zeta", "eta", "theta", "kappa",
    "lambda", "mu", "nu", "xi", "rho", "sigma", "tau", "phi", "varphi", "chi", "psi", "omega",
    "Gamma", "Delta", "Theta", "Lambda", "Xi", "Sigma", "Phi", "Psi", "Omega", "hbar", "ell",
    "vartheta", "odot",
}  # fmt: skip
_CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor"} | {
    "\\lceil": "\\rceil", "|": "|", "\\lvert": "\\rvert", "\\vert": "\\vert"
}  # fmt: skip
_STARTS_FACTOR = {"(", "[", "{", "\\frac", "\\sqrt", "\\binom", "\\lfloor", "\\lceil", "\\lvert"}


def parse(text: str) -> Node:
    """The formula in a text that `r1jax.rewards.math.text.clean` has written.

    Raises:
      Unreadable: it is none, or beyond the bounds at the head of this module.
    """
    text = text.strip()
    tokens = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None or match["other"] or len(tokens) > MAX_TOKENS:
            raise Unreadable(text[:80])
        tokens.append(match[match.lastgroup or ""])
        place = match.end()
    reader = _Reader(tokens)
    node = reader.sum()
    if reader.peek() is not None:
        raise Unreadable(text[:80])
    return node


def parse_number(text: str) -> Fraction | None:
    """The value of a number as written, thousands separators allowed; None if it is not one."""
    if "," in text:
        if not _THOUSANDS.fullmatch(text):
            return None
        text = text.replace(",", "")
    # Fraction would make 10**999999999 of the exponent.
    if len(text) > MAX_DIGITS or not _PLAIN.fullmatch(text) or not any(map(str.isdigit, text)):
        return None
    _, _, exponent = text.lower().partition("e")
    if exponent and (len(exponent) > 4 or abs(int(exponent)) > MAX_DIGITS):
        return None
    return Fraction(text)


class _Reader:
    """Recursive descent over tokens; one function for each rank of operators."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens  # changed on the way, where one token turns out to be two
        self.place = 0
        self.depth = 0

    def peek(self) -> str | None:
        return self.tokens[self.place] if self.place < len(self.tokens) else None

    def take(self) -> str:
        token = self.peek()
        if token is None:
            raise Unreadable("the formula ends too early")
        self.place += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise Unreadable(f"no {token} where one must be")

    def deeper(self, read: Callable[[], Node]) -> Node:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable("too deep")
        node = read()
        self.depth -= 1
        return node

    def negative(self) -> bool:
        """Whether the signs before a factor, which are taken, come to a minus."""
        minus = False
        while self.peek() in ("+", "-"):
            minus ^= self.take() == "-"
        return minus

    def sum(self) -> Node:
        node = self.product()
        while self.peek() in ("+", "-"):
            sign = self.take()
            right = self.product()
            node = Node("+", (node, right if sign == "+" else Node("neg", (right,))))
        return node

    def product(self) -> Node:
        if self.peek() in ("+", "-"):
            minus = self.negative()
            node = self.product()
            return Node("neg", (node,)) if minus else node
        node = self.mixed_number() or self.power()
        while True:
            token = self.peek()
            if token in ("*", "\\times", "\\cdot", "/", "\\div"):
                self.take()
                right = self.signed_power()
                node = Node("/" if token in ("/", "\\div") else "*", (node, right))
            elif token is not None and self.starts_factor(token):
                if token[0] in "0123456789." and self.tokens[self.place - 1][-1] in "0123456789.":
                    raise Unreadable("two numbers side by side")
                node = Node("*", (node, self.power()))
            else:
                return node

    def signed_power(self) -> Node:
        minus = self.negative()
        node = self.power()
        return Node("neg", (node,)) if minus else node

    def starts_factor(self, token: str) -> bool:
        if token in _STARTS_FACTOR or token[0] in "0123456789.":
            return True
        name = token.lstrip("\\")
        return name.isalpha() and (token[0] != "\\" or _known(name))

    def mixed_number(self) -> Node | None:
        """`1\\frac{4}{5}` or `1 4/5`, read as 9/5; None if there is none."""
        tokens = self.tokens[self.place : self.place + 9]
        if not tokens or not tokens[0].isdigit():
            return None
        if tokens[1:2] == ["\\frac"]:
            start, parts = self.place, tokens[2:]
            if len(parts) >= 6 and parts[0] == parts[3] == "{" and parts[2] == parts[5] == "}":
                top, bottom, length = parts[1], parts[4], 8
            elif parts and parts[0].isdigit() and len(parts[0]) == 2:
                top, bottom, length = parts[0][0], parts[0][1], 3
            else:
                return None
        elif len(tokens) >= 4 and tokens[1].isdigit() and tokens[2] == "/":
            start, top, bottom, length = self.place, tokens[1], tokens[3], 4
        else:
            return None
        if not (top.isdigit() and bottom.isdigit() and 0 < len(bottom) < 9 and int(bottom)):
            return None
        if len(top) > 9 or len(tokens[0]) > MAX_DIGITS:
            return None
        self.place = start + length
        return number(int(tokens[0]) + Fraction(int(top), int(bottom)))

    def power(self) -> Node:
        base = self.postfix(self.atom())
        if self.peek() in ("^", "**"):
            self.take()
            exponent = self.deeper(self.signed_power)
            return self.postfix(Node("^", (base, exponent)))
        return base

    def postfix(self, node: Node) -> Node:
        while self.peek() in ("!", "\\degree"):
            if self.take() == "!":
                node = Node("factorial", (node,))
            else:
                node = Node("*", (node, Node("/", (Node("name", ("pi",)), number(180)))))
        return node

    def argument(self) -> Node:
        """What follows `\\frac` or `\\sqrt`: a group, or else one digit or sign."""
        token = self.peek()
        if token is not None and token.isdigit() and len(token) > 1:
            self.tokens[self.place] = token[1:]
            return number(int(token[0]))
        return self.atom()

    def atom(self) -> Node:
        return self.deeper(self.any_atom)

    def any_atom(self) -> Node:
        token = self.take()
        if token[0] in "0123456789.":
            value = parse_number(token)
            if value is None:
                raise Unreadable(f"no number: {token[:40]}")
            return self.repeating(token, value)
        if token in ("(", "[", "{", "\\{"):
            node = self.sum()
            self.expect(_CLOSING[token])
            return node
        if token in ("\\lfloor", "\\lceil", "|", "\\lvert", "\\vert"):
            node = self.sum()
            self.expect(_CLOSING[token])
            return Node({"\\lfloor": "floor", "\\lceil": "ceil"}.get(token, "abs"), (node,))
        if token in ("\\frac", "\\binom"):
            top = self.argument()
            bottom = self.argument()
            return Node("/" if token == "\\frac" else "binomial", (top, bottom))
        if token == "\\sqrt":
            return self.root()
        if token == "\\text":
            self.expect("{")
            word = self.take()
            self.expect("}")
            if not word.isalpha() or not (len(word) == 1 or _alias(word) in _FUNCTIONS):
                raise Unreadable(f"a word: {word[:40]}")
            return self.name(word)
        if token.lstrip("\\").isalpha():
            return self.name(token)
        raise Unreadable(f"not understood: {token[:40]}")

    def repeating(self, token: str, value: Fraction) -> Node:
        r"""`0.1\overline{6}` as 1/6; without `\overline` the number itself."""
        if self.peek() != "\\overline" or "." not in token:
            return number(value)
        self.take()
        self.expect("{")
        period = self.take()
        self.expect("}")
        if not period.isdigit() or len(period) > 20:
            raise Unreadable("no period")
        places = len(token.partition(".")[2])
        return number(value + Fraction(int(period), (10 ** len(period) - 1) * 10**places))

    def root(self) -> Node:
        if self.peek() == "[":
            self.take()
            degree = self.sum()
            self.expect("]")
            return Node("root", (self.argument(), degree))
        token = self.peek()
        # In print \sqrt13 is the root of 1 and then a 3; who writes it means the root of 13.
        node = self.atom() if token is not None and token.isdigit() else self.argument()
        return Node("root", (node, number(2)))

    def name(self, token: str) -> Node:
        word = _alias(token.lstrip("\\"))
        if word == "infty":
            return INFINITY
        if word in _FUNCTIONS:
            return self.function(word)
        if token[0] != "\\" and len(word) > 1 and word != "pi":
            return self.letters(word)
        if token[0] == "\\" and not _known(word):
            raise Unreadable(f"not understood: {token}")
        return self.symbol(word)

    def letters(self, word: str) -> Node:
        """Two or three letters side by side are a product; more are a word."""
        for name in ("pi", "sqrt"):
            if word.endswith(name) and len(word) - len(name) == 1:
                self.tokens[self.place : self.place] = [name]
                return self.symbol(word[0])
        if len(word) > 3:
            raise Unreadable(f"a word: {word[:40]}")
        self.tokens[self.place : self.place] = list(word[1:])
        return self.symbol(word[0])

    def symbol(self, word: str) -> Node:
        """A variable with its subscript, primes, and what it is taken at, as in `f(0)`."""
        if self.peek() == "_":
            self.take()
            word += "_" + self.subscript()
        while self.peek() in ("'", "\\prime"):
            word += self.take()[0]
        ahead = self.tokens[self.place : self.place + 3]
        if len(ahead) == 3 and (ahead[0], ahead[2]) == ("(", ")"):
            # A number in brackets after a letter is an argument; I(0) is not I times 0.
            taken_at = word in ("f", "g", "h", "u", "y") and ahead[1].isalpha()
            if taken_at or ahead[1].isdigit():
                self.place += 3
                word += f"({ahead[1]})"
        return Node("name", (word,))

    def subscript(self) -> str:
        if self.peek() != "{":
            return self.take().lstrip("\\")
        parts, depth = [], 0
        while not parts or depth:
            parts.append(self.take())
            depth += {"{": 1, "}": -1}.get(parts[-1], 0)
        return "".join(part.lstrip("\\") for part in parts if part not in ("\\text", "{", "}"))

    def function(self, name: str) -> Node:
        if name == "sqrt":
            return Node("root", (self.atom(), number(2)))
        base = power = None
        for _ in range(2):
            if self.peek() == "_" and name == "log" and base is None:
                self.take()
                base = self.argument()
            elif self.peek() in ("^", "**") and power is None:
                self.take()
                power = self.signed_power() if self.peek() == "-" else self.argument()
        node = self.function_argument(name)
        if base is not None:
            node = Node("/", (Node("ln", (node.args[0],)), Node("ln", (base,))))
        if power is None:
            return node
        if power == Node("neg", (number(1),)) and f"arc{name}" in _FUNCTIONS:
            return Node(f"arc{name}", node.args)
        return Node("^", (node, power))

    def function_argument(self, name: str) -> Node:
        r"""`\sin 2x` and `\sin(2x)`: without brackets, all factors up to the next operator."""
        if self.peek() in ("(", "[", "{", "|"):
            return Node(name, (self.postfix(self.atom()),))
        if self.peek() == "-":
            self.take()
            return Node(name, (Node("neg", (self.power(),)),))
        node = self.mixed_number() or self.power()
        while True:
            token = self.peek()
            if (
                token is None
                or not self.starts_factor(token)
                or token in ("(", "[")
                or _alias(token.lstrip("\\")) in _FUNCTIONS
                or token[0].isdigit()
            ):
                return Node(name, (node,))
            node = Node("*", (node, self.power()))


def _alias(word: str) -> str:
    return _ALIASES.get(word, word)


def _known(word: str) -> bool:
    word = _alias(word)
    return word in _FUNCTIONS or word in _GREEK or word in ("pi", "infty", "text", "vert")
