"""Mixture of experts against the paper's sums in numpy, and on a mesh against one device."""

from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import settings, sharding
from r1jax.kernels.grouped import grouped_matmul
from r1jax.models import moe
from r1jax.settings import Experts

DIM = 12
SIGMOID = Experts(
    num_experts=8,
    top_k=3,
    dim=6,
    score="sigmoid",
    scale=2.5,
    num_groups=4,
    top_groups=2,
    shared_dim=6,
)
SOFTMAX = Experts(num_experts=8, top_k=2, dim=6, normalise=False)

experts = jax.jit(moe.experts, static_argnums=0)
route = jax.jit(moe.route, static_argnums=0)


@cache
def made(cfg: Experts) -> dict:
    return sharding.init(moe.experts_leaves(cfg, DIM), jax.random.key(0))


def weights(cfg: Experts) -> dict:
    params = dict(made(cfg))
    if "router_bias" in params:
        params["router_bias"] = 0.3 * jax.random.normal(jax.random.key(9), (cfg.num_experts,))
    return params


def inputs(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(5), (*shape, DIM))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def numpy_experts(cfg: Experts, params: dict, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One token at a time, in float64: output and sorted choice."""
    p = jax.tree.map(lambda w: np.asarray(w, np.float64), params)
    out, choices = np.zeros_like(x), []

    def feed(gate: np.ndarray, up: np.ndarray, down: np.ndarray, h: np.ndarray) -> np.ndarray:
        return down @ (silu(gate @ h) * (up @ h))

    for t, h in enumerate(x):
        logit = p["router"] @ h
        if cfg.score == "sigmoid":
            score = 1 / (1 + np.exp(-logit))
            value = score + p["router_bias"]
        else:
            score = value = np.exp(logit) / np.exp(logit).sum()
        size = cfg.num_experts // cfg.num_groups
        best = [np.sort(value[g * size :][:size])[-2:].sum() for g in range(cfg.num_groups)]
        groups = np.argsort(best)[-cfg.top_groups :]
        allowed = [e for e in range(cfg.num_experts) if e // size in groups]
        chosen = sorted(allowed, key=lambda e: -value[e])[: cfg.top_k]
        total = score[chosen].sum() if cfg.normalise else 1.0
        for e in chosen:
            mine = feed(p["gate"][e], p["up"][e], p["down"][e], h)
            out[t] += cfg.scale * score[e] / total * mine
        if cfg.shared_dim:
            out[t] += feed(*(p["shared"][name] for name in ("gate", "up", "down")), h)
        choices.append(sorted(chosen))
    return out, np.asarray(choices)


@pytest.mark.parametrize("cfg", [SIGMOID, SOFTMAX], ids=["sigmoid", "softmax"])
def test_the_mixture_is_the_papers_sum_over_chosen_experts(cfg: Experts) -> None:
    params, x = weights(cfg), inputs(2, 10)
    found, routing = experts(cfg, params, x)
    want, choice = numpy_experts(cfg, params, np.asarray(x, np.float64).reshape(20, DIM))
    np.testing.assert_array_equal(np.sort(routing.choice, axis=-1).reshape(20, -1), choice)
    np.testing.assert_allclose(found.reshape(20, DIM), want, atol=2e-5)


def every_product(x: jax.Array, weight: jax.Array, sizes: jax.Array) -> jax.Array:
    """Every row times every matrix, of which those of its own group are kept."""
    end = jnp.cumsum(sizes)
    row = jnp.arange(x.shape[0])[:, None]
    member = (row >= (end - sizes)[None]) & (row < end[None])
    return jnp.einsum("nd,efd,ne->nf", x, weight, member.astype(x.dtype))


@pytest.mark.parametrize("sizes", [[3, 0, 4, 2], [0, 0, 0, 9], [0, 0, 0, 0], [1, 2, 3, 1]])
def test_grouped_products_and_their_gradients_are_those_of_every_product(sizes: list[int]) -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (9, 5))
    weight = jax.random.normal(keys[1], (4, 3, 5))
    counts = jnp.asarray(sizes)

    def total(x: jax.Array, weight: jax.Array, multiply) -> jax.Array:
        return jnp.sum(jnp.sin(multiply(x, weight, counts)))

    found = jax.jit(grouped_matmul)(x, weight, counts)
    np.testing.assert_allclose(found, jax.jit(every_product)(x, weight, counts), atol=1e-5)
    gradient = jax.jit(jax.grad(total, (0, 1)), static_argnums=2)
    grads = gradient(x, weight, grouped_matmul)
    wanted = gradient(x, weight, every_product)
    for ours, theirs in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


MESHES = [{"expert": 2, "tensor": 2}, {"fsdp": 2, "expert": 2}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_experts_spread_over_devices_give_the_same_output_and_gradients(axes: dict) -> None:
    params, x = weights(SIGMOID), inputs(4, 6)

    def total(params: dict, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        out, _ = moe.experts(SIGMOID, params, x)
        return jnp.sum(jnp.sin(out)), out

    run = jax.value_and_grad(total, (0, 1), has_aux=True)
    (_, want), wanted = jax.jit(run)(params, x)
    mesh = sharding.make_mesh(settings.Mesh(**{"data": 1, **axes}))
    with jax.set_mesh(mesh):
        places = sharding.shardings(moe.experts_leaves(SIGMOID, DIM), mesh)
        split = jax.device_put(params, places)
        (_, found), grads = jax.jit(run)(split, sharding.put(x, mesh, "batch"))
    np.testing.assert_allclose(found, want, atol=1e-5)
    chex.assert_trees_all_close(grads, wanted, rtol=1e-7, atol=1e-5)


@pytest.mark.parametrize("count", [16, 7])
def test_no_token_is_dropped_when_all_choose_the_experts_of_one_device(count: int) -> None:
    params, x = weights(SOFTMAX), inputs(count)
    choice = jnp.broadcast_to(jnp.asarray([6, 7]), (count, 2))  # four times an even share
    want, _ = experts(SOFTMAX, params, x, choice=choice)
    mesh = sharding.make_mesh(settings.Mesh(data=1, expert=4))
    with jax.set_mesh(mesh):
        found, _ = jax.jit(lambda p, x, c: moe.experts(SOFTMAX, p, x, choice=c))(params, x, choice)
    assert float(jnp.min(jnp.abs(want).max(axis=-1))) > 1e-3
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_a_replayed_choice_is_taken_and_weighted_by_the_routers_own_scores() -> None:
    params, x = weights(SIGMOID), inputs(5)
    other = jnp.tile(jnp.asarray([[0, 3, 7]]), (5, 1))  # the router would need two groups
    weight, routing = route(SIGMOID, params, x, choice=other)
    np.testing.assert_array_equal(routing.choice, other)
    score = 1 / (1 + np.exp(-np.asarray(x) @ np.asarray(params["router"]).T))
    chosen = np.take_along_axis(score, np.asarray(other), axis=1)
    np.testing.assert_allclose(weight, 2.5 * chosen / chosen.sum(1, keepdims=True), rtol=1e-5)
    own, before = experts(SIGMOID, params, x)
    again, _ = experts(SIGMOID, params, x, choice=before.choice)
    np.testing.assert_allclose(again, own, atol=1e-6)


def test_the_bias_changes_the_choice_but_neither_weights_nor_gradients() -> None:
    params, x = weights(SIGMOID), inputs(6)
    moved = {**params, "router_bias": params["router_bias"].at[4:6].add(10.0)}
    _, routing = route(SIGMOID, moved, x)
    assert all({4, 5} <= set(row.tolist()) for row in np.asarray(routing.choice))
    np.testing.assert_array_equal(routing.score, route(SIGMOID, params, x)[1].score)

    def total(params: dict) -> jax.Array:
        return jnp.sum(moe.experts(SIGMOID, params, x)[0])

    grads = jax.jit(jax.grad(total))(moved)
    assert not np.any(grads["router_bias"])
    assert np.any(grads["router"])


def test_load_and_its_statistics_count_real_tokens_only() -> None:
    choice = jnp.asarray([[[0, 1], [0, 2], [3, 3]]])
    routing = moe.Routing(choice=choice, score=jnp.ones((1, 3, 4)))
    load = moe.load(routing, jnp.asarray([[True, True, False]]), num_experts=4)
    np.testing.assert_array_equal(load, [2, 1, 1, 0])
    found = moe.statistics(load)
    assert float(found["load_max"]) == 2.0  # half of the choices, of which a quarter is even
    assert float(found["load_idle"]) == 0.25
    entropy = -(0.5 * np.log(0.5) + 2 * 0.25 * np.log(0.25)) / np.log(4)
    np.testing.assert_allclose(found["load_entropy"], entropy, rtol=1e-6)
    even = moe.statistics(jnp.full((4,), 3.0))
    np.testing.assert_allclose([even["load_max"], even["load_entropy"]], [1, 1], rtol=1e-6)


def test_the_bias_moves_by_its_rate_towards_the_mean_load() -> None:
    bias = jnp.asarray([[0.5, 0.0, 0.0, 0.0]])
    load = jnp.asarray([[7.0, 1.0, 4.0, 4.0]])
    np.testing.assert_allclose(moe.update_bias(bias, load, rate=0.001), [[0.499, 0.001, 0, 0]])


def test_repeated_bias_updates_balance_a_router_that_was_not() -> None:
    cfg = Experts(num_experts=4, top_k=1, dim=6, score="sigmoid")
    x = inputs(400)
    tilt = jnp.zeros((4, DIM)).at[:, 0].set(jnp.asarray([1.0, 0, 0, 0]))
    params = {**weights(cfg), "router_bias": jnp.zeros(4)}
    params["router"] = 0.3 * params["router"] + tilt
    x = x.at[:, 0].set(3.0)
    mask = jnp.ones(400, bool)

    @jax.jit
    def step(bias: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, routing = moe.route(cfg, {**params, "router_bias": bias}, x)
        load = moe.load(routing, mask, num_experts=4)
        return moe.update_bias(bias, load, rate=0.01), load

    bias, first = step(params["router_bias"])
    for _ in range(60):
        bias, load = step(bias)
    assert float(first.max()) > 250
    assert float(load.max()) < 130


def test_the_sequence_balance_is_the_papers_sum_for_each_sequence() -> None:
    rng = np.random.default_rng(0)
    score = rng.uniform(0.1, 1, (2, 9, 4)).astype(np.float32)
    choice = np.argsort(-score, axis=-1)[..., :2]
    segment = np.asarray([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    each = []
    for row, number in ((0, 1), (0, 2), (1, 1)):
        here = segment[row] == number
        length = here.sum()
        used = np.asarray([(choice[row][here] == e).sum() for e in range(4)]) * 4 / (2 * length)
        share = score[row][here] / score[row][here].sum(-1, keepdims=True)
        each.append((used * share.mean(0)).sum())
    routing = moe.Routing(choice=jnp.asarray(choice), score=jnp.asarray(score))
    length = np.asarray([[4, 4, 4, 4, 3, 3, 3, 1, 1], [9] * 9])
    weight = np.where(segment > 0, 1 / (3 * length), 0).astype(np.float32)  # a third for each
    found = moe.sequence_balance(routing, jnp.asarray(segment), jnp.asarray(weight))
    np.testing.assert_allclose(found, np.mean(each), rtol=1e-5)


def test_only_groups_with_a_bias_are_moved() -> None:
    params = {
        "groups": [{"mlp": {"gate": 1}}, {"mlp": {"router_bias": jnp.zeros((2, 2)), "gate": 1}}]
    }
    found = moe.moved(params, [None, jnp.asarray([[3.0, 1.0], [2.0, 2.0]])], rate=0.5)
    np.testing.assert_array_equal(
        found["groups"][1]["mlp"]["router_bias"], [[-0.5, 0.5], [0.0, 0.0]]
    )
    assert found["groups"][0] == params["groups"][0]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"top_k": 9}, "top_k must be in 1..num_experts, got 9 of 8"),
        ({"num_groups": 3}, "multiple of num_groups, got 8 and 3"),
        ({"num_groups": 4, "top_groups": 5}, "top_groups must be in 1..num_groups"),
        ({"num_groups": 4, "top_groups": 1, "top_k": 3}, "hold top_k experts"),
        ({"num_groups": 8, "top_groups": 4}, "a group needs 2 experts or more"),
    ],
)
def test_settings_that_cannot_be_are_refused(change: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Experts(**{"num_experts": 8, "top_k": 2, "dim": 4, **change})


def test_experts_are_exchanged_inside_of_a_map_over_the_rows_too() -> None:
    params, x = weights(SIGMOID), inputs(4, 6)
    want, _ = experts(SIGMOID, params, x)
    mesh = sharding.make_mesh(settings.Mesh(data=2, expert=2))
    split = jax.sharding.PartitionSpec("data")
    run = jax.shard_map(
        lambda params, x: moe.experts(SIGMOID, params, x)[0],
        in_specs=(jax.sharding.PartitionSpec(), split),
        out_specs=split,
        axis_names={"data"},
        check_vma=False,
    )
    with jax.set_mesh(mesh):
        found = jax.jit(run)(params, x)
    np.testing.assert_allclose(found, want, atol=1e-5)
