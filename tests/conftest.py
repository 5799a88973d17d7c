"""What every test runs under: four CPU devices, strict promotion, checked shapes, no network."""

import os
from importlib.util import find_spec
from pathlib import Path

# Before JAX and transformers are imported; the commands that tests start inherit these.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import jax
from jaxtyping import install_import_hook

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Shapes and types of every call into these are checked. Not r1jax.types: JAX rebuilds its records
# with shapes and shardings in the place of arrays.
CHECKED = ("algos", "kernels", "loops", "models", "rollout")
if find_spec("beartype"):
    install_import_hook([f"r1jax.{name}" for name in CHECKED], "beartype.beartype")
