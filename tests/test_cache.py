"""Decoding with a cache gives what the whole model gives, for every family and both kinds."""

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import settings
from r1jax.kernels.logprob import token_logp
from r1jax.models import decoder, hf, zoo
from r1jax.rollout import cache as caching
from r1jax.rollout.engine import make_engine
from r1jax.settings import Engine
from r1jax.types import Prompts, Rollout

MODELS = Path(__file__).parent / "golden" / "models"
FAMILIES = ["deepseek_v3", "llama3", "mistral", "qwen2", "qwen3", "qwen3_moe"]
WIDTH, NEW = 20, 12  # past the 16 tokens at which the scaled rotary forms begin to differ


@cache
def model(family: str) -> tuple[settings.Decoder, dict]:
    return hf.load(MODELS / family, dtype=jnp.float32)


def prompts() -> Prompts:
    rng = np.random.default_rng(0)
    length = np.asarray([WIDTH, 1, 7], np.int32)
    tokens = rng.integers(3, 64, (3, WIDTH)).astype(np.int32)
    tokens[np.arange(WIDTH)[None] >= length[:, None]] = 0
    return Prompts(tokens=tokens, length=length, index=np.arange(3, dtype=np.int32))


def generate(family: str, **engine: Any) -> Rollout:
    """Two answers to each of three prompts in two slots: prompts are shared, slots refilled."""
    cfg, params = model(family)
    sizes = Engine(max_prompt=WIDTH, max_new=NEW, slots=2, **engine)
    made = jax.jit(make_engine(cfg, sizes, group=2, stop=(1,)))
    return jax.tree.map(np.asarray, made(params, prompts(), jax.random.key(3)))


def full_logp(family: str, rollout: Rollout) -> np.ndarray:
    """The answers' log-probabilities from whole sequences, without a cache; [B, NEW]."""
    cfg, params = model(family)
    tokens = np.zeros((6, WIDTH + NEW), np.int32)
    for i in range(6):
        start = rollout.prompt_length[i // 2]
        tokens[i, :start] = rollout.prompt[i // 2, :start]
        tokens[i, start : start + NEW] = rollout.answer[i]
    position = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)

    @jax.jit
    def run(params: dict) -> jax.Array:
        rows = jnp.asarray(tokens), jnp.asarray(position), jnp.ones(tokens.shape, jnp.int32)
        hidden = decoder.run(cfg, params, *rows).hidden
        return token_logp(hidden[:, :-1], decoder.head(cfg, params), rows[0][:, 1:])[0]

    logp = np.asarray(run(params))
    first = np.repeat(rollout.prompt_length, 2) - 1
    found = np.take_along_axis(logp, first[:, None] + np.arange(NEW)[None], axis=1)
    return np.where(np.arange(NEW)[None] < rollout.answer_length[:, None], found, 0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_engines_log_probabilities_are_those_of_the_full_forward(family: str) -> None:
    rollout = generate(family)
    assert rollout.answer_length.max() == NEW
    np.testing.assert_allclose(rollout.logp_rollout, full_logp(family, rollout), atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", ["llama3", "deepseek_v3"])
def test_prompts_computed_in_chunks_leave_the_same_behind(family: str) -> None:
    cfg, params = model(family)
    args = prompts()
    ahead = bool(cfg.num_mtp)
    choices = family == "deepseek_v3"

    @jax.jit
    def both(params: dict, args: Prompts) -> tuple[caching.Prefilled, caching.Prefilled]:
        fill = lambda chunk: caching.prefill(  # noqa: E731
            cfg, params, args, chunk=chunk, choices=choices, ahead=ahead
        )
        return fill(0), fill(6)

    whole, chunks = both(params, args)
    mixers = [group.mixer for group, _ in decoder.unstack(cfg, params)]
    pairs = list(zip(mixers, whole.caches, chunks.caches, strict=True))
    if ahead:
        pairs.append((cfg.groups[-1].mixer, whole.ahead, chunks.ahead))
    for mixer, want, found in pairs:
        for a, b, dim in zip(want, found, caching.kind(mixer).columns, strict=True):
            for row, length in enumerate(args.length - 1):  # the module has no token after the last
                first, second = (np.moveaxis(x[row], dim - 1, 0)[:length] for x in (a, b))
                np.testing.assert_allclose(first, second, atol=1e-5)
    np.testing.assert_allclose(whole.hidden[:, 1], chunks.hidden[:, 1], atol=1e-4)
    if choices:
        real = np.arange(WIDTH)[None] < args.length[:, None]
        np.testing.assert_array_equal(whole.choice[real], chunks.choice[real])


def test_prefill_in_chunks_changes_no_answer() -> None:
    want, found = generate("deepseek_v3"), generate("deepseek_v3", prefill_chunk=8)
    np.testing.assert_array_equal(found.answer, want.answer)
    np.testing.assert_allclose(found.logp_rollout, want.logp_rollout, atol=1e-4)


def test_latent_attention_keeps_576_numbers_a_token_and_layer_for_deepseek_v3() -> None:
    cfg = zoo.MODELS["deepseek-v3-671b"]
    for group in cfg.groups:
        shapes = jax.eval_shape(lambda g=group: caching.empty(cfg, g.mixer, 1, 1, wide=True))
        assert sum(np.prod(x.shape) for x in shapes) == 576
