import json
import math
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from r1jax.checkpoint import damage, load, numbers, open_checkpoints, outline
from r1jax.state import adamw, init_state
from r1jax.types import TrainState


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    if len(jax.devices()) < math.prod(shape) and jax.default_backend() != "cpu":
        pytest.skip(f"needs {math.prod(shape)} devices")
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


# --------------------------------------------------------------------------- save and restore


def small(step: int) -> TrainState:
    full = partial(jnp.full, dtype=jnp.float32)
    return TrainState(
        step=jnp.int32(step),
        params={"embed": full((40, 50), step), "groups": [{"norm": full(3, step)}]},
        opt_state=(None, {"mu": full((40, 50), -step)}),
    )


def as_bytes(x: jax.Array) -> bytes:
    keys = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if keys else x).tobytes()


def assert_same_bits(left, right):
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert (x.dtype, x.shape, x.aval.weak_type) == (y.dtype, y.shape, y.aval.weak_type)
        assert as_bytes(x) == as_bytes(y)


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "rl"
    with open_checkpoints(folder) as store:
        for step in (10, 20):
            store.save(step, small(step), {"rows": step}, {"accuracy": step / 100})
    return folder


@pytest.fixture
def folder(two_checkpoints, tmp_path) -> Path:
    return Path(shutil.copytree(two_checkpoints, tmp_path / "rl"))


def test_restoring_gives_every_bit_and_all_notes_back(tmp_path):
    bits = jax.random.bits(jax.random.key(0), (8, 16), jnp.uint32)
    state = {
        "float32": jax.lax.bitcast_convert_type(bits, jnp.float32),  # with nan, inf, subnormals
        "special": jnp.array([jnp.nan, -jnp.nan, -0.0, jnp.inf, 1e-45]),
        "bfloat16": jax.lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16),
        "int32": bits.astype(jnp.int32),
        "uint32": bits,
        "bool": bits > jnp.uint32(2**31),
        "scalar": jnp.int32(-7),
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(4, impl="rbg"), 3),
        "nothing": None,
    }
    meta = {"seed": 3, "config": "a: 1\nb: 'é'\n", "best": 0.1 + 0.2, "position": [4, 2]}
    with open_checkpoints(tmp_path) as store:
        store.save(5, state, meta, {"loss": 1 / 3})
        saved = store.restore(state)
    assert saved is not None
    assert (saved.step, saved.meta, saved.metrics) == (5, meta, {"loss": 1 / 3})
    assert_same_bits(saved.state, state)


def test_a_train_state_comes_back_as_one_on_another_mesh(tmp_path):
    before, after = mesh_of(4, 1), mesh_of(1, 2)

    def place(mesh, *axes):
        return lambda x: jax.device_put(
            x, NamedSharding(mesh, PartitionSpec(*(axes if x.ndim == 2 else ())))
        )

    state = jax.tree.map(place(before, "fsdp"), small(3))
    like = outline(jax.tree.map(place(after, None, "tensor"), small(0)))
    with open_checkpoints(tmp_path) as store:
        store.save(3, state, {})
        saved = store.restore(like)
    assert saved is not None
    assert isinstance(saved.state, TrainState)
    assert_same_bits(saved.state, state)
    jax.tree.map(lambda x, y: pytest.fail() if x.sharding != y.sharding else 0, saved.state, like)


def test_what_is_saved_is_the_state_before_it_was_donated(tmp_path):
    state = {"w": jnp.arange(1_000_000.0)}
    spoil = jax.jit(lambda x: jax.tree.map(lambda y: y * 0 - 1, x), donate_argnums=0)
    with open_checkpoints(tmp_path) as store:
        store.save(1, state, {})
        later = spoil(spoil(state))
        saved = store.restore(later)
    assert saved is not None
    np.testing.assert_array_equal(saved.state["w"], np.arange(1_000_000.0))


