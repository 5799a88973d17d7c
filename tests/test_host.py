"""How a command uses the machine: one CPU device per core, and none waits for another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from r1jax import host

ROOT = Path(__file__).parents[1]
OWN = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "NPROC")

DEVICES = """
from r1jax import host
host.prepare()
import jax, os
print(jax.device_count(), os.environ.get("XLA_FLAGS"))
"""

STEP = """
from r1jax import host
host.prepare()
import jax, numpy as np
from r1jax import settings, sharding
from r1jax.algos.losses import policy_loss
from r1jax.loops.step import make_logp, make_objective, make_update
from r1jax.models import decoder
from r1jax.rollout.answers import to_host
from r1jax.rollout.engine import make_engine
from r1jax.state import adamw, init_state
from r1jax.types import Batch, Prompts
cfg = settings.dense(vocab_size=16, dim=8, num_layers=1, num_heads=1, num_kv_heads=1, mlp_dim=8)
mesh = sharding.make_mesh(settings.Mesh())
put = lambda tree: sharding.put(tree, mesh, "batch")
with jax.set_mesh(mesh):
    params = sharding.init(decoder.leaves(cfg), jax.random.key(0), mesh)
    engine = settings.Engine(max_prompt=2, max_new=4, slots=4)
    prompts = Prompts(
        tokens=np.full((3, 2), 5, np.int32), length=np.full(3, 2, np.int32),
        index=np.arange(3, dtype=np.int32),
    )
    generate = jax.jit(make_engine(cfg, engine, group=2, stop=(1,)))
    rollout = to_host(generate(params, put(prompts), jax.random.key(1)))
    rows = np.zeros((4, 6), np.float32)
    batch = put(Batch(
        tokens=np.full((4, 6), 3, np.int32), position=np.tile(np.arange(6, dtype=np.int32), (4, 1)),
        segment=np.ones((4, 6), np.int32), mask=rows == 0, weight=rows + 0.04,
        num_tokens=np.float32(24), advantage=rows + 1, logp_rollout=rows - 3,
    ))
    optimizer = adamw(2, learning_rate=1e-3)
    update = make_update(make_objective(cfg, policy_loss), optimizer)
    state, _ = update(init_state(params, optimizer), [batch, batch])
    make_logp(cfg)(state.params, batch)
print(jax.device_count(), len(rollout.answer))
"""


def run(code: str, **changes: str) -> str:
    env = {name: value for name, value in os.environ.items() if name not in OWN}
    env |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **changes}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_cpu_has_a_device_for_each_core_a_power_of_two_at_the_most() -> None:
    devices, flags = run(DEVICES).split(maxsplit=1)
    cores = len(os.sched_getaffinity(0))
    assert int(devices) == max(n for n in (1, 2, 4, 8) if n <= cores)
    assert flags == "--xla_cpu_multi_thread_eigen=false"


@pytest.mark.parametrize(
    "chosen",
    [{"JAX_NUM_CPU_DEVICES": "3"}, {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=true"}],
)
def test_what_the_user_chose_stays(chosen: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OWN:
        monkeypatch.delenv(name, raising=False)
    for name, value in chosen.items():
        monkeypatch.setenv(name, value)
    host.one_device_per_core()
    assert {name: os.environ[name] for name in OWN if name in os.environ} == chosen


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_no_program_of_a_step_holds_a_collective_between_cpu_devices(tmp_path: Path) -> None:
    flags = os.environ.get("XLA_FLAGS", "").replace(host.ONE_THREAD, "")  # a command's in-process
    out = run(
        STEP,
        XLA_FLAGS=f"{flags} --xla_dump_to={tmp_path} --xla_dump_hlo_as_text",
        JAX_ENABLE_COMPILATION_CACHE="false",  # what comes from there is not dumped
    )
    devices, answers = map(int, out.split())
    assert devices > 1
    assert answers == 6  # of the three prompts, and none of those that fill up the devices
    programs = list(tmp_path.glob("*after_optimizations.txt"))
    names = " ".join(file.name for file in programs)
    assert all(name in names for name in ("jit_generate", "jit_add", "jit_apply"))
    kinds = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")
    for file in programs:
        text = file.read_text()
        assert not [kind for kind in kinds if f" {kind}(" in text], file.name
