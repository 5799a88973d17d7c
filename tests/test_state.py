import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
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
from r1jax.state import adamw, catch_sigterm, init_state, last_learning_rate, learning_rate_at
from r1jax.types import TrainState

# --------------------------------------------------------------------------- optimizer


def test_adamw_moves_weights_by_the_papers_rule():
    lr, b1, b2, eps, decay = 0.1, 0.8, 0.9, 1e-3, 0.5
    weight, grads = np.array([1.0, -2.0]), np.array([[0.3, -0.4], [0.1, 0.2]])
    optimizer = adamw(2, learning_rate=lr, weight_decay=decay, b1=b1, b2=b2, eps=eps)
    params = {"w": jnp.asarray(weight, jnp.float32)}
    state = optimizer.init(params)
    mean = square = np.zeros(2)
    for t, grad in enumerate(grads, start=1):
        changes, state = optimizer.update({"w": jnp.asarray(grad, jnp.float32)}, state, params)
        params = jax.tree.map(jnp.add, params, changes)
        # Algorithm 2 of arXiv:1711.05101.
        mean, square = b1 * mean + (1 - b1) * grad, b2 * square + (1 - b2) * grad**2
        step = (mean / (1 - b1**t)) / (np.sqrt(square / (1 - b2**t)) + eps)
        weight = weight - lr * (step + decay * weight)
        np.testing.assert_allclose(params["w"], weight, rtol=1e-5)


def test_a_long_gradient_is_cut_to_the_norm_and_a_short_one_is_not():
    optimizer = adamw(1, learning_rate=1.0, b1=0.5, max_grad_norm=1.0)
    params = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    for length, cut in ((5.0, 1.0), (0.5, 0.5)):
        grads = {"a": jnp.array([0.6 * length]), "b": jnp.array([0.8 * length])}
        _, state = optimizer.update(grads, optimizer.init(params), params)
        mean = optax.tree_utils.tree_get(state, "mu")  # (1 - b1) of the gradient that Adam saw
        np.testing.assert_allclose([mean["a"][0], mean["b"][0]], [0.3 * cut, 0.4 * cut], rtol=1e-6)


def test_norms_and_biases_do_not_decay_even_when_stacked():
    shape = (2, 3)
    mixer = {"qkv": jnp.ones(shape), "bias": jnp.ones(shape), "q_norm": jnp.ones(shape)}
    params = {"norm": jnp.ones(3), "groups": [{"mixer_norm": jnp.ones(shape), "mixer": mixer}]}
    optimizer = adamw(1, learning_rate=0.5, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes, _ = optimizer.update(zeros, optimizer.init(params), params)
    expected = jax.tree.map(jnp.zeros_like, params)
    expected["groups"][0]["mixer"]["qkv"] = jnp.full(shape, -0.25)
    jax.tree.map(np.testing.assert_array_equal, changes, expected)


def test_the_learning_rate_rises_in_equal_parts_and_falls_along_half_a_cosine():
    rate = partial(learning_rate_at, steps=13, learning_rate=2.0, warmup=4, final=0.5)
    np.testing.assert_allclose([rate(t) for t in range(4)], [0.5, 1.0, 1.5, 2.0])
    np.testing.assert_allclose(rate(8), 1.5, rtol=1e-6)  # half-way down
    np.testing.assert_allclose([rate(4), rate(12), rate(50)], [2.0, 1.0, 1.0], rtol=1e-6)
    constant = [
        learning_rate_at(t, steps=5, learning_rate=0.3, warmup=0, final=1.0) for t in range(5)
    ]
    assert constant == [jnp.float32(0.3)] * 5


def test_the_optimizer_state_shows_the_learning_rate_it_used():
    params = {"w": jnp.ones(2)}
    optimizer = adamw(10, learning_rate=1.0, warmup=10)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for used in (0.1, 0.2, 0.3):
        _, state = update(params, state, params)
        assert last_learning_rate(state) == pytest.approx(used)
    assert last_learning_rate(optax.sgd(0.1).init(params)) is None


def test_updates_of_a_fresh_and_of_an_older_optimizer_state_are_one_program():
    params = {"w": jnp.ones(2)}
    optimizer = adamw(10, learning_rate=1.0)
    traces = []

    @jax.jit
    def update(state):
        traces.append(state)
        return optimizer.update(params, state, params)[1]

    state = optimizer.init(params)
    for _ in range(3):
        state = update(state)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"learning_rate": -1.0}, "learning_rate must be >= 0 and finite, got -1.0"),
        ({"learning_rate": math.nan}, "learning_rate must be >= 0 and finite, got nan"),
        ({"warmup": -1}, "warmup must be >= 0, got -1"),
        ({"final": 1.5}, "final must be in .* got 1.5"),
        ({"weight_decay": -0.1}, "weight_decay must be >= 0, got -0.1"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be > 0 .* got 0.0"),
    ],
)
def test_an_optimizer_setting_out_of_range_is_named(given, error):
    with pytest.raises(ValueError, match=error):
        adamw(10, **{"learning_rate": 1.0, **given})


