"""An update is the same however it is packed, cut into micro-batches or split over devices."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax import settings, sharding
from r1jax.algos.kl import k3
from r1jax.algos.losses import policy_loss
from r1jax.algos.weights import sequence_mean
from r1jax.data.packing import collect
from r1jax.loops.batches import pack_answers
from r1jax.loops.step import make_logp, make_objective, make_update
from r1jax.models import decoder
from r1jax.rollout.answers import to_host
from r1jax.rollout.engine import make_engine
from r1jax.state import init_state
from r1jax.types import Batch, Prompts, Rollout

CFG = settings.dense(
    vocab_size=32, dim=32, num_layers=2, num_heads=4, num_kv_heads=4, mlp_dim=48, qk_norm=True
)
MESHES = {
    "one device": None,
    "data 4": settings.Mesh(data=4),
    "fsdp 4": settings.Mesh(data=1, fsdp=4),
    "tensor 4": settings.Mesh(data=1, tensor=4),
    "fsdp 2, tensor 2": settings.Mesh(data=1, fsdp=2, tensor=2),
}


@cache
def weights() -> dict[str, Any]:
    """Initial weights of CFG, on the host."""
    return jax.tree.map(np.asarray, sharding.init(decoder.leaves(CFG), jax.random.key(0)))


def a_rollout() -> Rollout:
    """Twelve answers of 0 to 20 tokens to three prompts, with log-probs near a policy's."""
    rng = np.random.default_rng(0)
    answer_length = np.asarray([3, 20, 1, 7, 12, 12, 5, 0, 9, 20, 18, 2], np.int32)
    past = np.arange(20)[None] >= answer_length[:, None]
    return Rollout(
        prompt=rng.integers(2, 32, (3, 6)).astype(np.int32),
        prompt_length=np.asarray([6, 1, 4], np.int32),
        answer=np.where(past, 0, rng.integers(1, 32, (12, 20))).astype(np.int32),
        answer_length=answer_length,
        finished=np.ones(12, bool),
        logp_rollout=np.where(past, 0, rng.normal(-3.4, 0.1, (12, 20))).astype(np.float32),
        decode_steps=np.int32(0),
        slot_steps=np.int32(0),
    )


