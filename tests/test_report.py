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
from r1jax.report import charts

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
