"""The RL loop's own decisions: which prompts a step keeps, who scores, what an update is told."""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from r1jax import config, metrics, monitors, schedules, settings, sharding
from r1jax.algos.kl import k3
from r1jax.algos.losses import policy_loss
from r1jax.algos.selection import has_signal
from r1jax.data.tokenizer import tiny
from r1jax.loops import rl
from r1jax.loops.run import Context, Scorer
from r1jax.loops.step import make_objective, make_update
from r1jax.models import decoder
from r1jax.rewards import length, prose
from r1jax.rewards.pool import open_pool
from r1jax.rewards.weighted import known_accuracy, part_names, score_many, weighted
from r1jax.state import adamw, init_state
from r1jax.types import Batch, Rollout

RUN = config.load(str(Path(__file__).with_name("small_config.py")))
CFG = RUN.stages[1]
assert isinstance(CFG, settings.Reinforce)


@pytest.fixture
def context(tmp_path: Path) -> Context:
    return Context(
        run=RUN,
        folder=tmp_path,
        text=[],
        tokenizer=tiny(),
        mesh=sharding.make_mesh(settings.Mesh()),
        writer=metrics.open_writer(tmp_path),
        stopping=lambda: False,
    )


def one_word(params: Any, rows: Any, index: Any, key: Any) -> Rollout:
    """Two answers a row, of one and of `row["second"]` tokens."""
    lengths = np.asarray([n for row in rows for n in (1, row["second"])], np.int32)
    answer = np.where(np.arange(3)[None] < lengths[:, None], 7, 0).astype(np.int32)
    return Rollout(
        prompt=np.full((len(rows), 1), 4, np.int32),
        prompt_length=np.ones(len(rows), np.int32),
        answer=answer,
        answer_length=lengths,
        finished=np.ones(len(lengths), bool),
        logp_rollout=np.zeros(answer.shape, np.float32),
        decode_steps=np.asarray(3),
        slot_steps=np.asarray(6),
    )


def long(row: settings.Row, answer: str) -> float:
    return float(row["num_tokens"] > 1)


SCORER = Scorer(
    reward=partial(score_many, long),
    each=lambda f, rows, answers: [f(r, a) for r, a in zip(rows, answers, strict=True)],
)


def collect(context: Context, seconds: list[int], **changes: Any) -> rl.Collected:
    task = dataclasses.replace(CFG.task, accuracy=long, observe=None)
    cfg = dataclasses.replace(CFG, prompts=2, task=task, **changes)
    row = lambda i: {"number": i, "second": seconds[i % len(seconds)]}  # noqa: E731
    return rl.collect_answers(cfg, context, None, row, one_word, SCORER, step=3)


def test_a_step_takes_the_next_prompts_in_order(context: Context) -> None:
    found = collect(context, [1, 2])
    assert [row["number"] for row in found.rows] == [4, 5]
    np.testing.assert_array_equal(found.rollout.reward, [0, 0, 0, 1])
    assert found.values["kept"] == 1


def test_prompts_without_signal_are_replaced_by_those_of_further_rounds(context: Context) -> None:
    # Step 3 of up to 4 rounds of 2 prompts: rows 16 to 23. Only even numbers have any signal.
    found = collect(context, [2, 1], select=has_signal, rounds=4)
    assert [row["number"] for row in found.rows] == [16, 18]
    np.testing.assert_array_equal(found.rollout.reward, [0, 1, 0, 1])
    np.testing.assert_array_equal(found.rollout.answer_length, [1, 2, 1, 2])
    assert found.scored.accuracy == [0.0, 1.0, 0.0, 1.0]
    assert found.values["kept"] == 0.5
    assert found.rollout.decode_steps == 6
    assert found.values["slots_busy"] == 10 / 12  # of both rounds, with the tokens that are dropped


