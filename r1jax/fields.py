"""What lies inside a run's settings: walking them, checking types, overriding, printing.

A path such as `rl.advantage.scale` goes through records, items of tuples and mappings, arguments
of functions and of `functools.partial`. Stages of a run are addressed by their names.
"""

import inspect
import math
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

from r1jax.deferred import (
    ConfigError,
    Deferred,
    NeedsReal,
    check_keywords,
    dotted,
    nearest,
    signature,
    written,
)
from r1jax.settings import Run, Stage

_SCALARS = (bool, int, float, str, type(None))
_MISSING = inspect.Parameter.empty


class Child(NamedTuple):
    """A value inside another one."""

    value: Any  # _MISSING: an argument that has to be given and is not
    kind: Any  # the type that its annotation asks for; Any where that is not known
    given: bool = True  # False: the default of an argument that the config does not pass


# ----------------------------------------------------------------- walking


def children(value: Any, kind: Any = Any) -> dict[str, Child]:
    """What can be addressed inside a value of annotated type `kind`, by name."""
    if is_dataclass(value) and not isinstance(value, type):
        return _record_fields(value)
    if isinstance(value, Mapping):
        return {str(key): Child(item, _item_kind(kind, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return {str(i): Child(item, _item_kind(kind, i)) for i, item in enumerate(value)}
    if callable(value) and not isinstance(value, type):
        return _arguments(value)
    return {}


def _record_fields(record: Any) -> dict[str, Child]:
    try:
        hints = get_type_hints(type(record))
    except NameError:  # an annotation that only a type checker can read
        hints = {}
    names = [field.name for field in fields(record) if field.init]
    # An annotation of a module that is a stand-in now says nothing.
    hints = {name: Any if isinstance(kind, Deferred) else kind for name, kind in hints.items()}
    found = {name: Child(getattr(record, name), hints.get(name, Any)) for name in names}
    if isinstance(record, Run):
        del found["stages"]
        found |= {stage.name: Child(stage, Stage) for stage in record.stages}
    return found


def _arguments(function: Any) -> dict[str, Child]:
    """What a function gets by name, and what a partial already passes by position."""
    function, args, keywords = _parts(function)
    known = signature(function)
    found: dict[str, Child] = {}
    if known is None:
        found |= {str(i): Child(arg, Any) for i, arg in enumerate(args)}
        return found | {name: Child(item, Any) for name, item in keywords.items()}
    parameters = list(known.parameters.values())
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for i, arg in enumerate(args):
        if i < len(by_position):
            found[by_position[i].name] = Child(arg, by_position[i].annotation)
        else:
            found[str(i)] = Child(arg, Any)
    for p in parameters:
        if p.name in found or p.kind in (p.POSITIONAL_ONLY, p.VAR_POSITIONAL, p.VAR_KEYWORD):
            continue
        if p.name in keywords:
            found[p.name] = Child(keywords[p.name], p.annotation)
        elif p.kind is p.KEYWORD_ONLY or p.default is not _MISSING:
            found[p.name] = Child(p.default, p.annotation, given=False)
    return found | {name: Child(v, Any) for name, v in keywords.items() if name not in found}


def _parts(function: Any) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(function, partial):
        return function.func, function.args, function.keywords
    return function, (), {}


def _item_kind(kind: Any, key: Any) -> Any:
    """The type of one item of a container: float for `Mapping[str, float]`."""
    for option in _options(kind):
        args = get_args(option)
        origin = get_origin(option)
        if origin is tuple and args and args[-1] is not ...:
            return args[key] if isinstance(key, int) and key < len(args) else Any
        if origin in (tuple, list, Sequence):
            return args[0]
        if origin in (dict, Mapping):
            return args[1]
    return Any


def _options(kind: Any) -> tuple[Any, ...]:
    """The members of a union; any other type alone."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


# ----------------------------------------------------------------- checking


def verify(value: Any, kind: Any = Any, path: str = "") -> None:
    """Checks types, keywords and needed arguments of a value and of all that is in it.

    Raises:
      ConfigError: with the path, what is needed there and what is there.
      NeedsReal: a stand-in is where a number or a record is needed.
    """
    if not _fits(value, kind):
        raise ConfigError(f"{path or 'config'} needs {_words(kind)}, got {written(value)}")
    if isinstance(value, Run):
        if not isinstance(value.stages, tuple):
            raise ConfigError(f"stages needs a tuple, got {written(value.stages)}")
        for stage in value.stages:
            _check_stage(stage)
    inside = children(value, kind)
    if callable(value) and not is_dataclass(value):
        function, _, keywords = _parts(value)
        try:
            check_keywords(function, keywords)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
        missing = [name for name, child in inside.items() if child.value is _MISSING]
        if missing:
            name = written(function)
            example = f"partial({name.rpartition('.')[2]}, {missing[0]}=...)"
            raise ConfigError(f"{path}: {name} needs {' and '.join(missing)}, as in {example}")
    for name, child in inside.items():
        if child.given:
            verify(child.value, child.kind, _join(path, name))


def _check_stage(stage: Any) -> None:
    name = getattr(stage, "name", None)
    if not isinstance(stage, Stage):
        raise ConfigError(
            f"stages need Supervised, Reinforce, Build or Compare, got {written(stage)}"
        )
    taken = [field.name for field in fields(Run)]
    if not isinstance(name, str) or not name.isidentifier() or name in taken:
        raise ConfigError(
            f"a stage's name must be a word other than {', '.join(taken)}, got {written(name)}"
        )


def _fits(value: Any, kind: Any) -> bool:
    options = _options(kind)
    if isinstance(value, Deferred):
        if not any(_may_be_function(option) for option in options):
            raise NeedsReal(str(options))
        return True
    return any(_fits_one(value, option) for option in options)


def _may_be_function(kind: Any) -> bool:
    return kind in (Any, Callable, _MISSING) or get_origin(kind) is Callable


def _fits_one(value: Any, kind: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if kind in (None, type(None)):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in args)
    if _may_be_function(kind):
        return kind in (Any, _MISSING) or callable(value)
    if origin is tuple:
        return isinstance(value, tuple) and (args[-1] is ... or len(value) == len(args))
    accepts = origin or kind
    return not isinstance(accepts, type) or isinstance(value, accepts)


def _words(kind: Any) -> str:
    """A type as an error message calls it."""
    first, *others = _options(kind)
    if others:
        return " or ".join(_words(option) for option in (first, *others))
    kind, origin, args = first, get_origin(first), get_args(first)
    if kind in (None, type(None)):
        return "none"
    if kind is bool:
        return "true or false"
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if _may_be_function(kind):
        return "a function"
    if origin is tuple:
        if args[-1] is ...:
            return f"a tuple of {_words(args[0])}"
        return f"a tuple of {len(args)} ({', '.join(map(_words, args))})"
    return getattr(origin or kind, "__name__", str(kind))


# ----------------------------------------------------------------- overriding


class Override(NamedTuple):
    """`--set path=text`."""

    path: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        return f"--set {'.'.join(self.path)}={self.text}"


def parse_override(argument: str) -> Override:
    """The override that `a.b=1` asks for.

    Raises:
      ConfigError: it has no `=` or an empty name.
    """
    path, equals, text = argument.partition("=")
    names = tuple(path.strip().split("."))
    if not equals or not all(names):
        raise ConfigError(f"--set {argument}: need name=value, as in rl.group=16")
    return Override(names, text.strip())


def override(value: Any, overrides: Sequence[Override], kind: Any = Any, depth: int = 0) -> Any:
    """`value` with all overrides made at once; of two for the same path the later one counts.

    Records are made anew from the inside out, so that their own checks run on the final values.

    Raises:
      ConfigError: an unknown name, a text that does not fit, or a record that refuses the values.
    """
    path = ".".join(overrides[0].path[:depth]) if overrides else ""
    inside = children(value, kind)
    new = {}
    for name in dict.fromkeys(each.path[depth] for each in overrides):
        within = [each for each in overrides if each.path[depth] == name]
        if name not in inside:
            raise ConfigError(f"{within[0]}: {_unknown(value, name, path, inside)}")
        child = inside[name]
        whole = [each for each in within if len(each.path) == depth + 1]
        deeper = [each for each in within if len(each.path) > depth + 1]
        if whole and deeper:
            raise ConfigError(f"{whole[-1]}: {deeper[-1]} sets a part of the same")
        if deeper:
            new[name] = override(child.value, deeper, child.kind, depth + 1)
        else:
            new[name] = _from_text(whole[-1], child)
    return _rebuilt(value, new, path) if new else value


def _unknown(value: Any, name: str, path: str, inside: Collection[str]) -> str:
    where = path or "the run"
    if not inside:
        return f"{where} is {written(value)}; nothing inside it can be set"
    if is_dataclass(value):
        return f"no field '{name}' in {where} ({type(value).__name__}); {nearest(name, inside)}"
    if isinstance(value, list | tuple | Mapping):
        return f"no item '{name}' in {where}; {nearest(name, inside)}"
    function, _, _ = _parts(value)
    return f"no argument '{name}' in {where} ({written(function)}); {nearest(name, inside)}"


def _from_text(asked: Override, child: Child) -> Any:
    name, value, kind = asked.path[-1], child.value, child.kind
    if kind in (Any, _MISSING) and isinstance(value, _SCALARS) and value is not None:
        # No annotation: what is there tells. A whole number may stand for any.
        kind = int | float if type(value) is int else type(value)
    if not any(_settable(option) for option in _options(kind)):
        raise ConfigError(f"{asked}: {_not_settable(asked.path, value, kind)}")
    for option in sorted(_options(kind), key=lambda option: option is str):
        if _settable(option):
            try:
                return _parsed(asked.text, option)
            except ValueError:
                continue
    raise ConfigError(f"{asked}: {name} needs {_words(kind)}, got '{asked.text}'")


def _not_settable(path: Sequence[str], value: Any, kind: Any) -> str:
    name, inside = path[-1], children(value, kind)
    hint = f"; set one of {'.'.join(path)}.({'|'.join(inside)})" if inside else ""
    if is_dataclass(value):
        return f"{name} is a whole record ({type(value).__name__}){hint}"
    if callable(value):
        return f"{name} is a function; a config file passes those{hint}"
    if isinstance(value, list | tuple | Mapping):
        return f"{name} holds several things{hint}"
    return f"{name} takes no plain value; a config file can set it"


def _settable(kind: Any) -> bool:
    origin, args = get_origin(kind), get_args(kind)
    if origin is tuple:
        return all(arg is ... or arg in _SCALARS for arg in args)
    return kind is None or kind in _SCALARS or origin is Literal


def _parsed(text: str, kind: Any) -> Any:
    """The value of type `kind` that a text stands for.

    Raises:
      ValueError: it stands for none.
    """
    origin, args = get_origin(kind), get_args(kind)
    if kind is str:
        return text
    if kind in (int, float):
        number = kind(text)
        if math.isnan(number):
            raise ValueError("not a number")
        return number
    if origin is tuple:
        items = [item.strip() for item in text.strip("()[] ").split(",") if item.strip()]
        kinds = [args[0]] * len(items) if args[-1] is ... else args
        return tuple(_parsed(item, one) for item, one in zip(items, kinds, strict=True))
    known: dict[str, Any] = {"none": None}
    if kind is bool:
        known = {"true": True, "false": False}
    elif origin is Literal:
        known = {str(choice): choice for choice in args}
    for word, value in known.items():
        if text == word or (origin is not Literal and text.lower() == word):
            return value
    raise ValueError("no such word")


def _rebuilt(value: Any, new: Mapping[str, Any], path: str) -> Any:
    """A value with some of its children replaced."""
    if is_dataclass(value) and not isinstance(value, type):
        changes = dict(new)
        if isinstance(value, Run):
            changes["stages"] = tuple(changes.pop(s.name, s) for s in value.stages)
        try:
            return replace(value, **changes)
        except ValueError as error:
            names = [field.name for field in fields(value)]
            message = str(error)
            inner = message.partition(" ")[0] in names
            raise ConfigError(
                _join(path, message) if inner else f"{path}: {message}".lstrip(": ")
            ) from error
    if isinstance(value, Mapping):
        return {key: new.get(str(key), item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [new.get(str(i), item) for i, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    function, args, keywords = _parts(value)
    positions = dict(zip(_arguments(value), range(len(args)), strict=False))
    items = list(args)
    for name in new.keys() & positions.keys():
        items[positions[name]] = new[name]
    named = {name: item for name, item in new.items() if name not in positions}
    return partial(function, *items, **{**keywords, **named})


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


# ----------------------------------------------------------------- printing


def describe(run: Run) -> list[str]:
    """Every setting of a run as a line `path: value`, sorted by path, defaults included.

    Records and functions are shown by name, and what is inside them on lines of their own.
    Arguments that a function of r1jax or of the config file has by default are listed too.
    """
    stages = ", ".join(stage.name for stage in run.stages)
    lines = [f"stages: {stages}"]
    for name, child in children(run).items():
        lines += _lines(name, child)
    return sorted(lines, key=lambda line: line.partition(": ")[0])


def _lines(path: str, child: Child) -> list[str]:
    value, inside = child.value, children(*child[:2])
    if isinstance(value, list | tuple | Mapping):
        # Plain values stand on one line together; others have one each.
        items = value.values() if isinstance(value, Mapping) else value
        if all(isinstance(item, _SCALARS) for item in items):
            return [f"{path}: {written(value)}"]
        lines = []
    elif is_dataclass(value) and not isinstance(value, type):
        lines = [f"{path}: {dotted(type(value))}"]
    else:
        lines = [f"{path}: {written(_parts(value)[0])}"]
    for name, below in inside.items():
        if below.value is not _MISSING:
            lines += _lines(f"{path}.{name}", below)
    return lines


def by_path(lines: Iterable[str]) -> dict[str, str]:
    """The settings in lines of `describe`: path -> what is printed there, without those of None.

    So a run's folder stays that of its config when settings are added, if None is their default.
    """
    pairs = (line.partition(": ") for line in lines if line)
    return {path: value for path, _, value in pairs if value != "None"}


def lines_of(file: Path) -> list[str]:
    """The lines of a run's config.txt."""
    # Not splitlines: a printed text may hold other line separators.
    return file.read_text(encoding="utf-8").split("\n")