def test_a_resumed_run_ends_with_the_bits_of_one_never_stopped(tmp_path):
    optimizer = adamw(6, learning_rate=0.1, warmup=2, final=0.1, weight_decay=0.1)

    @partial(jax.jit, donate_argnums=0)
    def update(state: TrainState) -> TrainState:
        key = jax.random.fold_in(jax.random.key(0), state.step)
        grads = jax.tree.map(lambda w: w + jax.random.normal(key, w.shape), state.params)
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        return replace(state, step=state.step + 1, params=params, opt_state=opt_state)

    def begin() -> TrainState:
        return init_state({"w": jnp.ones((3, 5)), "norm": jnp.ones(5)}, optimizer)

    straight = begin()
    for _ in range(6):
        straight = update(straight)
    resumed = begin()
    for step in range(1, 7):
        resumed = update(resumed)
        with open_checkpoints(tmp_path) as store:
            store.save(step, resumed, {})
        with open_checkpoints(tmp_path) as store:
            saved = store.restore(begin())
        assert saved is not None
        resumed = saved.state
    assert_same_bits(resumed, straight)


def test_the_newest_stay_and_the_best_one(tmp_path):
    accuracy = {1: 0.2, 2: 0.9, 3: math.nan, 4: 0.9, 5: 0.1, 6: None, 7: 0.3}
    with open_checkpoints(tmp_path, keep=2, best="accuracy") as store:
        for step, value in accuracy.items():
            store.save(step, small(step), {}, None if value is None else {"accuracy": value})
    assert numbers(tmp_path) == [4, 6, 7]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["4", "6", "7"]
    assert load(tmp_path, "best", {"step": jnp.int32(0)}).state == {"step": 4}


def test_a_step_is_saved_once_and_a_restored_one_not_again(folder):
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with open_checkpoints(folder) as store:
        assert store.restore(small(0)) is not None
        store.save(20, small(20), {})
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_a_part_of_a_checkpoint_is_read_from_a_folder_that_a_run_writes_to(folder):
    (folder / "unfinished" / "30").mkdir(parents=True)
    like = {"params": small(0).params}
    for saved, step in ((load(folder, "last", like), 20), (load(folder, 10, like), 10)):
        assert saved.step == step and saved.meta == {"rows": step}
        assert_same_bits(saved.state, {"params": small(step).params})
    assert (folder / "unfinished" / "30").is_dir()


