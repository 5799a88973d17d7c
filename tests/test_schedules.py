import math
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from r1jax import config
from r1jax.schedules import (
    Adaptive,
    Cosine,
    Linear,
    Steps,
    adaptive,
    arguments,
    at,
    bounds,
    resolve,
)
from r1jax.settings import Sampling

LENGTH = Steps(values=(32768, 65536), starts=(8200,))


def test_r1_zeros_length_doubles_at_step_8200():
    assert [LENGTH(step) for step in (1, 8199, 8200, 10400)] == [32768, 32768, 65536, 65536]
    weight = Steps(values=(0.0, 1.0, 0.5), starts=(3, 5))
    assert [weight(step) for step in range(1, 7)] == [0, 0, 1, 1, 0.5, 0.5]


def test_a_line_and_half_a_cosine_go_from_first_to_last():
    line, wave = (kind(first=2.0, last=1.0, begin=11, end=21) for kind in (Linear, Cosine))
    for ramp in (line, wave):
        assert [ramp(step) for step in (1, 11)] == [2, 2]
        assert [ramp(step) for step in (21, 999)] == [1, 1]
        assert ramp(16) == pytest.approx(1.5)
    assert line(13) == pytest.approx(1.8)
    assert wave(13) == pytest.approx(1 + (1 + math.cos(0.2 * math.pi)) / 2)
    assert Linear(first=0.3, last=0.1, end=4)(4) == 0.1
    assert Cosine(first=0.3, last=0.1, end=4)(1) == 0.3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Steps(values=(1.0,), starts=(5,)), "one more than starts, got 1 and 1"),
        (lambda: Steps(values=(1.0, 2.0, 3.0), starts=(5, 5)), "starts must increase"),
        (lambda: Steps(values=(1.0, math.nan), starts=(5,)), "values must be finite"),
        (lambda: Linear(first=1.0, last=math.inf, end=9), "first and last must be finite"),
        (lambda: Cosine(first=1.0, last=0.0, begin=9, end=9), "end must be after begin=9, got 9"),
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_plain_number_is_a_schedule_that_stays():
    assert at(0.5, 1) == at(0.5, 10**6) == 0.5
    assert at(LENGTH, 9000) == 65536


def test_the_bounds_of_a_number_are_its_least_and_its_greatest():
    assert bounds(0.5) == (0.5, 0.5)
    assert bounds(Steps(values=(2.0, 7.0, 1.0), starts=(3, 4))) == (1.0, 7.0)
    assert bounds(Linear(first=2.0, last=1.0, end=9)) == (1.0, 2.0)


def loss(x, *, kl_weight=0.0, clip=0.2):
    return x, kl_weight, clip


@dataclass(frozen=True, kw_only=True)
class Holder:
    sampling: Sampling
    terms: dict
    loss: object


def test_resolving_replaces_every_schedule_and_leaves_all_else_alone():
    fade = Linear(first=1.0, last=0.0, end=5)
    plain = Sampling()
    holder = Holder(
        sampling=plain,
        terms={"accuracy": (1.0, loss), "language": (fade, loss)},
        loss=partial(loss, kl_weight=fade, clip=0.3),
    )
    got = resolve(holder, 3)
    assert got.sampling is plain
    assert got.terms == {"accuracy": (1.0, loss), "language": (0.5, loss)}
    assert got.loss(7) == (7, 0.5, 0.3)
    assert holder.terms["language"][0] is fade
    for constant in (plain, [1, 2], {"a": loss}, partial(loss, clip=0.1), loss, "text", None):
        assert resolve(constant, 3) is constant


def test_scheduled_arguments_are_found_to_be_passed_at_the_call():
    scheduled = partial(loss, kl_weight=Linear(first=1.0, last=0.0, end=5), clip=0.3)
    assert arguments(scheduled, 3) == {"kl_weight": 0.5}
    assert scheduled(7, **arguments(scheduled, 3)) == (7, 0.5, 0.3)
    assert arguments(partial(scheduled, kl_weight=0.1), 3) == {}
    assert arguments(loss, 3) == {}


def test_schedules_survive_pickling():
    ramps = Linear(first=1.0, last=0.0, end=5), Cosine(first=1.0, last=0.0, end=5)
    for each in (LENGTH, *ramps, Adaptive(first=0.1, target=0.02)):
        assert pickle.loads(pickle.dumps(each)) == each


# --------------------------------------------------------------------------- adaptive


