"""Win rates of a stage's held-out answers against those that it began with."""

import json
from pathlib import Path

import pytest

from r1jax.evaluate.wins import main, wins


def samples(scores: dict[int, list[float]]) -> list[dict]:
    """Answers of some evaluations; problem i has the i-th score of each."""
    return [
        {
            "stage": "ppo",
            "step": step,
            "split": "test",
            "row": {"target": i},
            "reward": 10.0 * step,
            "parts": {"truth": value, "score": 10.0 * step},
        }
        for step, values in scores.items()
        for i, value in enumerate(values)
    ]


def test_a_tie_is_half_a_win_and_problems_are_compared_with_themselves():
    first, last = wins(samples({0: [0, 0, 1, -1], 20: [1, 0, 0, 0]}), "truth")
    assert first.wins.mean == 0.5 and first.wins.low == first.wins.high == 0.5
    assert last.wins.mean == (1 + 0.5 + 0 + 1) / 4
    assert (first.part.mean, last.part.mean) == (0.0, 0.25)
    assert (first.reward.mean, last.reward.mean) == (0.0, 200.0)
    assert last.wins.low <= last.wins.mean <= last.wins.high
    assert last.step == 20 and last.wins.problems == 4


def test_the_order_of_the_answers_does_not_matter_and_what_is_in_one_only_is_left_out():
    given = samples({0: [0, 1], 10: [1, 0, 1]})
    forward, backward = wins(given, "truth"), wins(given[::-1], "truth")
    assert forward[1].wins.mean == backward[1].wins.mean == 0.5
    assert forward[1].wins.problems == 2 and forward[1].part.problems == 3
    given[0]["reward"] = None  # could not be judged
    assert wins(given, "truth")[1].wins.mean == 0.0


def test_the_command_prints_a_line_for_each_evaluation(tmp_path: Path, capsys):
    given = samples({0: [0, 0, 1, 0], 5: [1, 0, 1, 1]})
    training = {**given[0], "split": "train", "parts": {}}
    (tmp_path / "samples.jsonl").write_text(
        "".join(json.dumps(one) + "\n" for one in [training, *given])
    )
    main([str(tmp_path), "--part", "truth"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{tmp_path}, stage ppo, 4 problems"
    assert lines[2].split()[:1] == ["0"] and "0.250 [" in lines[2] and "50.0% [" in lines[2]
    assert lines[3].split()[:1] == ["5"] and "0.750 [" in lines[3] and "75.0% [" in lines[3]


def test_a_part_that_is_not_there_and_a_run_without_answers_are_one_line(tmp_path: Path, capsys):
    with pytest.raises(ValueError, match="no part 'honesty'; it has truth, score"):
        wins(samples({0: [1]}), "honesty")
    with pytest.raises(SystemExit):
        main([str(tmp_path), "--part", "truth"])
    assert capsys.readouterr().err == f"error: {tmp_path} has no held-out answers of any stage\n"
