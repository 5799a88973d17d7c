"""The rollout engine: continuous batching gives what one prompt at a time would give."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import settings, sharding
from r1jax.kernels.logprob import token_logp
from r1jax.models import decoder
from r1jax.rollout.answers import to_host
from r1jax.rollout.engine import make_engine
from r1jax.rollout.sampling import answer_keys, keep_top, make_sampler
from r1jax.settings import Engine, Sampling, dense
from r1jax.types import Limits, Prompts, Rollout

CFG = dense(vocab_size=32, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, mlp_dim=48, bias=True)
STOP = (1,)
ENGINE = Engine(max_prompt=6, max_new=100, slots=5)


all_logits = jax.jit(decoder.logits, static_argnums=0)


@pytest.fixture(scope="module")
def params() -> dict:
    return sharding.init(decoder.leaves(CFG), jax.random.key(0))


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    rng = np.random.default_rng(0)
    length = np.asarray([6, 1, 3, 5], np.int32)
    tokens = rng.integers(2, 32, (4, 6)).astype(np.int32)
    tokens[np.arange(6)[None] >= length[:, None]] = 0
    return Prompts(tokens=tokens, length=length, index=np.asarray([7, 3, 11, 0], np.int32))


@cache
def compiled(engine: Engine, group: int, stop: tuple[int, ...]) -> Callable[..., Rollout]:
    return jax.jit(make_engine(CFG, engine, group=group, stop=stop))


def generate(
    params: dict, prompts: Prompts, engine: Engine, *, group: int = 3, stop: tuple[int, ...] = STOP
) -> Rollout:
    program = compiled(engine, group, stop)
    return jax.tree.map(np.asarray, program(params, prompts, jax.random.key(5)))


def texts(rollout: Rollout) -> list[list[int]]:
    return [row[:n].tolist() for row, n in zip(rollout.answer, rollout.answer_length, strict=True)]


def greedy_alone(params: dict, prompt: list[int], max_new: int) -> list[int]:
    """The whole sequence runs through the model again for every token."""
    width = ENGINE.max_prompt + max_new
    tokens, mask = np.zeros((1, width), np.int32), np.zeros((1, width), np.int32)
    tokens[0, : len(prompt)] = prompt
    answer: list[int] = []
    while len(answer) < max_new and answer[-1:] != [STOP[0]]:
        end = len(prompt) + len(answer)
        mask[0, :end] = 1
        token = int(np.argmax(np.asarray(all_logits(CFG, params, tokens, mask))[0, end - 1]))
        answer.append(token)
        if end < width:
            tokens[0, end] = token
    return answer


def test_greedy_answers_are_those_of_one_prompt_at_a_time(params: dict, prompts: Prompts) -> None:
    # Untrained greedy answers soon repeat themselves: a large embedding keeps them varied.
    params = {**params, "embed": 3 * params["embed"]}
    engine = replace(ENGINE, max_new=70, slots=2, sampling=Sampling(temperature=0.0))
    found = texts(generate(params, prompts, engine, group=1))
    for i, n in enumerate(prompts.length):
        assert found[i] == greedy_alone(params, prompts.tokens[i, :n].tolist(), 70)


@pytest.mark.parametrize("slots", [1, 2, 12])
def test_answers_do_not_change_with_the_number_of_slots(
    params: dict, prompts: Prompts, slots: int
) -> None:
    expected = generate(params, prompts, ENGINE)
    found = generate(params, prompts, replace(ENGINE, slots=slots))
    assert texts(found) == texts(expected)
    assert len({tuple(text) for text in texts(found)}) == 12
    np.testing.assert_allclose(found.logp_rollout, expected.logp_rollout, atol=1e-5)


def test_an_answer_depends_on_its_own_prompt_and_number_only(
    params: dict, prompts: Prompts
) -> None:
    expected = texts(generate(params, prompts, ENGINE))
    turned = jax.tree.map(lambda x: x[::-1], prompts)
    found = texts(generate(params, turned, ENGINE))
    assert found == [expected[3 * p + g] for p in (3, 2, 1, 0) for g in range(3)]
    more = texts(generate(params, prompts, ENGINE, group=5))
    assert [more[5 * p + g] for p in range(4) for g in range(3)] == expected


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0.7), Sampling(top_k=4), Sampling(temperature=0.0)],
    ids=["tempered", "top_k", "greedy"],
)
def test_log_probabilities_are_the_trainers(
    params: dict, prompts: Prompts, sampling: Sampling
) -> None:
    engine = replace(ENGINE, max_new=60, sampling=sampling)
    rollout = generate(params, prompts, engine, group=2)
    tokens, segment = np.zeros((8, 66), np.int32), np.zeros((8, 66), np.int32)
    for i, answer in enumerate(texts(rollout)):
        whole = [*prompts.tokens[i // 2, : prompts.length[i // 2]].tolist(), *answer]
        tokens[i, : len(whole)], segment[i, : len(whole)] = whole, 1
    position = np.broadcast_to(np.arange(66, dtype=np.int32), (8, 66))

    @jax.jit
    def trainer(tokens: jax.Array, position: jax.Array, segment: jax.Array) -> jax.Array:
        hidden = decoder.run(CFG, params, tokens, position, segment).hidden
        temperature = sampling.temperature or 1.0
        return token_logp(hidden[:, :-1], params["embed"], tokens[:, 1:], temperature=temperature)[
            0
        ]

    logp = np.asarray(trainer(*(jnp.asarray(x) for x in (tokens, position, segment))))
    for i, answer in enumerate(texts(rollout)):
        start = int(prompts.length[i // 2]) - 1
        gap = logp[i, start : start + len(answer)] - rollout.logp_rollout[i, : len(answer)]
        assert np.abs(gap).max() <= 1e-5


def test_answers_end_at_the_stop_token_or_at_the_limit(params: dict, prompts: Prompts) -> None:
    rollout = generate(params, prompts, replace(ENGINE, max_new=20))
    assert rollout.finished.any()
    assert not rollout.finished.all()
    for text, finished in zip(texts(rollout), rollout.finished, strict=True):
        assert STOP[0] not in text[:-1]
        assert (text[-1] == STOP[0]) == finished
        assert finished or len(text) == 20
    past = np.arange(20)[None] >= rollout.answer_length[:, None]
    assert (rollout.answer[past] == 0).all()
    assert (rollout.logp_rollout[past] == 0).all()
    endless = generate(params, prompts, replace(ENGINE, max_new=20), stop=())
    assert (endless.answer_length == 20).all()
    assert not endless.finished.any()


def test_on_lengths_with_a_long_tail_hardly_a_slot_is_idle(params: dict) -> None:
    rng = np.random.default_rng(1)
    many = Prompts(
        tokens=rng.integers(2, 32, (48, 6)).astype(np.int32),
        length=np.full(48, 6, np.int32),
        index=np.arange(48, dtype=np.int32),
    )
    rollout = generate(params, many, replace(ENGINE, max_new=300, slots=12), group=8)
    lengths = rollout.answer_length
    assert lengths.max() > 4 * lengths.mean()
    assert rollout.decode_steps <= 1.15 * lengths.sum() / 12


SPARSE = settings.Decoder(
    vocab_size=32,
    dim=16,
    groups=(
        settings.Group(
            count=1,
            mixer=settings.Attention(num_heads=2, num_kv_heads=2, head_dim=8),
            mlp=settings.Experts(num_experts=4, top_k=2, dim=24, score="sigmoid"),
        ),
    ),
    num_mtp=1,
)


@pytest.mark.parametrize(
    ("axes", "draft"),
    [({"data": 2, "expert": 2}, "none"), ({"data": 1, "expert": 2, "tensor": 2}, "coupled")],
    ids=["data and expert", "expert and tensor, drafted"],
)
def test_answers_do_not_change_where_experts_are_spread_over_devices(
    prompts: Prompts, axes: dict, draft: str
) -> None:
    three = jax.tree.map(lambda x: x[:3], prompts)  # a device with nothing to do goes along
    engine = Engine(max_prompt=6, max_new=20, slots=4, keep_routing=True, draft=draft)
    generate = jax.jit(make_engine(SPARSE, engine, group=3, stop=STOP))
    leaves = decoder.leaves(SPARSE)
    params = sharding.init(leaves, jax.random.key(0))
    want = to_host(generate(params, three, jax.random.key(5)))
    mesh = sharding.make_mesh(settings.Mesh(**axes))
    with jax.set_mesh(mesh):
        split = jax.device_put(params, sharding.shardings(leaves, mesh))
        program = generate.lower(split, three, jax.random.key(5)).compile()
        found = to_host(program(split, three, jax.random.key(5)))
    for name in ("answer", "answer_length", "finished", "answer_choice"):
        np.testing.assert_array_equal(getattr(found, name), getattr(want, name), err_msg=name)
    np.testing.assert_allclose(found.logp_rollout, want.logp_rollout, atol=1e-5)
    assert len({tuple(text) for text in texts(found)}) == 9
    # No device ever has all the experts of a layer: of 4 matrices from 16 to 24 or a part of it.
    assert not re.search(r"\b4,16,(24|12)\]", program.as_text())


def test_experts_that_the_devices_do_not_divide_are_refused(prompts: Prompts) -> None:
    mesh = sharding.make_mesh(settings.Mesh(data=1, expert=2, tensor=2))
    experts = settings.Experts(num_experts=3, top_k=1, dim=8)
    group = replace(SPARSE.groups[0], mlp=experts)
    cfg = replace(SPARSE, groups=(group,), num_mtp=0)
    params = sharding.abstract(decoder.leaves(cfg), mesh)
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match="expert must divide num_experts, got 2 and 3"),
    ):
        jax.eval_shape(
            lambda params: decoder.logits(cfg, params, jnp.ones((2, 4), jnp.int32)), params
        )


def test_nothing_is_compiled_again_for_other_weights_prompts_and_keys(
    params: dict, prompts: Prompts
) -> None:
    made = jax.jit(make_engine(CFG, replace(ENGINE, max_new=8), group=2, stop=STOP))
    for seed in range(4):
        weights = jax.tree.map(lambda w, s=seed: w + s, params)
        made(weights, prompts.replace(index=prompts.index + seed), jax.random.key(seed))
    assert made._cache_size() == 1


def test_top_k_and_top_p_keep_the_smallest_sets() -> None:
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]]))

    def kept(**limits: float) -> list[list[int]]:
        settings = {"top_k": 0, "top_p": 1.0, **limits}
        return [np.flatnonzero(np.isfinite(row)).tolist() for row in keep_top(logits, **settings)]

    assert kept(top_k=1) == [[0], [3]]
    assert kept(top_k=3) == [[0, 1, 2], [1, 2, 3]]
    assert kept(top_p=0.45) == [[0], [2, 3]]
    assert kept(top_p=0.75) == [[0, 1], [1, 2, 3]]
    assert kept(top_k=2, top_p=0.6) == [[0], [2, 3]]  # 0.5 / 0.8 is already more than 0.6
    assert kept(top_k=9) == [[0, 1, 2, 3], [0, 1, 2, 3]]


def test_limits_of_a_call_do_what_an_engine_made_for_them_does_and_compile_nothing_anew(
    params: dict, prompts: Prompts
) -> None:
    engine = Engine(max_prompt=6, max_new=12, slots=5)
    made = jax.jit(make_engine(CFG, engine, group=2, stop=STOP))

    def limited(temperature: float, max_new: int) -> Rollout:
        limits = Limits(temperature=np.float32(temperature), max_new=np.int32(max_new))
        return jax.tree.map(np.asarray, made(params, prompts, jax.random.key(5), limits))

    own = replace(engine, max_new=7, sampling=Sampling(temperature=0.5))
    expected, found = generate(params, prompts, own, group=2), limited(0.5, 7)
    assert texts(found) == texts(expected)
    np.testing.assert_array_equal(found.finished, expected.finished)
    np.testing.assert_allclose(found.logp_rollout[:, :7], expected.logp_rollout, atol=1e-5)
    assert 7 < max(map(len, texts(limited(1.5, 12)))) <= 12
    assert made._cache_size() == 1


def test_samples_have_the_probabilities_of_the_tempered_distribution() -> None:
    p = np.asarray([0.5, 0.3, 0.15, 0.05])
    draws = 20_000
    keys = jax.random.split(jax.random.key(0), draws)
    logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32)), (draws, 4))
    for temperature in (1.0, 0.5):
        sampler = make_sampler(Sampling(temperature=temperature))
        counts = np.bincount(np.asarray(sampler(logits, keys)), minlength=4)
        expected = p ** (1 / temperature) / (p ** (1 / temperature)).sum() * draws
        # Chi-square with 3 degrees of freedom exceeds 16.27 once in 1,000 times.
        assert ((counts - expected) ** 2 / expected).sum() < 16.27
    assert set(np.asarray(make_sampler(Sampling(temperature=0.0))(logits, keys))) == {0}


def test_every_answer_has_a_key_of_its_own() -> None:
    keys = answer_keys(jax.random.key(0), jnp.asarray([4, 9, 5]), 4)
    data = {tuple(row) for row in np.asarray(jax.random.key_data(keys)).tolist()}
    assert len(data) == 12
