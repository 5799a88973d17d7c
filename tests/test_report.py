"""r1jax.report: one file that stands alone, says what the run measured, and survives any run."""

import html
import json
import math
import random
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from r1jax import metrics, report
from r1jax.report.takeoff import take_off

CONFIG = {
    "model.dim": "96",
    "name": '"countdown_tiny"',
    "base": "Supervised",
    "base.steps": "800",
    "rl": "Reinforce",
    "rl.evaluate_rows": "256",
    "rl.group": "8",
    "rl.steps": "100",
    "seed": "0",
    "stages": "base, rl",
}


# --------------------------------------------------------------------------- a run that never was


def fake_run(folder: Path, *, seed: int = 0, rl_steps: int = 100, gain: float = 0.34) -> Path:
    """A run's folder such as `make train` leaves, with made-up numbers of a likely course."""
    rng = random.Random(seed)
    clock = [0.0]
    writer = metrics.open_writer(folder, clock=lambda: clock[0])
    (folder / "config.txt").write_text("".join(f"{k}: {v}\n" for k, v in CONFIG.items()))
    (folder / "config.py").write_text("def config():\n    ...\n")
    (folder / "config.json").write_text(
        json.dumps({"variant": "config", "overrides": [f"seed={seed}"], "commit": "0" * 40})
    )
    for step in range(10, 801, 10):
        clock[0] += 1.9
        writer.write("base", step, _base_row(rng, step))
    clock[0] += 4
    for step in range(rl_steps + 1):
        if step:
            clock[0] += 2.8
            writer.write("rl", step, _rl_row(rng, step, gain))
            train = [_sample(rng, k, gain * step / 100, "train") for k in range(4)]
            writer.samples("rl", step, train)
        if step % 25 == 0 or step == rl_steps:
            clock[0] += 3
            writer.write("rl", step, _test_row(rng, step, gain))
            answers = [_sample(rng, k, gain * step / 100, "test") for k in range(256)]
            writer.samples("rl", step, answers)
    return folder


def _base_row(rng: random.Random, step: int) -> dict[str, float]:
    return {
        "loss": 2.6 * math.exp(-step / 90) + 0.35 + rng.gauss(0, 0.012),
        "grad_norm": 0.3 + 2 * math.exp(-step / 60) + abs(rng.gauss(0, 0.05)),
        "learning_rate": 3e-3 * min(step / 80, (880 - step) / 800),
        "time/step": 0.19 + abs(rng.gauss(0, 0.01)),
        "time/update_tokens_per_s": 43_000 + rng.gauss(0, 900),
    }


def _course(step: int) -> float:
    return 1 / (1 + math.exp(-(step - 40) / 14))


def _rl_row(rng: random.Random, step: int, gain: float) -> dict[str, float]:
    course = _course(step)
    accuracy = 0.37 + gain * course + rng.gauss(0, 0.03)
    return {
        "loss": rng.gauss(0, 0.004),
        "reward": accuracy + 0.1,
        "reward/accuracy": accuracy,
        "reward/format": 0.1 * min(1, 0.9 + course / 8 + rng.gauss(0, 0.01)),
        "accuracy": accuracy,
        "length": 38 + 42 * course + rng.gauss(0, 1.6),
        "cut": max(0.0, 0.01 + 0.02 * course + rng.gauss(0, 0.006)),
        "attempts": 1.4 + 1.9 * course + rng.gauss(0, 0.07),
        "reflections": 0.9 + 1.8 * course + rng.gauss(0, 0.07),
        "give_ups": max(0.0, 0.43 - 0.4 * course + rng.gauss(0, 0.02)),
        "wrong_give_ups": max(0.0, 0.43 - 0.4 * course + rng.gauss(0, 0.02)),
        "right_sums": 0.975 + 0.015 * course + rng.gauss(0, 0.003),
        "right_verdicts": 0.80 + 0.12 * course + rng.gauss(0, 0.01),
        "right_numbers": 0.93 + 0.05 * course + rng.gauss(0, 0.005),
        "kl": 0.002 + 0.09 * course + abs(rng.gauss(0, 0.003)),
        "entropy": 0.34 - 0.15 * course + rng.gauss(0, 0.008),
        "equal_groups": 0.12 + 0.2 * course + rng.gauss(0, 0.04),
        "gap": 10 ** rng.uniform(-6.4, -5.6),
        "clipped": abs(rng.gauss(0.004, 0.002)),
        "grad_norm": 0.4 + abs(rng.gauss(0, 0.08)),
        "learning_rate": 3e-4,
        "num_updates": float(step),
        "time/step": 2.8 + abs(rng.gauss(0, 0.1)),
        "time/rollout": 1.7 + abs(rng.gauss(0, 0.08)),
        "time/update": 0.85 + abs(rng.gauss(0, 0.02)),
        "time/rollout_tokens_per_s": 12_300 + rng.gauss(0, 350) - 900 * course,
        "time/update_tokens_per_s": 24_000 + rng.gauss(0, 400),
    }