def test_weights_too_narrow_for_adam_are_named():
    params = {"groups": [{"up": jnp.ones(2, jnp.bfloat16)}]}
    with pytest.raises(ValueError, match="needs float32 weights, groups/0/up is bfloat16"):
        adamw(1, learning_rate=1.0).init(params)


# --------------------------------------------------------------------------- train state


def mesh_of(*shape: int) -> jax.sharding.Mesh:
    if len(jax.devices()) < math.prod(shape):
        pytest.skip(f"needs {math.prod(shape)} devices")
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    return jax.sharding.Mesh(devices, ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)


def test_moments_lie_as_their_weights_and_counts_on_the_whole_mesh():
    mesh = mesh_of(2, 2)
    split = NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))
    state = init_state(
        {"w": jax.device_put(jnp.ones((4, 4)), split)}, adamw(3, learning_rate=1.0), reference=True
    )
    matrices = [x for x in jax.tree.leaves(state) if x.ndim]
    assert len(matrices) == 4 and all(x.sharding == split for x in matrices)
    scalars = [x for x in jax.tree.leaves(state) if not x.ndim]
    assert scalars and all(x.sharding == NamedSharding(mesh, PartitionSpec()) for x in scalars)


def test_the_reference_outlives_the_weights():
    state = init_state({"w": jnp.ones(3)}, adamw(3, learning_rate=1.0), reference=True)
    jax.jit(lambda x: x + 1, donate_argnums=0)(state.params["w"])
    assert state.reference is not None
    np.testing.assert_array_equal(state.reference["w"], np.ones(3))


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


def run_python(code: str, *args: object, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, args)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[1], text=True, **options)


def test_killed_at_random_moments_a_run_goes_on_from_a_whole_checkpoint(tmp_path):
    # Children are forked before JAX makes threads: its import, once, is most of the time.
    process = run_python(
        """
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
        """,
        tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )
    out, err = process.communicate(timeout=60)
    steps = [int(line) for line in out.split()]
    assert process.returncode == 0 and "damaged" not in err, err
    assert len(steps) == 7 and steps == sorted(steps) and steps[-1] >= 1, steps
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        str(step) for step in numbers(tmp_path)
    )


# --------------------------------------------------------------------------- stopping


def test_the_first_signal_asks_to_stop_and_its_echo_does_no_harm(capfd):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    for number in (signal.SIGTERM, signal.SIGINT):
        with catch_sigterm() as stopping:
            assert not stopping()
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            assert stopping()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert capfd.readouterr().err == 2 * "stopping after this step; once more to stop at once\n"


def test_a_second_signal_ends_the_process_at_once_inside_a_long_call():
    process = run_python(
        """
        import hashlib
        from r1jax.state import catch_sigterm
        with catch_sigterm(grace=0.2):
            print("ready", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, and no Python handler runs
        """,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=5)
    assert process.returncode == 128 + signal.SIGTERM
    assert err == "stopping after this step; once more to stop at once\n"


def test_outside_the_main_thread_no_signal_is_caught_and_nothing_breaks():
    answers = []

    def work():
        with catch_sigterm() as stopping:
            answers.append(stopping())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]


def test_meta_json_can_be_read_without_this_package(folder):
    record = json.loads((folder / "20" / "meta.json").read_text())
    assert record["arrays"]["params/embed"] == "float32[40,50]" and record["meta"] == {"rows": 20}
    if shutil.which("sha256sum"):
        check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
        assert subprocess.run(check, cwd=folder / "20").returncode == 0