def test_a_checkpoint_that_does_not_exist_is_named_with_those_that_do(folder, tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint 30 in .*rl; there are: 10, 20"):
        load(folder, 30, {})
    with pytest.raises(ValueError, match=r"no checkpoint 'best' in .*rl; there are: 10, 20"):
        load(folder, "best", {})
    with pytest.raises(ValueError, match=r"no checkpoint 'last' in .*none; there are none"):
        load(tmp_path / "none", "last", {})
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        open_checkpoints(tmp_path / "none", keep=0)


def test_another_dtype_shape_or_name_is_an_error_that_names_the_array(folder):
    params = small(0).params
    wrong = {
        "params/embed is float32.40,50. in .*20, need bfloat16": {"embed": jnp.bfloat16(0)},
        r"params/embed is float32\[40,50\] in .*20, need float32\[40\]": {"embed": jnp.zeros(40)},
        "20 has no params/head, need float32": {"head": jnp.zeros((40, 50))},
    }
    with open_checkpoints(folder) as store:
        for error, change in wrong.items():
            with pytest.raises(ValueError, match=error):
                store.restore(replace(small(0), params={**params, **change}))
            with pytest.raises(ValueError, match=error):
                load(folder, "last", {"params": {**params, **change}})
        with pytest.raises(ValueError, match="20 has params/groups/0/norm, which is not in the"):
            store.restore(replace(small(0), params={"embed": params["embed"]}))
    assert numbers(folder) == [10, 20]


def without_form(folder: Path, step: int) -> None:
    """Makes a checkpoint one of before forms were written."""
    path = folder / str(step)
    record = json.loads((path / "meta.json").read_text())
    del record["form"]
    (path / "meta.json").write_text(json.dumps(record))
    run = subprocess.run(["sha256sum", "meta.json"], cwd=path, capture_output=True, text=True)
    kept = [x for x in (path / "SHA256SUMS").read_text().splitlines() if "meta.json" not in x]
    lines = sorted([*kept, run.stdout.strip()], key=lambda line: line.partition("  ")[2])
    (path / "SHA256SUMS").write_text("\n".join(lines) + "\n")
    assert damage(path) is None


def test_a_checkpoint_of_another_form_is_refused_in_one_line(folder):
    without_form(folder, 20)
    line = r"20 has form 1, need 2: another version of r1jax wrote it, whose r1jax.convert .*$"
    with pytest.raises(ValueError, match=line):
        load(folder, 20, {"params": small(0).params})
    with open_checkpoints(folder) as store, pytest.raises(ValueError, match=line):
        store.restore(small(0))
    assert load(folder, 10, {"params": small(0).params}).step == 10


def test_meta_json_can_be_read_without_this_package(folder):
    record = json.loads((folder / "20" / "meta.json").read_text())
    assert record["arrays"]["params/embed"] == "float32[40,50]" and record["meta"] == {"rows": 20}
    if shutil.which("sha256sum"):
        check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
        assert subprocess.run(check, cwd=folder / "20").returncode == 0


# --------------------------------------------------------------------------- damage


def flip(file: Path, place: int = -1) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def test_a_flipped_bit_in_any_file_is_found(folder):
    rng = random.Random(0)
    checkpoint = folder / "20"
    files = [file for file in checkpoint.rglob("*") if file.is_file() and file.stat().st_size]
    assert damage(checkpoint) is None and len(files) > 5
    for file in files:
        size = file.stat().st_size
        for place in {0, size - 1, *rng.choices(range(size), k=8)}:
            flip(file, place)
            assert damage(checkpoint) is not None, (file, place)
            flip(file, place)
    assert damage(checkpoint) is None


def flip_in_the_largest(path: Path) -> None:
    flip(max(path.rglob("*"), key=lambda p: p.stat().st_size * p.is_file()), 1000)


def truncate_the_largest(path: Path) -> None:
    largest = max(path.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    os.truncate(largest, 100)


def empty(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


@pytest.mark.parametrize(
    ("harm", "why"),
    [
        (flip_in_the_largest, "arrays/state/.* does not match its sum"),
        (truncate_the_largest, "arrays/state/.* does not match its sum"),
        (lambda path: (path / "meta.json").unlink(), "meta.json is missing"),
        (lambda path: (path / "SHA256SUMS").unlink(), "SHA256SUMS is missing"),
        (lambda path: os.truncate(path / "SHA256SUMS", 0), "is not in SHA256SUMS"),
        (lambda path: (path / "extra").touch(), "extra is not in SHA256SUMS"),
        (empty, "SHA256SUMS is missing"),
    ],
)
def test_a_damaged_newest_checkpoint_is_named_in_one_line_and_the_one_before_is_used(
    folder, capfd, harm, why
):
    harm(folder / "20")
    with pytest.raises(ValueError, match=f"checkpoint 20 in {folder} is damaged .*{why}"):
        load(folder, "last", {})
    with open_checkpoints(folder) as store:
        saved = store.restore(small(0))
        assert saved is not None and saved.step == 10
        assert_same_bits(saved.state, small(10))
        store.save(20, small(20), {})  # the run goes on
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith(f"checkpoint 20 in {folder} is damaged (")
    assert err.endswith(f"); set aside as {folder / 'damaged' / '20'}; using 10\n")
    assert damage(folder / "20") is None and damage(folder / "damaged" / "20") is not None


def test_nothing_set_aside_is_lost_and_with_no_good_one_left_none_is_restored(folder, capfd):
    (folder / "damaged" / "20").mkdir(parents=True)
    for step in (10, 20):
        (folder / str(step) / "meta.json").unlink()
    with open_checkpoints(folder) as store:
        assert store.restore(small(0)) is None
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == ["10", "20", "20-2"]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all(line.endswith("; no other is left") for line in lines)


def test_a_disk_that_cannot_read_a_file_is_damage_and_a_missing_right_is_not(folder, monkeypatch):
    def refuse(error):
        def file_digest(*_):
            raise OSError(error, os.strerror(error))

        monkeypatch.setattr("hashlib.file_digest", file_digest)

    refuse(5)
    assert damage(folder / "20") == "Input/output error"
    refuse(13)
    with pytest.raises(PermissionError):
        damage(folder / "20")


# --------------------------------------------------------------------------- failures


def test_a_save_that_failed_is_told_at_the_next_one_and_at_the_end(tmp_path, capfd):
    (tmp_path / "unfinished").write_text("in the way")
    failed = rf"checkpoint 1 could not be saved in {tmp_path}: "
    store = open_checkpoints(tmp_path)
    with pytest.raises(OSError, match=failed):
        store.save(1, small(1), {})
        store.save(2, small(2), {})
    with pytest.raises(OSError, match=failed), open_checkpoints(tmp_path) as store:
        store.save(1, small(1), {})
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("may not mount a small disk")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_one_error_and_costs_no_older_checkpoint(small_disk, capfd):
    noise = {"w": jax.random.normal(jax.random.key(0), (1000, 100))}  # 0.4 MB that do not shrink
    folder = small_disk / "rl"
    store = open_checkpoints(folder)
    store.save(1, noise, {})
    store.wait()
    (small_disk / "filler").write_bytes(bytes(1_400_000))
    store.save(2, noise, {})
    with pytest.raises(OSError) as caught:
        store.save(3, noise, {})
    assert str(caught.value) == (
        f"checkpoint 2 could not be saved in {folder}: No space left on device"
    )
    assert [path.name for path in folder.iterdir()] == ["1"] and damage(folder / "1") is None
    (small_disk / "filler").unlink()
    store.save(2, noise, {})
    store.close()
    assert numbers(folder) == [1, 2] and damage(folder / "2") is None
    assert capfd.readouterr() == ("", "")


# Children are forked before JAX makes threads: its import, once, is most of the time.
KILLED_AGAIN_AND_AGAIN = """
import os, random, signal, sys, time
import jax, jax.numpy as jnp
from orbax.checkpoint import v1
from r1jax.checkpoint import open_checkpoints

def run(folder, last, restored):
    like = {"a": jnp.zeros(30_000), "b": {"c": jnp.zeros((), jnp.int32)}}
    with open_checkpoints(folder) as store:
        saved = store.restore(like)
        step = saved.step if saved else 0
        if saved:
            state = saved.state
            assert saved.meta == {"step": step} and state["b"]["c"] == step
            assert (state["a"] == step).all()
        print(step, flush=True)
        os.write(restored, b".")
        while step < last:
            step += 1
            state = jax.tree.map(lambda x: jnp.full_like(x, step), like)
            store.save(step, state, {"step": step})

rng = random.Random(0)
for attempt in range(7):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        run(sys.argv[1], 10**9 if attempt < 6 else 0, writer)
        os._exit(0)
    os.close(writer)
    if attempt < 6:
        os.read(reader, 1)
        time.sleep(0.6 * rng.random())
        os.kill(child, signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_killed_at_random_moments_a_run_goes_on_from_a_whole_checkpoint(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    steps = [int(line) for line in done.stdout.split()]
    assert done.returncode == 0 and "damaged" not in done.stderr, done.stderr
    assert len(steps) == 7 and steps == sorted(steps) and steps[-1] >= 1, steps
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        str(step) for step in numbers(tmp_path)
    )
