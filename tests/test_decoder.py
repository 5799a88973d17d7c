"""The decoder against a transcription of the published equations in numpy, and its invariances."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import sharding
from r1jax.kernels.attention import decode_attention, packed_attention
from r1jax.kernels.logprob import token_logp
from r1jax.kernels.tiles import TILE, tile_attention
from r1jax.models import decoder, layers
from r1jax.settings import Decoder, dense

SMALL = {
    "vocab_size": 64,
    "dim": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_dim": 48,
}
FAMILIES = {
    "llama": dense(**SMALL, tied=False),
    "qwen2": dense(**SMALL, bias=True),
    "qwen3": dense(**SMALL, qk_norm=True, head_dim=16, rope_theta=1e6),
}


# Each a program: operation by operation a test would have the compiler called a hundred times.
logits = jax.jit(decoder.logits, static_argnums=0)


@partial(jax.jit, static_argnums=0)
def hidden(
    cfg: Decoder, params: dict, tokens: jax.Array, position: jax.Array, segment: jax.Array
) -> jax.Array:
    return decoder.run(cfg, params, tokens, position, segment).hidden


@cache
def weights(cfg: Decoder) -> dict:
    """Random weights; biases and norms too, which start as 0 and 1."""
    rng = np.random.default_rng(0)
    params = sharding.init(decoder.leaves(cfg), jax.random.key(0))
    noisy = lambda w: jnp.asarray(w + rng.normal(0, 0.1, w.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(lambda w: noisy(np.asarray(w)), params)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_tokens(*shape: int, seed: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 64, shape).astype(np.int32)


def numpy_logits(cfg: Decoder, params: dict, tokens: np.ndarray) -> np.ndarray:
    """One sequence, one head and one position at a time, in float64."""
    params = jax.tree.map(lambda w: np.asarray(w, np.float64), params)

    def norm(scale: np.ndarray, x: np.ndarray) -> np.ndarray:
        return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + cfg.norm_eps)

    def rope(x: np.ndarray, position: int) -> np.ndarray:
        half = len(x) // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position * cfg.rope_theta ** (-2 * i / len(x))
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    x = params["embed"][tokens]
    group = cfg.groups[0]
    attention = group.mixer
    per_kv = attention.num_heads // attention.num_kv_heads
    for i in range(group.count):
        p = jax.tree.map(lambda w, i=i: w[i], params["groups"][0])
        h = norm(p["mixer_norm"], x)
        qkv = np.einsum("td,krhd->tkrh", h, p["mixer"]["qkv"])
        if attention.bias:
            qkv = qkv + p["mixer"]["bias"]
        mixed = np.zeros_like(x)
        for kv in range(attention.num_kv_heads):
            key = qkv[:, kv, per_kv]
            if attention.qk_norm:
                key = norm(p["mixer"]["k_norm"], key)
            key = np.stack([rope(k, t) for t, k in enumerate(key)])
            for r in range(per_kv):
                query = qkv[:, kv, r]
                if attention.qk_norm:
                    query = norm(p["mixer"]["q_norm"], query)
                for t in range(len(tokens)):
                    score = key[: t + 1] @ rope(query[t], t) / np.sqrt(attention.head_dim)
                    weight = np.exp(score - score.max())
                    value = weight / weight.sum() @ qkv[: t + 1, kv, per_kv + 1]
                    mixed[t] += p["mixer"]["out"][:, kv, r] @ value
        x = x + mixed
        h = norm(p["mlp_norm"], x)
        gate, up = h @ p["mlp"]["gate"].T, h @ p["mlp"]["up"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ p["mlp"]["down"].T
    head = params["embed"] if cfg.tied else params["head"]
    return norm(params["norm"], x) @ head.T


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_published_equations(family: str) -> None:
    cfg = FAMILIES[family]
    params = weights(cfg)
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 9))
    ours = logits(cfg, params, tokens.astype(np.int32))
    for row, expected in zip(np.asarray(ours), tokens, strict=True):
        np.testing.assert_allclose(row, numpy_logits(cfg, params, expected), atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str) -> None:
    cfg = FAMILIES["qwen2"]
    params = weights(cfg)
    tokens = random_tokens(1, 7)
    pad = ((0, 0), (5, 0)) if side == "left" else ((0, 0), (0, 5))
    mask = np.pad(np.ones_like(tokens), pad)
    padded = np.asarray(logits(cfg, params, np.pad(tokens, pad, constant_values=9), mask))
    real = padded[:, 5:] if side == "left" else padded[:, :7]
    np.testing.assert_allclose(real, logits(cfg, params, tokens), atol=1e-5)


def test_packed_sequences_do_not_see_each_other() -> None:
    cfg = FAMILIES["qwen3"]
    params = weights(cfg)
    first, second = random_tokens(1, 150), random_tokens(1, 30, seed=3)
    both = np.asarray(
        hidden(
            cfg,
            params,
            np.concatenate([first, second], axis=1),
            np.concatenate([np.arange(n, dtype=np.int32) for n in (150, 30)])[None],
            np.repeat(np.asarray([1, 2], np.int32), (150, 30))[None],
        )
    )
    for tokens, packed in ((first, both[:, :150]), (second, both[:, 150:])):
        position = np.arange(tokens.shape[1], dtype=np.int32)[None]
        alone = hidden(cfg, params, tokens, position, np.ones_like(tokens))
        np.testing.assert_allclose(packed, alone, atol=1e-5)


@pytest.mark.parametrize("lengths", [(4, 5, 6), (30, 35, 70)])
def test_an_answer_sees_its_prompt_and_itself_and_no_other_answer(lengths: tuple) -> None:
    cfg = FAMILIES["qwen2"]
    params = weights(cfg)
    segment = np.repeat(np.asarray([1, 2, 3], np.int32), lengths)[None]
    prompt = (segment > 1).astype(np.int32)
    start, second = lengths[0], lengths[0] + lengths[1]
    tokens = np.arange(sum(lengths), dtype=np.int32)[None]
    position = np.where(segment == 3, tokens - lengths[1], tokens)

    @jax.jit
    @jax.grad
    def gradient(embedded: jax.Array, counts: jax.Array) -> jax.Array:
        texts = map(jnp.asarray, (tokens, position, segment, prompt))
        out = decoder.run(cfg, {**params, "embed": embedded}, *texts)
        return jnp.sum(jnp.sin(out.hidden[0]) * counts)

    def seen_by(first: int, end: int) -> np.ndarray:
        """How much the states from `first` to `end` depend on each token."""
        counts = (tokens[0] >= first) & (tokens[0] < end)
        found = gradient(normal(sum(lengths), cfg.dim), counts[:, None].astype(np.float32))
        return np.abs(found).max(axis=1)

    first, last = seen_by(start, second), seen_by(second, sum(lengths))
    assert (first[:second] > 0).all() and (first[second:] == 0).all()
    assert (last[:start] > 0).all() and (last[second:] > 0).all()
    assert (last[start:second] == 0).all()
    of_prompt = seen_by(0, start)
    assert (of_prompt[:start] > 0).all() and (of_prompt[start:] == 0).all()


def test_no_logit_depends_on_a_later_token() -> None:
    cfg = FAMILIES["llama"]
    params = weights(cfg)
    tokens = jnp.arange(8)[None]

    @jax.jit
    @jax.grad
    def gradient(table: jax.Array, at: jax.Array) -> jax.Array:
        out = decoder.run(cfg, {**params, "embed": table}, tokens, tokens, jnp.ones_like(tokens))
        return jnp.sum(out.hidden[0] * jnp.outer(at, jnp.arange(1.0, 33.0)))

    for t in (0, 3, 7):
        grad = np.asarray(gradient(params["embed"], np.eye(8, dtype=np.float32)[t]))[:8]
        assert (grad[t + 1 :] == 0).all()
        assert (np.abs(grad[: t + 1]).max(axis=1) > 0).all()


@pytest.mark.parametrize("change", [{"scan": False}, {"remat": "layer"}])
def test_unrolling_and_recomputing_change_neither_values_nor_gradients(change: dict) -> None:
    cfg = FAMILIES["qwen2"]
    params = weights(cfg)
    tokens = random_tokens(2, 12)

    @partial(jax.jit, static_argnums=1)
    @jax.grad
    def gradient(params: dict, cfg: Decoder) -> jax.Array:
        return jnp.sum(jnp.sin(decoder.logits(cfg, params, jnp.asarray(tokens))))

    expected, found = gradient(params, cfg), gradient(params, replace(cfg, **change))
    chex.assert_trees_all_close(found, expected, rtol=1e-7, atol=2e-4)


@pytest.mark.parametrize("change", [lambda f: f, jax.grad], ids=["forward", "gradient"])
def test_angles_are_turned_into_cosines_once_for_all_heads_of_all_layers(change: Callable) -> None:
    def count(num_layers: int) -> int:
        cfg = dense(**{**SMALL, "num_layers": num_layers}, scan=False)
        params = jax.eval_shape(partial(sharding.init, decoder.leaves(cfg)), jax.random.key(0))

        def total(params: dict, *row: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(decoder.run(cfg, params, *row).hidden))

        row = [jax.ShapeDtypeStruct((1, 8), jnp.int32)] * 3  # tokens, position, segment
        program = jax.jit(change(total)).lower(params, *row).compile()
        return program.as_text().count(" cosine(")

    assert 0 < count(1) == count(3)


# Runs of (segment, the segment it continues, tokens) in each row.
LAYOUTS = {
    "one tile": [[(1, 0, 2), (2, 1, 2), (3, 1, 1)]],
    "two sequences": [[(1, 0, 100), (2, 0, 200)], [(1, 0, 300)]],
    "shared prompts": [
        [(1, 0, 40), (2, 1, 64), (3, 1, 65), (4, 1, 1), (5, 0, 20), (6, 5, 70), (0, 0, 5)],
        [(1, 0, 150), (2, 1, 3), (3, 1, 80), (0, 0, 32)],
    ],
    "padding first": [[(0, 0, 30), (1, 0, 90), (2, 1, 40)]],
}


def laid_out(layout: str) -> tuple[np.ndarray, np.ndarray]:
    rows = LAYOUTS[layout]
    segment = [np.repeat([s for s, _, _ in row], [n for _, _, n in row]) for row in rows]
    prompt = [np.repeat([p for _, p, _ in row], [n for _, _, n in row]) for row in rows]
    return np.stack(segment).astype(np.int32), np.stack(prompt).astype(np.int32)


def numpy_attention(
    q: np.ndarray, k: np.ndarray, v: np.ndarray, segment: np.ndarray, prompt: np.ndarray
) -> np.ndarray:
    """One query at a time, in float64."""
    out = np.zeros(q.shape)
    for b, t, kv, r in np.ndindex(*q.shape[:-1]):
        own = segment[b, : t + 1] == segment[b, t]
        asked = (segment[b, : t + 1] == prompt[b, t]) & (prompt[b, t] > 0)
        see = np.flatnonzero(own | asked)
        score = k[b, see, kv].astype(np.float64) @ q[b, t, kv, r] / np.sqrt(q.shape[-1])
        weight = np.exp(score - score.max())
        out[b, t, kv, r] = weight / weight.sum() @ v[b, see, kv]
    return out


def dense_attention(q: jax.Array, k: jax.Array, v: jax.Array, see: np.ndarray) -> jax.Array:
    """All scores at once, with JAX's own gradient."""
    score = jnp.einsum("btkrh,bskh->bkrts", q, k) / q.shape[-1] ** 0.5
    weight = jax.nn.softmax(jnp.where(see[:, None, None], score, -1e30), axis=-1)
    return jnp.einsum("bkrts,bskh->btkrh", weight, v)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_attention_and_its_gradient_are_those_of_the_definition(layout: str) -> None:
    segment, prompt = laid_out(layout)
    shape = segment.shape
    real = (segment > 0)[..., None, None, None]
    q, towards = (normal(*shape, 2, 3, 8, seed=seed) for seed in (0, 1))
    k, v = (normal(*shape, 2, 8, seed=seed) for seed in (2, 3))
    see = segment[:, :, None] == segment[:, None]
    see |= (prompt[:, :, None] == segment[:, None]) & (prompt[:, :, None] > 0)
    see &= np.tri(shape[1], dtype=bool)[None]

    @partial(jax.jit, static_argnums=0)
    def pulled(attend: Callable, q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
        """What `attend` finds, and the gradient of its product with `towards`."""
        found, back = jax.vjp(attend, q, k, v)
        return found, back(jnp.where(real, towards, 0.0))

    segments = jnp.asarray(segment), jnp.asarray(prompt)
    packed = lambda q, k, v: packed_attention(q, k, v, *segments)  # noqa: E731
    found, ours = pulled(packed, q, k, v)
    _, theirs = pulled(partial(dense_attention, see=see), q, k, v)
    expected = numpy_attention(q, k, v, segment, prompt)
    np.testing.assert_allclose(np.where(real, found, 0), expected * real, atol=1e-5)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_tiles_that_nothing_sees_are_not_read() -> None:
    segment, prompt = laid_out("shared prompts")
    q = normal(*segment.shape, 1, 1, 8)
    k, v = (normal(*segment.shape, 1, 8, seed=seed) for seed in (1, 2))
    third = segment[0] == 3
    column = np.arange(len(third))
    # Its prompt's tokens are read in one tile, which reaches past them; then come its own.
    unread = (column >= TILE) & (column < np.flatnonzero(third)[0])
    assert unread.sum() == 40  # of the answer between its prompt and itself

    attend = jax.jit(lambda *given: tile_attention(jnp.asarray(q), *given))
    expected = np.asarray(attend(k, v, segment, prompt))[0, third]
    k[0, unread] = v[0, unread] = np.nan
    np.testing.assert_array_equal(np.asarray(attend(k, v, segment, prompt))[0, third], expected)


def test_decode_attention_over_pieces_is_attention_over_all_visible_keys() -> None:
    q, k, v = normal(2, 2, 3, 8), normal(2, 2, 8, 11, seed=1), normal(2, 2, 11, 8, seed=2)
    visible = np.arange(11)[None] % np.asarray([[2], [3]]) == 0
    found = jax.jit(decode_attention)(
        q, [k[..., :4], k[..., 4:]], [v[:, :, :4], v[:, :, 4:]], visible
    )
    for b in range(2):
        see = np.flatnonzero(visible[b])
        score = np.einsum("krh,khs->krs", q[b], k[b][..., see]) / np.sqrt(8)
        weight = np.exp(score) / np.exp(score).sum(-1, keepdims=True)
        expected = np.einsum("krs,ksh->krh", weight, v[b][:, see])
        np.testing.assert_allclose(found[b], expected, atol=1e-5)


@pytest.mark.parametrize("chunk", [2**24, 2 * 64 * 5])
def test_chunks_of_log_probabilities_are_those_of_the_whole(
    chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("r1jax.kernels.logprob.CHUNK", chunk)
    states, head, tokens = normal(2, 13, 16), normal(64, 16, seed=1), random_tokens(2, 13)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def total(head: jax.Array, temperature: float) -> tuple[jax.Array, Any]:
        given = jnp.asarray(states), head, jnp.asarray(tokens)
        logp, entropy = token_logp(*given, temperature=temperature)
        return jnp.sum(logp), (logp, entropy)

    scores = states.astype(np.float64) @ head.astype(np.float64).T
    for temperature in (0.7, 1.0):
        p = np.exp(scores / temperature)
        p /= p.sum(-1, keepdims=True)
        chosen = np.take_along_axis(p, tokens[..., None], -1)[..., 0]
        (_, (logp, entropy)), grad = total(head, np.float32(temperature))
        np.testing.assert_allclose(logp, np.log(chosen), atol=2e-5)
        np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), atol=2e-5)
        expected = np.einsum("btv,btd->vd", np.eye(64)[tokens] - p, states) / temperature
        np.testing.assert_allclose(grad, expected, atol=1e-4)


def test_what_every_row_shares_has_the_sum_of_the_rows_gradients() -> None:
    vector, weight = jnp.asarray(normal(8)), normal(3, 5, 8, seed=1)
    of_vector = jax.grad(lambda v: jnp.sum(layers.spread(weight.shape, v) * weight))(vector)
    np.testing.assert_allclose(of_vector, weight.sum(axis=(0, 1)), rtol=1e-6, atol=1e-6)
