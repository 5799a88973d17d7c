"""Stand-ins for modules that take seconds to import, so that a config file can be checked in none.

Inside `stand_ins()` an `import jax` gives a stand-in, and `jax.numpy.exp` a `Deferred` that knows
its own name and no more. That is enough to find a wrong name or a wrong keyword in a config:
names and signatures of r1jax's own modules are read from their source. Whatever needs the real
thing raises `NeedsReal`, and the config is run again with real imports.
"""

import ast
import hashlib
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import cache, partial
from importlib.machinery import ModuleSpec
from pathlib import Path, PurePath
from types import FunctionType, ModuleType, UnionType
from typing import Any, Literal, Optional, Union, get_args, get_origin

from r1jax.schedules import Adaptive, Schedule

PACKAGE = Path(__file__).parent
CONFIG_MODULE = "r1jax_config_file"  # the module name under which a config file runs

_INSTALLED = ("site-packages", "dist-packages")
_SLOW = {"chex", "flax", "grain", "jax", "jaxlib", "jaxtyping", "optax", "orbax", "transformers"}


class ConfigError(ValueError):
    """What is wrong with a config or an override, in one line for its writer."""


class NeedsReal(BaseException):
    """A config computes with something that a stand-in cannot know.

    No `Exception`, so that a `try` in a config file cannot take the wrong turn.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: those like it, or else all there are."""
    public = sorted(known)
    close = get_close_matches(name, public, n=3)
    if close:
        return f"nearest: {', '.join(close)}"
    return f"there are: {', '.join(public[:20])}{', ...' * (len(public) > 20)}"


# ----------------------------------------------------------------- a name, or a call of one


class Deferred:
    """A name of a module that was not imported, or an expression made of such names.

    It can be called, subscripted, joined by `|` (as annotations are) and asked for attributes:
    each gives another Deferred. All else raises `NeedsReal`.
    """

    __slots__ = ("_home", "_text")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, text: str, home: tuple[str, str] | None = None) -> None:
        self._text = text  # as `describe` prints it
        self._home = home  # (module, name) of a definition in r1jax

    def __call__(self, *args: Any, **keywords: Any) -> "Deferred":
        check_keywords(self, keywords)
        given = [written(arg) for arg in args]
        given += [f"{name}={written(value)}" for name, value in keywords.items()]
        return Deferred(f"{self._text}({', '.join(given)})")

    def __getattr__(self, name: str) -> "Deferred":
        if name.startswith("__"):
            raise AttributeError(f"'Deferred' object has no attribute {name!r}")
        return Deferred(f"{self._text}.{name}")

    def __getitem__(self, key: Any) -> "Deferred":
        return Deferred(f"{self._text}[{written(key)}]")

    def __or__(self, other: Any) -> "Deferred":
        return Deferred(f"{self._text} | {written(other)}")

    def __ror__(self, other: Any) -> "Deferred":
        return Deferred(f"{written(other)} | {self._text}")

    def __repr__(self) -> str:
        return self._text


def _needs_real(self: Deferred, *args: Any, **keywords: Any) -> Any:
    raise NeedsReal(self._text)


_OPERATIONS = """
    str format bool int float complex index round fspath array len iter next contains setitem
    delitem eq ne lt le gt ge neg pos abs invert add radd sub rsub mul rmul matmul rmatmul truediv
    rtruediv floordiv rfloordiv mod rmod pow rpow and rand xor rxor lshift rshift enter exit
    instancecheck subclasscheck mro_entries
"""
for _operation in _OPERATIONS.split():
    setattr(Deferred, f"__{_operation}__", _needs_real)


# ----------------------------------------------------------------- values as text


def written(value: Any) -> str:
    """A value on one line: the same in every process and wherever the config file lies."""
    if isinstance(value, str | PurePath):
        return json.dumps(str(value), ensure_ascii=False)
    if isinstance(value, partial):
        given = [written(value.func), *map(written, value.args)]
        given += [f"{name}={written(item)}" for name, item in value.keywords.items()]
        return f"partial({', '.join(given)})"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{written(k)}: {written(v)}" for k, v in value.items()) + "}"
    if isinstance(value, tuple):
        return f"({', '.join(map(written, value))}{',' * (len(value) == 1)})"
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    if hasattr(type(value), "__dataclass_fields__"):
        given = [f"{name}={written(getattr(value, name))}" for name in value.__dataclass_fields__]
        return f"{type(value).__name__}({', '.join(given)})"
    if isinstance(value, Deferred | int | float | complex | None):
        return repr(value)
    if callable(value) and hasattr(value, "__qualname__"):
        return dotted(value)
    # A repr with an address in it would be another one in every process.
    return repr(value) if " at 0x" not in repr(value) else dotted(type(value))


