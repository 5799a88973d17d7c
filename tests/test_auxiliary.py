"""What an update does for experts and prediction modules, whatever way its rows are packed."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from r1jax import config, settings, sharding
from r1jax.algos.losses import policy_loss
from r1jax.loops import auxiliary
from r1jax.loops.batches import pack_answers
from r1jax.loops.step import make_logp, make_objective, make_update
from r1jax.models import decoder
from r1jax.rollout.answers import concatenate, take, to_host
from r1jax.rollout.engine import make_engine
from r1jax.settings import Auxiliary, Engine
from r1jax.state import init_state
from r1jax.types import Batch, Prompts, Rollout

MIXER = settings.Attention(num_heads=2, num_kv_heads=1, head_dim=8)
EXPERTS = settings.Experts(num_experts=8, top_k=2, dim=8, score="sigmoid")
CFG = settings.Decoder(
    vocab_size=64,
    dim=16,
    groups=(
        settings.Group(count=1, mixer=MIXER, mlp=settings.Mlp(dim=8)),
        settings.Group(count=1, mixer=MIXER, mlp=EXPERTS),
    ),
    num_mtp=1,
)
ALL = np.arange(6)


@cache
def model() -> tuple[settings.Decoder, dict]:
    return CFG, sharding.init(decoder.leaves(CFG), jax.random.key(0))


@cache
def rollout() -> Rollout:
    """Two answers of up to 12 tokens to three prompts, by two slots that are refilled."""
    cfg, params = model()
    rng = np.random.default_rng(0)
    length = np.asarray([9, 1, 4], np.int32)
    tokens = rng.integers(3, 64, (3, 9)).astype(np.int32)
    tokens[np.arange(9)[None] >= length[:, None]] = 0
    prompts = Prompts(tokens=tokens, length=length, index=np.arange(3, dtype=np.int32))
    engine = Engine(max_prompt=9, max_new=12, slots=2, keep_routing=True, draft="coupled")
    made = jax.jit(make_engine(cfg, engine, group=2, stop=tuple(range(8))))
    return to_host(made(params, prompts, jax.random.key(1)))


def packed(
    row_length: int, micro_rows: int, *, share_prompts: bool, which: np.ndarray = ALL
) -> list[Batch]:
    one = rollout()
    mask = np.arange(12)[None] < one.answer_length[:, None]
    extras = {
        "weight": (mask / mask.sum()).astype(np.float32),
        "advantage": np.where(mask, np.arange(6)[:, None] - 2.5, 0).astype(np.float32),
        "logp_rollout": one.logp_rollout,
    }
    _, batches = pack_answers(
        one,
        which,
        {name: values[which] for name, values in extras.items()},
        row_length=row_length,
        micro_rows=micro_rows,
        share_prompts=share_prompts,
    )
    return jax.tree.map(jnp.asarray, batches)


def chosen() -> np.ndarray:
    """The experts that the answers' tokens took in the one layer that has any, [tokens, k]."""
    one = rollout()
    inside = np.arange(12)[None] < one.answer_length[:, None]
    assert one.answer_choice is not None
    return one.answer_choice[:, :, 0][inside]


@pytest.mark.parametrize("share_prompts", [True, False])
def test_the_update_takes_the_rollouts_experts_again(share_prompts: bool) -> None:
    cfg, params = model()
    assert rollout().answer_length.min() < 12
    (batch,) = packed(64, 3, share_prompts=share_prompts)
    real = np.asarray(batch.segment) > 0
    assert (np.asarray(batch.choice)[real] >= 0).all()
    logp, _ = make_logp(cfg)(params, batch)
    mask = np.asarray(batch.mask)
    np.testing.assert_allclose(
        np.asarray(logp)[mask], np.asarray(batch.logp_rollout)[mask], atol=1e-4
    )
    # A router that has changed would choose otherwise; it weighs what it is given.
    other = jax.tree.map(lambda w: w, params)
    mlp = other["groups"][1]["mlp"]
    mlp["router"] = mlp["router"][:, ::-1]
    run = jax.jit(lambda params, batch: auxiliary.run_batch(cfg, params, batch))
    out = run(other, batch)
    free = run(other, batch.replace(choice=None))
    found = np.asarray(out.routing[1].choice)[0]
    np.testing.assert_array_equal(found[real], np.asarray(batch.choice)[real][:, 0])
    assert (np.sort(np.asarray(free.routing[1].choice)[0][real]) != np.sort(found[real])).any()
    assert np.abs(np.asarray(out.hidden - free.hidden)[real]).max() > 1e-3


def test_replayed_choices_are_those_of_the_trainers_router_before_an_update() -> None:
    cfg, params = model()
    (batch,) = packed(64, 3, share_prompts=True)
    run = jax.jit(lambda params, batch: auxiliary.run_batch(cfg, params, batch))
    free = run(params, batch.replace(choice=None))
    real = np.asarray(batch.segment) > 0
    want = np.sort(np.asarray(free.routing[1].choice)[0][real])
    np.testing.assert_array_equal(np.sort(np.asarray(batch.choice)[real][:, 0]), want)


