"""Stages that train adapters alone: their gradients, what stays, and who has which weights."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax import checkpoint, config, metrics, preflight, settings, sharding
from r1jax.algos import advantages, critics, losses
from r1jax.algos.kl import k3
from r1jax.data import countdown
from r1jax.data.tokenizer import tiny
from r1jax.loops import adapters, learning, supervised
from r1jax.loops.run import Context
from r1jax.loops.step import make_logp, make_objective, make_update
from r1jax.models import adapted, decoder, heads, lora
from r1jax.settings import Lora
from r1jax.state import adamw, init_state
from r1jax.types import Batch, Params, Rollout

RUN = config.load(str(Path(__file__).with_name("small_config.py")))
BASE, RL = RUN.stages
assert isinstance(BASE, settings.Supervised) and isinstance(RL, settings.Reinforce)
SFT = replace(
    BASE,
    source=partial(countdown.attempts_rows, 50, seed=0, counts=(3,), max_attempts=1),
    lora=Lora(rank=2, scale=2.0),
    optimizer=partial(adamw, learning_rate=1e-2),
    steps=6,
    row_length=48,
    log_every=1,
)


def one_device() -> jax.sharding.Mesh:
    """Programs for one device are compiled in half the time."""
    return jax.make_mesh(
        (1,) * len(sharding.AXES),
        sharding.AXES,
        devices=jax.devices()[:1],
        axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
    )


def make_context(folder: Path, mesh: jax.sharding.Mesh, model: settings.Decoder) -> Context:
    return Context(
        run=replace(RUN, model=model),
        folder=folder,
        text=[],
        tokenizer=tiny(),
        mesh=mesh,
        writer=metrics.open_writer(folder),
        stopping=lambda: False,
    )


def bits(tree: Params) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


def moved(trained: Params) -> Params:
    """Adapters whose `b` is not 0 any more."""
    rng = np.random.default_rng(0)
    noise = lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype)  # noqa: E731
    return {**trained, "lora": jax.tree.map(noise, trained["lora"])}


def shown() -> optax.GradientTransformation:
    """An optimizer that leaves the weights and shows the gradient in its state."""
    zeros = partial(jax.tree.map, jnp.zeros_like)
    return optax.GradientTransformation(zeros, lambda grads, state, params: (zeros(grads), grads))


# --------------------------------------------------------------------------- gradients


def texts(vocabulary: int) -> list[Batch]:
    """Two micro-batches of one row each, of five tokens that count in all."""
    tokens = np.random.default_rng(1).integers(0, vocabulary, (2, 8)).astype(np.int32)
    mask = np.arange(8)[None] >= np.asarray([[5], [6]])
    rows = {
        "tokens": tokens,
        "position": np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8)),
        "segment": np.ones((2, 8), np.int32),
        "mask": mask,
        "weight": np.where(mask, 0.2, 0.0).astype(np.float32),
    }
    each = [{name: x[i : i + 1] for name, x in rows.items()} for i in range(2)]
    return [Batch(**one, num_tokens=np.float32(5)) for one in each]


def by_the_chain_rule(
    a: np.ndarray, b: np.ndarray, grad: np.ndarray, scale: float
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of a and b from that of w + scale * b @ a, layer by layer."""
    stacked = a.ndim + b.ndim - grad.ndim - 2
    lead, rank = b.shape[:stacked], b.shape[-1]
    a2, b2 = a.reshape(*lead, rank, -1), b.reshape(*lead, -1, rank)
    g = np.asarray(grad, np.float64).reshape(*lead, b2.shape[-2], a2.shape[-1])
    of_a, of_b = scale * b2.swapaxes(-1, -2) @ g, scale * g @ a2.swapaxes(-1, -2)
    return of_a.reshape(a.shape), of_b.reshape(b.shape)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    size = np.abs(expected).max()
    assert size > 0
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * size)