def dotted(named: Any) -> str:
    """The dotted name of a function or class.

    A function of the config file itself is `config:name@hash`, the hash being of its code: a run
    continued with another body of its reward is another run. What a library keeps in a private
    module has the shortest public name: `optax.adamw`, not `optax._src.alias.adamw`.
    """
    module, name = named.__module__ or "builtins", named.__qualname__
    if module == CONFIG_MODULE:
        if not isinstance(named, FunctionType):
            return f"config:{name}"
        return f"config:{name}@{hashlib.sha256(_code(named).encode()).hexdigest()[:8]}"
    if module in ("r1jax.settings", "r1jax.architecture"):
        return name
    parts = module.split(".")
    for count in range(1, len(parts) if parts[0] != "r1jax" else 0):
        parent = ".".join(parts[:count])
        if parent in sys.modules and vars(sys.modules[parent]).get(name) is named:
            return f"{parent}.{name}"
    return f"{module}.{name}"


def _code(function: FunctionType) -> str:
    """The code of a function of the config file, without its comments and layout."""
    function = inspect.unwrap(function)
    found = []
    for node in ast.walk(ast.parse(function.__globals__.get("__source__", ""))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            first = min(d.lineno for d in [*getattr(node, "decorator_list", []), node])
            if first == function.__code__.co_firstlineno:
                found.append(_tree(node))
    return "\n".join(found)


def _tree(node: Any) -> str:
    """A syntax tree as text, the same in every Python version; ast.unparse and ast.dump are not."""
    if isinstance(node, list):
        return f"[{', '.join(map(_tree, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    # A newer Python has more fields, which are empty in code that the older ones can read too.
    given = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return f"{type(node).__name__}({', '.join(f'{n}={_tree(v)}' for n, v in given)})"


# ----------------------------------------------------------------- signatures, from source


def signature(function: Any) -> inspect.Signature | None:
    """The parameters of a function of r1jax or of the config file; None for any other.

    r1jax's are read from source, whether the function is a stand-in or real, so that both give
    the same. A default that is no literal is a Deferred with its text.
    """
    if isinstance(function, Deferred):
        home = function._home
    elif isinstance(function, FunctionType) and function.__module__ == CONFIG_MODULE:
        return _real_signature(function)
    elif (getattr(function, "__module__", None) or "").partition(".")[0] == "r1jax":
        home = (function.__module__, function.__qualname__)
    else:
        home = None
    if home is None:
        return None
    module, node = _definition(*home) or (None, None)
    if module and isinstance(node, ast.FunctionDef):
        return _source_signature(node, module)
    return None


def check_keywords(function: Any, keywords: Iterable[str]) -> None:
    """Finds a keyword that a function of known signature does not take.

    Raises:
      ConfigError: with the parameters nearest to the keyword.
    """
    known = signature(function)
    if known is None or any(p.kind is p.VAR_KEYWORD for p in known.parameters.values()):
        return
    for name in keywords:
        if name not in known.parameters:
            raise ConfigError(
                f"{written(function)} has no argument '{name}'; {nearest(name, known.parameters)}"
            )


def _real_signature(function: FunctionType) -> inspect.Signature:
    try:
        hints = inspect.get_annotations(function, eval_str=True)
    except NameError:  # an annotation that only a type checker can read
        hints = {}
    known = inspect.signature(function)
    parameters = known.parameters.values()
    return known.replace(
        parameters=[p.replace(annotation=_plain(hints.get(p.name, Any))) for p in parameters]
    )


def _plain(kind: Any) -> Any:
    """A type if --set can give its values, or if it is a function's; else Any."""
    origin, args = get_origin(kind), get_args(kind)
    if isinstance(kind, Deferred):
        return Any
    if origin in (Union, UnionType):
        return Union[tuple(map(_plain, args))]  # noqa: UP007
    if origin is tuple:
        return tuple[tuple(arg if arg is ... else _plain(arg) for arg in args)]
    if kind is Callable or origin is Callable:
        return Callable
    if getattr(kind, "__module__", None) == "jaxtyping":
        return Schedule | Adaptive
    known = origin is Literal or kind in (bool, float, int, str, None, type(None))
    return kind if known else Any


def _source_signature(node: ast.FunctionDef, module: str) -> inspect.Signature:
    def parameter(arg: ast.arg, kind: Any, default: ast.expr | None = None) -> inspect.Parameter:
        value = inspect.Parameter.empty if default is None else _literal(default, module)
        annotation = _annotation(arg.annotation, module)
        return inspect.Parameter(arg.arg, kind, default=value, annotation=annotation)

    args, kinds = node.args, inspect.Parameter
    plain = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(plain) - len(args.defaults)) + args.defaults
    parameters = [
        parameter(
            arg,
            kinds.POSITIONAL_ONLY if arg in args.posonlyargs else kinds.POSITIONAL_OR_KEYWORD,
            default,
        )
        for arg, default in zip(plain, defaults, strict=True)
    ]
    if args.vararg:
        parameters.append(parameter(args.vararg, kinds.VAR_POSITIONAL))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        parameters.append(parameter(arg, kinds.KEYWORD_ONLY, default))
    if args.kwarg:
        parameters.append(parameter(args.kwarg, kinds.VAR_KEYWORD))
    return inspect.Signature(parameters)


