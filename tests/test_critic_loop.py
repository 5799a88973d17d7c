"""A critic beside the policy: what it says of packed rows, what it learns, how it is kept."""

import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from r1jax import config, metrics, settings, sharding
from r1jax.algos import advantages, critics, losses, weights
from r1jax.algos.kl import k1, k3
from r1jax.algos.selection import has_signal
from r1jax.data.tokenizer import tiny
from r1jax.loops import learning, rl
from r1jax.loops.batches import pack_answers
from r1jax.loops.run import Context, Scorer
from r1jax.loops.step import make_critic_objective, make_objective, make_score
from r1jax.models import decoder, heads
from r1jax.rewards.weighted import one_by_one, score_many
from r1jax.rollout import answers
from r1jax.schedules import Adaptive, Steps
from r1jax.state import adamw
from r1jax.types import Batch, Rollout, TrainState

RUN = config.load(str(Path(__file__).with_name("small_config.py")))
CFG = RUN.stages[1]
assert isinstance(CFG, settings.Reinforce)
MODEL = replace(RUN.model, vocab_size=16)
VALUES = settings.Critic(
    score=heads.values,
    leaves=heads.value_leaves,
    fill=critics.as_value,
    target=advantages.value_targets,
    loss=critics.value_loss,
    measure={"explained_variance": critics.explained_variance},
    optimizer=partial(adamw, learning_rate=1e-2),
    reference=True,
    warmup=1,
)
PRM = settings.Critic(
    score=heads.logps,
    fill=partial(critics.as_process, beta=0.05),
    target=critics.outcomes,
    loss=partial(critics.implicit_prm_loss, beta=0.05),
    weight=weights.sequence_mean,
    optimizer=partial(adamw, learning_rate=1e-2),
    reference=True,
)


RULE = Adaptive(first=0.1, target=0.02)
PENALTY = {"kl": k1, "kl_weight": RULE}


def packed(rollout: Rollout, extras: dict[str, Any], row_length: int = 5) -> Batch:
    mask = np.arange(2)[None] < rollout.answer_length[:, None]
    extras = {"weight": weights.token_mean(mask), **extras}
    _, (batch,) = pack_answers(rollout, np.arange(4), extras, row_length=row_length, micro_rows=2)
    return batch


@cache
def network() -> Any:
    """Random weights of a decoder with a value head, none of them 0."""
    leaves = {**decoder.leaves(MODEL), **heads.value_leaves(MODEL)}
    params = sharding.init(leaves, jax.random.key(0))
    rng = np.random.default_rng(0)
    noise = lambda w: np.asarray(w) + rng.normal(0, 0.1, w.shape).astype(np.float32)  # noqa: E731
    return jax.tree.map(noise, params)


def shrunk(params: Any) -> Any:
    return jax.tree.map(lambda w: w * np.float32(0.8), params)


def nothing(*_: Any, **__: Any) -> Any:
    raise AssertionError("not to be called")


