"""Multi-token prediction, scalar heads and adapters."""

from functools import partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from r1jax import settings, sharding
from r1jax.models import decoder, heads, hf, lora, mtp

GOLDEN = Path(__file__).parent / "golden" / "models"
SMALL = settings.dense(
    vocab_size=16, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=8, bias=True
)


def rows(count: int, length: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens, positions and segments of rows with one sequence each."""
    tokens = jax.random.randint(jax.random.key(3), (count, length), 0, 16)
    position = jnp.broadcast_to(jnp.arange(length), (count, length))
    return tokens, position, jnp.ones_like(tokens)


def test_the_prediction_modules_logits_are_those_of_transformers() -> None:
    cfg, params = hf.load(GOLDEN / "deepseek_v3", dtype=jnp.float32)
    expected = load_file(GOLDEN / "deepseek_v3" / "expected.safetensors")
    tokens = jnp.asarray(expected["tokens"])
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    segment = jnp.ones_like(tokens)

    @jax.jit
    def run(params: dict) -> tuple[jax.Array, jax.Array]:
        hidden = decoder.run(cfg, params, tokens, position, segment).hidden
        (made,) = mtp.run(cfg, params, hidden, tokens, position, segment)
        return hidden, made.state @ params["head"].T

    hidden, found = run(params)
    np.testing.assert_allclose(found[:, :-1], expected["mtp_logits"], atol=1e-4, rtol=0)
    # The loss is the mean of what each sequence would give alone, packed or not.
    logp = jax.nn.log_softmax(expected["mtp_logits"])[:, :-1]
    want = -np.take_along_axis(np.asarray(logp), np.asarray(tokens)[:, 2:, None], axis=-1).sum()
    weight = jnp.ones(tokens.shape)
    args = (hidden, tokens, position, segment, weight)
    loss = jax.jit(partial(mtp.loss, cfg))
    np.testing.assert_allclose(loss(params, *args)[0], want, rtol=1e-5)
    packed = [x.reshape(1, -1, *x.shape[2:]) for x in args]
    packed[3] = jnp.repeat(jnp.asarray([1, 2]), tokens.shape[1])[None]
    np.testing.assert_allclose(loss(params, *packed)[0], want, rtol=1e-5)


def test_a_second_module_looks_one_token_further_and_no_state_looks_beyond() -> None:
    cfg = settings.dense(
        vocab_size=16, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=8, num_mtp=2
    )
    params = sharding.init(decoder.leaves(cfg), jax.random.key(0))
    tokens, position, segment = rows(1, 8)
    tokens = jnp.arange(8)[None]

    def state_at(table: jax.Array, k: int) -> jax.Array:
        own = {**params, "embed": params["embed"].at[:8].set(table)}
        hidden = decoder.run(cfg, own, tokens, position, segment).hidden
        made = mtp.run(cfg, own, hidden, tokens, position, segment)
        return jnp.sum(made[k].state[0, 3] * jnp.arange(1.0, 9.0))

    gradient = jax.jit(jax.grad(state_at), static_argnums=1)
    for k in (0, 1):
        grad = np.abs(gradient(params["embed"][:8], k)).max(axis=1)
        assert (grad[: 3 + k + 2] > 0).all()
        assert (grad[3 + k + 2 :] == 0).all()


def test_ahead_stays_inside_of_a_sequence() -> None:
    segment = jnp.asarray([[1, 1, 1, 2, 2, 0, 0]])
    np.testing.assert_array_equal(mtp.ahead(segment, 1), [[1, 1, 0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(mtp.ahead(segment, 2), [[1, 0, 0, 0, 0, 0, 0]])
    whole = jnp.ones((1, 3), jnp.int32)
    np.testing.assert_array_equal(mtp.ahead(whole, 2), [[1, 0, 0]])


def test_a_new_scalar_head_says_0_and_a_sequence_is_scored_at_its_last_token() -> None:
    params = sharding.init(heads.scalar_leaves(SMALL), jax.random.key(0))
    hidden = jax.random.normal(jax.random.key(1), (2, 6, 8))
    assert not np.any(heads.token_scores(params, hidden))
    params = {"scale": jnp.arange(8.0), "bias": jnp.asarray(0.5)}
    each = np.asarray(hidden) @ np.arange(8.0) + 0.5
    np.testing.assert_allclose(heads.token_scores(params, hidden), each, rtol=1e-5)
    segment = jnp.asarray([[1, 1, 2, 2, 2, 0], [1, 1, 1, 1, 1, 1]])
    found = heads.sequence_scores(params, hidden, segment, max_segments=3)
    want = [[each[0, 1], each[0, 4], 0], [each[1, 5], 0, 0]]
    np.testing.assert_allclose(found, want, rtol=1e-5)


TARGETS = {
    "qwen2": ("qkv", "out", "gate", "up", "down"),
    "deepseek_v3": ("q_down", "q_up", "kv_down", "kv_up", "out", "gate", "down"),
}


@pytest.mark.parametrize("family", TARGETS)
def test_adapters_start_as_nothing_and_add_their_product(family: str) -> None:
    cfg, params = hf.load(GOLDEN / family, dtype=jnp.float32)
    leaves = lora.adapter_leaves(cfg, rank=3, targets=TARGETS[family])
    adapters = sharding.init(leaves, jax.random.key(0))
    merge = partial(lora.merge, scale=2.0)
    chex.assert_trees_all_equal(merge(params, adapters), params)
    adapters = {
        name: (a, jax.random.normal(jax.random.key(1), b.shape))
        for name, (a, b) in adapters.items()
    }
    merged = merge(params, adapters)
    # The adapted output is the weight's and the adapter's, one layer, and expert, at a time.
    name = "groups/0/mixer/out"
    a, b = adapters[name]
    weight, moved = params["groups"][0]["mixer"]["out"], merged["groups"][0]["mixer"]["out"]
    x = jax.random.normal(jax.random.key(2), weight.shape[2:])
    letters = "khj"[: x.ndim]
    apply = lambda w: jnp.einsum(f"{letters},d{letters}->d", x, w)  # noqa: E731
    want = apply(weight[0]) + 2 * b[0] @ apply(a[0])
    np.testing.assert_allclose(apply(moved[0]), want, rtol=1e-4, atol=1e-5)
    if family == "deepseek_v3":
        a, b = adapters["groups/1/mlp/down"]
        assert a.shape == (1, 8, 3, 16)  # of each expert
        want = params["groups"][1]["mlp"]["down"][0, 5] + 2 * b[0, 5] @ a[0, 5]
        np.testing.assert_allclose(merged["groups"][1]["mlp"]["down"][0, 5], want, rtol=1e-4)


def test_adapters_are_written_and_read_and_belong_to_their_model(tmp_path: Path) -> None:
    adapters = sharding.init(lora.adapter_leaves(SMALL, rank=2), jax.random.key(0))
    assert adapters.keys() == {"groups/0/mixer/qkv", "groups/0/mixer/out"}
    lora.write(tmp_path / "adapters.safetensors", adapters)
    again = lora.read(tmp_path / "adapters.safetensors")
    chex.assert_trees_all_equal(again, adapters)
    params = sharding.init(decoder.leaves(SMALL), jax.random.key(0))
    with pytest.raises(ValueError, match="no weight 'groups/3/mixer/qkv'"):
        lora.merge(params, {"groups/3/mixer/qkv": again["groups/0/mixer/qkv"]}, scale=1.0)
    with pytest.raises(ValueError, match="no weight of this model is called 'kv_up'"):
        lora.adapter_leaves(SMALL, rank=2, targets=("qkv", "kv_up"))
    with pytest.raises(ValueError, match="rank must be >= 1, got 0"):
        lora.adapter_leaves(SMALL, rank=0)
