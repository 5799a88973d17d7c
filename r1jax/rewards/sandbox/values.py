"""Plain Python values as JSON text and back, exactly, for channels whose other end is not trusted.

None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset and dict of these. An
instance of a subclass is sent as the plain value it holds, so an `__eq__` that somebody wrote does
not arrive with it. Nothing is ever executed on reading, which is why this is neither pickle nor
marshal.
"""

import json
from typing import Any

MAX_DEPTH = 200
_SMALL = 10**15  # longer integers travel in base 16: reading them takes linear time

_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}


def encode(value: Any) -> bytes:
    """The value as JSON text in ASCII.

    Raises:
      ValueError: a part has another type, or the value is nested deeper than `MAX_DEPTH`.
    """
    return json.dumps(_pack(value, 0), separators=(",", ":")).encode()


def decode(text: bytes) -> Any:
    """The value that `encode` wrote.

    Raises:
      ValueError: `text` is not what `encode` writes.
    """
    try:
        return _unpack(json.loads(text), 0)
    # A set of lists; a complex number too large; brackets without end.
    except (TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not an encoded value: {error}") from error


def _pack(value: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"a value nested deeper than {MAX_DEPTH}")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, int):
        number = int.__int__(value)
        return number if -_SMALL < number < _SMALL else ["int", hex(number)]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, bytes):
        return ["bytes", bytes.hex(value)]
    if isinstance(value, dict):
        items = [part for pair in dict.items(value) for part in pair]
        return ["dict", *(_pack(part, depth + 1) for part in items)]
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [name, *(_pack(part, depth + 1) for part in kind.__iter__(value))]
    raise ValueError(f"a {type(value).__name__} is not a plain value")


def _unpack(packed: Any, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise ValueError(f"a value nested deeper than {MAX_DEPTH}")
    if not isinstance(packed, list):
        if isinstance(packed, dict):
            raise ValueError("not an encoded value: a JSON object")
        return packed
    match packed:
        case ["int", str(digits)]:
            return int(digits, 16)
        case ["complex", int() | float() as real, int() | float() as imaginary]:
            return complex(real, imaginary)
        case ["bytes", str(digits)]:
            return bytes.fromhex(digits)
        case ["dict", *parts] if len(parts) % 2 == 0:
            parts = [_unpack(part, depth + 1) for part in parts]
            return dict(zip(parts[::2], parts[1::2], strict=True))
        case [str(name), *parts] if name in _SEQUENCES:
            return _SEQUENCES[name](_unpack(part, depth + 1) for part in parts)
    raise ValueError(f"not an encoded value: {str(packed)[:60]}")