def test_an_update_with_every_part_is_the_same_however_it_is_packed() -> None:
    cfg, params = model()
    extra = Auxiliary(mtp_weight=0.3, balance_weight=0.1, bias_rate=0.25)
    update = make_update(
        make_objective(cfg, policy_loss, extra=extra),
        optax.sgd(1.0),
        settle=partial(auxiliary.balanced, cfg, extra),
    )
    together = packed(64, 2, share_prompts=False)
    assert len(together) == 1
    alone = [packed(64, 2, share_prompts=False, which=ALL[i : i + 1])[0] for i in ALL]
    alone = [batch.replace(num_tokens=together[0].num_tokens) for batch in alone]
    results = []
    for batches in (together, alone):
        own = init_state(jax.tree.map(jnp.copy, params), optax.sgd(1.0))
        results.append(update(own, batches))
    (want, metrics), (found, again) = results
    assert metrics.keys() == again.keys()
    for name, value in metrics.items():
        assert np.ndim(value) == 0
        np.testing.assert_allclose(value, again[name], rtol=1e-4, atol=1e-5, err_msg=name)
    chex.assert_trees_all_close(want.params, found.params, rtol=1e-7, atol=1e-5)
    # The load of an update is that of its answers' tokens, over all of its micro-batches.
    load = np.bincount(chosen().reshape(-1), minlength=8)
    assert float(metrics["experts/load_max"]) >= load.max() / load.mean() - 1e-5
    bias = [p["groups"][1]["mlp"]["router_bias"][0] for p in (params, want.params)]
    np.testing.assert_allclose(bias[1] - bias[0], 0.25 * np.sign(load.mean() - load), atol=1e-6)
    ahead = [p["mtp"]["layer"]["mlp"]["router_bias"][0] for p in (params, want.params)]
    assert set(np.round(np.asarray(ahead[1] - ahead[0]), 5).tolist()) <= {-0.25, 0.0, 0.25}
    assert np.abs(ahead[1] - ahead[0]).max() > 0.2


def test_modules_that_are_trained_alone_leave_the_model_as_it_is() -> None:
    cfg = settings.dense(
        vocab_size=16, dim=8, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=8, num_mtp=1
    )
    params = sharding.init(decoder.leaves(cfg), jax.random.key(0))
    tokens = jnp.arange(12).reshape(2, 6)
    batch = Batch(
        tokens=tokens,
        position=jnp.broadcast_to(jnp.arange(6), (2, 6)),
        segment=jnp.ones((2, 6), jnp.int32),
        mask=jnp.ones((2, 6), bool),
        weight=jnp.full((2, 6), 1 / 12),
        num_tokens=jnp.float32(12),
    )

    @jax.jit
    def gradients(params: dict) -> list[dict]:
        def value(params: dict, extra: Auxiliary) -> jax.Array:
            out = auxiliary.run_batch(cfg, params, batch)
            return auxiliary.added(cfg, extra, params, batch, out)[0]

        both = (Auxiliary(mtp_weight=0.3, mtp_alone=alone) for alone in (False, True))
        return [jax.grad(value)(params, extra) for extra in both]

    whole, alone = gradients(params)
    # Sums whose terms cancel keep the rounding of their terms, 2^-24 of the largest.
    rounding = 2**-24 * max(np.abs(g).max() for g in jax.tree.leaves(whole["mtp"]))
    chex.assert_trees_all_close(whole["mtp"], alone["mtp"], rtol=1e-5, atol=rounding)
    largest = {name: [np.abs(g[name]).max() for g in (whole, alone)] for name in ("embed", "norm")}
    assert all(both > 0 and own == 0 for both, own in largest.values()), largest
    shared = batch.replace(prompt=jnp.zeros_like(tokens), before=tokens)
    out = decoder.Outputs(hidden=jnp.zeros((2, 6, 8)))
    with pytest.raises(ValueError, match="needs a prompt to each answer"):
        auxiliary.added(cfg, Auxiliary(mtp_weight=0.1), params, shared, out)


def test_routing_stays_with_its_prompts_and_answers() -> None:
    one = rollout()
    kept = take(one, np.asarray([True, False, True]))
    both = concatenate([kept, one])
    for name, rows in (("prompt_choice", [0, 2]), ("answer_choice", [0, 1, 4, 5])):
        of_one = getattr(one, name)
        np.testing.assert_array_equal(getattr(kept, name), of_one[rows])
        np.testing.assert_array_equal(getattr(both, name), np.concatenate([of_one[rows], of_one]))
    assert both.drafted == 2 * np.asarray(one.drafted)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"auxiliary": Auxiliary(mtp_weight=0.1)},
            "rl.auxiliary.mtp_weight needs a model with num",
        ),
        ({"auxiliary": Auxiliary(balance_weight=0.1)}, "balance_weight needs a model with experts"),
        ({"auxiliary": Auxiliary(bias_rate=0.1)}, "bias_rate needs a model with sigmoid experts"),
        ({"draft": "rejection"}, "rl.engine.draft needs a model with num_mtp >= 1"),
        ({"keep_routing": True}, "rl.engine.keep_routing needs a model with experts"),
    ],
)
def test_a_stage_that_needs_parts_that_the_model_lacks_is_refused(change: dict, words: str) -> None:
    run = config.load(str(Path(__file__).with_name("small_config.py")))
    base, rl = run.stages
    assert isinstance(rl, settings.Reinforce)
    if "auxiliary" in change:
        rl = replace(rl, **change)
    else:
        rl = replace(rl, engine=replace(rl.engine, **change))
    with pytest.raises(ValueError, match=words):
        replace(run, stages=(base, rl))
