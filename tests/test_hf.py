"""Hugging Face folders: what is read, what is written again, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from r1jax import convert, settings, sharding
from r1jax.data.tokenizer import tiny
from r1jax.models import decoder, hf, hf_config, hf_names, safetensors
from r1jax.models.zoo import MODELS

GOLDEN = Path(__file__).parent / "golden" / "models"
FAMILIES = sorted(path.name for path in GOLDEN.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a golden model, to be damaged."""
    return Path(shutil.copytree(GOLDEN / "llama3", tmp_path / "llama3"))


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Dtype, shape and bytes of each tensor of a folder, by the format's own package."""
    out = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118
                piece = opened.get_slice(name)
                array = np.ascontiguousarray(opened.get_tensor(name))
                out[name] = (piece.get_dtype(), tuple(piece.get_shape()), array.tobytes())
    return out


def device_mesh(**axes: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(settings.Mesh(**{"data": 1, **axes}))


# --------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_loaded_and_saved_is_the_same_bit_for_bit(family: str, tmp_path: Path) -> None:
    cfg, params = hf.load(GOLDEN / family)
    hf.save(tmp_path / "saved", cfg, params, shard=20_000)
    assert contents(tmp_path / "saved") == contents(GOLDEN / family)
    again, _ = hf.load(tmp_path / "saved")
    assert again == cfg
    index = json.loads((tmp_path / "saved" / hf.INDEX).read_text())
    files = {path.name for path in (tmp_path / "saved").glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files
    assert index["weight_map"].keys() == contents(GOLDEN / family).keys()
    for file in files:
        assert sum(x.nbytes for x in load_all(tmp_path / "saved" / file)) <= 20_000


def load_all(file: Path) -> list[np.ndarray]:
    return list(load_file(file).values())


def test_loaded_weights_do_not_change_with_the_file(tmp_path: Path) -> None:
    cfg, params = hf.load(GOLDEN / "mistral")
    hf.save(tmp_path / "saved", cfg, params)
    _, loaded = hf.load(tmp_path / "saved")
    with (tmp_path / "saved" / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))  # in place: a memory map of it shows zeros from now on
    chex.assert_trees_all_equal(loaded, params)


def test_a_small_model_is_one_file_without_an_index(tmp_path: Path) -> None:
    cfg, params = hf.load(GOLDEN / "qwen3")
    hf.save(tmp_path / "saved", cfg, params, tiny(numbers=20))
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors"} <= names
    assert {"tokenizer.json", "tokenizer_config.json"} <= names
    assert hf.INDEX not in names
    generation = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": 1, "pad_token_id": 0}
    hf.load(tmp_path / "saved")


@pytest.mark.parametrize("family", ["qwen2", "deepseek_v3"])
def test_a_mesh_holds_the_same_weights_split_as_the_rules_say(family: str, tmp_path: Path) -> None:
    mesh = device_mesh(fsdp=2, tensor=2)
    cfg, whole = hf.load(GOLDEN / family, dtype=jnp.float32)
    _, split = hf.load(GOLDEN / family, dtype=jnp.float32, mesh=mesh)
    chex.assert_trees_all_equal(split, whole)
    places = sharding.shardings(decoder.leaves(cfg), mesh)
    assert jax.tree.map(lambda w: w.sharding, split) == places
    mlp = split["groups"][0]["mlp"]["gate"]
    assert mlp.addressable_shards[0].data.shape == (mlp.shape[0], 20, 16)
    hf.save(tmp_path / "split", cfg, split)
    hf.save(tmp_path / "whole", cfg, whole)
    assert contents(tmp_path / "split") == contents(tmp_path / "whole")


def test_a_chosen_dtype_is_that_of_all_weights_but_the_routers_bias() -> None:
    _, params = hf.load(GOLDEN / "deepseek_v3", dtype=jnp.float16)
    found = {
        jax.tree_util.keystr(path, simple=True, separator="/"): weight.dtype
        for path, weight in jax.tree_util.tree_leaves_with_path(params)
    }
    biases = {name for name in found if name.endswith("router_bias")}
    assert biases == {"groups/1/mlp/router_bias", "mtp/layer/mlp/router_bias"}
    assert {found[name] for name in biases} == {np.dtype(np.float32)}
    assert {found[name] for name in found.keys() - biases} == {np.dtype(np.float16)}


@pytest.mark.parametrize("name", MODELS)
def test_the_config_of_a_known_model_is_read_back_as_it_was_written(name: str, tmp_path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(hf_config.to_json(MODELS[name], dtype="bfloat16")))
    assert hf_config.read(file) == MODELS[name]


@pytest.mark.parametrize("family", ["qwen2", "qwen2_yarn", "llama3", "deepseek_v3"])
def test_the_older_form_of_a_config_says_the_same(family: str, tmp_path: Path) -> None:
    config = json.loads((GOLDEN / family / "config.json").read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    config["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = hf_config.read(GOLDEN / family / "config.json")
    assert hf_config.read(tmp_path / "config.json") == expected


def test_the_published_config_of_llama_3_1_8b_is_the_known_model(tmp_path: Path) -> None:
    published = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
    }
    (tmp_path / "config.json").write_text(json.dumps(published))
    assert hf_config.read(tmp_path / "config.json") == MODELS["llama-3.1-8b"]


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # Billions, as their publishers give them.
        ("qwen2.5-0.5b", 0.49, 0.49),
        ("qwen2.5-1.5b", 1.54, 1.54),
        ("qwen2.5-7b", 7.6, 7.6),
        ("qwen2.5-32b", 32.8, 32.8),
        ("qwen3-30b-a3b", 30.5, 3.3),
        ("llama-3.1-8b", 8.0, 8.0),
        ("llama-3.3-70b", 70.6, 70.6),
        ("deepseek-v3-671b", 671.0, 37.0),
    ],
)
def test_a_known_model_has_as_many_weights_as_published(
    name: str, total: float, active: float
) -> None:
    count = decoder.count_weights(MODELS[name])
    assert count.total / 1e9 == pytest.approx(total, rel=0.01)
    assert count.active / 1e9 == pytest.approx(active, rel=0.02)


