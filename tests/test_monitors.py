"""r1jax.monitors: each fault is named while it lasts, and nothing is said of a sound run."""

import math

import pytest

from r1jax import monitors
from r1jax.monitors import STEPS

SOUND = {
    "loss": -0.003,
    "reward": 0.4,
    "equal_groups": 0.3,
    "cut": 0.1,
    "entropy": 0.3,
    "gap": 2e-6,
    "clipped": 0.01,
    "grad_norm": 0.5,
}

FAULTS = [
    ({"equal_groups": 1.0}, "all answers have had equal rewards"),
    ({"reward": 0.0}, "the reward has been 0"),
    ({"reward": math.nan}, "no answer could be judged"),
    ({"cut": 1.0}, "cut off at the length limit"),
    ({"cut": 0.95}, "cut off at the length limit"),
    ({"entropy": 0.019}, "entropy has collapsed"),
    ({"clipped": 0.51}, "more than 50% of the tokens have been clipped"),
    ({"gap": 1.1e-3}, "sampler and trainer differ by more than 0.001"),
    ({"gap": math.nan}, "sampler and trainer differ by more than 0.001"),
]
NO_FAULTS = [
    {"equal_groups": 0.99},
    {"reward": -0.1},
    {"cut": 0.94},
    {"entropy": 0.021},
    {"clipped": 0.5},
    {"gap": 1e-3},
]


def test_nothing_is_said_of_a_sound_run():
    assert monitors.warnings([SOUND] * 20) == []


@pytest.mark.parametrize("fault, text", FAULTS)
def test_a_fault_that_lasts_is_named_alone(fault: dict, text: str):
    (said,) = monitors.warnings([SOUND] * 3 + [SOUND | fault] * STEPS)
    assert text in said


@pytest.mark.parametrize("near", NO_FAULTS)
def test_what_is_just_within_its_limit_is_no_fault(near: dict):
    assert monitors.warnings([SOUND | near] * STEPS) == []


@pytest.mark.parametrize("fault, _", FAULTS[:7])
def test_a_fault_of_fewer_steps_is_not_named(fault: dict, _: str):
    assert monitors.warnings([SOUND | fault] * (STEPS - 1)) == []
    assert monitors.warnings([SOUND | fault] * (STEPS - 1) + [SOUND]) == []
    interrupted = [SOUND | fault] * (STEPS - 1) + [SOUND] + [SOUND | fault]
    assert monitors.warnings(interrupted) == []


def test_a_gap_is_named_at_once_and_only_while_it_is_there():
    assert len(monitors.warnings([SOUND | {"gap": 1.0}])) == 1
    assert monitors.warnings([SOUND | {"gap": 1.0}, SOUND]) == []


def test_rows_of_an_evaluation_do_not_count():
    evaluation = {"test/accuracy": 0.5}
    rows = [SOUND | {"cut": 1.0}, evaluation] * STEPS
    assert len(monitors.warnings(rows)) == 1


def test_a_stage_that_measures_little_is_left_alone():
    assert monitors.warnings([{"loss": 2.0}] * 20) == []
    assert monitors.warnings([]) == []


@pytest.mark.parametrize("name", ["loss", "grad_norm", "critic/loss", "critic/grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_run_must_stop_where_its_loss_or_gradient_is_not_finite(name: str, value: float):
    text = monitors.fatal(SOUND | {name: value})
    assert text is not None and text.startswith(f"{name} is {value}:") and "\n" not in text


def test_a_run_need_not_stop_for_anything_else():
    assert monitors.fatal(SOUND) is None
    assert monitors.fatal({"test/accuracy": math.nan}) is None


def test_history_tells_from_when_to_when_each_fault_held():
    def row(stage: str, step: int, **fault: float) -> dict:
        return {"stage": stage, "step": step} | SOUND | fault

    rows = [row("base", step) for step in range(1, 10)]
    rows += [row("rl", step, cut=1.0 if 3 <= step <= 12 else 0.0) for step in range(1, 20)]
    rows += [row("rl", step, cut=1.0, gap=1.0 * (step == 22)) for step in range(20, 26)]
    rows += [row("rl", 26, loss=math.nan)]
    rows.insert(15, {"stage": "rl", "step": 6, "test/accuracy": 0.2})
    found = [(span.stage, span.first, span.last, span.text[:12]) for span in monitors.history(rows)]
    assert found == [
        ("rl", 3 + STEPS - 1, 12, "at least 95%"),
        ("rl", 22, 22, "log-probabil"),
        ("rl", 20 + STEPS - 1, 25, "at least 95%"),
        ("rl", 26, 26, "loss is nan:"),
    ]


def test_a_warning_is_one_sentence_that_says_what_to_change():
    advice = ("use ", "raise ", "lower ", "compare ", "read ", "returns ")
    for fault, _ in FAULTS:
        (said,) = monitors.warnings([SOUND | fault] * STEPS)
        assert any(word in said for word in advice) and "\n" not in said
        assert said == monitors.warnings([SOUND | fault] * (STEPS + 9))[0]
