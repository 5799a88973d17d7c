"""Locks, dependencies, the Makefile's set-up, and what conftest.py switches on."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
ACCELERATORS = ("cpu", "cuda", "tpu")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def lock_text(accel: str) -> str:
    return (ROOT / "launch" / "locks" / f"{accel}.lock").read_text()


def entries(accel: str) -> list[str]:
    """A lock's entries, each with its hashes on one line."""
    return lock_text(accel).replace("\\\n", "").splitlines()


def pins(accel: str, python: str = "3.11") -> dict[str, str]:
    """Versions by name of what a lock installs on Linux, on x86-64, with this Python."""
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.0",
        "sys_platform": "linux",
        "platform_machine": "x86_64",
    }
    found = {}
    for entry in entries(accel):
        requirement = Requirement(entry.split(" --hash=")[0])
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.name not in found
            found[requirement.name] = str(requirement.specifier).removeprefix("==")
    return found


@pytest.mark.parametrize("accel", ACCELERATORS)
def test_every_entry_of_a_lock_is_one_version_with_hashes(accel: str):
    for entry in entries(accel):
        assert re.fullmatch(
            r"[a-z0-9.-]+==[\w.]+( ;.*?)?\s+(--hash=sha256:[0-9a-f]{64}\s*)+", entry
        )


@pytest.mark.parametrize("accel", ACCELERATORS)
def test_a_lock_names_no_index_and_no_address(accel: str):
    assert "://" not in lock_text(accel)
    assert set(re.findall(r"--[a-z-]+", lock_text(accel))) == {"--hash"}


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_locks_agree_and_differ_only_in_the_accelerator(python: str):
    cpu, cuda, tpu = (pins(accel, python) for accel in ACCELERATORS)
    assert cpu.items() <= cuda.items()
    assert cpu.items() <= tpu.items()
    assert {"jax-triton", "triton"} <= cuda.keys() - tpu.keys() - cpu.keys()
    assert "libtpu" in tpu.keys() - cuda.keys() - cpu.keys()
    assert "torch" not in cuda.keys() | tpu.keys()


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13"])
def test_the_lock_holds_what_pyproject_asks_for(python: str):
    asked = PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]
    held = pins("cpu", python)
    for requirement in map(Requirement, asked):
        assert held[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_every_package_that_r1jax_imports_is_a_declared_dependency():
    imported = set()
    for path in (ROOT / "r1jax").rglob("*.py"):
        imported |= set(re.findall(r"^ *(?:import|from) (\w+)", path.read_text(), re.MULTILINE))
    imported -= set(sys.stdlib_module_names) | {"r1jax"}
    optional = PROJECT["project"]["optional-dependencies"].values()
    lists = [PROJECT["project"]["dependencies"], *optional]
    declared = {canonicalize_name(Requirement(each).name) for names in lists for each in names}
    sources = packages_distributions()
    for name in imported:
        known = {canonicalize_name(each) for each in sources.get(name, [name.replace("_", "-")])}
        assert known & declared, name


def make(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make in a folder, as if from a fresh shell: not as a part of `make test`."""
    outside = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "PYTHON", "ACCEL"}
    environment = {name: value for name, value in os.environ.items() if name not in outside}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with a Makefile and locks, without .venv; its set-up only leaves a mark."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "launch" / "locks", tmp_path / "launch" / "locks")
    setup = tmp_path / "launch" / "setup.sh"
    setup.write_text("#!/bin/sh\nmkdir .venv\n")
    setup.chmod(0o755)
    return tmp_path


@pytest.fixture
def old_python(tmp_path: Path) -> str:
    """An interpreter that takes itself for Python 3.9."""
    path = tmp_path / "python3.9"
    path.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 9, 18); $2"\n'
    )
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("target", ["setup", "train", "test"])
def test_a_python_below_3_11_gets_one_line_that_says_so(checkout, old_python, target):
    run = make(checkout, target, f"PYTHON={old_python}")
    assert run.returncode != 0
    assert run.stdout == ""
    assert len(run.stderr.splitlines()) == 1
    assert "needs Python 3.11 or newer" in run.stderr
    assert old_python in run.stderr
    assert not (checkout / ".venv").exists()


def test_setup_takes_the_first_python_that_is_new_enough(checkout, old_python):
    run = make(checkout, "--dry-run", "setup", f"PYTHON={old_python} {sys.executable} no-such")
    interpreter = os.path.realpath(sys._base_executable)
    assert run.stdout.split() == ["launch/setup.sh", "cpu", interpreter]


def test_setup_does_nothing_where_venv_is_what_the_lock_says(checkout):
    venv = checkout / ".venv"
    venv.mkdir()
    (venv / "accel").write_text("cuda\n")
    shutil.copy(ROOT / "launch" / "locks" / "cuda.lock", venv / "installed.lock")
    assert make(checkout, "--dry-run", "setup").stdout.split() == [":"]
    assert "setup.sh cpu" in make(checkout, "--dry-run", "setup", "ACCEL=cpu").stdout
    with (checkout / "launch" / "locks" / "cuda.lock").open("a") as lock:
        lock.write("another==1.0\n")
    assert "setup.sh cuda" in make(checkout, "--dry-run", "setup").stdout


def test_an_unknown_accelerator_gets_one_line_that_lists_the_known_ones(checkout):
    run = make(checkout, "setup", "ACCEL=gpu")
    assert run.returncode != 0
    assert len(run.stderr.splitlines()) == 1
    assert "cpu, cuda or tpu, not 'gpu'" in run.stderr


def test_tests_run_on_four_devices_under_strict_promotion():
    assert jax.device_count() == 4
    with pytest.raises(ValueError, match="rank"):
        jnp.ones(3) + jnp.ones((2, 3))
    with pytest.raises(ValueError, match="promotion"):
        jnp.ones(3) + jnp.ones(3, dtype=int)
