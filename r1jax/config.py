"""Config files: ordinary Python that builds a `Run`, checked before JAX is imported.

    python -m r1jax.train --config configs/debug.py:grpo --set rl.group=16 --print-config

A config file is executed twice: by `check` with stand-ins for all slow imports (`r1jax.deferred`),
which finds mistakes and prints the run within a second, and by `load` for real.
"""

import argparse
import ast
import errno
import functools
import inspect
import json
import linecache
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn, ParamSpec, TypeVar

from r1jax import metrics, settings
from r1jax.deferred import CONFIG_MODULE, PACKAGE, ConfigError, NeedsReal, nearest, stand_ins
from r1jax.fields import by_path, describe, lines_of, override, parse_override, verify
from r1jax.settings import Run

__all__ = [
    "ConfigError",
    "arguments",
    "check",
    "describe",
    "fail",
    "is_saved",
    "load",
    "one_line_errors",
    "same_or_fail",
    "save",
    "saved",
    "variants",
]

P = ParamSpec("P")
T = TypeVar("T")

# ----------------------------------------------------------------- from a file to a run


def check(spec: str, overrides: Sequence[str] = ()) -> Run:
    """The run of `file.py:variant` with overrides `a.b=1` made: to be read, not to be started.

    Nothing slow is imported: functions of JAX, optax and of r1jax above them are stand-ins that
    know their names. A config that computes with such a thing is executed for real instead.

    Raises:
      ConfigError: whatever is wrong, in one line.
    """
    try:
        with stand_ins():
            return _build(spec, overrides)
    except NeedsReal:
        return _build(spec, overrides)


def load(spec: str, overrides: Sequence[str] = ()) -> Run:
    """The run of `file.py:variant` with true functions in it. Imports what the file imports.

    Raises:
      ConfigError: whatever is wrong, in one line; what `check` can find, before the imports.
    """
    check(spec, overrides)
    return _build(spec, overrides)


def variants(file: Path) -> list[str]:
    """The names of a config file's functions that need no argument and are annotated to return a
    `Run`."""
    with _located(file):
        body = ast.parse(file.read_bytes(), str(file)).body
    return [
        node.name
        for node in body
        if isinstance(node, ast.FunctionDef)
        and node.returns
        and re.fullmatch(r"(\w+\.)?Run", ast.unparse(node.returns))
        and not _needs_arguments(node.args)
    ]


def _needs_arguments(given: ast.arguments) -> bool:
    by_position = len(given.posonlyargs) + len(given.args)
    return by_position > len(given.defaults) or None in given.kw_defaults


def _build(spec: str, overrides: Sequence[str]) -> Run:
    file, variant = _split(spec)
    asked = [parse_override(each) for each in overrides]
    with _located(file):
        function = vars(_execute(file)).get(variant)
    if not callable(function):
        raise ConfigError(f"{file} has no variant '{variant}'; {nearest(variant, variants(file))}")
    with _located(file):
        run = function()
    if not isinstance(run, Run):
        raise ConfigError(f"{file}: {variant}() must return a Run, got {type(run).__name__}")
    if asked:
        run = override(run, asked)
    try:
        verify(run, Run)
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from None
    return run


def _split(spec: str) -> tuple[Path, str]:
    """The file and the variant of `file.py:variant`; the variant is `config` if none is named."""
    name, colon, variant = spec.rpartition(":")
    if not colon or not variant.isidentifier():
        name, variant = spec, "config"
    file = Path(name)
    if not file.is_file():
        folder = file if file.is_dir() else file.parent if file.parent.is_dir() else Path("configs")
        known = ", ".join(sorted(str(f) for f in folder.glob("*.py"))) or f"none in {folder}"
        raise ConfigError(f"no config file {name}; there are: {known}")
    return file, variant


def _execute(file: Path) -> ModuleType:
    """The module that a config file makes. A config file is the user's own program."""
    module = ModuleType(CONFIG_MODULE)
    source = file.read_bytes()
    vars(module).update(__file__=str(file), __source__=source)
    sys.modules[CONFIG_MODULE] = module  # dataclasses and pickle look modules up by name
    exec(compile(source, str(file), "exec"), vars(module))
    return module


