"""The decoder against a transcription of the published equations in numpy, and its invariances."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import sharding
from r1jax.kernels.attention import decode_attention, packed_attention
from r1jax.kernels.logprob import token_logp
from r1jax.kernels.tiles import TILE, tile_attention
from r1jax.models import decoder
from r1jax.settings import Decoder, dense

pytestmark = pytest.mark.usefixtures("optimized")  # rounding counts

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


def weights(cfg: Decoder, seed: int = 0) -> dict:
    """Random weights; biases and norms too, which start as 0 and 1."""
    params = sharding.init(decoder.leaves(cfg), jax.random.key(seed))
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    noisy = [w + 0.1 * jax.random.normal(k, w.shape) for w, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, noisy)


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
    ours = decoder.logits(cfg, params, jnp.asarray(tokens, jnp.int32))
    for row, expected in zip(np.asarray(ours), tokens, strict=True):
        np.testing.assert_allclose(row, numpy_logits(cfg, params, expected), atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(side: str) -> None:
    cfg = FAMILIES["qwen2"]
    params = weights(cfg)
    tokens = jax.random.randint(jax.random.key(2), (1, 7), 0, 64)
    pad = ((0, 0), (5, 0)) if side == "left" else ((0, 0), (0, 5))
    padded = decoder.logits(
        cfg, params, jnp.pad(tokens, pad, constant_values=9), jnp.pad(jnp.ones_like(tokens), pad)
    )
    real = padded[:, 5:] if side == "left" else padded[:, :7]
    np.testing.assert_allclose(real, decoder.logits(cfg, params, tokens), atol=1e-5)


def test_packed_sequences_do_not_see_each_other() -> None:
    cfg = FAMILIES["qwen3"]
    params = weights(cfg)
    first = jax.random.randint(jax.random.key(2), (1, 150), 0, 64)
    second = jax.random.randint(jax.random.key(3), (1, 30), 0, 64)
    lengths = jnp.asarray([150, 30])
    hidden = decoder.run(
        cfg,
        params,
        jnp.concatenate([first, second], axis=1),
        jnp.concatenate([jnp.arange(n) for n in lengths])[None],
        jnp.repeat(jnp.asarray([1, 2]), lengths, total_repeat_length=180)[None],
    ).hidden
    for tokens, packed in ((first, hidden[:, :150]), (second, hidden[:, 150:])):
        ones = jnp.ones_like(tokens)
        alone = decoder.run(cfg, params, tokens, jnp.arange(tokens.shape[1])[None], ones).hidden
        np.testing.assert_allclose(packed, alone, atol=1e-5)


@pytest.mark.parametrize("lengths", [(4, 5, 6), (30, 35, 70)])
def test_an_answer_sees_its_prompt_and_itself_and_no_other_answer(lengths: tuple) -> None:
    cfg = FAMILIES["qwen2"]
    params = weights(cfg)
    segment = jnp.repeat(jnp.asarray([1, 2, 3]), np.asarray(lengths))[None]
    prompt = jnp.where(segment > 1, 1, 0)
    start, second = lengths[0], lengths[0] + lengths[1]
    position = jnp.concatenate([jnp.arange(start), *(start + jnp.arange(n) for n in lengths[1:])])[
        None
    ]
    tokens = jnp.arange(sum(lengths))[None]

    def hidden_of(embedded: jax.Array, first: int, end: int) -> jax.Array:
        out = decoder.run(
            cfg, {**params, "embed": embedded}, tokens, position, segment, prompt
        ).hidden
        return jnp.sum(jnp.sin(out[0, first:end]))

    embedded = jax.random.normal(jax.random.key(5), (sum(lengths), cfg.dim))
    gradient = jax.jit(jax.grad(hidden_of), static_argnums=(1, 2))
    first = np.abs(gradient(embedded, start, second)).max(axis=1)
    last = np.abs(gradient(embedded, second, sum(lengths))).max(axis=1)
    assert (first[:second] > 0).all() and (first[second:] == 0).all()
    assert (last[:start] > 0).all() and (last[second:] > 0).all()
    assert (last[start:second] == 0).all()
    of_prompt = np.abs(gradient(embedded, 0, start)).max(axis=1)
    assert (of_prompt[:start] > 0).all() and (of_prompt[start:] == 0).all()


def test_no_logit_depends_on_a_later_token() -> None:
    cfg = FAMILIES["llama"]
    params = weights(cfg)
    position = jnp.arange(8)[None]

    def hidden_at(embedded: jax.Array, t: int) -> jax.Array:
        tokens = jnp.arange(8)[None]
        table = params["embed"].at[:8].set(embedded)
        out = decoder.run(
            cfg, {**params, "embed": table}, tokens, position, jnp.ones_like(tokens)
        ).hidden
        return jnp.sum(out[0, t] * jnp.arange(1.0, 33.0))

    for t in (0, 3, 7):
        grad = np.asarray(jax.grad(hidden_at)(params["embed"][:8], t))
        assert (grad[t + 1 :] == 0).all()
        assert (np.abs(grad[: t + 1]).max(axis=1) > 0).all()


@pytest.mark.parametrize("change", [{"scan": False}, {"remat": "layer"}])
def test_unrolling_and_recomputing_change_neither_values_nor_gradients(change: dict) -> None:
    cfg = FAMILIES["qwen2"]
    params = weights(cfg)
    tokens = jax.random.randint(jax.random.key(2), (2, 12), 0, 64)

    def total(params: dict, cfg: Decoder) -> jax.Array:
        return jnp.sum(jnp.sin(decoder.logits(cfg, params, tokens)))

    expected = jax.grad(total)(params, cfg)
    found = jax.grad(total)(params, replace(cfg, **change))
    chex.assert_trees_all_close(found, expected, rtol=1e-7, atol=2e-4)


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
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (*shape, 2, 3, 8))
    k, v = (jax.random.normal(key, (*shape, 2, 8)) for key in keys[1:3])
    real = (segment > 0)[..., None, None, None]
    found = jnp.where(real, packed_attention(q, k, v, jnp.asarray(segment), jnp.asarray(prompt)), 0)
    expected = numpy_attention(*map(np.asarray, (q, k, v)), segment, prompt) * real
    np.testing.assert_allclose(found, expected, atol=1e-5)

    see = segment[:, :, None] == segment[:, None]
    see |= (prompt[:, :, None] == segment[:, None]) & (prompt[:, :, None] > 0)
    see &= np.tri(shape[1], dtype=bool)[None]
    towards = jnp.where(real, jax.random.normal(keys[3], q.shape), 0.0)

    def total(attend, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(towards * attend(q, k, v))

    packed = lambda q, k, v: packed_attention(  # noqa: E731
        q, k, v, jnp.asarray(segment), jnp.asarray(prompt)
    )
    ours = jax.grad(total, argnums=(1, 2, 3))(packed, q, k, v)
    theirs = jax.grad(total, argnums=(1, 2, 3))(partial(dense_attention, see=see), q, k, v)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_tiles_that_nothing_sees_are_not_read() -> None:
    segment, prompt = laid_out("shared prompts")
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (*segment.shape, 1, 1, 8))
    k, v = (jax.random.normal(key, (*segment.shape, 1, 8)) for key in keys[1:])
    third = segment[0] == 3
    column = np.arange(len(third))
    # Its prompt's tokens are read in one tile, which reaches past them; then come its own.
    unread = (column >= TILE) & (column < np.flatnonzero(third)[0])
    assert unread.sum() == 40  # of the answer between its prompt and itself

    def of_third(k: jax.Array, v: jax.Array) -> jax.Array:
        out = tile_attention(q, k, v, jnp.asarray(segment), jnp.asarray(prompt))
        return out[0, third]

    bad_k, bad_v = (x.at[0, unread].set(jnp.nan) for x in (k, v))
    np.testing.assert_array_equal(of_third(bad_k, bad_v), of_third(k, v))


def test_decode_attention_over_pieces_is_attention_over_all_visible_keys() -> None:
    keys = jax.random.split(jax.random.key(0), 3)
    q = jax.random.normal(keys[0], (2, 2, 3, 8))
    k = jax.random.normal(keys[1], (2, 2, 8, 11))
    v = jax.random.normal(keys[2], (2, 2, 11, 8))
    visible = jnp.arange(11)[None] % jnp.asarray([[2], [3]]) == 0
    found = decode_attention(q, [k[..., :4], k[..., 4:]], [v[:, :, :4], v[:, :, 4:]], visible)
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
    hidden = jax.random.normal(jax.random.key(0), (2, 13, 16))
    head = jax.random.normal(jax.random.key(1), (64, 16))
    tokens = jax.random.randint(jax.random.key(2), (2, 13), 0, 64)
    logp, entropy = token_logp(hidden, head, tokens, temperature=0.7)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64).T / 0.7
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    chosen = np.take_along_axis(p, np.asarray(tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(logp, np.log(chosen), atol=2e-5)
    np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(-1), atol=2e-5)

    def total(head: jax.Array) -> jax.Array:
        return jnp.sum(token_logp(hidden, head, tokens)[0])

    grad = jax.grad(total)(head)
    q = np.exp(logits * 0.7) / np.exp(logits * 0.7).sum(-1, keepdims=True)
    expected = np.einsum("btv,btd->vd", np.eye(64)[np.asarray(tokens)] - q, np.asarray(hidden))
    np.testing.assert_allclose(grad, expected, atol=1e-4)
