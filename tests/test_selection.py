from dataclasses import replace

import numpy as np
import pytest

from r1jax.algos import selection
from r1jax.rollout import answers
from r1jax.types import Rollout

NAN = float("nan")


def make_rollout(prompts=3, group=2, width=4, seed=0, **fields):
    rng = np.random.default_rng(seed)
    answers = prompts * group
    default = dict(
        prompt=rng.integers(1, 9, (prompts, 5)).astype(np.int32),
        prompt_length=rng.integers(1, 6, prompts).astype(np.int32),
        answer=rng.integers(1, 9, (answers, width)).astype(np.int32),
        answer_length=rng.integers(1, width + 1, answers).astype(np.int32),
        finished=rng.random(answers) < 0.5,
        logp_rollout=rng.normal(size=(answers, width)).astype(np.float32),
        decode_steps=np.asarray(7),
        slot_steps=np.asarray(20),
        reward=rng.random(answers).astype(np.float32),
        entropy=rng.random((answers, width)).astype(np.float32),
    )
    return Rollout(**(default | fields))


def test_a_group_has_signal_if_two_of_its_judged_rewards_differ():
    reward = np.array([1, 1, 1, 0, 0, 1, 1.1, 1.1, 1.1, NAN, 0, 0, NAN, NAN, NAN, NAN, 0, 2.0])
    got = selection.has_signal(reward.astype(np.float32), group=3)
    np.testing.assert_array_equal(got, [False, True, False, False, False, True])


def test_a_band_keeps_groups_whose_mean_accuracy_is_in_it_bounds_included():
    for right in range(11):
        accuracy = np.array([1.0] * right + [0.0] * (10 - right), np.float32)
        assert selection.within_band(accuracy, group=10) == [2 <= right <= 8]
    mixed = np.array([1, NAN, NAN, NAN, 1, 0, NAN, NAN, NAN, NAN, NAN, NAN], np.float32)
    np.testing.assert_array_equal(selection.within_band(mixed, group=4), [False, True, False])
    tenths = np.full(10, 0.2, np.float32)  # their float32 mean may miss 0.2
    assert selection.within_band(tenths, group=10).all()


@pytest.mark.parametrize("function", [selection.has_signal, selection.within_band])
def test_groups_that_are_not_whole_are_refused(function):
    with pytest.raises(ValueError, match="B=5, group=2"):
        function(np.zeros(5, np.float32), group=2)


def test_taking_prompts_takes_all_their_answers():
    rollout = make_rollout()
    got = answers.take(rollout, np.array([False, True, True]))
    np.testing.assert_array_equal(got.prompt, rollout.prompt[1:])
    np.testing.assert_array_equal(got.prompt_length, rollout.prompt_length[1:])
    for name in ("answer", "answer_length", "finished", "logp_rollout", "reward", "entropy"):
        np.testing.assert_array_equal(getattr(got, name), getattr(rollout, name)[2:])
    assert got.logp_ref is None and got.slot_steps == 20
    with pytest.raises(ValueError, match="choice for each of 3 prompts"):
        answers.take(rollout, np.array([True]))
    with pytest.raises(ValueError, match="B=5, N=3"):
        answers.take(replace(rollout, answer=rollout.answer[:5]), np.ones(3, bool))


def test_rollouts_of_several_rounds_become_one():
    first, second = make_rollout(width=4), make_rollout(prompts=1, width=6, seed=1)
    got = answers.concatenate([first, second])
    assert got.answer.shape == (8, 6) and got.prompt.shape == (4, 5)
    np.testing.assert_array_equal(got.answer[:6, :4], first.answer)
    np.testing.assert_array_equal(got.answer[:6, 4:], 0)
    np.testing.assert_array_equal(got.entropy[6:], second.entropy)
    np.testing.assert_array_equal(got.reward, [*first.reward, *second.reward])
    assert got.decode_steps == 14 and got.slot_steps == 40
    assert got.answer.dtype == np.int32 and got.logp_rollout.dtype == np.float32
    parts = [answers.take(got, np.arange(4) < 3), answers.take(got, np.arange(4) >= 3)]
    np.testing.assert_array_equal(answers.concatenate(parts).answer, got.answer)
    with pytest.raises(ValueError, match="same fields"):
        answers.concatenate([first, replace(second, entropy=None)])
    with pytest.raises(ValueError, match="at least one"):
        answers.concatenate([])


def test_a_full_update_is_put_together_from_groups_with_signal():
    """Dynamic sampling with the pure parts, as a loop does it."""
    kept, need = [], 4
    for round_number in range(8):
        reward = np.random.default_rng(round_number).integers(0, 2, 6).astype(np.float32)
        rollout = make_rollout(seed=round_number, reward=reward)
        kept.append(answers.take(rollout, selection.has_signal(reward, group=2)))
        if sum(len(each.prompt) for each in kept) >= need:
            break
    whole = answers.concatenate(kept)
    full = answers.take(whole, np.arange(len(whole.prompt)) < need)
    assert len(full.prompt) == need and round_number > 0
    assert selection.has_signal(full.reward, group=2).all()


def test_the_tokens_of_highest_entropy_are_kept():
    rng = np.random.default_rng(3)
    entropy = rng.permutation(40).reshape(4, 10).astype(np.float32)
    length = np.array([10, 5, 7, 3], np.int32)
    mask = np.arange(10)[None] < length[:, None]
    entropy[~mask] = 1000  # past the ends: never kept, no part of the share
    rollout = make_rollout(2, 2, 10, answer_length=length, entropy=entropy)
    got = selection.top_entropy(rollout, share=0.2)
    assert got.sum() == 5  # of 25 tokens
    assert not got[~mask].any()
    assert entropy[got].min() > entropy[mask & ~got].max()
    np.testing.assert_array_equal(selection.top_entropy(rollout, share=1.0), mask)


def test_top_entropy_of_nothing_is_nothing_and_bad_input_is_refused():
    empty = make_rollout(answer_length=np.zeros(6, np.int32))
    assert not selection.top_entropy(empty).any()
    with pytest.raises(ValueError, match="entropy=None"):
        selection.top_entropy(make_rollout(entropy=None))
    for share in (0.0, 1.5):
        with pytest.raises(ValueError, match="share must be in"):
            selection.top_entropy(make_rollout(), share=share)


def test_answers_that_were_cut_off_can_be_left_out():
    rollout = make_rollout()
    got = selection.finished(rollout)
    for i in range(6):
        n = rollout.answer_length[i] if rollout.finished[i] else 0
        np.testing.assert_array_equal(got[i], np.arange(4) < n)
    assert got.any() and (~rollout.finished).any()