# --------------------------------------------------------------------------- FP8


def test_blocks_of_fp8_are_multiplied_by_their_scales() -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(200, 300)).astype(jnp.float8_e4m3fn)
    scale = rng.uniform(0.5, 2, (2, 3)).astype(np.float32)
    found = hf.dequantize(weight, scale)
    assert found.dtype == jnp.bfloat16
    for first, last in ((0, 128), (100, 130), (128, 200), (140, 150)):
        some = hf.dequantize(weight[first:last], scale, first)
        np.testing.assert_array_equal(some, found[first:last])
    for i, j in ((0, 0), (127, 127), (128, 127), (127, 128), (199, 299), (130, 260)):
        exact = np.float32(weight[i, j]) * scale[i // 128, j // 128]
        assert found[i, j] == exact.astype(jnp.bfloat16)


def test_a_folder_with_fp8_weights_loads_as_bfloat16(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "deepseek_v3", tmp_path / "fp8"))
    name = "model.layers.0.self_attn.o_proj.weight"
    file = next(f for f in folder.glob("model*.safetensors") if name in safetensors.entries(f))
    reader, found = safetensors.Reader(), safetensors.entries(file)
    tensors = {key: reader(entry).copy() for key, entry in found.items()}
    plain = tensors[name].astype(np.float32)
    scale = np.full((1, 1), np.abs(plain).max() / 448, np.float32)
    tensors[name] = (plain / scale).astype(jnp.float8_e4m3fn)
    tensors[name + "_scale_inv"] = scale
    rewrite(folder, file, tensors)
    cfg, params = hf.load(folder)
    weight = params["groups"][0]["mixer"]["out"]
    assert weight.dtype == jnp.bfloat16
    want = (tensors[name].astype(np.float32) * scale).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(weight[0]).reshape(cfg.dim, -1), want)
    assert np.abs(want.astype(np.float32) - plain).max() < 0.04 * np.abs(plain).max()


