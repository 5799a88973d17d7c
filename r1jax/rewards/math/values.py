r"""The values of formulas, and whether two formulas have the same.

Rational numbers are compared exactly. All else is computed in floating point, formulas with
variables at several points: values that differ beyond the error of the arithmetic decide that the
formulas differ, values that agree to twelve digits that they are equal, and anything between them
decides nothing. Powers and factorials are bounded, so that no formula takes long.
"""

import cmath
import math
import re
import zlib
from collections.abc import Mapping
from fractions import Fraction

from r1jax.rewards.math.expressions import INFINITY, Node

MAX_BITS = 40_000  # of an exact power
MAX_FACTORIAL = 2_000
POINTS = 4  # where formulas are compared
WHOLE_POINTS = 12  # the same for those that count, which agree by chance more often

_CONSTANTS = {"pi": math.pi, "e": math.e}
_ROUNDING = 4e-16  # relative error of one operation; functions of the C library are a bit worse


def exact(node: Node) -> Fraction | None:
    """The value of a formula of rational numbers; None if it has none, or one too large.

    Roots count where they come out even.
    """
    if node.kind == "number":
        return node.args[0]
    if node.kind in ("name", "infinity"):
        return None
    values = [exact(each) for each in node.args]
    if any(value is None for value in values):
        return None
    try:
        return _EXACT[node.kind](*values) if node.kind in _EXACT else None
    except ZeroDivisionError:
        return None


def _size(value: Fraction) -> int:
    return value.numerator.bit_length() + value.denominator.bit_length()


def _bounded(value: Fraction) -> Fraction | None:
    return value if _size(value) <= MAX_BITS else None


def _power(base: Fraction, exponent: Fraction) -> Fraction | None:
    if exponent.denominator != 1:
        root = _root(base, Fraction(exponent.denominator))
        return None if root is None else _power(root, Fraction(exponent.numerator))
    if base in (0, 1, -1) and exponent >= 0:
        return Fraction(base ** int(exponent % 2 + 2 * (exponent > 0)))
    if abs(exponent) * _size(base) > MAX_BITS:
        return None
    return base ** int(exponent)


def _root(value: Fraction, degree: Fraction) -> Fraction | None:
    if degree.denominator != 1 or not 2 <= degree <= 60:
        return None
    power = int(degree)
    if value < 0:
        return None  # the principal root of a negative number is not real
    parts = [_whole_root(part, power) for part in (value.numerator, value.denominator)]
    return None if None in parts else Fraction(*parts)  # type: ignore[arg-type]


def _whole_root(value: int, power: int) -> int | None:
    if power == 2:
        found = math.isqrt(value)
    elif value.bit_length() < 900:
        found = round(value ** (1 / power))
    else:
        return None
    return found if found**power == value else None


def _factorial(value: Fraction) -> Fraction | None:
    if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL:
        return None
    return Fraction(math.factorial(int(value)))


def _binomial(top: Fraction, bottom: Fraction) -> Fraction | None:
    if top.denominator != 1 or bottom.denominator != 1 or not 0 <= bottom <= top <= MAX_FACTORIAL:
        return None
    return Fraction(math.comb(int(top), int(bottom)))


_EXACT = {
    "+": lambda a, b: _bounded(a + b),
    "*": lambda a, b: _bounded(a * b),
    "/": lambda a, b: _bounded(a / b),
    "neg": lambda a: -a,
    "abs": abs,
    "floor": lambda a: Fraction(math.floor(a)),
    "ceil": lambda a: Fraction(math.ceil(a)),
    "^": _power,
    "root": _root,
    "factorial": _factorial,
    "binomial": _binomial,
}


def names(node: Node) -> frozenset[str]:
    """The variables of a formula; pi, e and i are none."""
    if node.kind == "name":
        return frozenset(node.args) - {"i", *_CONSTANTS}
    if node.kind in ("number", "infinity"):
        return frozenset()
    return frozenset().union(*map(names, node.args))


def kinds(node: Node) -> frozenset[str]:
    """The operators of a formula."""
    inner = (kinds(each) for each in node.args if isinstance(each, Node))
    return frozenset((node.kind,)).union(*inner)


def _approximate(node: Node, values: Mapping[str, float]) -> tuple[complex, float]:
    """The value in floating point and the error it may have, followed through every operation.

    Raises:
      ArithmeticError, ValueError: it has none, or it is too large.
    """
    if node.kind == "number":
        found = complex(float(node.args[0]))
        return found, 0.0 if found.real == node.args[0] else _ROUNDING * abs(found)
    if node.kind == "name":
        name = node.args[0]
        if name in values or name == "i":
            return complex(values.get(name, 1j)), 0.0
        return complex(_CONSTANTS[name]), _ROUNDING * _CONSTANTS[name]
    if node.kind == "infinity":
        raise OverflowError
    function = _COMPLEX[node.kind]
    inner = [_approximate(each, values) for each in node.args]
    args = [value for value, _ in inner]
    found = function(*args) + 0j  # no negative zero: the root of -4 - 0i is -2i
    error = _ROUNDING * abs(found)
    for place, (value, wrong) in enumerate(inner):
        if wrong:
            shifted = function(*args[:place], value + wrong, *args[place + 1 :])
            error += abs(shifted - found)
    if not cmath.isfinite(found) or not math.isfinite(error):
        raise OverflowError
    return found, error


def _real(value: complex) -> float:
    if abs(value.imag) > 1e-9 * max(1.0, abs(value.real)):
        raise ValueError("not a real number")
    return value.real


def _rounded(function):
    def apply(value: complex) -> complex:
        real = _real(value)
        nearest = round(real)
        return complex(nearest if abs(real - nearest) < 1e-9 else function(real))

    return apply


