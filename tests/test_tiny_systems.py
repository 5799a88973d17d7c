"""Texts that the tiny variants of the configs make of the base's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from r1jax.config import check, describe, load
from r1jax.models import zoo
from r1jax.rewards.countdown import accuracy
from r1jax.settings import Supervised

assert zoo.MODELS  # imported here: under stand-ins the tests' own hook would wrap its functions

CONFIGS = Path(__file__).parent.parent / "configs"


def stage(spec: str, name: str) -> Supervised:
    """A supervised stage of a shipped config."""
    stages = load(str(CONFIGS / spec)).stages
    (found,) = [one for one in stages if one.name == name and isinstance(one, Supervised)]
    return found


def problem_of(text: Mapping[str, Any]) -> dict[str, Any]:
    words = text["prompt"].split()
    return {"target": int(words[1]), "numbers": [int(word) for word in words[3:6]]}


def test_an_instructed_text_is_the_bases_with_an_answer_where_that_gives_up():
    rows = stage("tiny_zero.py:tiny_instruct", "sft").source()[:300]
    right = 0.0
    for row in rows:
        problem = problem_of(row)
        assert row["prompt"].endswith(" .")
        assert "give up" not in row["answer"] and "none" not in row["answer"]
        thought, _, answer = row["answer"].partition(" </think>")
        verdict = thought.split()[-1]
        assert (verdict == "yes") == bool(accuracy(problem, answer))
        if verdict == ".":  # its last attempt, without the results
            last = thought.split(" no .")[-2].removeprefix(" <think>").split()
            assert answer.split()[1:-1] == [last[0], *last[1:3], *last[5:7]]
        right += accuracy(problem, answer)
    assert 0.3 < right / len(rows) < 0.7


def test_two_texts_of_five_are_programs_and_the_rest_are_searches():
    rows = stage("simple_rl.py:tiny", "base").source()[:50]
    assert sum("```" in row["answer"] for row in rows) == 20
    assert sum("no ." in row["answer"] or "yes" in row["answer"] for row in rows) == 30


def test_long_searches_end_right_and_fit_the_engine():
    sft = stage("simple_rl.py:tiny_long", "sft")
    rows = sft.source()
    assert len(rows) > 1_500
    for row in rows[:300]:
        assert accuracy(problem_of(row), row["answer"]) == 1.0
    longest = max(len(row["answer"].split()) + 1 for row in rows)
    assert 80 < longest <= 104


@pytest.mark.parametrize("spec", ["rlhf.py", "rlhf.py:free"])
def test_the_reward_models_pairs_come_from_the_stage_that_ppo_begins_with(spec: str):
    text = describe(check(str(CONFIGS / spec)))
    assert "stages: base, sft, pairs, held_out, reward, ppo" in text
    for setting in ("pairs.answers.stage", "held_out.answers.stage", "reward.begin", "ppo.begin"):
        assert f'{setting}: "sft"' in text


def test_a_second_round_has_pairs_of_the_firsts_policy_and_begins_with_sft_again():
    text = describe(check(str(CONFIGS / "rlhf.py:iterated")))
    for setting, stage in (
        ("pairs_again.answers.stage", "ppo"),
        ("pairs_again.passes.others.others.stage", "pairs"),
        ("reward_again.source.stage", "pairs_again"),
        ("ppo_again.begin", "sft"),
    ):
        assert f'{setting}: "{stage}"' in text
    (model,) = [
        line for line in text if line.startswith("ppo_again.reward.terms.score.1.many.model:")
    ]
    assert 'RewardModel(stage="reward_again")' in model


def test_the_tiny_worlds_share_one_base():
    texts = [
        "\n".join(line for line in describe(check(str(CONFIGS / spec))) if line.startswith(same))
        for spec in ("rlhf.py", "tiny_zero.py:tiny_64")
        for same in (("base", "model", "tokenizer"),)
    ]
    assert texts[0] == texts[1] and "base.steps" in texts[0]