def apart(rollout: Rollout) -> tuple[jax.Array, list[range]]:
    """Each answer after its prompt in a row of its own, and where in the row its tokens are."""
    tokens, places = np.zeros((4, 4), np.int32), []
    for i, size in enumerate(rollout.answer_length):
        start = int(rollout.prompt_length[i // 2])
        tokens[i, :start] = rollout.prompt[i // 2, :start]
        tokens[i, start : start + size] = rollout.answer[i, :size]
        places.append(range(start, start + size))
    return jnp.asarray(tokens), places


def make_context(
    folder: Path, mesh: jax.sharding.Mesh, tokenizer: Any = None, writer: Any = None
) -> Context:
    return Context(
        run=RUN,
        folder=folder,
        text=[],
        tokenizer=tokenizer,
        mesh=mesh,
        writer=writer or metrics.Writer(folder, time.monotonic),
        stopping=lambda: False,
    )


# --------------------------------------------------------------------------- targets and scores


def test_returns_lie_at_their_answers_tokens_beside_a_shared_prompt(two_pairs: Rollout) -> None:
    # With gamma 1/2 the last token of a right answer has 1, the one before it 1/2.
    rollout = two_pairs.replace(value=np.full((4, 2), 0.25, np.float32))
    target = np.asarray(advantages.value_targets(rollout, gamma=0.5))
    np.testing.assert_allclose(target, [[0.5, 1], [0, 0], [0, 0], [0.5, 1]])
    batch = packed(rollout, {"target": target, "value_old": rollout.value})
    np.testing.assert_array_equal(batch.tokens, [[3, 4, 6, 1, 1], [5, 7, 1, 1, 0]])
    np.testing.assert_array_equal(batch.target, [[0, 0, 0.5, 1, 0], [0, 0.5, 1, 0, 0]])
    # Six tokens: errors of 1/4 four times and of 3/4 twice, so (4 / 16 + 2 * 9 / 16) / 2 / 6.
    loss, _ = jax.jit(partial(critics.value_loss, clip=None))(jnp.full((2, 5), 0.25), batch)
    np.testing.assert_allclose(loss, 22 / 16 / 12, rtol=1e-6)


def test_a_value_is_of_the_state_before_its_token_wherever_the_prompt_lies(
    two_pairs: Rollout,
) -> None:
    rollout, params = two_pairs, network()
    batch = packed(rollout, {})
    np.testing.assert_array_equal(batch.before[0, 2:], [1, 2, 1])  # both go on from column 1
    rows = np.asarray(make_score(MODEL, VALUES)(params, batch))
    tokens, places = apart(rollout)

    @jax.jit
    def values(params: Any, tokens: jax.Array) -> jax.Array:
        position = jnp.broadcast_to(jnp.arange(4), (4, 4))
        hidden = decoder.run(MODEL, params, tokens, position, jnp.ones_like(tokens)).hidden
        return hidden @ params["value"]["scale"] + params["value"]["bias"]

    expected = np.asarray(values(params, tokens))
    columns = [[(0, 2), (0, 3)], [(0, 4)], [(1, 3)], [(1, 1), (1, 2)]]
    for i, place in enumerate(places):
        found = [rows[column] for column in columns[i]]
        np.testing.assert_allclose(found, expected[i, [t - 1 for t in place]], atol=1e-5)


def test_process_rewards_of_an_answer_add_up_to_beta_times_its_log_ratio(
    two_pairs: Rollout,
) -> None:
    rollout, now, first = two_pairs, network(), shrunk(network())
    cfg = replace(CFG, critic=PRM, row_length=24)
    critic = TrainState(step=jnp.int32(0), params=now, opt_state=(), reference=first)
    state = TrainState(step=jnp.int32(0), params=None, opt_state=(), critic=critic)
    learner = learning.Learner(
        logp_of=nothing, update=nothing, score=make_score(MODEL, PRM), update_critic=None
    )
    mesh = sharding.make_mesh(RUN.mesh)
    with jax.set_mesh(mesh):
        context = make_context(Path(), mesh)
        found, said = learning.look_again(cfg, context, rollout, state, learner, 1)
    tokens, places = apart(rollout)
    every = jax.jit(lambda params: jax.nn.log_softmax(decoder.logits(MODEL, params, tokens)))
    gap = np.asarray(every(now)) - np.asarray(every(first))
    expected = np.asarray(
        [sum(gap[i, t - 1, tokens[i, t]] for t in place) for i, place in enumerate(places)]
    )
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found.process.sum(1), 0.05 * expected, atol=1e-6)
    # What it learns from the same rollout: the outcome, by the cross-entropy of these sums.
    weight = weights.sequence_mean(np.arange(2)[None] < rollout.answer_length[:, None])
    target = np.asarray(critics.outcomes(rollout))
    batch = packed(rollout, {**said, "target": target, "weight": weight})
    loss, _ = jax.jit(PRM.loss)(make_score(MODEL, PRM)(now, batch), batch)
    p = 1 / (1 + np.exp(-0.05 * expected))
    right = rollout.reward.astype(bool)
    np.testing.assert_allclose(loss, -np.log(np.where(right, p, 1 - p)).mean(), rtol=1e-5)


def test_an_answer_that_was_not_judged_teaches_a_critic_nothing(two_pairs: Rollout) -> None:
    rollout = two_pairs.replace(reward=np.asarray([1, np.nan, 0, 1], np.float32))
    target = np.asarray(critics.outcomes(rollout))
    np.testing.assert_array_equal(target, [[1, 1], [np.nan, 0], [0, 0], [1, 1]])
    seen = {}

    def update(state: Any, batches: list[Batch], **numbers: Any) -> tuple[Any, dict]:
        seen["batch"] = batches[0]
        return state, {"loss": jnp.float32(0)}

    cfg = replace(CFG, critic=PRM, row_length=24)
    critic = TrainState(step=jnp.int32(0), params=None, opt_state=())
    learner = learning.Learner(logp_of=nothing, update=nothing, score=None, update_critic=update)
    zero = np.zeros((4, 2), np.float32)
    said = {"value_old": zero, "logp_ref": zero}
    state = critic.replace(critic=critic)
    context = make_context(Path(), sharding.make_mesh(RUN.mesh))
    learning.improve_critic(cfg, PRM, context, rollout, said, state, learner, 1)
    batch = seen["batch"]
    assert np.isfinite(batch.target).all()
    # Of six tokens in four answers, one answer of one token counts for nothing.
    assert sorted(np.asarray(batch.weight)[np.asarray(batch.mask)]) == [0, *[0.125] * 4, 0.25]


def test_an_adaptive_weight_is_that_of_the_state_in_reward_target_and_loss(
    two_pairs: Rollout,
) -> None:
    rollout = two_pairs.replace(
        logp_ref=np.asarray([[-2.5, -1], [-2.25, 9], [-2, 9], [-3, -2]], np.float32),
        value=np.zeros((4, 2), np.float32),
    )
    seen = []

    def update(state: Any, batches: list[Batch], **numbers: Any) -> tuple[Any, dict]:
        seen.append((batches[0], numbers))
        return state, {"loss": jnp.float32(0)}

    cfg = replace(
        CFG,
        critic=replace(VALUES, target=partial(advantages.value_targets, **PENALTY), warmup=0),
        advantage=partial(advantages.ppo, **PENALTY),
        loss=partial(losses.policy_loss, kl=k3, kl_weight=RULE),
        reference="start",
    )
    critic = TrainState(step=jnp.int32(0), params=None, opt_state=())
    state = critic.replace(critic=critic, kl_weight=jnp.float32(0.5))
    context = make_context(Path(), sharding.make_mesh(RUN.mesh))
    said = {"value_old": np.zeros((4, 2), np.float32)}
    learner = learning.Learner(
        logp_of=nothing, update=update, score=None, update_critic=update, adaptive=RULE
    )
    state, values = learning.improve(cfg, context, rollout, said, state, learner, 1)
    (lesson, _), (batch, numbers) = seen
    plain = {"kl": k1, "kl_weight": 0.5}
    for got, expected in (
        (lesson.target, advantages.value_targets(rollout, **plain)),
        (batch.advantage, advantages.ppo(rollout, **plain)),
    ):
        mask = np.asarray(advantages.answer_mask(rollout))
        np.testing.assert_array_equal(np.sort(got[batch.mask]), np.sort(expected[mask]))
    assert numbers["kl_weight"] == values["kl_weight"] == 0.5
    # Log-ratios of the six tokens: what stands after an answer's end is none of them.
    kl = (0.5 - 1 + 0.25 + 0 + 1 + 0) / 6
    assert values["kl_rollout"] == pytest.approx(kl, abs=1e-7)
    # Six times the target: the weight goes as far up as it may in a step.
    assert float(state.kl_weight) == np.float32(0.5 * 1.02)


def test_a_step_of_fewer_prompts_compiles_nothing_anew(
    two_pairs: Rollout, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = replace(
        CFG,
        prompts=2,
        group=2,
        minibatches=2,
        select=has_signal,
        rounds=2,
        critic=replace(PRM, measure={"explained_variance": critics.explained_variance}),
        advantage=advantages.prime,
    )
    mesh = sharding.make_mesh(RUN.mesh)
    compiled = []
    with jax.set_mesh(mesh), jax.log_compiles():
        context = make_context(tmp_path, mesh)
        params = sharding.init(decoder.leaves(RUN.model), jax.random.key(3), mesh)
        learner, state = learning.begin(cfg, context, params)
        for step, kept in enumerate([[True, True], [True, True], [False, True], [True, False]], 1):
            caplog.clear()
            rollout = answers.take(two_pairs, np.asarray(kept))
            rollout, said = learning.look_again(cfg, context, rollout, state, learner, step)
            state, values = learning.improve(cfg, context, rollout, said, state, learner, step)
            assert np.isfinite(values["critic/loss"]) and np.isfinite(values["loss"])
            compiled.append(sum("Compiling" in line for line in caplog.messages))
    assert compiled[0] > 10 and compiled[1:] == [0, 0, 0]
    # An update for each pair of answers: two, two, one and one.
    assert int(jax.device_get(state.step)) == 6


# --------------------------------------------------------------------------- identities


def test_ppo_that_expects_nothing_is_reinforce_with_returns(two_pairs: Rollout) -> None:
    rng = np.random.default_rng(0)
    rollout = two_pairs.replace(
        reward=rng.normal(size=4).astype(np.float32),
        logp_ref=rng.normal(-2, 0.1, (4, 2)).astype(np.float32),
        value=np.zeros((4, 2), np.float32),
    )
    for penalty in ({}, {"kl": k1, "kl_weight": 0.3}):
        plain = advantages.monte_carlo(rollout, **penalty)
        np.testing.assert_allclose(
            advantages.ppo(rollout, whitened=False, **penalty), plain, rtol=1e-6
        )
        np.testing.assert_allclose(advantages.value_targets(rollout, **penalty), plain, rtol=1e-6)


def test_a_shared_trunk_gets_the_sum_of_both_gradients(two_pairs: Rollout) -> None:
    critic = replace(VALUES, trunk="policy", share=0.5, optimizer=None, reference=False, warmup=0)
    rollout, params = two_pairs, network()
    rng = np.random.default_rng(0)
    names = ("advantage", "value_old", "target")
    extras = {name: rng.normal(size=(4, 2)).astype(np.float32) for name in names}
    batch = packed(rollout, {**extras, "logp_rollout": rollout.logp_rollout})

    @jax.jit
    def gradients(params: Any, batch: Batch) -> list[Any]:
        parts = [
            make_objective(MODEL, losses.policy_loss, critic=critic),
            make_objective(MODEL, losses.policy_loss),
            make_critic_objective(MODEL, critic),
        ]
        return [jax.grad(lambda p, f=f: f(p, batch, {})[0])(params) for f in parts]

    both, policy, value = gradients(params, batch)
    assert np.abs(value["value"]["scale"]).max() > 1e-3
    assert np.abs(value["embed"]).max() > 1e-4
    assert not np.any(policy["value"]["scale"])
    jax.tree.map(
        lambda a, b, c: np.testing.assert_allclose(a, b + 0.5 * c, rtol=1e-4, atol=1e-6),
        both,
        policy,
        value,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": None}, "needs an optimizer"),
        ({"trunk": "policy", "warmup": 0, "reference": False}, "no optimizer, weight, reference"),
        ({"trunk": "policy", "optimizer": None, "reference": False}, "or warmup of its own"),
        ({"warmup": -1}, "warmup must be >= 0, got -1"),
    ],
)
def test_a_critic_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(VALUES, **changes)


def test_a_warmup_as_long_as_the_stage_is_refused() -> None:
    with pytest.raises(ValueError, match=r"warmup must be less than steps, got 1 of 1"):
        replace(CFG, critic=VALUES)


# --------------------------------------------------------------------------- in the loop


def train(folder: Path, stage: settings.Reinforce) -> list[dict[str, Any]]:
    """Runs the stage in the folder, or goes on with it; its metrics without times."""
    mesh = sharding.make_mesh(RUN.mesh)
    with jax.set_mesh(mesh):
        context = make_context(folder, mesh, tiny(), metrics.open_writer(folder))
        params = sharding.init(decoder.leaves(RUN.model), jax.random.key(3), mesh)
        scorer = Scorer(reward=partial(score_many, stage.reward), each=one_by_one)
        rl.train(stage, context, params, scorer=scorer)
    return [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in metrics.read(folder)
    ]


@pytest.fixture(scope="module")
def stage() -> settings.Reinforce:
    return replace(
        CFG,
        steps=3,
        critic=replace(VALUES, target=partial(advantages.value_targets, **PENALTY)),
        advantage=partial(advantages.ppo, **PENALTY),
        loss=partial(losses.policy_loss, kl=k3, kl_weight=RULE),
        reference="start",
        optimizer=partial(adamw, learning_rate=3e-3),
        minibatches=2,
        evaluate_every=9,
        checkpoints=settings.Checkpoints(every=1, keep=9),
    )


@pytest.fixture(scope="module")
def straight(made_once: Callable[..., Path], stage: settings.Reinforce) -> Path:
    return made_once("critic run", lambda folder: train(folder, stage))


def saved(folder: Path, step: int) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, by name."""
    with warnings.catch_warnings():  # orbax warns that arrays go where they were saved
        warnings.simplefilter("ignore", UserWarning)
        tree = ocp.load(folder / "checkpoints" / "rl" / str(step) / "arrays")
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.asarray(x) for path, x in flat}


def test_in_the_warm_up_the_critic_learns_and_the_policy_stays(straight: Path) -> None:
    one, two = saved(straight, 1), saved(straight, 2)
    mesh = sharding.make_mesh(RUN.mesh)
    first = sharding.init(decoder.leaves(RUN.model), jax.random.key(3), mesh)
    for path, weight in jax.tree_util.tree_leaves_with_path(first):
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(one[f"['params']{name}"], weight)
        np.testing.assert_array_equal(one[f"['critic']['reference']{name}"], weight)
    assert np.any(one["['critic']['params']['value']['scale']"])
    assert np.any(one["['critic']['params']['embed']"] != first["embed"])
    assert np.any(two["['params']['embed']"] != first["embed"])
    assert (int(one["['step']"]), int(one["['critic']['step']"])) == (0, 2)


def test_an_adaptive_weight_moves_with_each_rollout_and_waits_for_the_policy(
    straight: Path,
) -> None:
    rows = [row for row in metrics.read(straight) if "kl_weight" in row]
    weights, kls = ([row[name] for row in rows] for name in ("kl_weight", "kl_rollout"))
    assert [row["step"] for row in rows] == [1, 2, 3]
    # In step 1 the policy waits, so that the rollout of step 2 is of the reference itself.
    first = float(np.float32(0.1))
    assert weights == [first, first, float(np.float32(first * 0.98))]
    assert abs(kls[0]) < 1e-5 and abs(kls[1]) < 1e-5 and abs(kls[2]) > 1e-4
    error = np.clip(kls[2] / 0.02 - 1, -0.2, 0.2)
    last = saved(straight, 3)["['kl_weight']"]
    assert last.dtype == np.float32 and last == np.float32(weights[2] * (1 + 0.1 * error))


def test_a_part_of_the_reward_can_have_all_of_the_advantage(two_pairs: Rollout) -> None:
    # The first part tells answers apart, the second gives all of them the same.
    parts = np.asarray([[1, 1], [0, 1], [0, 1], [1, 1]], np.float32)
    rollout = two_pairs.replace(reward=parts.sum(axis=1), parts=parts)
    first = Steps(values=(0.0, 1.0), starts=(2,))
    cfg = replace(
        CFG,
        steps=2,
        advantage=partial(advantages.by_source, weight=(first, 1.0)),
        weight=weights.token_mean,
        row_length=24,
    )
    mesh = sharding.make_mesh(RUN.mesh)
    with jax.set_mesh(mesh):
        context = make_context(Path(), mesh)
        params = sharding.init(decoder.leaves(RUN.model), jax.random.key(3), mesh)
        learner, state = learning.begin(cfg, context, params)
        norms = []
        for step in (1, 2):
            state, values = learning.improve(cfg, context, rollout, {}, state, learner, step)
            norms.append(values["grad_norm"])
    assert norms[0] == 0 and norms[1] > 0


def test_a_run_with_a_critic_goes_on_with_the_same_bits(
    straight: Path, stage: settings.Reinforce, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(straight, folder)
    for step in (2, 3):
        shutil.rmtree(folder / "checkpoints" / "rl" / str(step))
    again = train(folder, stage)
    expected = [
        {name: value for name, value in row.items() if not name.startswith("time/")}
        for row in metrics.read(straight)
    ]
    assert again == expected
    assert {"critic/explained_variance", "critic/loss", "critic/grad_norm"} <= again[-1].keys()
    found, wanted = saved(folder, 3), saved(straight, 3)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].tobytes() == value.tobytes(), name
