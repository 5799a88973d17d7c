"""Every family against what transformers computes on torch; see golden/make_models.py."""

import subprocess
import sys
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from r1jax import settings
from r1jax.models import decoder, hf

GOLDEN = Path(__file__).parent / "golden"
FAMILIES = sorted(path.name for path in (GOLDEN / "models").iterdir())


@cache
def golden(folder: Path) -> tuple[settings.Decoder, dict, dict[str, np.ndarray]]:
    cfg, params = hf.load(folder, dtype=jnp.float32)
    return cfg, params, load_file(folder / "expected.safetensors")


@cache
def run(cfg: settings.Decoder):
    return jax.jit(lambda params, tokens, mask: decoder.logits(cfg, params, tokens, mask))


def check_logits(folder: Path) -> None:
    cfg, params, expected = golden(folder)
    tokens = jnp.asarray(expected["tokens"])
    found = run(cfg)(params, tokens, jnp.ones_like(tokens))
    np.testing.assert_allclose(found, expected["logits"], atol=1e-4, rtol=0)


def check_greedy(folder: Path) -> None:
    cfg, params, expected = golden(folder)
    prompt, new = expected["prompt"], len(expected["greedy"])
    tokens = np.zeros((1, len(prompt) + new), np.int32)
    tokens[0, : len(prompt)] = prompt
    for end in range(len(prompt), tokens.shape[1]):
        mask = (np.arange(tokens.shape[1]) < end)[None].astype(np.int32)
        tokens[0, end] = np.argmax(run(cfg)(params, tokens, mask)[0, end - 1])
    np.testing.assert_array_equal(tokens[0, len(prompt) :], expected["greedy"])


def check_gradients(folder: Path, tmp_path: Path) -> None:
    cfg, params, expected = golden(folder)
    names = {name.removeprefix("grad.") for name in expected if name.startswith("grad.")}
    tokens = jnp.asarray(expected["tokens"])

    def mean_logp(params: dict) -> jax.Array:
        logp = jax.nn.log_softmax(decoder.logits(cfg, params, tokens)[:, :-1])
        return jnp.mean(jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1))

    hf.save(tmp_path / "grads", cfg, jax.jit(jax.grad(mean_logp))(params))
    found = load_file(tmp_path / "grads" / "model.safetensors")
    extra = {name for name in found if not name.startswith("model.layers.2.")}  # the mtp module
    assert names == {name for name in extra if not name.endswith("e_score_correction_bias")}
    for name in names:
        want = expected[f"grad.{name}"]
        error = np.abs(found[name] - want).max() / np.abs(want).max()
        assert error <= 1e-3, f"{name}: {error}"


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_at_every_position_are_those_of_transformers(family: str) -> None:
    check_logits(GOLDEN / "models" / family)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_greedy_continuation_is_that_of_transformers(family: str) -> None:
    check_greedy(GOLDEN / "models" / family)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_the_mean_logp_are_those_of_torch(family: str, tmp_path: Path) -> None:
    check_gradients(GOLDEN / "models" / family, tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_and_packing_change_no_logit(family: str) -> None:
    cfg, params, expected = golden(GOLDEN / "models" / family)
    tokens, want = expected["tokens"], expected["logits"]
    count, length = tokens.shape
    pad = ((0, 0), (7, 0))
    padded = np.pad(tokens, pad, constant_values=9)
    found = run(cfg)(params, padded, np.pad(np.ones_like(tokens), pad))
    np.testing.assert_allclose(found[:, 7:], want, atol=1e-4, rtol=0)
    position = np.tile(np.arange(length, dtype=np.int32), count)[None]
    segment = np.repeat(np.arange(1, count + 1, dtype=np.int32), length)[None]

    @jax.jit
    def packed(params: dict, *rows: jax.Array) -> jax.Array:
        return decoder.run(cfg, params, *rows).hidden @ decoder.head(cfg, params).T

    found = np.asarray(packed(params, tokens.reshape(1, -1), position, segment))
    np.testing.assert_allclose(found.reshape(want.shape), want, atol=1e-4, rtol=0)


def test_the_cache_that_prefill_keeps_is_what_decoding_would_have_made() -> None:
    cfg, params, expected = golden(GOLDEN / "models" / "deepseek_v3")
    tokens = expected["tokens"].astype(np.int32)
    position = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    whole = jax.jit(partial(decoder.run, cfg, keep_cache=True, keep_routing=True))
    out = whole(params, tokens, position, np.ones_like(tokens))
    assert out.cache is not None and out.routing is not None
    mixer = cfg.groups[0].mixer
    assert isinstance(mixer, settings.Latent)
    entry = mixer.kv_rank + mixer.rope_dim
    assert [c.shape for c in out.cache] == [(1, *tokens.shape, entry)] * 2

    @jax.jit
    def entry_of(params: dict, tokens: jax.Array, position: jax.Array) -> jax.Array:
        made = []

        def attend(q: jax.Array, entry: jax.Array) -> tuple[jax.Array, None]:
            made.append(entry)
            return jnp.zeros((*q.shape[:-1], mixer.kv_rank)), None

        unstacked = decoder.unstack(cfg, params)[:1]
        decoder.decode_step(cfg, params, unstacked, tokens, position, [attend])
        return made[0]

    made = entry_of(params, tokens[:, 3], position[:, 3])
    np.testing.assert_allclose(made, np.asarray(out.cache[0])[0, :, 3], atol=1e-5)
    assert out.routing[0] is None
    assert out.routing[1].choice.shape == (1, *tokens.shape, 2)


CONTINUE = """
import sys, torch, transformers
from safetensors.torch import load_file
for folder, saved in zip(sys.argv[1::2], sys.argv[2::2]):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        saved, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["mismatched_keys"], info
    expected = load_file(f"{folder}/expected.safetensors")
    text, new = expected["prompt"][None].long(), expected["greedy"]
    with torch.no_grad():
        for _ in new:
            last = model(text, use_cache=False).logits[:, -1:]
            text = torch.cat([text, last.argmax(-1)], dim=1)
    assert text[0, -len(new) :].tolist() == new.tolist(), folder
"""


@pytest.mark.skipif(not find_spec("torch"), reason="needs torch")
def test_transformers_continues_a_text_from_a_saved_folder_as_before(tmp_path: Path) -> None:
    arguments = []
    for family in FAMILIES:
        cfg, params = hf.load(GOLDEN / "models" / family)
        hf.save(tmp_path / family, cfg, params)
        arguments += [str(GOLDEN / "models" / family), str(tmp_path / family)]
    run = subprocess.run(
        [sys.executable, "-c", CONTINUE, *arguments], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


@pytest.mark.skipif(not find_spec("torch"), reason="needs torch")
def test_fresh_models_of_every_family_agree_too(tmp_path: Path) -> None:
    script = GOLDEN / "make_models.py"
    command = [sys.executable, str(script), "--out", str(tmp_path / "made"), "--seed", "100"]
    subprocess.run(command, check=True, capture_output=True)
    for family in FAMILIES:
        folder = tmp_path / "made" / family
        check_logits(folder)
        check_greedy(folder)
        check_gradients(folder, tmp_path / family)