# ----------------------------------------------------------------- errors inside the file


@contextmanager
def _located(file: Path) -> Iterator[None]:
    """Whatever the config file raises becomes one line with file and line number."""
    try:
        yield
    except SyntaxError as error:
        raise ConfigError(f"{error.filename or file}:{error.lineno}: {error.msg}") from error
    except Exception as error:  # the file is any program, so this may be anything
        # A stand-in used for what it cannot do: the real thing may well be able to.
        if not isinstance(error, ConfigError) and "'Deferred'" in str(error):
            raise NeedsReal(str(error)) from error
        lines = [line for frame, line in _frames(error) if frame.f_code.co_filename == str(file)]
        where = f"{file}:{lines[-1]}" if lines else str(file)
        raise ConfigError(f"{where}: {_explained(error)}") from error


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    """The frames an error passed through, with their lines; the last is where it was raised."""
    found, trace = [], error.__traceback__
    while trace:
        found.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return found


def _explained(error: Exception) -> str:
    """What went wrong in a config file, with the nearest names where a name is wrong."""
    message = str(error).replace(".__init__()", "()")
    frames = [frame for frame, _ in _frames(error)]
    for frame in frames:
        if frame.f_code.co_name == "__post_init__":
            return _refusal(frame.f_locals["self"], message)
    if found := re.match(r"(\w+)\(\) got an unexpected keyword .*?'(\w+)'", message):
        owner = _globals().get(found[1], vars(settings).get(found[1]))
        if inspect.isclass(owner) or inspect.isfunction(owner):
            noun = "field" if inspect.isclass(owner) else "argument"
            known = inspect.signature(owner).parameters
            return f"{found[1]} has no {noun} '{found[2]}'; {nearest(found[2], known)}"
    if isinstance(error, ModuleNotFoundError) and error.name:
        known = ["flax", "jax", "numpy", "optax", "r1jax", *sys.stdlib_module_names]
        if error.name in known:
            return f"module '{error.name}' is not installed"
        return f"no module '{error.name}'; {nearest(error.name, known)}"
    if isinstance(error, AttributeError) and error.name and error.obj is not None:
        return f"{message}; {nearest(error.name, dir(error.obj))}"
    if isinstance(error, NameError) and error.name:
        return f"{message}; {nearest(error.name, [*frames[-1].f_locals, *_globals()])}"
    if isinstance(error, TypeError | ValueError | ImportError):
        return message
    return f"{type(error).__name__}: {message}"


def _refusal(record: object, message: str) -> str:
    """Why a record's own check failed: a field of a wrong type, or else what the check says."""
    name = type(record).__name__
    try:
        verify(record, path=name)
    except ConfigError as found:
        return str(found)
    return f"{name}: {message}"


def _globals() -> dict[str, object]:
    return vars(sys.modules[CONFIG_MODULE])


# ----------------------------------------------------------------- a run's folder


def save(folder: Path, text: Sequence[str], spec: str, overrides: Sequence[str] = ()) -> None:
    """Writes what a run is made of: config.py (the file), config.json, config.txt (`text`).

    `text` is `describe` of what `check` returns. config.json holds the variant, the overrides and
    the git commit of the code, "-dirty" behind it if files were changed, null if there is none.
    """
    file, variant = _split(spec)
    folder.mkdir(parents=True, exist_ok=True)
    made = {"variant": variant, "overrides": list(overrides), "commit": _commit()}
    metrics.replace(folder / "config.py", file.read_bytes())
    metrics.replace(folder / "config.json", json.dumps(made, indent=1).encode())
    metrics.replace(folder / "config.txt", "".join(f"{line}\n" for line in text).encode())