def test_gradients_of_adapters_are_those_of_the_merged_weights_by_the_chain_rule(
    tmp_path: Path,
) -> None:
    """Of two layers and two micro-batches, through the loop's update."""
    mesh, scale = one_device(), 2.0
    cfg = settings.dense(
        vocab_size=16, dim=8, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=8, remat="layer"
    )
    stage = replace(SFT, lora=Lora(rank=3, scale=scale))
    objective, batches = make_objective(cfg, losses.cross_entropy), texts(cfg.vocab_size)
    with jax.set_mesh(mesh):
        params = sharding.init(decoder.leaves(cfg), jax.random.key(0), mesh)
        found = adapters.of_stage(stage, make_context(tmp_path, mesh, cfg), params)
        trained = moved(found.first)
        merged, kept = found.merged(trained), lora_of(trained)
        update = make_update(found.objective(objective), shown())
        state, measured = update(init_state(trained, shown()), batches, **found.told)
        gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))
        each = [gradient(merged, batch, {}) for batch in batches]
    assert float(measured["loss"]) == pytest.approx(float(each[0][0][0] + each[1][0][0]), rel=1e-5)
    whole = jax.tree.map(
        lambda *g: sum(np.asarray(x, np.float64) for x in g), *[g for _, g in each]
    )
    flat = jax.tree_util.tree_leaves_with_path(whole)
    of_weight = {jax.tree_util.keystr(path, simple=True, separator="/"): g for path, g in flat}
    assert state.opt_state.keys() == {"lora"} and len(kept) == 5
    for name, grads in lora_of(state.opt_state).items():
        expected = by_the_chain_rule(*kept[name], of_weight[name], scale)
        for one, other in zip(grads, expected, strict=True):
            close(one, other)


def test_each_expert_of_each_layer_has_an_adapter_and_its_gradient() -> None:
    rng = np.random.default_rng(0)
    w, a, b, grad = (
        rng.normal(size=(2, 3, *shape)).astype(np.float32)
        for shape in ((5, 4), (2, 4), (5, 2), (5, 4))
    )
    total = lambda a, b: adapted.total(adapted.Adapted(weight=w, a=a, b=b, scale=0.5))  # noqa: E731
    found, pull = jax.vjp(total, a, b)
    close(found[1, 2], w[1, 2] + 0.5 * (b[1, 2] @ a[1, 2]))
    for one, other in zip(pull(grad), by_the_chain_rule(a, b, grad, 0.5), strict=True):
        close(one, other)


def lora_of(tree: Params) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    return {name: (np.asarray(a), np.asarray(b)) for name, (a, b) in tree["lora"].items()}


# --------------------------------------------------------------------------- on texts


