"""Drafts by the model's own prediction module change the speed of sampling and not what comes."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import settings, sharding
from r1jax.models import decoder
from r1jax.rollout.engine import make_engine
from r1jax.rollout.sampling import DRAFTS
from r1jax.settings import Engine, Sampling, dense
from r1jax.types import Prompts, Rollout

CFG = dense(vocab_size=32, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16, num_mtp=1)
ENGINE = Engine(max_prompt=5, max_new=24, slots=7, sampling=Sampling(temperature=0.0))


def some_prompts(count: int) -> Prompts:
    rng = np.random.default_rng(0)
    length = rng.integers(1, 6, count).astype(np.int32)
    tokens = rng.integers(2, 32, (count, 5)).astype(np.int32)
    tokens[np.arange(5)[None] >= length[:, None]] = 0
    return Prompts(tokens=tokens, length=length, index=np.arange(count, dtype=np.int32))


def generate(params: dict, prompts: Prompts, engine: Engine) -> Rollout:
    made = jax.jit(make_engine(CFG, engine, group=1, stop=(1,)))
    return jax.tree.map(np.asarray, made(params, prompts, jax.random.key(5)))


@pytest.fixture(scope="module")
def params() -> dict:
    params = sharding.init(decoder.leaves(CFG), jax.random.key(0))
    # Larger than those that training begins with: else greedy answers soon repeat themselves.
    groups = jax.tree.map(lambda w: 1.5 * w, params["groups"])
    return {**params, "embed": 2 * params["embed"], "groups": groups}


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_coupled_drafts_change_no_token_of_a_hundred_answers(
    params: dict, temperature: float
) -> None:
    engine = replace(ENGINE, sampling=Sampling(temperature=temperature))
    prompts = some_prompts(100)
    want = generate(params, prompts, engine)
    found = generate(params, prompts, replace(engine, draft="coupled"))
    assert len({tuple(row) for row in want.answer.tolist()}) > 50
    np.testing.assert_array_equal(found.answer, want.answer)
    np.testing.assert_array_equal(found.answer_length, want.answer_length)
    np.testing.assert_array_equal(found.finished, want.finished)
    np.testing.assert_allclose(found.logp_rollout, want.logp_rollout, atol=1e-4)
    # Every token is either the first of a run over the model or an accepted draft.
    assert found.accepted is not None and found.drafted is not None
    assert 0 < found.accepted < found.drafted
    assert found.drafted <= want.answer_length.sum() - found.accepted
    assert found.slot_steps >= want.answer_length.sum() - found.accepted
    assert found.decode_steps < want.decode_steps


def test_an_answer_checked_by_rejection_depends_on_nothing_beside_it(params: dict) -> None:
    engine = replace(ENGINE, draft="rejection", sampling=Sampling(top_k=20))
    prompts = some_prompts(12)
    made = jax.jit(make_engine(CFG, engine, group=1, stop=(1,)))
    turned = jax.tree.map(lambda x: x[::-1], prompts)
    want, found = (np.asarray(made(params, x, jax.random.key(5)).answer) for x in (prompts, turned))
    np.testing.assert_array_equal(found[::-1], want)


@pytest.mark.parametrize("draft", ["rejection", "coupled"])
def test_a_checked_draft_has_the_models_probabilities(draft: str) -> None:
    p = np.asarray([0.5, 0.3, 0.15, 0.05])
    q = np.asarray([0.1, 0.4, 0.2, 0.3])
    draws = 20_000
    keys = jax.random.split(jax.random.key(1), draws)
    rows = [jnp.broadcast_to(jnp.log(jnp.asarray(x, jnp.float32)), (draws, 4)) for x in (p, q)]
    propose, check = DRAFTS[draft](Sampling())
    guess = propose(rows[1], keys)
    found = np.asarray(check(rows[0], rows[1], guess, keys))
    counts = np.bincount(found, minlength=4)
    # Chi-square with 3 degrees of freedom exceeds 16.27 once in 1,000 times.
    assert ((counts - p * draws) ** 2 / (p * draws)).sum() < 16.27
    drafts = np.bincount(np.asarray(guess), minlength=4)
    assert ((drafts - q * draws) ** 2 / (q * draws)).sum() < 16.27
    apart = np.abs(p - q).sum() / 2
    accepted = (found == np.asarray(guess)).mean()
    if draft == "rejection":
        assert accepted == pytest.approx(1 - apart, abs=0.01)
    else:
        assert (1 - apart) / (1 + apart) - 0.01 < accepted < 1 - apart + 0.01


def test_sampled_answers_have_the_probabilities_of_the_full_forward() -> None:
    cfg = replace(CFG, vocab_size=4, tied=False)
    params = sharding.init(decoder.leaves(cfg), jax.random.key(2))
    params = {**params, "head": 0.3 * params["head"]}  # flat: every answer comes often enough
    engine = Engine(max_prompt=2, max_new=3, slots=500, draft="rejection")
    count = 8000
    prompts = Prompts(
        tokens=np.asarray([[3, 1]], np.int32),
        length=np.asarray([2], np.int32),
        index=np.asarray([0], np.int32),
    )
    rollout = jax.jit(make_engine(cfg, engine, group=count, stop=()))(
        params, prompts, jax.random.key(0)
    )
    answers = np.stack(np.meshgrid(*[np.arange(4)] * 3, indexing="ij"), -1).reshape(-1, 3)
    tokens = np.concatenate([np.tile([[3, 1]], (64, 1)), answers], 1).astype(np.int32)
    of = jax.jit(lambda tokens: jax.nn.log_softmax(decoder.logits(cfg, params, tokens)[:, 1:4]))
    logp = np.take_along_axis(np.asarray(of(tokens)), answers[..., None], -1).sum((1, 2))
    want = np.exp(logp) / np.exp(logp).sum() * count
    found = np.bincount(np.asarray(rollout.answer) @ [16, 4, 1], minlength=64)
    assert want.min() > 5
    # Chi-square with 63 degrees of freedom exceeds 103.4 once in 1,000 times.
    assert ((found - want) ** 2 / want).sum() < 103.4
    assert 0.3 < rollout.accepted / rollout.drafted < 1


def test_drafts_need_a_prediction_module() -> None:
    with pytest.raises(ValueError, match="needs a prediction module, the model has num_mtp=0"):
        make_engine(replace(CFG, num_mtp=0), replace(ENGINE, draft="coupled"), group=1, stop=())


def test_routing_is_recorded_only_where_there_are_experts() -> None:
    assert not any(isinstance(group.mlp, settings.Experts) for group in CFG.groups)
    with pytest.raises(ValueError, match="routing can be recorded where layers have experts"):
        make_engine(CFG, replace(ENGINE, keep_routing=True), group=1, stop=())