def test_rounds_end_at_the_cap_with_what_there_is(context: Context) -> None:
    one = collect(context, [1, 1, 1, 1, 1, 2, 1, 1], select=has_signal, rounds=3)
    assert [row["number"] for row in one.rows] == [13]
    none = collect(context, [1], select=has_signal, rounds=3)
    assert [row["number"] for row in none.rows] == [16, 17]  # of the last round, all the same


def test_what_could_not_be_judged_is_in_no_mean(context: Context) -> None:
    judged = lambda row, answer: None if row["number"] % 2 else long(row, answer)  # noqa: E731
    scorer = dataclasses.replace(SCORER, reward=partial(score_many, judged))
    rows = [{"second": 2, "number": n} for n in (1, 2, 3, 4)]
    rollout = one_word(None, rows, None, None)
    task = dataclasses.replace(CFG.task, accuracy=long, observe=None)
    scored = rl.score_answers(task, context.tokenizer, rollout, rows, scorer)
    found = rl.summary(dataclasses.replace(CFG, group=2), rollout, scored)
    assert (found["equal_groups"], found["unjudged"], found["reward"]) == (0.0, 0.5, 0.5)
    nothing = dataclasses.replace(scored, reward=np.full(8, np.nan, np.float32))
    found = rl.summary(dataclasses.replace(CFG, group=2), rollout, nothing)
    assert found["unjudged"] == 1.0
    assert np.isnan(found["equal_groups"]) and np.isnan(found["reward"])


def test_rounds_without_a_selection_are_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 needs select, got 2"):
        dataclasses.replace(CFG, rounds=2)


def test_the_weight_of_a_reward_is_that_of_the_step(context: Context) -> None:
    reward = weighted(long=(schedules.Steps(values=(1.0, 3.0), starts=(3,)), long))
    scorer = dataclasses.replace(SCORER, reward=partial(score_many, reward))
    task = dataclasses.replace(CFG.task, accuracy=long, observe=None)
    cfg = dataclasses.replace(CFG, prompts=2, task=task)
    row = lambda i: {"number": i, "second": 2}  # noqa: E731
    for step, weight in ((2, 1), (3, 3)):
        found = rl.collect_answers(cfg, context, None, row, one_word, scorer, step=step)
        np.testing.assert_array_equal(found.rollout.reward, [0, weight, 0, weight])
    with pytest.raises(ValueError, match="the weight of long is a schedule"):
        reward({"num_tokens": 2}, "a")


def test_an_advantage_sees_the_parts_of_a_reward_in_their_order(context: Context) -> None:
    judged = lambda row, answer: None if row["number"] == 16 else 0.5  # noqa: E731
    reward = weighted(long=(1.0, long), judged=(9.0, judged))
    task = dataclasses.replace(CFG.task, accuracy=long, observe=None)
    cfg = dataclasses.replace(CFG, prompts=2, task=task, rounds=4, select=has_signal)
    row = lambda i: {"number": i, "second": 2 - i % 2}  # noqa: E731
    scorer = dataclasses.replace(
        SCORER, reward=partial(score_many, reward), parts=part_names(reward)
    )
    found = rl.collect_answers(cfg, context, None, row, one_word, scorer, step=3)
    # Of prompt 16 no reward is known, and odd ones have no signal.
    assert [row["number"] for row in found.rows] == [18, 20]
    np.testing.assert_array_equal(found.rollout.parts, [[0, 0.5], [1, 0.5]] * 2)
    again = rl.collect_answers(
        dataclasses.replace(cfg, rounds=1, select=None), context, None, row, one_word, scorer, 9
    )
    nan = float("nan")
    assert [row["number"] for row in again.rows] == [16, 17]
    np.testing.assert_array_equal(again.rollout.parts, [[0, nan], [1, nan], [0, 0.5], [0, 0.5]])
    alone = dataclasses.replace(SCORER, parts=part_names(long))
    plain = rl.collect_answers(cfg, context, None, row, one_word, alone, step=3)
    assert plain.rollout.parts is None


