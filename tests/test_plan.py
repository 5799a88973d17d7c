"""What a plan says that devices hold is what they hold."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from r1jax import config, plan, settings, sharding
from r1jax.algos import critics
from r1jax.data import countdown
from r1jax.loops import step
from r1jax.models import decoder, heads
from r1jax.reward_model import RewardModel, scores
from r1jax.rewards.weighted import Batched, weighted
from r1jax.rollout import engine
from r1jax.settings import Critic, Engine, Mesh, Run, dense
from r1jax.state import adamw, init_state
from r1jax.types import Batch, Prompts

MODEL = dense(
    vocab_size=64, dim=32, num_layers=3, num_heads=4, num_kv_heads=2, mlp_dim=48, dtype="bfloat16"
)


def on_first_device(tree: Any) -> int:
    """Bytes of a tree of arrays on the first device."""
    first = jax.devices()[0]
    shards = [s for x in jax.tree.leaves(tree) for s in x.addressable_shards if s.device == first]
    return sum(shard.data.nbytes for shard in shards)


def debug(variant: str, mesh: Mesh) -> Run:
    return replace(config.load(f"configs/debug.py:{variant}"), mesh=mesh)


@pytest.mark.parametrize(
    ("variant", "mesh"),
    [
        ("config", Mesh(data=2, fsdp=2)),
        ("config", Mesh(data=1, fsdp=2, tensor=2)),
        ("deepseek", Mesh(data=1, expert=2, tensor=2)),
        ("deepseek", Mesh(data=1, fsdp=2, expert=2)),
    ],
)
def test_weights_moments_and_reference_take_the_bytes_of_the_plan(variant: str, mesh: Mesh) -> None:
    run = debug(variant, mesh)
    stage = run.stages[-1]
    assert isinstance(stage, settings.Reinforce)
    sizes = sharding.mesh_sizes(run.mesh, 4)
    held = plan.held_by(run.model, replace(stage, critic=None, reference="start"), sizes)
    made = sharding.make_mesh(run.mesh)
    params = sharding.init(decoder.leaves(run.model), jax.random.key(0), made)
    state = init_state(params, stage.optimizer(10), reference=True)
    assert held.weights == on_first_device(state.params)
    assert held.frozen == on_first_device(state.reference)
    # A few counts, and the learning rate, are whole on every device.
    assert 0 <= on_first_device(state.opt_state) - held.optimizer <= 64


def test_a_value_network_is_a_second_model_that_learns_after_the_first() -> None:
    run = debug("config", Mesh(data=1, fsdp=4))
    sizes = sharding.mesh_sizes(run.mesh, 4)
    stage = replace(run.stages[-1], reference="none", critic=None)
    network = Critic(
        score=heads.values,
        leaves=heads.value_leaves,
        fill=critics.as_value,
        target=critics.outcomes,
        loss=critics.value_loss,
        optimizer=partial(adamw, learning_rate=1e-3),
    )
    alone = plan.held_by(run.model, stage, sizes)
    both = plan.held_by(run.model, replace(stage, critic=network), sizes)
    head = plan.bytes_of(heads.value_leaves(run.model), sizes)
    assert both.weights == 2 * alone.weights + head
    assert both.optimizer == pytest.approx(2 * alone.optimizer + 2 * head, rel=0.01)
    assert both.gradients == alone.gradients + 2 * head  # the larger of the two


def test_adapters_alone_have_moments_and_the_weights_below_them_are_frozen() -> None:
    run = debug("config", Mesh(data=1, fsdp=4))
    sizes = sharding.mesh_sizes(run.mesh, 4)
    stage = replace(run.stages[0], lora=settings.Lora(rank=2))
    held = plan.held_by(run.model, stage, sizes)
    whole = plan.held_by(run.model, run.stages[0], sizes)
    assert held.frozen == whole.weights * jnp.dtype(run.model.dtype).itemsize // 4
    assert 0 < held.weights < whole.weights and held.optimizer < whole.optimizer


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_cache_takes_the_bytes_of_the_plan(tensor: int) -> None:
    asked = Engine(max_prompt=8, max_new=24, slots=16)
    sizes = sharding.mesh_sizes(Mesh(data=-1, tensor=tensor), 4)
    slots = 16 // sizes["data"]
    prompts = Prompts(
        tokens=jnp.zeros((4, 8), jnp.int32),
        length=jnp.full(4, 8, jnp.int32),
        index=jnp.arange(4, dtype=jnp.int32),
    )
    params = decoder.compute_weights(MODEL, sharding.init(decoder.leaves(MODEL), jax.random.key(0)))
    work = engine.prepare(MODEL, asked, params, prompts, jax.random.key(1), group=2)
    caches = engine.empty_loop(MODEL, asked, work, slots).caches
    made = sum(x.nbytes for x in jax.tree.leaves((caches, work.stored.caches)))
    every = 4 * plan.batch_parts(sizes)  # of all devices
    assert plan.cache_bytes(MODEL, asked, sizes, prompts=every) == made // tensor
    held = plan.bytes_of(plan.as_sampled(decoder.leaves(MODEL)), sizes, itemsize=2)
    assert held == pytest.approx(on_first_device(params) / tensor, rel=0.05)  # norms are whole


def test_weights_that_are_no_experts_lie_spread_over_the_experts_devices_too() -> None:
    sizes = {"fsdp": 2, "expert": 4, "tensor": 2}
    of = partial(sharding.spec, mesh_shape=sizes)
    assert of((8, 16), ("mlp", "embed")) == PartitionSpec("tensor", ("fsdp", "expert"))
    into = of((8, 8, 16), ("experts", "mlp", "embed"))
    assert into == PartitionSpec("expert", "tensor", "fsdp")
    assert of((8, 12), ("mlp", "embed")) == PartitionSpec("tensor", None)  # 8 do not divide 12


def temporary(model: settings.Decoder, mesh: Mesh) -> tuple[int, Callable[[int], bool]]:
    """Bytes that a gradient takes beside its arguments on one device, and whether something in its
    program has a layer, 2 rows of 64 tokens and so many entries as dimensions."""
    made = sharding.make_mesh(mesh)
    with jax.set_mesh(made):

        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            position = jnp.broadcast_to(jnp.arange(64), tokens.shape)
            out = decoder.run(model, params, tokens, position, jnp.ones_like(tokens))
            return jnp.sum(out.hidden.astype(jnp.float32) ** 2)

        params = sharding.abstract(decoder.leaves(model), made)
        tokens = jax.ShapeDtypeStruct((2, 64), jnp.int32)
        compiled = jax.jit(jax.grad(loss)).lower(params, tokens).compile()
    text = compiled.as_text() or ""
    size = compiled.memory_analysis().temp_size_in_bytes
    return size, lambda entries: f"[3,2,64,{entries}]" in text


def test_what_recomputed_layers_begin_with_lies_split_over_the_tensor_axis() -> None:
    model = replace(MODEL, remat="layer")
    _, whole = temporary(model, Mesh(data=1, fsdp=4))
    assert whole(32) and not whole(8)
    _, split = temporary(model, Mesh(data=1, tensor=4))
    assert split(8) and not split(32)
    sizes = sharding.mesh_sizes(Mesh(data=1, tensor=4), 4)
    stage = replace(debug("config", Mesh()).stages[0], micro_rows=2, batch_rows=2, row_length=64)
    assert plan.remat_bytes(model, stage, sizes) == math.prod((3, 2, 64, 8)) * 2
    sizes = sharding.mesh_sizes(Mesh(data=3), 3)  # who cannot share two rows has them all
    assert plan.remat_bytes(model, stage, sizes) == math.prod((3, 2, 64, 32)) * 2


def test_what_devices_cannot_share_alike_is_said() -> None:
    run = debug("config", Mesh(data=-1))
    found = plan.plan(run, 3)
    assert found[0] == "on 3 devices (data 3), MB on each:"
    rows = run.stages[-1].micro_rows
    assert f"note: rl: micro_rows={rows} is no multiple of 3 devices: each computes them all" in (
        found
    )
    with pytest.raises(ValueError, match="mesh axes must multiply to the 3 devices there are"):
        plan.plan(replace(run, mesh=Mesh(data=2)), 3)


def test_models_that_a_stage_asks_beside_its_own_are_counted_or_named() -> None:
    run = debug("config", Mesh(data=1, fsdp=4))
    sizes = sharding.mesh_sizes(run.mesh, 4)
    stage = run.stages[-1]

    def asks(model: RewardModel) -> settings.Stage:
        judge = Batched(partial(scores, model=model, prompt=countdown.short_prompt))
        return replace(stage, reward=weighted(judge=(1.0, judge)))

    plain = plan.held_by(run.model, stage, sizes)
    own = plan.held_by(run.model, asks(RewardModel(stage="base")), sizes)
    assert own.frozen - plain.frozen == plan.bytes_of(decoder.leaves(run.model), sizes)
    other = replace(run, stages=(asks(RewardModel(run="runs/other")),))
    assert plan.plan(other, 4)[-1] == "note: rl: not counted: the model of runs/other"


def test_an_update_takes_what_the_plan_says_and_the_activations_of_a_layer() -> None:
    """By the compiler's account of the loop over micro-batches, an update's largest program."""
    wide = dense(
        vocab_size=64, dim=128, num_layers=8, num_heads=4, num_kv_heads=4, mlp_dim=512,
        remat="layer",
    )  # fmt: skip
    run = replace(debug("config", Mesh(data=1, fsdp=4)), model=wide)
    stage = run.stages[0]
    assert isinstance(stage, settings.Supervised)
    objective = step.make_objective(wide, stage.loss)

    def more(total: Any, params: Any, batch: Batch, numbers: Any) -> Any:
        grads, metrics = jax.grad(objective, has_aux=True)(params, batch, numbers)
        return jax.tree.map(jnp.add, total[0], grads), metrics

    rows = jnp.zeros((stage.micro_rows, stage.row_length), jnp.int32)
    batch = Batch(
        tokens=rows, position=rows, segment=rows + 1, mask=rows == 0, weight=jnp.ones(rows.shape),
        num_tokens=jnp.float32(1),
    )  # fmt: skip
    mesh = sharding.make_mesh(run.mesh)
    with jax.set_mesh(mesh):
        params = sharding.init(decoder.leaves(wide), jax.random.key(0), mesh)
        _, metrics = jax.eval_shape(objective, params, batch, {})
        zeros = jax.tree.map(lambda x: jnp.zeros((1, *x.shape)), metrics)
        total = jax.tree.map(lambda x: x[None], params), zeros
        batches = sharding.put((batch, batch), mesh, "batch")
        add = jax.jit(partial(step.add_all, more), donate_argnums=0)
        compiled = add.lower(total, params, jnp.int32(2), {}, batches).compile()
    found = compiled.memory_analysis()
    taken = found.argument_size_in_bytes + found.temp_size_in_bytes
    held = plan.held_by(wide, stage, sharding.mesh_sizes(run.mesh, 4))
    said = held.weights + held.gradients + held.remat
    assert said < taken < 1.5 * said, (said, taken)