def test_on_texts_adapters_learn_and_the_weights_keep_every_bit(tmp_path: Path) -> None:
    """The weights in bfloat16: they have the dtype that they came with, adapters are float32."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        params = sharding.init(decoder.leaves(RUN.model), jax.random.key(0), mesh)
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        before, arrays = bits(params), jax.tree.leaves(params)
        context = make_context(tmp_path, mesh, RUN.model)
        left = supervised.train(SFT, context, params)
    log = [row["loss"] for row in metrics.read(tmp_path)]
    assert log[-1] < log[0] - 0.1
    assert bits(params) == before and not any(x.is_deleted() for x in arrays)
    assert left["embed"] is params["embed"]  # held once
    assert left.keys() == params.keys()
    # A checkpoint has the adapters and Adam's moments of them, and nothing of the weights' size.
    saved = json.loads((tmp_path / "checkpoints" / "base" / "6" / "meta.json").read_text())
    names = set(saved["arrays"])
    weighty = {name for name, text in saved["arrays"].items() if not text.endswith("[]")}
    assert len(weighty) == 3 * 2 * 5  # a and b of five weights: they, and two moments
    assert all("lora/groups/0/" in name for name in weighty)
    assert "params/lora/groups/0/mixer/qkv/0" in names
    a, b = checkpoint.load(
        tmp_path / "checkpoints" / "base", 6, {"params": like(RUN.model, SFT, mesh)}
    ).state["params"]["lora"]["groups/0/mlp/down"]
    want = np.asarray(params["groups"][0]["mlp"]["down"], np.float64) + 2.0 * (b @ a)
    np.testing.assert_allclose(left["groups"][0]["mlp"]["down"], want, atol=1e-6)


def like(model: settings.Decoder, stage: settings.Trained, mesh: jax.sharding.Mesh) -> Params:
    assert stage.lora is not None
    leaves = lora.adapter_leaves(model, rank=stage.lora.rank, targets=stage.lora.targets)
    return {"lora": sharding.abstract(leaves, mesh)}


# --------------------------------------------------------------------------- with rewards


def test_policy_reference_and_critic_share_one_copy_of_the_weights(
    two_pairs: Rollout, tmp_path: Path
) -> None:
    """PPO with a value network of its own: adapters and a head. The reference is the base."""
    mesh = one_device()
    model = replace(RUN.model, vocab_size=16)
    critic = settings.Critic(
        score=heads.values,
        leaves=heads.value_leaves,
        fill=critics.as_value,
        target=advantages.value_targets,
        loss=critics.value_loss,
        optimizer=partial(adamw, learning_rate=1e-2),
    )
    stage = replace(
        RL,
        lora=Lora(rank=2, targets=("qkv", "down")),
        critic=critic,
        advantage=advantages.ppo,
        loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2, kl=k3, kl_weight=0.1),
        reference="start",
    )
    rollout = two_pairs
    with jax.set_mesh(mesh):
        params = sharding.init(decoder.leaves(model), jax.random.key(0), mesh)
        before = bits(params)
        context = make_context(tmp_path, mesh, model)
        learner, state = learning.begin(stage, context, params)
        assert state.critic is not None
        # What is there of the weights' shapes is of the heads and the adapters.
        names = {"groups/0/mixer/qkv", "groups/0/mlp/down"}
        for tree in (state.params, state.reference, state.critic.params):
            assert tree["lora"].keys() == names and tree.keys() - {"lora"} <= {"value"}
        for step in (1, 2):
            found, said = learning.look_again(stage, context, rollout, state, learner, step)
            state, values = learning.improve(stage, context, found, said, state, learner, step)
            assert values["grad_norm"] > 0 and values["critic/grad_norm"] > 0
            if step == 1:
                first = found.logp_ref
        assert found.logp_ref is not None and state.critic is not None
        np.testing.assert_array_equal(found.logp_ref, first)
        assert bits(params) == before
        trained, valued = lora_of(state.params), lora_of(state.critic.params)
        for name in names:
            assert np.any(trained[name][1]) and np.any(valued[name][1])
            assert np.any(trained[name][1] != valued[name][1])
        # The policy's first tokens of the prompts, by the base alone.
        answers = {"tokens": np.asarray([[3, 4, 6, 1]], np.int32)}
        row = Batch(
            **answers,
            position=np.arange(4, dtype=np.int32)[None],
            segment=np.ones((1, 4), np.int32),
            mask=np.arange(4)[None] > 1,
            weight=np.zeros((1, 4), np.float32),
            num_tokens=np.float32(2),
        )
        logp = make_logp(model)
        np.testing.assert_allclose(found.logp_ref[0], logp(params, row)[0][0, 2:], atol=1e-6)
        # What the engine is given says the same as the adapters beside the weights, now moved.
        sampled = logp(learner.sampled(state.params), row)[0]
        np.testing.assert_allclose(sampled, learner.logp_of(state.params, row)[0], atol=1e-6)
        assert np.abs(sampled[0, 2:] - found.logp_ref[0]).max() > 1e-4


# --------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be >= 1, got 0"),
        ({"scale": 0.0}, "scale must be > 0 and finite, got 0.0"),
        ({"scale": math.inf}, "scale must be > 0 and finite, got inf"),
        ({"targets": ()}, "targets must name a weight at least"),
    ],
)
def test_adapters_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Lora(**{"rank": 2, **changes})


def test_a_stage_that_counts_on_weights_it_does_not_train_is_refused() -> None:
    group = RUN.model.groups[0]
    experts = settings.Experts(num_experts=4, top_k=2, dim=8, score="sigmoid")
    model = replace(RUN.model, num_mtp=1, groups=(replace(group, mlp=experts),))
    for changes in ({"mtp_weight": 0.1}, {"bias_rate": 0.1}):
        stage = replace(SFT, auxiliary=settings.Auxiliary(**changes))
        with pytest.raises(ValueError, match=r"^base.lora leaves prediction modules and routers"):
            replace(RUN, model=model, stages=(stage,))
    with pytest.raises(ValueError, match=r"^base.lora.targets: no weight .* called 'kv_up'"):
        preflight.check_lora(RUN.model, "base", Lora(rank=1, targets=("qkv", "kv_up")))


def test_an_adapter_of_another_shape_is_refused() -> None:
    wide = replace(RUN.model, dim=24)
    params, found = (
        jax.tree.map(lambda x: jnp.asarray(np.zeros(x.shape)), leaves, is_leaf=sharding.is_leaf)
        for leaves in (decoder.leaves(RUN.model), lora.adapter_leaves(wide, rank=2))
    )
    with pytest.raises(ValueError, match=r"the adapter of groups/0/mixer/\w+ does not fit"):
        lora.attach(params, found, scale=1.0)