def test_temperature_and_longest_answer_are_those_of_the_step() -> None:
    cfg = dataclasses.replace(
        CFG,
        temperature=schedules.Linear(first=1.0, last=0.6, end=5),
        max_new=schedules.Steps(values=(4, 12), starts=(3,)),
    )
    found = [rl.limits_at(cfg, step) for step in (1, 2, 3, 5)]
    np.testing.assert_allclose([limits.temperature for limits in found], [1, 0.9, 0.8, 0.6])
    assert [int(limits.max_new) for limits in found] == [4, 4, 12, 12]
    plain = rl.limits_at(CFG, 7)
    assert (float(plain.temperature), int(plain.max_new)) == (1.0, 12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new": 13}, "max_new must be 1 to engine.max_new=12, got 13"),
        ({"max_new": schedules.Linear(first=0, last=9, end=3)}, "max_new must be 1 to"),
        ({"temperature": schedules.Linear(first=1, last=0, end=3)}, "temperature must stay above"),
        (
            {
                "temperature": 0.5,
                "engine": dataclasses.replace(
                    CFG.engine, sampling=settings.Sampling(temperature=0.0)
                ),
            },
            "needs an engine that samples",
        ),
    ],
)
def test_limits_that_the_engine_cannot_keep_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CFG, **changes)


def test_workers_score_as_this_process_does(context: Context) -> None:
    rows = [{"second": n, "number": n} for n in (1, 2, 3)]
    rollout = one_word(None, rows, None, None)
    task = dataclasses.replace(CFG.task, accuracy=length.tokens, observe=prose.observe)
    with open_pool(workers=2) as pool:
        reward = partial(score_many, length.tokens, each=pool.map)
        beside = Scorer(reward=reward, each=pool.map)
        found = rl.score_answers(task, context.tokenizer, rollout, rows, beside)
    here = Scorer(reward=partial(score_many, length.tokens), each=SCORER.each)
    expected = rl.score_answers(task, context.tokenizer, rollout, rows, here)
    np.testing.assert_array_equal(found.reward, expected.reward)
    assert (found.accuracy, found.seen) == (expected.accuracy, expected.seen)
    assert found.reward.tolist() == [1, 1, 1, 2, 1, 3]


def unknown(row: settings.Row, answer: str) -> None:
    return None


def test_where_no_answer_can_be_judged_no_mean_is_made_up(context: Context) -> None:
    scorer = dataclasses.replace(SCORER, reward=partial(score_many, unknown))
    task = dataclasses.replace(CFG.task, accuracy=unknown, observe=None)
    cfg = dataclasses.replace(CFG, prompts=2, task=task)
    row = lambda i: {"number": i, "second": 2}  # noqa: E731
    found = rl.collect_answers(cfg, context, None, row, one_word, scorer, step=1)
    values = rl.summary(cfg, found.rollout, found.scored)
    assert values["unjudged"] == 1 and values["cut"] == 0
    for name in ("reward", "equal_groups", "accuracy"):
        assert np.isnan(values[name]), name
    (said,) = monitors.warnings([values] * monitors.STEPS)
    assert "no answer could be judged" in said


def test_an_answer_without_a_verdict_has_no_part_in_the_means(context: Context) -> None:
    rows = [{"number": i, "second": 2} for i in range(3)]
    rollout = one_word(None, rows, None, None)
    reward = np.asarray([0.5, np.nan, 1.0, 0.0, np.nan, np.nan], np.float32)
    scored = rl.score_answers(CFG.task, context.tokenizer, rollout, rows, SCORER)
    scored = dataclasses.replace(scored, reward=reward)
    values = rl.summary(dataclasses.replace(CFG, group=2), rollout, scored)
    # The first group is equal, the second is not, the third has no verdict.
    found = [values[name] for name in ("reward", "unjudged", "equal_groups")]
    assert found == [0.5, 0.5, 0.5]


