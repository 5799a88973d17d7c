"""The command that writes Hugging Face folders, and the one that lists known models."""

import json
import shutil
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from r1jax import convert, sharding
from r1jax.models import __main__ as listing
from r1jax.models import hf, lora

GOLDEN = Path(__file__).parent / "golden" / "models"


def same(a: dict, b: dict) -> None:
    chex.assert_trees_all_equal(a, b)


def test_a_run_becomes_a_folder_with_its_tokenizer(small_run: Path, tmp_path: Path, capsys) -> None:
    from r1jax import restore

    run = restore.open_run(small_run, stage="base")
    convert.main([str(small_run), str(tmp_path / "out"), "--stage", "base"])
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    cfg, params = hf.load(tmp_path / "out")
    assert (cfg.dim, cfg.vocab_size, cfg.groups) == (16, 128, run.run.model.groups)
    same(params, run.params)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == run.tokenizer.eos_token_id
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_a_folder_becomes_another_of_another_dtype_with_adapters_merged(tmp_path: Path) -> None:
    source = Path(shutil.copytree(GOLDEN / "qwen2", tmp_path / "source"))
    (source / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}}')
    cfg, params = hf.load(source, dtype=jnp.float32)
    adapters = sharding.init(lora.adapter_leaves(cfg, rank=2), jax.random.key(0))
    adapters = {name: (a, jnp.ones_like(b)) for name, (a, b) in adapters.items()}
    lora.write(tmp_path / "adapters.safetensors", adapters)
    flags = f"--dtype float32 --scale 0.5 --adapters {tmp_path / 'adapters.safetensors'}"
    convert.main([str(source), str(tmp_path / "out"), *flags.split()])
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"model": {"vocab": {"a": 0}}}'
    again, found = hf.load(tmp_path / "out")
    assert again == cfg
    same(found, lora.merge(params, adapters, scale=0.5))
    files = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in files.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("nowhere", "out", "no such folder"),
        (GOLDEN / "qwen2", ".", "exists; need a new folder"),
        (GOLDEN, "out", "config.json: no such file"),
    ],
)
def test_a_mistake_is_one_line(source, target, words, tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        convert.main([str(tmp_path / source), str(tmp_path / target)])
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == 1


def test_known_models_are_listed_with_their_sizes(capsys) -> None:
    listing.main(["deepseek-v3-671b", "qwen3-30b-a3b"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["deepseek-v3-671b", "671.03", "37.55", "61"]
    assert lines[2].split()[:4] == ["qwen3-30b-a3b", "30.53", "3.35", "48"]
    with pytest.raises(SystemExit):
        listing.main(["gpt-5"])
    assert "unknown model 'gpt-5'" in capsys.readouterr().err