def saved(folder: Path) -> tuple[str, list[str]]:
    """The spec and the overrides of a run's folder, for `check` and `load`.

    Raises:
      ConfigError: `folder` holds no run.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise ConfigError(f"{folder} is no run folder: it has no config.json")
    try:
        made = json.loads(file.read_bytes())
        return f"{folder / 'config.py'}:{made['variant']}", list(made["overrides"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file} is damaged: {error}") from error


def is_saved(folder: Path, text: Sequence[str]) -> bool:
    """Whether `folder` holds a run with this config text, but for the mesh."""
    file = folder / "config.txt"
    if not file.is_file():
        return False
    there = _values(lines_of(file), None, free=("mesh",))
    return there == _values(text, None, free=("mesh",))


def same_or_fail(
    folder: Path, text: Sequence[str], *, begun: Mapping[str, bool] | None = None
) -> None:
    """Passes if `folder` holds no run yet, or one of this config; mesh, price and what is kept of a
    stage may be others.

    So may be, if `begun` is given, stages that are not in it, and the passes of those that it says
    are not done.

    Raises:
      ConfigError: the first line that differs, and how many more do.
    """
    file = folder / "config.txt"
    if not file.is_file():
        return
    there, here = (_made(_values(lines, begun)) for lines in (lines_of(file), text))
    paths = [path for path in sorted(there | here) if there.get(path) != here.get(path)]
    if paths:
        path, more = paths[0], len(paths) - 1
        raise ConfigError(
            f"{folder} was made by another config: {path} is {there.get(path, 'absent')} there "
            f"and {here.get(path, 'absent')} here{f' (and {more} more)' * bool(more)}; "
            f"use --out for a new folder, and --after {folder} to keep stages that are the same"
        )


def _made(values: Mapping[str, str]) -> dict[str, str]:
    """Settings without those that only say what is kept of a stage."""
    return {
        path: value
        for path, value in values.items()
        if path.partition(".")[2].partition(".")[0] not in settings.ONLY_KEPT
    }


def _values(
    text: Sequence[str],
    begun: Mapping[str, bool] | None,
    free: Sequence[str] = ("mesh", "price"),
) -> dict[str, str]:
    """The settings by path, without those that may be others."""
    values = by_path(text)
    names = [name for name in values.get("stages", "").split(", ") if name]
    new = [name for name in names if begun is not None and name not in begun]
    if names:
        values["stages"] = ", ".join(name for name in names if name not in new)
    new += [f"{name}.passes" for name, done in (begun or {}).items() if not done]
    starts = tuple(f"{path}." for path in (*free, *new))
    return {path: value for path, value in values.items() if not f"{path}.".startswith(starts)}


def _commit() -> str | None:
    command = ["git", "-C", str(PACKAGE), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(
            [*command, "--exclude=*"], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):  # no git here; a run does not depend on it
        return None
    return done.stdout.strip() or None


# ----------------------------------------------------------------- the command line


def arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --config, --set (to `overrides`) and --print-config to a command."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:VARIANT]",
        help="a Python file with a function `config() -> Run`, or the variant's name",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="NAME=VALUE",
        help="change one setting, as in --set rl.group=16; may be given again",
    )
    parser.add_argument("--print-config", action="store_true", help="print every setting and leave")


def fail(message: str) -> NoReturn:
    """Ends the command with code 2 and one line on stderr."""
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def one_line_errors(main: Callable[P, T]) -> Callable[P, T]:
    """A command whose user's mistakes end in one line instead of a traceback.

    Those are the ValueErrors that a `raise` in r1jax makes, and files that cannot be read or
    written. A ValueError that a library makes is a programmer's: its traceback stays.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **keywords: P.kwargs) -> T:
        try:
            return main(*args, **keywords)
        except ValueError as error:
            frame, number = _frames(error)[-1]
            file = frame.f_code.co_filename
            ours = Path(file).is_relative_to(PACKAGE)
            # C code has no frame: numpy's errors seem to come from our line that calls it.
            if not ours or not linecache.getline(file, number).lstrip().startswith("raise "):
                raise
            fail(str(error))
        except KeyboardInterrupt:  # before a command catches signals itself
            print("stopped", file=sys.stderr)
            sys.exit(128 + signal.SIGINT)
        except OSError as error:
            reason = error.strerror or str(error)
            if error.errno == errno.ENOSPC:
                reason = "no space left on device"
            fail(f"{reason}: {error.filename}" if error.filename else reason)

    return wrapped
