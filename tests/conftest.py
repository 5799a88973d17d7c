"""What every test runs under: four CPU devices, strict promotion, checked shapes, no network."""

import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# Before JAX and transformers are imported; the commands that tests start inherit these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")
)
# To keep a small program, and to look for it, takes as long as to compile it.
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# Most of the time of a first run is the compiler's: it optimises little here and, where JAX 0.10
# has them, uses its older emitters of loops, which take half as long (later XLA ends at a flag it
# does not know). With JAX_DISABLE_MOST_OPTIMIZATIONS=0 all is compiled as a user's run is: .ci/run
# does that with the files in which the order of a sum could count.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jaxlib").startswith("0.10."):
    # One part at a time: as many processes run as there are cores.
    faster = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {faster}".strip()
# Operations do not say from which line they are: nobody reads that here, and it takes time.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
os.environ.setdefault("NPROC", "8")  # threads of XLA's pool: more than devices, see r1jax.host
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

from r1jax.types import Rollout

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes and types of every call into these are checked. Not r1jax.types: JAX rebuilds its records
# with shapes and shardings in the place of arrays.
CHECKED = ("algos", "kernels", "loops", "models", "rollout")
if find_spec("beartype"):
    install_import_hook([f"r1jax.{name}" for name in CHECKED], "beartype.beartype")


# Of files of which some tests take most of a minute.
LONG = ("test_gsm8k_run.py", "test_pipeline.py", "test_train.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: at the end no process waits for another's."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """What has been imported stays: the collector of garbage need not look through it again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


@dataclass
class Process:
    """A train command that runs, and what it has said so far."""

    pid: int
    stdout_file: Path
    stderr_file: Path
    ask: Callable[[dict], int | None]
    returncode: int | None = field(default=None, init=False)

    @property
    def stdout(self) -> str:
        return self.stdout_file.read_text()

    @property
    def stderr(self) -> str:
        return self.stderr_file.read_text()

    def wait(self, seconds: float = 300.0) -> int | None:
        """Its exit code; None if it still runs after so many seconds."""
        if self.returncode is None:
            self.returncode = self.ask({"wait": self.pid, "seconds": seconds})
        return self.returncode

    def signal(self, number: int) -> None:
        if self.wait(0.0) is None:
            os.kill(self.pid, number)


Train = Callable[..., Process]


@pytest.fixture(scope="session")
def start_train(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """`start_train(*arguments)`: the train command with these arguments, begun from the project's
    folder in a process of its own (`train_server.py`); `kill` is (part, number) as there."""
    folder = tmp_path_factory.mktemp("commands")
    root = Path(__file__).parents[1]
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)}
    env["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # they run the same small programs
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("train_server.py"))],
        env=env,
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin and server.stdout
        to, of = server.stdin, server.stdout

        def ask(what: dict) -> int | None:
            print(json.dumps(what), file=to, flush=True)
            return json.loads(of.readline())

        def start(*arguments: object, kill: tuple[str, int] | None = None) -> Process:
            name = str(time.monotonic_ns())
            files = {stream: folder / f"{name}.{stream}" for stream in ("stdout", "stderr")}
            words = list(map(str, arguments))
            pid = ask({"arguments": words, "kill": kill} | {k: str(f) for k, f in files.items()})
            assert pid is not None
            return Process(pid, files["stdout"], files["stderr"], ask)

        yield start
        to.close()


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`made_once(name, make)`: the folder that `make` was called with, by one of the processes that
    share these tests; the others wait for it. Nobody may change what is in it."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        with (root / f"{name}.lock").open("a+") as done:
            fcntl.flock(done, fcntl.LOCK_EX)
            if not os.fstat(done.fileno()).st_size:
                shutil.rmtree(root / name, ignore_errors=True)  # of one who failed to make it
                make(root / name)
                done.write("done")
        return root / name

    return folder


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder as training leaves it: `base` saved at step 1, `rl` at 3, random weights."""
    from r1jax import checkpoint, config, sharding
    from r1jax.models import decoder

    spec = str(Path(__file__).with_name("small_config.py"))
    folder = tmp_path_factory.mktemp("runs") / "small"
    run = config.load(spec)
    config.save(folder, config.describe(config.check(spec)), spec)
    mesh = sharding.make_mesh(run.mesh)
    for stage, step in (("base", 1), ("rl", 3)):
        params = sharding.init(decoder.leaves(run.model), jax.random.key(step), mesh)
        with checkpoint.open_checkpoints(folder / "checkpoints" / stage) as store:
            store.save(step, {"params": params, "more": params["embed"]}, {})
    return folder


@pytest.fixture
def two_pairs() -> Rollout:
    """Two answers to each of two prompts, of 2, 1 and 1, 2 tokens; one of each pair is right."""
    length = np.asarray([2, 1, 1, 2], np.int32)
    past = np.arange(2)[None] >= length[:, None]
    return Rollout(
        prompt=np.asarray([[3, 4], [5, 0]], np.int32),
        prompt_length=np.asarray([2, 1], np.int32),
        answer=np.where(past, 0, [[6, 1], [1, 0], [1, 0], [7, 1]]).astype(np.int32),
        answer_length=length,
        finished=np.ones(4, bool),
        logp_rollout=np.where(past, 0, -2.0).astype(np.float32),
        decode_steps=np.int32(0),
        slot_steps=np.int32(0),
        reward=np.asarray([1, 0, 0, 1], np.float32),
    )


# What is said of a backend that this machine lacks; anything else is a fault of the backend.
LACKING = ("needs Linux", "not installed", "bwrap: ", "no landlock", "no table of system calls")


@pytest.fixture(scope="module", params=["bubblewrap", "landlock"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """A way to confine programs that works on this machine; no sandbox is left at the end."""
    from r1jax.rewards import code
    from r1jax.rewards.sandbox.programs import SandboxError
    from r1jax.rewards.sandbox.start import start

    try:
        start(request.param).close()
    except SandboxError as error:
        if not any(reason in str(error) for reason in LACKING):
            raise
        pytest.skip(f"{request.param} cannot work here: {error}")
    yield request.param
    code.close_idle()
