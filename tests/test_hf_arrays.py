"""How the tensors of a Hugging Face folder become arrays: in pieces, and without memory beside."""

import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import bench_load, settings, sharding
from r1jax.models import hf, hf_arrays, hf_names, safetensors

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


def test_a_tensor_is_read_into_memory_that_lies_apart(tmp_path: Path) -> None:
    numbers = np.arange(2 * 3 * 5, dtype=np.int16)
    (tmp_path / "file").write_bytes(b"some" + numbers.tobytes())
    entry = safetensors.Entry(
        file=tmp_path / "file", name="x", dtype=numbers.dtype, shape=(6, 5), start=4
    )
    large = np.full((3, 4, 4, 5), -1, np.int16)
    safetensors.read_into(entry, large[1:2, 1:3, :3])
    expected = np.full_like(large, -1)
    expected[1, 1:3, :3] = numbers.reshape(2, 3, 5)
    np.testing.assert_array_equal(large, expected)
    (tmp_path / "file").write_bytes(b"some" + numbers.tobytes()[:-1])
    with pytest.raises(ValueError, match="file: truncated: tensor x is not all there"):
        safetensors.read_into(entry, large[1:2, 1:3, :3])


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
        block=(1, 4, 2, 8, 5),
        at=(2, 0, 3, 0, 0),
    )
    array = np.arange(64 * 5).reshape(place.shape)
    weight = np.full((3, 4, 6, 8, 5), -1)
    pieces = list(hf_names.pieces(place, 2 * 2 * 8 * 5))
    assert [(piece.shape, first) for piece, first in pieces] == [((32, 5), 0), ((32, 5), 32)]
    for piece, first in pieces:
        there = tuple(slice(i, i + n) for i, n in zip(piece.at, piece.block, strict=True))
        weight[there] = array[first : first + len(array) // 2].reshape(piece.block)
    whole = np.full_like(weight, -1)
    whole[2:3, :, 3:5] = array.reshape(place.block)
    np.testing.assert_array_equal(weight, whole)
