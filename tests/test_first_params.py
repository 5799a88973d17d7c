"""What the first stage of a run begins with."""

from dataclasses import replace
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import pytest

from r1jax import config, parameters, settings, sharding
from r1jax.models import hf, hf_config

FOLDER = Path(__file__).parent / "golden" / "models" / "qwen2"


def run_with(model: settings.Decoder, weights: Path | None) -> settings.Run:
    run = config.load(str(Path(__file__).with_name("small_config.py")))
    return replace(run, model=model, weights=None if weights is None else str(weights))


def test_a_run_begins_with_the_weights_of_its_folder_in_float32() -> None:
    model = replace(hf_config.read(FOLDER / "config.json"), remat="layer", dtype="bfloat16")
    mesh = sharding.make_mesh(settings.Mesh(data=2, fsdp=2))
    found = parameters.first_params(run_with(model, FOLDER), mesh)
    _, expected = hf.load(FOLDER, dtype=jnp.float32)
    chex.assert_trees_all_equal(found, expected)
    gate = found["groups"][0]["mlp"]["gate"]
    assert gate.addressable_shards[0].data.shape == (2, 40, 16)
    random = parameters.first_params(run_with(model, None), mesh)
    assert jax.tree.structure(random) == jax.tree.structure(found)


def test_a_folder_with_another_model_is_refused() -> None:
    model = replace(hf_config.read(FOLDER / "config.json"), rope_theta=5.0)
    mesh = sharding.make_mesh(settings.Mesh())
    with pytest.raises(ValueError, match="holds another model than the run's"):
        parameters.first_params(run_with(model, FOLDER), mesh)
    with pytest.raises(ValueError, match=r"nowhere/config.json: no such file"):
        parameters.first_params(run_with(model, Path("nowhere")), mesh)
