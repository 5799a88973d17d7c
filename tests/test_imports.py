"""The order of the code: which module may import which, read from the source."""

import ast
import graphlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABOVE = "(all above)"

# From the bottom of the code to its top. A row imports `settings`, itself, and what stands beside
# it; those are rows above it. Modules about the same thing share a line.
ROWS = {
    "schedules": "",
    "architecture": "",
    "settings": "architecture schedules",
    "types": "",
    "host": "",
    "stopping": "",
    "deferred": "schedules",
    "fields": "deferred",
    "tensorboard": "",
    "metrics": "tensorboard",
    "progress": "",
    "config": "deferred fields metrics",
    "sharding": "types",
    "kernels": "types",
    "algos": "types",
    "rewards": "schedules",
    "data": "rewards",
    "manifest": "fields metrics",
    "monitors": "",
    "models": "types config sharding kernels",
    "checkpoint": "types sharding",
    "state": "types sharding checkpoint",
    "rollout": "types sharding kernels models",
    "local": "types sharding models rollout data.tokenizer",
    # Loops are handed their algorithms, rewards and tasks: they know none by name.
    "loops": "types schedules sharding kernels data.packing data.labelled data.sources "
    "data.tokenizer metrics progress monitors models checkpoint state rollout",
    "reuse": "fields metrics manifest",
    "parameters": ABOVE,
    "restore": ABOVE,
    "search": ABOVE,
    "reward_model": ABOVE,
    "dataset": ABOVE,
    "comparison": ABOVE,
    "evaluate": ABOVE,
    "inputs": ABOVE,
    "preflight": ABOVE,
    "plan": ABOVE,
    "pipeline": ABOVE,
    "report": ABOVE,
    "bench": ABOVE,
    "bench_load": ABOVE,
    "generate": ABOVE,
    "convert": ABOVE,
    "train": ABOVE,
    "build": ABOVE,
}
WITHOUT_JAX = ("settings", "config", "rewards", "data")
BUILT_ON_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
SLOW = {"jax", "transformers", "tokenizers", "grain"}  # half a second and more each


@cache
def modules() -> dict[str, Path]:
    """Files of r1jax by dotted name; a package's is its `__init__.py`."""
    found = {}
    for path in sorted((ROOT / "r1jax").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> frozenset[str]:
    """Dotted names of all that a module imports, inside its functions too."""
    found = set()
    for node in ast.walk(ast.parse(modules()[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} line {node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def inner(module: str) -> set[str]:
    """Modules of r1jax that a module imports: `r1jax.a.f` is `r1jax.a` if `f` is a name in it."""
    names = {name for name in imports(module) if name.split(".")[0] == "r1jax"}
    return {name if name in modules() else name.rpartition(".")[0] for name in names} - {"r1jax"}


def outer(module: str) -> set[str]:
    return {name for name in imports(module) if name.split(".")[0] != "r1jax"}


def reached(module: str) -> set[str]:
    """A module, all that it imports, all that those import, and so on."""
    found, todo = set(), {module}
    while todo:
        found |= todo
        todo = {name for each in todo for name in inner(each)} - found
    return found


def row(module: str) -> str:
    return module.split(".")[1]


def allowed(module: str, target: str) -> bool:
    names, here = list(ROWS), row(module)
    if row(target) in (here, "settings"):
        return True
    if ROWS[here] == ABOVE:
        return names.index(row(target)) < names.index(here)
    return any(f"{target}.".startswith(f"r1jax.{name}.") for name in ROWS[here].split())


PARTS = sorted(modules().keys() - {"r1jax"})


def test_the_table_itself_only_points_up():
    for number, (name, above) in enumerate(ROWS.items()):
        if above != ABOVE:
            assert {entry.split(".")[0] for entry in above.split()} <= set(list(ROWS)[:number]), (
                name
            )


def test_every_module_has_a_row():
    assert {row(module) for module in PARTS} <= set(ROWS)


@pytest.mark.parametrize("module", PARTS)
def test_a_module_imports_only_what_its_row_allows(module: str):
    assert [target for target in sorted(inner(module)) if not allowed(module, target)] == []


def test_no_import_cycles():
    graph = graphlib.TopologicalSorter({module: inner(module) - {module} for module in PARTS})
    graph.prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("module", [module for module in PARTS if row(module) in WITHOUT_JAX])
def test_no_jax_in_rewards_data_and_config_even_through_another_module(module: str):
    found = {(each, name) for each in reached(module) for name in outer(each)}
    assert {pair for pair in found if pair[1].split(".")[0] in BUILT_ON_JAX} == set()


def test_importing_rewards_data_and_config_loads_nothing_slow():
    names = [module for module in PARTS if row(module) in WITHOUT_JAX]
    program = f"import sys, {', '.join(names)}; print(*sorted({SLOW} & set(sys.modules)))"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


@pytest.mark.parametrize("module", PARTS)
def test_no_torch_and_of_flax_only_struct_and_traverse_util(module: str):
    roots = {name.split(".")[0] for name in outer(module)}
    assert "torch" not in roots
    flax = {name for name in outer(module) if name.split(".")[0] == "flax"}
    assert {
        name for name in flax if name.split(".")[1:2] not in (["struct"], ["traverse_util"])
    } == set()


def test_no_folder_or_file_is_called_utils_common_or_helpers():
    names = {"util", "utils", "common", "helper", "helpers", "misc"}
    assert [path for path in (ROOT / "r1jax").rglob("*") if path.stem in names] == []


@pytest.mark.parametrize("module", PARTS)
def test_a_file_stays_short_enough_to_read(module: str):
    assert len(modules()[module].read_text().splitlines()) <= 600