def _complex_power(base: complex, exponent: complex) -> complex:
    if exponent.imag == 0 and exponent.real.is_integer() and abs(exponent.real) < 1000:
        return base ** int(exponent.real)  # exact where it can be
    return base**exponent


def _complex_root(value: complex, degree: complex) -> complex:
    if degree == 2:
        return cmath.sqrt(value)
    if value.imag == 0 and value.real < 0 and degree.imag == 0 and degree.real % 2 == 1:
        return -((-value) ** (1 / degree))  # the cube root of -8 is meant to be -2
    return value ** (1 / degree)


def _gamma(value: complex) -> complex:
    return complex(math.gamma(_real(value) + 1))


_COMPLEX = {
    "+": lambda a, b: a + b,
    "*": lambda a, b: a * b,
    "/": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": lambda a: complex(abs(a)),
    "floor": _rounded(math.floor),
    "ceil": _rounded(math.ceil),
    "^": _complex_power,
    "root": _complex_root,
    "factorial": _gamma,
    "binomial": lambda a, b: _gamma(a) / (_gamma(b) * _gamma(a - b)),
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda a: cmath.cos(a) / cmath.sin(a),
    "sec": lambda a: 1 / cmath.cos(a),
    "csc": lambda a: 1 / cmath.sin(a),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "sinh": cmath.sinh,
    "cosh": cmath.cosh,
    "tanh": cmath.tanh,
    "ln": cmath.log,
    "log": cmath.log10,
    "exp": cmath.exp,
}


def _points(variables: frozenset[str], whole: bool) -> list[dict[str, float]]:
    """Values for the variables, the same for the same names in every run.

    Positive, so that a root of a square is its base; whole where a formula counts things.
    """
    if whole:
        starts = {name: 2 + zlib.crc32(name.encode()) % 5 for name in variables}
        steps = range(WHOLE_POINTS)
        return [{name: float(start + step) for name, start in starts.items()} for step in steps]
    seeds = [
        {name: zlib.crc32(f"{name} {point}".encode()) for name in variables}
        for point in range(POINTS)
    ]
    return [{name: 0.3 + seed / 2**32 * 1.9 for name, seed in each.items()} for each in seeds]


_COUNTING = {"floor", "ceil", "factorial", "binomial"}


def equal(a: Node, b: Node) -> bool | None:
    """Whether two formulas have the same value for all positive values of their variables.

    None: it cannot be told here, because a value is infinite, too large or lost in rounding.
    """
    if a == b:
        return True
    if INFINITY in (a, b) or Node("neg", (INFINITY,)) in (a, b):
        return False if names(a) | names(b) == frozenset() else None
    left, right = exact(a), exact(b)
    if left is not None and right is not None:
        return left == right
    variables = names(a) | names(b)
    verdicts = []
    for point in _points(variables, bool(_COUNTING & (kinds(a) | kinds(b)))):
        verdict = _close(a, b, point)
        if verdict is False or not variables:
            return verdict
        verdicts.append(verdict)
    return True if verdicts.count(True) >= POINTS - 1 else None  # undefined at some, perhaps


def _evaluated(node: Node, point: Mapping[str, float]) -> tuple[complex, float] | None:
    """Value and error at a point, None if it has none there."""
    try:
        return _approximate(node, point)
    except (ArithmeticError, ValueError):
        return None


def _close(a: Node, b: Node, point: Mapping[str, float]) -> bool | None:
    left, right = _evaluated(a, point), _evaluated(b, point)
    if left is None or right is None:
        return None
    size = max(abs(left[0]), abs(right[0]))
    error = left[1] + right[1]
    gap = abs(left[0] - right[0])
    if gap > 1e-7 * size and gap > 1e3 * error:
        return False
    if point and size == 0:
        return None  # zero at a point where a formula with variables should not be
    return True if gap <= 1e-12 * size + 4 * error and error < 1e-9 * max(size, 1.0) else None


def proportional(a: tuple[Node, Node], b: tuple[Node, Node]) -> bool | None:
    """Whether two equations are one up to a factor: `2x - y = 3` and `y + 3 = 2x`."""
    left, right = (Node("+", (lhs, Node("neg", (rhs,)))) for lhs, rhs in (a, b))
    variables = names(left) | names(right)
    if not variables or names(left) != names(right):
        return False
    ratios = []
    for point in _points(variables, False):
        values = _evaluated(left, point), _evaluated(right, point)
        if None in values:
            return None
        (top, error), (bottom, _) = values  # type: ignore[misc]
        if abs(bottom) < 1e-9 or abs(top) < 1e3 * error:
            return None
        ratios.append(top / bottom)
    return all(abs(ratio - ratios[0]) <= 1e-9 * abs(ratios[0]) for ratio in ratios)


def rounds_to(decimal: str, other: Node) -> bool:
    """Whether a decimal of six significant digits or more is the other value, rounded or cut.

    Never for a value that can be written out: 0.3333333 is a third, but 0.1250001 no eighth.
    """
    digits = decimal.lstrip("-+ ")
    if not re.fullmatch(r"\d*\.\d+", digits) or len(digits.replace(".", "").lstrip("0")) < 6:
        return False
    value = exact(other)
    if value is not None:
        rest = value.denominator
        for prime in (2, 5):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return False
        target = value
    else:
        found = _evaluated(other, {}) if not names(other) else None
        if found is None or found[0].imag != 0:
            return False
        target = Fraction(found[0].real)
    places = len(digits.partition(".")[2])
    written = Fraction(digits) * (-1 if decimal.lstrip().startswith("-") else 1)
    unit = Fraction(1, 10**places)
    return 2 * abs(target - written) <= unit or 0 <= abs(target) - abs(written) < unit