def _test_row(rng: random.Random, step: int, gain: float) -> dict[str, float]:
    course = _course(step)
    accuracy = round(256 * (0.36 + gain * course + rng.gauss(0, 0.008))) / 256
    half = 1.96 * math.sqrt(accuracy * (1 - accuracy) / 256)
    return {
        "test/accuracy": accuracy,
        "test/accuracy_low": accuracy - half,
        "test/accuracy_high": accuracy + half,
        "test/length": 37 + 42 * course + rng.gauss(0, 0.8),
        "test/attempts": 1.4 + 1.9 * course,
        "test/reflections": 0.9 + 1.8 * course,
        "test/wrong_give_ups": max(0.0, 0.44 - 0.41 * course),
        "time/evaluate": 3.0,
    }


def _sample(rng: random.Random, k: int, gain: float, split: str) -> dict:
    problem = random.Random(k * 2 + (split == "test"))
    a, b, c = (problem.randint(1, 20) for _ in range(3))
    target = a + b - c
    tries = [f"{b} + {c} = {b + c} - {a} = {b + c - a} no ."]
    tries += [f"{a} + {c} = {a + c} - {b} = {a + c - b} no ."] * (rng.random() < 0.3 + gain)
    right = rng.random() < 0.37 + gain
    end = f" {a} + {b} = {a + b} - {c} = {target} yes </think> <answer> {a} + {b} - {c} </answer>"
    lost = " give up </think> <answer> none </answer>"
    return {
        "split": split,
        "row": {"numbers": [a, b, c], "target": target},
        "prompt": f"make {target} from {a} {b} {c} <think>",
        "answer": " ".join(tries) + (end if right else lost),
        "reward": 1.1 if right else 0.1,
        "parts": {"accuracy": float(right), "format": 0.1},
        "accuracy": float(right),
        "finished": True,
        "length": 20 + 15 * len(tries),
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fake_run(tmp_path_factory.mktemp("runs") / "countdown_tiny")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return report.build(run)


def text_of(page: str) -> str:
    """What a reader sees, on one line."""
    body = re.sub(r"<(style|title)>.*?</\1>", " ", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", body)).split())


class Balance(HTMLParser):
    """Checks that every element is closed, and notes all elements and attributes."""

    VOID = frozenset({"meta", "br"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(page)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def stands_alone(page: str) -> None:
    found = Balance(page)
    assert not found.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    for name, value in found.attributes:
        assert name not in {"href", "src", "srcset", "action"} and not name.startswith("on"), name
        assert "url(" not in (value or "")
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style and "@import" not in style
    assert re.findall(r'\s(?:d|cx|cy|x|y|width)="[^"]*(?:nan|inf)[^"]*"', page) == []


def figure(page: str, title: str) -> str:
    (found,) = [f for f in re.findall(r"<figure.*?</figure>", page, re.DOTALL) if title in f]
    return found


# --------------------------------------------------------------------------- the page


def test_the_page_is_one_file_that_needs_no_network_and_no_scripts(page: str):
    stands_alone(page)
    assert 'name="viewport"' in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page


def test_the_headline_says_from_where_to_where_with_both_intervals(run: Path, page: str):
    tests = [row for row in metrics.read(run) if "test/accuracy" in row]
    first, last = tests[0], tests[-1]
    text = text_of(page)
    ends = f"{first['test/accuracy']:.1%} to {last['test/accuracy']:.1%}"
    assert f"Held-out accuracy went from {ends}" in text
    for row in (first, last):
        assert f"[{row['test/accuracy_low']:.1%}, {row['test/accuracy_high']:.1%}]" in text
    assert "they do not overlap" in text and "on 256 problems that were never trained on" in text
    assert f"{first['test/attempts']:.2f} → {last['test/attempts']:.2f}" in text


CHARTS = [
    "Accuracy",
    "Reward",
    "Reward by part",
    "Answer length",
    "Attempts",
    "Wrong give-ups",
    "Reflections",
    "KL",
    "Entropy",
    "Log-prob gap",
    "Throughput",
]


@pytest.mark.parametrize("title", CHARTS)
def test_there_is_a_curve_of(page: str, title: str):
    before = page[: page.index("<h2>base")]
    assert 'class="line c' in figure(before, f"<b>{title}</b>")


def test_there_is_a_curve_of_the_base_trainings_loss_and_of_metrics_nobody_foresaw(page: str):
    base = page[page.index("<h2>base") :]
    assert 'class="line c' in figure(base, "<b>Loss</b>")
    assert 'class="line c' in figure(page, "<b>Num updates</b>")


def test_held_out_accuracy_has_its_band_and_every_value_as_a_tooltip(run: Path, page: str):
    chart = figure(page, "<b>Accuracy</b>")
    assert 'class="band c1"' in chart
    for row in metrics.read(run):
        if "test/accuracy" in row:
            share, low, high = (row[f"test/accuracy{end}"] for end in ("", "_low", "_high"))
            assert f"held-out {share:.1%} [{low:.1%}, {high:.1%}]" in chart
            assert f"<title>step {row['step']}\n" in chart


def test_time_and_cost_add_up(tmp_path: Path, run: Path, page: str):
    text = text_of(page[page.index("<h2>Time and cost") :])
    (tmp_path / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes())
    (tmp_path / "machine.json").write_text('{"cores": 6}')
    elsewhere = text_of(report.build(tmp_path))
    # base: 80 lines of 1.9 s; rl: 4 s, 100 steps of 2.8 s and 5 evaluations of 3 s.
    assert "base 800 2 min 32 s" in text and "rl 100 4 min 59 s" in text
    assert "all 7 min 31 s" in text
    assert "7 min 31 s 0.752 core-hours on 6 cores" in elsewhere  # 451 s x 6 / 3600
    assert "$" not in text + elsewhere
    (tmp_path / "machine.json").write_text('{"cores": 1}')
    alone = text_of(report.build(tmp_path))
    assert "0.125 core-hours on 1 core" in alone and "on 1 cores" not in alone


def priced(folder: Path, *, stages: str = "make, sft, rl", price: float = 2.0) -> Path:
    """A run that builds data for 600 s, learns from it for 900 s, and does two steps of RL."""
    clock = [0.0]
    writer = metrics.open_writer(
        folder, machine={"devices": 4, "device": "NVIDIA H200"}, clock=lambda: clock[0]
    )
    kinds = {"make": "Build", "sft": "Supervised", "rl": "Reinforce"}
    lines = {**kinds, "rl.steps": "2", "price": str(price), "stages": stages}
    (folder / "config.txt").write_text("".join(f"{k}: {v}\n" for k, v in lines.items()))
    parts = {"time/rollout": 200.0, "time/score": 50.0, "time/update": 100.0}
    parts |= {"time/rollout_tokens": 3000.0, "time/update_tokens": 2000.0}
    tests = {"time/evaluate": 60.0, "time/evaluate_tokens": 150.0}
    for stage, step, seconds, values in (
        ("make", 1, 600, {"rows/source": 8.0, "time/rollout_tokens": 700.0}),
        ("sft", 5, 450, {"loss": 1.0, "time/update_tokens": 5000.0}),
        ("sft", 10, 450, {"loss": 1.0, "time/update_tokens": 4000.0}),
        ("rl", 0, 90, {"test/accuracy": 0.5, **tests}),
        ("rl", 1, 350, {"reward": 0.5, **parts}),
        ("rl", 2, 410, {"reward": 0.5, **parts, "test/accuracy": 0.7, **tests}),
    ):
        clock[0] += seconds
        writer.write(stage, step, values)
    return folder


def test_a_price_gives_costs_with_training_and_inference_apart(tmp_path: Path):
    folder = priced(tmp_path / "priced")
    (folder / "evaluations").mkdir()
    (folder / "evaluations" / "a.json").write_text('{"time/elapsed": 100.0}')
    (folder / "evaluations" / "b.curves.jsonl").write_text(
        '{"strategy": "plain", "size": 1, "sampled": 9, "read": 3, "scored": 0, "accuracy": 0.5, '
        '"low": 0.4, "high": 0.6, "cut": 0, "time/elapsed": 50.0}\n'
    )
    page = report.build(folder)
    stands_alone(page)
    text = text_of(page[page.index("<h2>Time and cost") :])
    heads = (
        "stage steps time training rollout data building evaluation other "
        "tokens sampled tokens trained on device-hours cost"
    )
    # 4 devices at 2 dollars: 8 dollars an hour.
    assert heads in text
    assert "make 1 10 min 00 s 10 min 00 s 700 0.667 $1.33 " in text
    assert "sft 10 15 min 00 s 15 min 00 s 9,000 1.00 $2.00 " in text
    # rl: 850 s, of which 200 are updates, 400 rollouts and 120 evaluations. Tokens: two rollouts
    # of 3,000 and two evaluations of 150; of each rollout 2,000 are trained on.
    spent = "3 min 20 s 6 min 40 s 2 min 00 s 2 min 10 s 6,300 4,000"
    assert f"rl 2 14 min 10 s {spent} 0.944 $1.89 " in text
    assert "evaluated afterwards 2 min 30 s 2 min 30 s 0.167 $0.33 " in text
    assert (
        "all 41 min 40 s 18 min 20 s 6 min 40 s 10 min 00 s 4 min 30 s 2 min 10 s "
        "7,000 13,000 2.78 $5.56" in text
    )
    assert "Training took 18 min 20 s (1.22 device-hours, $2.44)" in text
    assert "inference took 21 min 10 s (1.41 device-hours, $2.82)" in text
    # The run's own time is without what came afterwards.
    assert "39 min 10 s 2.61 device-hours on 4 devices, $5.22" in text_of(page)


def test_costs_are_compared(tmp_path: Path, run: Path):
    text = text_of(report.compare([priced(tmp_path / "dear", price=10.0), run]))
    heads = "run time training inference tokens sampled tokens trained on core or device-hours cost"
    assert heads in text
    # 2350 s x 4 devices; training 900 + 200, inference 600 + 400 + 120.
    assert "39 min 10 s 18 min 20 s 18 min 40 s 7,000 13,000 2.61 $26.11" in text
    assert text.count("$") == 1
    assert "cost" not in text_of(report.compare([run, run]))


def test_where_reflections_take_off_is_said_and_marked(run: Path, page: str, tmp_path: Path):
    rows = [row for row in metrics.read(run) if "reflections" in row]
    step = take_off([(row["step"], row["reflections"]) for row in rows])
    assert step is not None and 10 < step < 40  # the made-up course is half way up at 40
    assert f"Reflections take off at step {step}: from there on" in text_of(page)
    chart = figure(page, "<b>Reflections</b>")
    assert ">take-off</text>" in chart and page.count(">take-off</text>") == 1
    assert f"step {step}" in text_of(report.compare([run, run]))
    writer = metrics.open_writer(tmp_path)
    for number in range(1, 31):
        writer.write("rl", number, {"reward": 0.5, "reflections": 1.0 + number % 2})
    flat = report.build(tmp_path)
    assert "Reflections do not take off: there is no step" in text_of(flat)
    assert ">take-off</text>" not in flat


def curve_file(file: Path, scorer: str | None, **sizes: list[float]) -> None:
    """Points of strategies with these accuracies at 1, 2, ... answers of 30 tokens."""
    about = {"stage": "rl", "step": 80, "data": "test", "problems": 128, "scorer": scorer}
    points = [
        {**about, "strategy": name, "size": i, "sampled": 30.0 * i, "read": 9, "cut": 0.0}
        | {"scored": 30 * i * (name in ("best", "tree")), "accuracy": value}
        | {"low": value - 0.1, "high": value + 0.1}
        for name, values in sizes.items()
        for i, value in enumerate(values, 1)
    ]
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join(json.dumps(point) + "\n" for point in points))


def test_strategies_with_several_scorers_are_one_chart(tmp_path: Path):
    metrics.open_writer(tmp_path)
    folder = tmp_path / "evaluations"
    plain = {"plain": [0.5], "majority": [0.5, 0.6]}
    curve_file(folder / "a.curves.jsonl", "runs/reward", **plain, best=[0.5, 0.7])
    curve_file(folder / "b.curves.jsonl", "mine:rule", **plain, best=[0.5, 0.8], tree=[0.5, 0.9])
    page = report.build(tmp_path)
    stands_alone(page)
    chart = figure(page, "<b>Accuracy</b>")
    labels = re.findall(r'class="label c\d">([^<]*)<', chart)
    assert sorted(labels) == [
        *("best by reward 70.0%", "best by rule 80.0%"),
        *("majority 60.0%", "plain 50.0%", "tree by rule 90.0%"),
    ]
    assert page.count("<tr><td>") == 1 + 2 + 2 + 2 + 2  # what both files hold stands there once
    assert "band" not in chart and "majority 60.0%" in chart
    other = (folder / "b.curves.jsonl").read_text().replace('"step": 80', '"step": 60')
    (folder / "b.curves.jsonl").write_text(other)
    page = report.build(tmp_path)
    assert page.count("<h3>Stage rl, step") == 2  # other weights are another section


def test_code_is_drawn_where_answers_hold_some(tmp_path: Path):
    for name, share in (("without", 0.0), ("with", 0.25)):
        writer = metrics.open_writer(tmp_path / name)
        for step in range(1, 4):
            code = {"code_share": share, "code_answers": 2 * share}
            writer.write("rl", step, {"reward": 0.5, "text_characters": 9.0, **code})
    assert "<b>Code</b>" not in report.build(tmp_path / "without")
    page = report.build(tmp_path / "with")
    assert "answers 50.0%, characters 25.0%" in figure(page, "<b>Code</b>")
    assert "no code 9.00" in figure(page, "<b>Length of text</b>")
    assert "Also measured" not in page


def test_the_same_problems_stand_side_by_side_with_their_verdicts(run: Path, page: str):
    samples = [s for s in metrics.read_samples(run) if s["split"] == "test"]
    first = [s for s in samples if s["step"] == 0]
    last = [s for s in samples if s["step"] == 100]
    problems = re.findall(r'<div class="problem">.*?</div></div></div>', page, re.DOTALL)
    assert len(problems) == 8
    for before, after, shown in zip(first, last, problems, strict=False):
        assert before["row"] == after["row"]
        words = text_of(shown)
        verdicts = ["✓ right" if s["accuracy"] else "✗ wrong" for s in (before, after)]
        assert words.startswith(before["prompt"])
        assert f"Before: {verdicts[0]} · {before['length']} tokens" in words
        assert f"After: {verdicts[1]} · {after['length']} tokens" in words
        assert before["answer"] in words and after["answer"] in words


def test_the_flow_from_wrong_to_right_counts_each_problem_once(tmp_path: Path):
    folder = answers(tmp_path, before=[0, 0, 0, 1, 1, None], after=[1, 1, 0, 1, 0, 1])
    text = text_of(report.build(folder))
    counts = "2 became right, 1 stayed right, 1 became wrong, 1 stayed wrong"
    assert f"Of 5 problems logged both times, {counts}." in text


def answers(folder: Path, *, before: list, after: list, text: str = "an answer") -> Path:
    writer = metrics.open_writer(folder)
    for step, verdicts in ((0, before), (7, after)):
        writer.write("rl", step, {"test/accuracy": 0.5})
        writer.samples(
            "rl",
            step,
            [
                {"split": "test", "row": {"n": i}, "prompt": text, "answer": text, "accuracy": x}
                for i, x in enumerate(verdicts)
            ],
        )
    return folder


def test_what_a_model_writes_cannot_become_markup(tmp_path: Path):
    evil = "</pre></div><script>alert(1)</script><img src=x onerror=y> &amp; \ud800 \0"
    folder = answers(tmp_path / "<b>", before=[0], after=[1], text=evil)
    path = report.write(folder)
    page = path.read_text(encoding="utf-8")
    stands_alone(page)
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "&amp;amp;" in page
    assert "&lt;b&gt;" in page and "<b> ·" not in page


def test_a_long_answer_keeps_its_ends_and_says_what_is_left_out(tmp_path: Path):
    text = "begin " + "x" * 40_000 + " end"
    page = report.build(answers(tmp_path, before=[0], after=[1], text=text))
    assert len(page) < 60_000
    shown = text_of(page)
    assert "begin x" in shown and "x end" in shown and "[34,010 characters left out]" in shown


def test_warnings_are_on_top_with_their_steps(tmp_path: Path):
    writer = metrics.open_writer(tmp_path)
    for step in range(1, 31):
        writer.write("rl", step, {"reward": 0.5, "cut": float(step > 10)})
    page = report.build(tmp_path)
    text = text_of(page)
    assert "rl, steps 15 to 30: at least 95% of the answers have been cut off" in text
    assert text.index("cut off at the length limit") < text.index("Stage rl")


def test_settings_and_the_command_to_run_it_again_are_there(run: Path, page: str):
    text = text_of(page)
    command = f"python -m r1jax.train --config {run}/config.py:config --set seed=0"
    assert f"{command} --out {run}-again" in text
    assert "Code at commit " + "0" * 40 in text
    assert all(f"{path}: {value}" in text for path, value in CONFIG.items())


# --------------------------------------------------------------------------- runs of all kinds


def test_a_run_without_a_line_has_a_report(tmp_path: Path):
    metrics.open_writer(tmp_path)
    page = report.build(tmp_path)
    stands_alone(page)
    assert "Nothing measured yet" in page


def test_an_unfinished_run_says_how_far_it_is(tmp_path: Path):
    text = text_of(report.build(fake_run(tmp_path / "half", rl_steps=48)))
    assert "Unfinished: stage rl is at step 48 of 100." in text


def test_a_run_that_has_not_come_to_its_second_stage_says_so(tmp_path: Path):
    folder = fake_run(tmp_path / "half", rl_steps=1)
    metrics.rewind(folder, stages=["base", "rl"], stage="base", step=300)
    page = report.build(folder)
    stands_alone(page)
    text = text_of(page)
    assert "Unfinished: stage base is at step 300 of 800." in text
    assert re.search(r"Loss went from 2\.\d\d to 0\.\d+", text)


def test_a_finished_run_is_not_called_unfinished(page: str):
    assert "Unfinished" not in page


def test_one_evaluation_is_no_change(tmp_path: Path):
    writer = metrics.open_writer(tmp_path)
    ends = {"test/accuracy_low": 0.2, "test/accuracy_high": 0.3}
    writer.write("rl", 0, {"test/accuracy": 0.25} | ends)
    page = report.build(tmp_path)
    stands_alone(page)
    assert "Held-out accuracy 25.0% at step 0 95% interval [20.0%, 30.0%]" in text_of(page)


def test_an_evaluation_without_a_verdict_is_no_result(tmp_path: Path):
    writer = metrics.open_writer(tmp_path)
    names = ("test/accuracy", "test/accuracy_low", "test/accuracy_high")
    writer.write("rl", 0, dict.fromkeys(names, math.nan) | {"test/length": 3.0})
    assert "A run without rewards or losses" in text_of(report.build(tmp_path))
    writer.write("rl", 5, dict(zip(names, (0.25, 0.2, 0.3), strict=True)))
    page = report.build(tmp_path)
    stands_alone(page)
    assert "Held-out accuracy 25.0% at step 5 95% interval [20.0%, 30.0%]" in text_of(page)


def test_what_goes_wrong_with_scoring_is_drawn_where_it_happens(tmp_path: Path):
    writer = metrics.open_writer(tmp_path)
    fine = {"reward": 0.5, "unjudged": 0.0, "reward_timeouts": 0.0, "reward_crashes": 0.0}
    for step in (1, 2):
        writer.write("rl", step, fine)
    assert not re.search("Without a verdict|given up|Unjudged", report.build(tmp_path))
    writer.write("rl", 3, fine | {"unjudged": 0.125, "reward_timeouts": 2.0})
    page = report.build(tmp_path)
    assert "12.5%" in figure(page, "<b>Without a verdict</b>")
    assert "late 2.00" in figure(page, "<b>Scoring given up</b>")


def test_values_that_are_not_finite_or_enormous_leave_the_others_readable(tmp_path: Path):
    writer = metrics.open_writer(tmp_path)
    odd = {3: math.nan, 5: math.inf, 7: 1e300}
    for step in range(1, 9):
        writer.write("rl", step, {"kl": odd.get(step, 0.5), "gap": 0.0, "reward": math.nan})
    page = report.build(tmp_path)
    stands_alone(page)
    assert 'aria-label="KL: 0.500 at the last step"' in figure(page, "<b>KL</b>")
    assert "<b>Reward</b>" not in page


def test_ten_thousand_steps_make_a_page_of_bounded_size(tmp_path: Path):
    rng = random.Random(0)
    rows = [
        {"stage": "rl", "step": step, "reward": rng.random(), "length": rng.gauss(900, 99)}
        for step in range(1, 10_401)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(report.build(tmp_path)) < 120_000


def test_runs_are_compared_on_one_page(tmp_path: Path, run: Path):
    other = fake_run(tmp_path / "group_16", seed=1, gain=0.2)
    config = (other / "config.txt").read_text().replace("rl.group: 8", "rl.group: 16")
    (other / "config.txt").write_text(config)
    page = report.compare([run, other])
    stands_alone(page)
    text = text_of(page)
    assert "2 runs compared" in text and "rl.group 8 16" in text and "rl.steps" not in text
    chart = figure(page, "<b>Accuracy, held-out</b>")
    assert chart.count('class="line c') == 2 and "countdown_tiny" in chart and "group_16" in chart


def test_settings_of_what_a_run_does_not_have_are_told_in_one_line(tmp_path: Path, run: Path):
    lines = (run / "config.txt").read_text().splitlines()
    plain = [line for line in lines if not line.startswith("stages: ")]
    without, more = fake_run(tmp_path / "without"), fake_run(tmp_path / "more")
    (without / "config.txt").write_text(
        "\n".join([*plain, "rl.critic: None", "stages: base, rl"]) + "\n"
    )
    critic = ["rl.critic: Critic", "rl.critic.share: 1.0", "sft.steps: 9"]
    (more / "config.txt").write_text("\n".join([*plain, *critic, "stages: base, sft, rl"]) + "\n")
    text = text_of(report.compare([without, more]))
    assert "rl.critic absent Critic" in text and "rl.critic.share" not in text
    assert "stages base, rl base, sft, rl" in text and "sft.steps" not in text


# --------------------------------------------------------------------------- the command


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "r1jax.report", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_the_command_writes_the_report_and_prints_its_path(run: Path, tmp_path: Path):
    (run / "report.html").unlink(missing_ok=True)
    done = command(str(run))
    assert done.stdout == f"{run / 'report.html'}\n" and done.returncode == 0
    assert (run / "report.html").read_text(encoding="utf-8") == report.build(run)
    done = command(str(run), str(run), "--out", str(tmp_path / "both.html"))
    assert done.stdout == f"{tmp_path / 'both.html'}\n" and "2 runs" in done.stdout + (
        tmp_path / "both.html"
    ).read_text(encoding="utf-8")


def test_what_a_user_gets_wrong_is_one_line(tmp_path: Path, run: Path):
    (tmp_path / "no_run").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "metrics.jsonl").write_text("x\n")
    cases = [
        ([str(tmp_path / "none")], f"no such folder: {tmp_path / 'none'}"),
        ([str(tmp_path / "no_run")], "no_run is no run folder: it has no metrics.jsonl"),
        ([str(damaged)], "metrics.jsonl, line 1: expected a JSON object"),
        ([str(run), "--out", str(tmp_path / "no" / "x.html")], str(tmp_path / "no" / "x.html")),
    ]
    for arguments, message in cases:
        done = command(*arguments)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert message in done.stderr
    assert [path.name for path in damaged.iterdir()] == ["metrics.jsonl"]


def test_help_is_there():
    done = command("--help")
    assert done.returncode == 0 and "RUN" in done.stdout and "--out" in done.stdout