def _literal(node: ast.expr, module: str) -> Any:
    """The value of a literal, or of a name that stands for one; of the rest a Deferred text."""
    if isinstance(node, ast.Name):
        home, found = _definition(module, node.id) or (module, None)
        if isinstance(found, ast.Assign | ast.AnnAssign) and found.value:
            return _literal(found.value, home)
    try:
        return ast.literal_eval(node)
    except ValueError:
        return Deferred(ast.unparse(node))


def _annotation(node: ast.expr | None, module: str) -> Any:
    """The type that an annotation names, as far as --set can use it; Any for the rest."""
    scalars = {"bool": bool, "float": float, "int": int, "str": str, "Callable": Callable}
    match node:
        case ast.Constant(value=None):
            return None
        case ast.Constant(value=value) if value is ...:
            return ...
        case ast.Constant(value=str(text)):
            return _annotation(ast.parse(text, mode="eval").body, module)
        case ast.Name(id=name) if name in scalars:
            return scalars[name]
        case ast.Name(id=name):  # an alias, as in Kl = Callable[...]
            home, found = _definition(module, name) or (module, None)
            return _annotation(found.value, home) if isinstance(found, ast.Assign) else Any
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return Union[_annotation(left, module), _annotation(right, module)]  # noqa: UP007
        case ast.Subscript(value=ast.Name(id="Callable")):
            return Callable
        case ast.Subscript(value=ast.Name(id="Float")):
            return Schedule | Adaptive  # what a program can be given anew at each step
        case ast.Subscript(value=ast.Name(id="Optional"), slice=item):
            return Optional[_annotation(item, module)]  # noqa: UP045
        case ast.Subscript(value=ast.Name(id="Literal"), slice=item):
            choices = _literal(item, module)
            return Any if isinstance(choices, Deferred) else Literal[choices]
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=items)):
            return tuple[tuple(_annotation(item, module) for item in items)]
    return Any


@cache
def _names(module: str) -> dict[str, ast.stmt]:
    """What the source of a module of r1jax defines at its top level, imports included."""
    file = _file(module)
    assert file is not None, module
    found: dict[str, ast.stmt] = {}

    def add(body: Sequence[ast.stmt]) -> None:
        for node in body:
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                    found[node.name] = node
                case ast.Import() | ast.ImportFrom():
                    for alias in node.names:
                        found[alias.asname or alias.name.partition(".")[0]] = node
                case ast.Assign():
                    for target in node.targets:
                        for part in ast.walk(target):
                            if isinstance(part, ast.Name):
                                found[part.id] = node
                case ast.AnnAssign(target=ast.Name(id=name)):
                    found[name] = node
                case ast.If() | ast.Try() | ast.With():
                    add(node.body)
                    add(getattr(node, "orelse", []))
                    add([s for h in getattr(node, "handlers", []) for s in h.body])

    add(ast.parse(file.read_bytes()).body)
    return found