def test_an_adaptive_weight_follows_zieglers_controller():
    rule = Adaptive(first=0.1, target=6.0)
    for kl, expected in [
        (6.0, 0.1),  # on target
        (6.6, 0.1 * 1.01),  # 10% above: K = 0.1 of it
        (60.0, 0.1 * 1.02),  # the error is cut at 20%
        (0.0, 0.1 * 0.98),
        (-1.0, 0.1 * 0.98),  # an estimate from samples may be of either sign
    ]:
        assert math.isclose(rule.after(0.1, kl), expected)
    assert math.isclose(Adaptive(first=1.0, target=0.5, gain=0.5).after(2.0, 9.0), 2.2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": 0.0}, "target must be > 0 and finite, got 0.0"),
        ({"target": -0.1}, "target must be > 0"),
        ({"first": 0.0}, "first must be > 0 and finite, got 0.0"),
        ({"gain": math.inf}, "gain must be > 0 and finite"),
        ({"bound": 0.0}, "bound must be in"),
        ({"gain": 5.0}, "gain \\* bound < 1, got 0.2 and gain 5.0"),
    ],
)
def test_an_adaptive_weight_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Adaptive(**({"first": 0.1, "target": 0.02} | changes))


def test_an_adaptive_weight_stands_for_the_number_that_its_owner_keeps():
    rule = Adaptive(first=0.1, target=0.02)
    function = partial(loss, kl_weight=rule, clip=Linear(first=1.0, last=0.0, end=5))
    assert arguments(function, 3, adapted=0.25) == {"kl_weight": 0.25, "clip": 0.5}
    assert resolve({"a": function}, 3, adapted=0.25)["a"](7) == (7, 0.25, 0.5)
    for call in (arguments, resolve):
        with pytest.raises(ValueError, match="only for the weight of a KL term"):
            call(function, 3)


def test_one_adaptive_weight_may_stand_in_several_places_and_two_may_not():
    rules = [Adaptive(first=0.1, target=target) for target in (0.02, 0.02, 0.03)]
    settings = [partial(loss, kl_weight=rule) for rule in rules]
    assert adaptive(settings[:2]) == rules[0]
    assert adaptive(partial(loss, kl_weight=0.1)) is None
    with pytest.raises(ValueError, match="only one adaptive weight"):
        adaptive(settings)


IMPORT = "from r1jax.schedules import Linear"


def test_a_config_holds_a_schedule_prints_it_and_takes_overrides_of_its_numbers(tmp_path):
    text = (Path(__file__).parents[1] / "configs" / "debug.py").read_text()
    schedule = "kl_weight=Linear(first=0.1, last=0.0, end=100)"
    assert "kl_weight=0.001" in text
    text = text.replace("kl_weight=0.001", schedule)
    file = tmp_path / "scheduled.py"
    file.write_text(text.replace("import replace\n", f"import replace\n{IMPORT}\n", 1))
    lines = config.describe(config.check(str(file), ["rl.loss.kl_weight.end=50"]))
    assert "rl.loss.kl_weight: r1jax.schedules.Linear" in lines
    assert "rl.loss.kl_weight.first: 0.1" in lines
    assert "rl.loss.kl_weight.end: 50" in lines


def test_a_config_can_have_an_adaptive_weight_in_the_loss_or_in_the_reward(tmp_path):
    text = (Path(__file__).parents[1] / "configs" / "debug.py").read_text()
    text = text.replace(
        "import replace\n",
        "import replace\nfrom r1jax.algos.kl import k1\n"
        "from r1jax.schedules import Adaptive\nRULE = Adaptive(first=0.1, target=0.02)\n",
        1,
    )
    in_reward = "advantage=partial(grpo, kl=k1, kl_weight=RULE)"
    for place, old, new in (
        ("loss", "kl_weight=0.001", "kl_weight=RULE"),
        ("advantage", "advantage=grpo", in_reward),
    ):
        file = tmp_path / f"{place}.py"
        assert old in text
        file.write_text(text.replace(old, new))
        lines = config.describe(config.check(str(file), [f"rl.{place}.kl_weight.target=0.5"]))
        assert f"rl.{place}.kl_weight: r1jax.schedules.Adaptive" in lines
        assert f"rl.{place}.kl_weight.target: 0.5" in lines
        for asked, message in (
            (f"rl.{place}.kl_weight.target=0", "target must be > 0 and finite, got 0.0"),
            ("rl.reference=none", "reference must not be none"),
        ):
            with pytest.raises(config.ConfigError, match=message) as caught:
                config.check(str(file), [asked])
            assert "\n" not in str(caught.value)
    file.write_text(file.read_text().replace("kl_weight=0.001", "kl_weight=replace(RULE, gain=1)"))
    with pytest.raises(config.ConfigError, match="only one adaptive weight"):
        config.check(str(file))