def test_an_accuracy_that_the_reward_holds_is_not_computed_again(context: Context) -> None:
    asked = []

    def right(row: settings.Row, answer: str) -> float | None:
        asked.append(answer)
        return None if row["num_tokens"] == 3 else float(row["num_tokens"] > 1)

    rows = [{"second": n, "number": n} for n in (2, 3)]
    rollout = one_word(None, rows, None, None)
    task = dataclasses.replace(CFG.task, accuracy=right, observe=None)
    for reward in (right, weighted(length=(0.5, long), right=(2.0, right))):
        asked.clear()
        read = known_accuracy(reward, right)
        assert read is not None
        scorer = dataclasses.replace(SCORER, reward=partial(score_many, reward), accuracy=read)
        found = rl.score_answers(task, context.tokenizer, rollout, rows, scorer)
        assert found.accuracy == [0.0, 1.0, 0.0, None] and len(asked) == 4
    assert known_accuracy(weighted(length=(1.0, long)), right) is None
    assert known_accuracy(long, right) is None


def test_values_that_were_given_up_are_counted_for_each_step(context: Context) -> None:
    lost = {"reward_timeouts": 5, "reward_crashes": 0}

    def reward(rows: Any, answers: Any) -> Any:
        lost["reward_timeouts"] += 2
        return score_many(long, rows, answers)

    scorer = dataclasses.replace(SCORER, reward=reward, given_up=lambda: dict(lost))
    task = dataclasses.replace(CFG.task, accuracy=long, observe=None)
    cfg = dataclasses.replace(CFG, prompts=2, task=task)
    row = lambda i: {"number": i, "second": 2}  # noqa: E731
    found = rl.collect_answers(cfg, context, None, row, one_word, scorer, step=1)
    assert found.values["reward_timeouts"] == 2 and found.values["reward_crashes"] == 0


def test_a_scheduled_number_reaches_the_loss_and_compiles_nothing_anew() -> None:
    loss = partial(
        policy_loss,
        entropy_weight=schedules.Linear(first=0.0, last=1.0, end=3),
        kl=k3,
        kl_weight=schedules.Adaptive(first=0.1, target=0.02),
    )
    params = sharding.init(decoder.leaves(RUN.model), jax.random.key(0))
    traced = []

    def watched(logp: jax.Array, batch: Batch, **numbers: Any) -> Any:
        traced.append(sorted(numbers))
        return loss(logp, batch, **numbers)

    optimizer = adamw(4, learning_rate=1e-3)
    update = make_update(make_objective(RUN.model, watched), optimizer)
    tokens = np.arange(2, 10, dtype=np.int32)[None]
    batch = Batch(
        tokens=tokens,
        position=np.arange(8, dtype=np.int32)[None],
        segment=np.ones((1, 8), np.int32),
        mask=np.arange(8)[None] > 2,
        weight=np.full((1, 8), 0.2, np.float32),
        num_tokens=np.float32(5),
        advantage=np.zeros((1, 8), np.float32),
        logp_rollout=np.full((1, 8), -4.0, np.float32),
        logp_ref=np.full((1, 8), -3.0, np.float32),
    )
    state = init_state(params, optimizer)
    losses = []
    for step in (1, 2, 3):
        before = len(traced)
        numbers = schedules.arguments(loss, step, adapted=0.25 * step)
        state, measured = update(state, [batch], **numbers)
        losses.append([float(measured[name]) for name in ("loss", "entropy", "kl")])
        assert step == 1 or len(traced) == before
    assert traced[0] == ["entropy_weight", "kl_weight"]
    # Advantages are 0, so the loss is the terms of the entropy, its weight being 0, 1/2 and 1, and
    # of the KL.
    for step, (value, entropy, kl) in enumerate(losses):
        expected = 0.25 * (step + 1) * kl - 0.5 * step * entropy
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