def _definition(module: str, name: str) -> tuple[str, ast.stmt] | None:
    """The module of r1jax that defines what `module` calls `name`, and the statement."""
    node = _names(module).get(name)
    if isinstance(node, ast.ImportFrom) and not node.level and node.module:
        for alias in node.names:
            if (alias.asname or alias.name) == name and _file(node.module):
                return _definition(node.module, alias.name)
    return None if node is None else (module, node)


@cache
def _file(module: str) -> Path | None:
    """The source of a module of r1jax; None if there is no such module."""
    package, *parts = module.split(".")
    place = PACKAGE.joinpath(*parts)
    if package == "r1jax":
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                return file
    return None


# ----------------------------------------------------------------- modules


class _StandIn(ModuleType):
    """A module that was not imported."""

    def __getattr__(self, name: str) -> Any:
        if name in ("__all__", "__version__"):
            raise NeedsReal(f"{self.__name__}.{name}")
        if name.startswith("__"):  # the import system asks for __path__ and the like
            raise AttributeError(f"'Deferred' {self.__name__} has no {name}")
        if self.__name__.partition(".")[0] != "r1jax":
            return Deferred(f"{self.__name__}.{name}")
        if found := _definition(self.__name__, name):
            module, _ = found
            return Deferred(f"{module}.{name}", home=(module, name))
        if _file(f"{self.__name__}.{name}"):
            return importlib.import_module(f"{self.__name__}.{name}")
        known = [name for name in _names(self.__name__) if not name.startswith("_")]
        raise ConfigError(f"{self.__name__} has no '{name}'; {nearest(name, known)}")


class _Finder:
    """Answers imports: real modules where they are light, stand-ins where they are installed."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        top, _, rest = name.partition(".")
        if _is_light(name):
            return None
        if top == "r1jax" and not _file(name):
            folder = PACKAGE.joinpath(*rest.split(".")[:-1])
            known = [f.stem for f in folder.glob("[!_]*") if f.suffix == ".py" or f.is_dir()]
            raise ConfigError(f"no module {name}; {nearest(name.rpartition('.')[2], known)}")
        if top == "r1jax" or isinstance(sys.modules.get(top), _StandIn):
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        finders = [f for f in sys.meta_path if f is not self and hasattr(f, "find_spec")]
        spec = next(filter(None, (f.find_spec(name, path, target) for f in finders)), None)
        if spec is None:
            return None
        places = [spec.origin or "", *(spec.submodule_search_locations or [])]
        if top in _SLOW or any(part in _INSTALLED for p in places for part in Path(p).parts):
            return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        pass


@cache
def _is_light(module: str) -> bool:
    """Whether importing a module takes no more than the standard library and numpy."""
    found, left = set(), {module}
    while left:
        name = left.pop()
        found.add(name)
        top = name.partition(".")[0]
        if top == "r1jax" and _file(name):
            left |= _imported(name) - found
        elif top not in sys.stdlib_module_names and top not in ("numpy", "__main__"):
            return False
    return True


@cache
def _imported(module: str) -> set[str]:
    """The modules that importing a module of r1jax imports, its package among them."""
    needed = {module.rpartition(".")[0] or module}
    for node in _names(module).values():
        match node:
            case ast.Import(names=names):
                needed |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(source), names=names):
                inside = {f"{source}.{alias.name}" for alias in names}
                needed |= {source, *(name for name in inside if _file(name))}
    return needed


@contextmanager
def stand_ins() -> Iterator[None]:
    """While inside, imports give stand-ins; afterwards no trace of them is left.

    Real are the standard library, numpy, those parts of r1jax that need nothing else, and modules
    that are not installed but lie beside the config (they are forgotten afterwards: they hold
    stand-ins). Modules that were imported before are put aside, so that the answer does not
    depend on them.
    """
    hidden = _take_slow_modules()
    finder: Any = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        _take_slow_modules()
        sys.modules.update(hidden)
        for name, module in hidden.items():
            parent, _, child = name.rpartition(".")
            if _is_light(parent):
                setattr(sys.modules[parent], child, module)


def _take_slow_modules() -> dict[str, ModuleType]:
    """Takes all that is not light out of `sys.modules` and out of the packages that stay there."""
    names = [name for name in sys.modules if not _is_light(name)]
    taken = {name: sys.modules.pop(name) for name in names}
    for name, module in taken.items():
        parent, _, child = name.rpartition(".")
        held = vars(sys.modules[parent]) if parent in sys.modules else {}
        if held.get(child) is module:
            del held[child]
    return taken