def alone(rollout: Rollout, extras: dict[str, np.ndarray]) -> Batch:
    """Each answer after its own copy of the prompt, one to a row, one segment."""
    fields = {name: np.zeros((12, 26), np.float32) for name in extras}
    fields |= {name: np.zeros((12, 26), np.int32) for name in ("tokens", "position", "segment")}
    fields["mask"] = np.zeros((12, 26), bool)
    for i, size in enumerate(rollout.answer_length):
        start = rollout.prompt_length[i // 4]
        end = start + size
        fields["tokens"][i, :start] = rollout.prompt[i // 4, :start]
        fields["tokens"][i, start:end] = rollout.answer[i, :size]
        fields["position"][i, :end] = np.arange(end)
        fields["segment"][i, :end] = 1
        fields["mask"][i, start:end] = True
        for name, values in extras.items():
            fields[name][i, start:end] = values[i, :size]
    return Batch(**fields, num_tokens=np.float32(rollout.answer_length.sum()))


def step(
    *, row_length: int | None = None, micro_rows: int = 1, mesh: settings.Mesh | None = None
) -> tuple[dict[str, np.ndarray], float]:
    """The gradient (by plain gradient descent at rate 1) and the loss of one update.

    Without `row_length`, of answers that stand alone.
    """
    rng = np.random.default_rng(1)
    rollout = a_rollout()
    mask = np.arange(20)[None] < rollout.answer_length[:, None]
    extras = {
        "weight": sequence_mean(mask),
        "advantage": (rng.normal(size=(12, 1)) * mask).astype(np.float32),
        "logp_rollout": rollout.logp_rollout,
        "logp_ref": (rollout.logp_rollout + 0.1 * mask).astype(np.float32),
    }
    if row_length is None:
        batches = [alone(rollout, extras)]
    else:
        _, batches = pack_answers(
            rollout, np.arange(12), extras, row_length=row_length, micro_rows=micro_rows
        )
    optimizer = optax.sgd(1.0)
    loss = partial(policy_loss, kl=k3, kl_weight=0.1)
    update = make_update(make_objective(CFG, loss), optimizer)
    before = weights()
    if mesh is None:
        state, metrics = update(init_state(jax.tree.map(jnp.array, before), optimizer), batches)
    else:
        made = sharding.make_mesh(mesh)
        with jax.set_mesh(made):
            params = jax.device_put(before, sharding.shardings(decoder.leaves(CFG), made))
            placed = [sharding.put(batch, made, "batch") for batch in batches]
            state, metrics = update(init_state(params, optimizer), placed)
    gradient = jax.tree.map(lambda a, b: a - np.asarray(b), before, state.params)
    named = jax.tree_util.tree_leaves_with_path(gradient)
    return {jax.tree_util.keystr(path): g for path, g in named}, float(metrics["loss"])


@pytest.fixture(scope="module")
def expected() -> tuple[dict[str, np.ndarray], float]:
    """One answer to a row with a prompt of its own, all rows at once, one device."""
    gradient, loss = step()
    assert all(np.abs(g).max() > 1e-4 for g in gradient.values())
    return gradient, loss


@pytest.mark.parametrize(
    ("row_length", "micro_rows"), [(26, 1), (26, 3), (64, 2), (70, 1), (200, 1)]
)
def test_shared_prompts_packing_and_micro_batches_change_neither_loss_nor_gradient(
    expected: tuple[dict[str, np.ndarray], float], row_length: int, micro_rows: int
) -> None:
    gradient, loss = step(row_length=row_length, micro_rows=micro_rows)
    assert abs(loss - expected[1]) <= 1e-5
    for name, g in gradient.items():
        np.testing.assert_allclose(g, expected[0][name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_devices_change_neither_loss_nor_gradient(
    expected: tuple[dict[str, np.ndarray], float], mesh: str
) -> None:
    gradient, loss = step(row_length=66, micro_rows=4, mesh=MESHES[mesh])
    assert abs(loss - expected[1]) <= 1e-5
    for name, g in gradient.items():
        np.testing.assert_allclose(g, expected[0][name], atol=1e-5, err_msg=name)


def test_weights_and_optimizer_are_split_by_the_rules() -> None:
    mesh = sharding.make_mesh(settings.Mesh(data=1, fsdp=2, tensor=2))
    with jax.set_mesh(mesh):
        params = sharding.init(decoder.leaves(CFG), jax.random.key(0), mesh)
        state = init_state(params, optax.adam(1e-3))
    jax.tree.map(np.testing.assert_array_equal, params, weights())
    adam = state.opt_state[0]
    for tree in (params, adam.mu, adam.nu):
        qkv = tree["groups"][0]["mixer"]["qkv"]  # [L, K, R + 2, H, D]: K by tensor, D by fsdp
        assert qkv.addressable_shards[0].data.shape == (2, 2, 3, 8, 16)
        assert tree["embed"].addressable_shards[0].data.shape == (16, 16)
        assert tree["norm"].addressable_shards[0].data.shape == (32,)


@pytest.fixture(scope="module")
def sampled() -> tuple[Callable[..., Rollout], Prompts, Rollout]:
    """An engine, prompts, and what it answers to them on one device."""
    rng = np.random.default_rng(0)
    prompts = Prompts(
        tokens=rng.integers(2, 32, (4, 6)).astype(np.int32),
        length=np.asarray([6, 2, 4, 5], np.int32),
        index=np.arange(4, dtype=np.int32),
    )
    engine = settings.Engine(max_prompt=6, max_new=24, slots=4)
    generate = jax.jit(make_engine(CFG, engine, group=2, stop=(1,)))
    return generate, prompts, generate(weights(), prompts, jax.random.key(0))


@pytest.mark.parametrize("mesh", list(MESHES)[1:])
def test_answers_do_not_change_with_the_devices(
    sampled: tuple[Callable[..., Rollout], Prompts, Rollout], mesh: str
) -> None:
    generate, prompts, expected = sampled
    made = sharding.make_mesh(MESHES[mesh] or settings.Mesh())
    with jax.set_mesh(made):
        params = jax.device_put(weights(), sharding.shardings(decoder.leaves(CFG), made))
        found = generate(params, sharding.put(prompts, made, "batch"), jax.random.key(0))
    np.testing.assert_array_equal(found.answer, expected.answer)
    np.testing.assert_allclose(found.logp_rollout, expected.logp_rollout, atol=1e-5)


def logps(cfg: settings.Decoder, rollout: Rollout, row_length: int) -> np.ndarray:
    """The trainer's log-probability of every answer token, [B, A]."""
    count, width = rollout.answer.shape
    none = {"weight": np.zeros((count, width), np.float32)}
    packing, batches = pack_answers(
        rollout, np.arange(count), none, row_length=row_length, micro_rows=1
    )
    logp_of = make_logp(cfg)
    return collect(
        packing, np.concatenate([logp_of(weights(), b)[0] for b in batches]), width=width
    )


def test_the_trainers_log_probabilities_do_not_depend_on_packing() -> None:
    rollout = a_rollout()
    batch = alone(rollout, {"weight": np.zeros((12, 20), np.float32)})
    rows = np.asarray(make_logp(CFG)(weights(), batch)[0])
    expected = np.zeros((12, 20), np.float32)
    for i, size in enumerate(rollout.answer_length):
        expected[i, :size] = rows[i, batch.mask[i]]
    for row_length in (26, 100):
        np.testing.assert_allclose(logps(CFG, rollout, row_length), expected, atol=1e-5)


def test_with_sums_in_float64_log_probabilities_have_the_same_bits_in_rows_of_any_length() -> None:
    cfg = replace(CFG, sums="float64")
    rng = np.random.default_rng(0)
    prompts = Prompts(
        tokens=rng.integers(2, 32, (3, 30)).astype(np.int32),
        length=np.asarray([30, 11, 22], np.int32),
        index=np.arange(3, dtype=np.int32),
    )
    engine = settings.Engine(max_prompt=30, max_new=90, slots=12)
    generate = jax.jit(make_engine(cfg, engine, group=4, stop=(1,)))
    rollout = to_host(generate(weights(), prompts, jax.random.key(1)))
    short, long = logps(cfg, rollout, 144), logps(cfg, rollout, 256)
    np.testing.assert_array_equal(short, long)
    np.testing.assert_allclose(short, rollout.logp_rollout, atol=1e-5)


@pytest.mark.parametrize("mesh", ["data 4", "fsdp 2, tensor 2"])
def test_log_probabilities_do_not_change_with_the_devices(mesh: str) -> None:
    none = {"weight": np.zeros((12, 20), np.float32)}
    _, batches = pack_answers(a_rollout(), np.arange(12), none, row_length=66, micro_rows=4)
    expected = make_logp(CFG)(weights(), batches[0])[0]
    made = sharding.make_mesh(MESHES[mesh] or settings.Mesh())
    with jax.set_mesh(made):
        placed = sharding.put(batches[0], made, "batch")
        params = jax.device_put(weights(), sharding.shardings(decoder.leaves(CFG), made))
        found = make_logp(CFG)(params, placed)[0]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_mesh_that_does_not_fit_the_devices_is_refused() -> None:
    with pytest.raises(ValueError, match="multiply to the 4 devices there are, got data=3"):
        sharding.make_mesh(settings.Mesh(data=3))
    with pytest.raises(ValueError, match="context must be 1: nothing is split over it, got 2"):
        sharding.make_mesh(settings.Mesh(context=2))
    assert dict(sharding.make_mesh(settings.Mesh(fsdp=2)).shape)["data"] == 2


def test_temperature_divides_the_logits() -> None:
    params = weights()
    batch = alone(a_rollout(), {"weight": np.zeros((12, 20), np.float32)})

    @jax.jit
    def tempered(params: dict, *rows: jax.Array) -> jax.Array:
        hidden = decoder.run(CFG, params, *rows).hidden
        return jax.nn.log_softmax(hidden[:, :-1] @ params["embed"].T / 0.5)

    logp = tempered(params, batch.tokens, batch.position, batch.segment)
    expected = np.take_along_axis(np.asarray(logp), batch.tokens[:, 1:, None], -1)[..., 0]
    found = np.asarray(make_logp(CFG)(params, batch, 0.5)[0])[:, 1:]
    real = batch.position[:, 1:] > 0
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)