def rewrite(folder: Path, file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Puts other tensors into a file of a folder, and into its index."""
    index = json.loads((folder / hf.INDEX).read_text())
    kept = {name: its for name, its in index["weight_map"].items() if its != file.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, file.name)
    (folder / hf.INDEX).write_text(json.dumps(index))
    kinds = {name: (array.dtype, array.shape) for name, array in tensors.items()}
    safetensors.write(file, kinds, tensors.values())


# --------------------------------------------------------------------------- refused


def config_with(**changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def tensors_with(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "model-00001-of-00002.safetensors"
        reader, found = safetensors.Reader(), safetensors.entries(file)
        tensors = {name: reader(entry).copy() for name, entry in found.items()}
        change(tensors)
        rewrite(folder, file, tensors)

    return apply


def truncate(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:50])


def large_tokenizer(folder: Path) -> None:
    vocabulary = {f"t{i}": i for i in range(65)}
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}}))


EMBED = "model.embed_tokens.weight"
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROPE = {"rope_theta": 1e4, "rope_type": "longrope"}
BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "missing shard": (
        lambda f: (f / "model-00002-of-00002.safetensors").unlink(),
        ["model-00002-of-00002.safetensors", "missing", "model."],
    ),
    "no weights": (
        lambda f: [file.unlink() for file in f.glob("model*")],
        ["llama3", "model.safetensors"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json", "no such file"]),
    "config is no JSON": (
        lambda f: (f / "config.json").write_text("{"),
        ["config.json", "cannot be read"],
    ),
    "missing tensor": (tensors_with(lambda t: t.pop(EMBED)), [EMBED, "in none of its files"]),
    "index puts a tensor where it is not": (
        lambda f: (f / hf.INDEX).write_text(
            (f / hf.INDEX).read_text().replace('"lm_head.weight"', '"lm_head.wrong"')
        ),
        ["lm_head"],
    ),
    "extra tensor": (
        tensors_with(lambda t: t.update({"model.extra": np.zeros(3, np.float32)})),
        ["model-00001-of-00002.safetensors", "model.extra", "no part"],
    ),
    "wrong shape": (
        tensors_with(lambda t: t.update({EMBED: t[EMBED][:, :30].copy()})),
        ["model-00001-of-00002.safetensors", EMBED, "[64, 30]", "[64, 32]"],
    ),
    "whole numbers": (
        tensors_with(lambda t: t.update({EMBED: t[EMBED].astype(np.int32)})),
        ["model-00001-of-00002.safetensors", EMBED, "int32"],
    ),
    "FP8 without scales": (
        tensors_with(lambda t: t.update({EMBED: t[EMBED].astype(jnp.float8_e4m3fn)})),
        [EMBED, "_scale_inv", "missing"],
    ),
    "truncated file": (truncate, ["model-00002-of-00002.safetensors", "truncated", "tensor model"]),
    "truncated header": (cut_header, ["model-00002-of-00002.safetensors", "truncated"]),
    "unsupported family": (config_with(model_type="gpt2"), ["config.json", "'gpt2'", "llama"]),
    "no family": (config_with(model_type=None), ["config.json", "model_type None"]),
    "unknown rope": (
        config_with(rope_parameters=ROPE),
        ["config.json", "unknown rope type 'longrope'", "yarn"],
    ),
    "no size": (config_with(hidden_size=None), ["config.json", "hidden_size is missing"]),
    "a size that is no number": (
        config_with(vocab_size="64"),
        ["config.json", "vocab_size must be int, got '64'"],
    ),
    "a family that is no text": (
        config_with(model_type=["llama"]),
        ["config.json", "unsupported model_type ['llama']"],
    ),
    "rope that would divide by 0": (
        config_with(rope_parameters={**LLAMA3, "high_freq_factor": 1.0}),
        ["config.json", "low_freq_factor < high_freq_factor"],
    ),
    "another quantisation": (
        config_with(quantization_config={"quant_method": "awq", "bits": 4}),
        ["config.json", "quantization_config.quant_method 'awq' is not supported"],
    ),
    "another activation": (config_with(hidden_act="gelu"), ["config.json", "hidden_act 'gelu'"]),
    "bias": (config_with(attention_bias=True), ["config.json", "attention_bias True"]),
    "sliding window": (
        config_with(model_type="mistral", sliding_window=32),
        ["config.json", "sliding_window 32"],
    ),
    "heads that do not divide": (
        config_with(num_key_value_heads=3),
        ["config.json", "num_heads must be a multiple"],
    ),
    "large tokenizer": (large_tokenizer, ["tokenizer.json", "65 tokens", EMBED, "64 rows"]),
    "mixed dtypes": (
        tensors_with(
            lambda t: t.update(
                {name: t[name].astype(np.float32) for name in t if "layers.0.mlp" in name}
            )
        ),
        ["layers.1.mlp", "choose a dtype"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_gets_one_line_before_any_device_memory_is_taken(
    name: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damage, words = BAD[name]
    damage(folder)
    before = {id(array) for array in jax.live_arrays()}

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("an array was made")

    monkeypatch.setattr(jax, "device_put", fail)
    monkeypatch.setattr(jnp, "zeros", fail)
    with pytest.raises(ValueError) as caught:
        hf.load(folder)
    text = str(caught.value)
    assert "\n" not in text
    assert [word for word in words if word not in text] == [], text
    with pytest.raises(SystemExit) as ended:
        convert.main([str(folder), str(folder / "converted")])
    assert ended.value.code not in (0, None)
    (line,) = capsys.readouterr().err.splitlines()
    assert text in line
    assert not (folder / "converted").exists()
    assert {id(array) for array in jax.live_arrays()} <= before


def test_a_tied_model_may_repeat_its_head_if_it_is_the_embedding(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "qwen2", tmp_path / "qwen2"))
    file = folder / "model-00001-of-00002.safetensors"
    reader, found = safetensors.Reader(), safetensors.entries(file)
    tensors = {name: reader(entry).copy() for name, entry in found.items()}
    tensors["lm_head.weight"] = tensors[EMBED].copy()
    rewrite(folder, file, tensors)
    _, params = hf.load(folder)
    _, expected = hf.load(GOLDEN / "qwen2")
    chex.assert_trees_all_equal(params, expected)
    tensors["lm_head.weight"][63, 31] += 1
    rewrite(folder, file, tensors)
    with pytest.raises(ValueError, match=r"lm_head.weight differs from model.embed_tokens.weight"):
        hf.load(folder)


def test_a_folder_without_the_prediction_module_loads_without_it_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(GOLDEN / "deepseek_v3", tmp_path / "deepseek"))
    file = folder / "model-mtp.safetensors"
    rewrite(folder, file, {})
    file.unlink()
    cfg, params = hf.load(folder)
    assert cfg.num_mtp == 0
    assert "mtp" not in params
    (line,) = caplog.messages
    assert "num_nextn_predict_layers 1, but no file has a tensor model.layers.2.*" in line
    caplog.clear()
    hf.load(GOLDEN / "deepseek_v3")
    assert caplog.messages == []


def test_half_a_prediction_module_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(GOLDEN / "deepseek_v3", tmp_path / "deepseek"))
    file = folder / "model-mtp.safetensors"
    reader, found = safetensors.Reader(), safetensors.entries(file)
    rewrite(folder, file, {n: reader(e).copy() for n, e in found.items() if "eh_proj" not in n})
    with pytest.raises(ValueError, match=r"tensor model.layers.2.eh_proj.weight is in none of its"):
        hf.load(folder)


def test_nothing_is_written_over_and_nothing_half_done_is_left(tmp_path: Path) -> None:
    cfg, params = hf.load(GOLDEN / "qwen2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists; need a new or empty folder"):
        hf.save(tmp_path / "full", cfg, params)
    odd = settings.dense(
        vocab_size=8,
        dim=4,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        mlp_dim=4,
        bias=True,
        qk_norm=True,
    )
    with pytest.raises(ValueError, match="no Hugging Face family has these layers"):
        hf.save(tmp_path / "odd", odd, params)
    assert {path.name for path in tmp_path.iterdir()} == {"full"}


def test_every_weight_is_filled_exactly_once() -> None:
    for family in FAMILIES:
        cfg = hf_config.read(GOLDEN / family / "config.json")
        sizes: dict[hf_names.Path, int] = {}
        for place in hf_names.places(cfg):
            if place.same_as is None:
                sizes[place.path] = sizes.get(place.path, 0) + int(np.prod(place.shape))
        leaves = jax.tree_util.tree_leaves_with_path(decoder.leaves(cfg), is_leaf=sharding.is_leaf)
        wanted = {
            tuple(getattr(k, "key", getattr(k, "idx", None)) for k in path): int(
                np.prod(leaf.shape)
            )
            for path, leaf in leaves
        }
        assert sizes == wanted


def test_the_format_is_that_of_its_own_package(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.normal(size=(3, 5)).astype(np.float32),
        "b": rng.normal(size=7).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "number": np.asarray(3, np.int64),
    }
    kinds = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    safetensors.write(tmp_path / "x.safetensors", kinds, arrays.values())
    theirs = load_file(tmp_path / "x.safetensors")
    reader, found = safetensors.Reader(), safetensors.entries(tmp_path / "x.safetensors")
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(reader(found[name]), array)
        assert theirs[name].dtype == array.dtype
