"""How the tensors of a Hugging Face folder become arrays: in pieces, and without memory beside."""

import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import bench_load, settings, sharding
from r1jax.models import hf, hf_arrays, hf_names

GOLDEN = Path(__file__).parent / "golden" / "models"


def split_mesh() -> jax.sharding.Mesh:
    return sharding.make_mesh(settings.Mesh(data=1, fsdp=2, tensor=2))


@pytest.mark.parametrize("split", [False, True])
def test_it_does_not_matter_in_what_pieces_a_folder_is_read(
    split: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh = split_mesh() if split else None
    _, expected = hf.load(GOLDEN / "deepseek_v3", mesh=mesh)
    monkeypatch.setattr(hf, "PIECE", 3 * 32)  # three rows of most tensors
    monkeypatch.setattr(hf_arrays, "TILE", (2, 2 * 2 * 5))
    _, found = hf.load(GOLDEN / "deepseek_v3", mesh=mesh)
    chex.assert_trees_all_equal(found, expected)


def test_weights_are_the_same_where_they_are_sent_to_a_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mesh = split_mesh()
    _, expected = hf.load(GOLDEN / "qwen2", mesh=mesh)
    monkeypatch.setattr(hf_arrays, "on_host", lambda device: False)
    monkeypatch.setattr(hf, "PIECE", 48 * 32)
    _, sent = hf.load(GOLDEN / "qwen2", mesh=mesh)
    chex.assert_trees_all_equal(sent, expected)
    assert jax.tree.map(lambda w: w.sharding, sent) == jax.tree.map(lambda w: w.sharding, expected)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (2, 0, 1), (1, 2, 0), (2, 1, 0)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_a_copy_is_numpys_whatever_the_strides(order: tuple[int, int, int], dtype) -> None:
    source = np.random.default_rng(0).normal(size=(3, 150, 200)).astype(jnp.bfloat16)
    block = source[:, :140, 3:].transpose(order)
    out = np.zeros([n + 2 for n in block.shape], dtype)
    hf_arrays.copy(out[1:-1, 1:-1, 1:-1], block)
    np.testing.assert_array_equal(out, np.pad(block.astype(dtype), 1))


def test_loaded_arrays_may_be_donated() -> None:
    _, params = hf.load(GOLDEN / "qwen3", dtype=jnp.float32)
    _, expected = hf.load(GOLDEN / "qwen3", dtype=jnp.float32)
    doubled = jax.jit(lambda tree: jax.tree.map(lambda x: 2 * x, tree), donate_argnums=0)(params)
    assert all(x.is_deleted() for x in jax.tree.leaves(params))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 2 * y), doubled, expected)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_loading_needs_no_more_memory_than_the_arrays_and_a_few_pieces(tmp_path: Path) -> None:
    cfg = settings.dense(
        vocab_size=8192,
        dim=512,
        num_layers=12,
        num_heads=8,
        num_kv_heads=2,
        mlp_dim=2048,
        bias=False,
        qk_norm=True,
    )
    bench_load.write_random(tmp_path / "model", cfg)
    taken = bench_load.load(tmp_path / "model")
    assert taken.arrays > 90e6
    largest = 8192 * 512 * 2
    # Some pieces of 16 MB, a thread's own tiles, and what the test's process does beside.
    assert taken.extra < largest + 48 * 2**20


def test_pieces_of_a_place_hold_each_number_of_it_once() -> None:
    place = hf_names.Place(
        name="x",
        shape=(4 * 2 * 8, 5),
        path=("x",),
        split=(1, 4, 2, 8, 5),
        order=(0, 4, 1, 2, 3),
        at=(2, 0, 0, 3, 0),
    )
    array = np.arange(64 * 5).reshape(place.shape)
    weight = np.full((3, 5, 4, 6, 8), -1)
    pieces = list(hf_names.pieces(place, 2 * 2 * 8 * 5))
    assert [(piece.shape, first) for piece, first in pieces] == [((32, 5), 0), ((32, 5), 32)]
    for piece, first in pieces:
        there = tuple(slice(i, i + n) for i, n in zip(piece.at, piece.block, strict=True))
        weight[there] = piece.view(array[first : first + len(array) // 2])
    whole = np.full_like(weight, -1)
    whole[2:3, :, :, 3:5] = place.view(array)
    np.testing.assert_array_equal(weight, whole)
