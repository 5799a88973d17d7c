"""Which metrics a report draws, under which headings and names."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from r1jax.monitors import GAP_LIMIT
from r1jax.report.charts import NUM_COLOURS, Axis, Series, line_chart
from r1jax.report.data import Row
from r1jax.report.takeoff import take_off

REFLECTIONS = "reflections"  # the count whose take-off is looked for
SHARE, WHOLE, AROUND = Axis(share=True), Axis(share=True, whole=True), Axis(zero=False)


class Spec(NamedTuple):
    """A chart and the metrics in it, with their labels if there are several."""

    title: str
    note: str
    names: Mapping[str, str]
    axis: Axis = Axis()
    rare: bool = False  # left out where all is 0


CHARTS: Mapping[str, Sequence[Spec]] = {
    "What is learned": (
        Spec("Accuracy", "share of answers that are right", {"accuracy": ""}, WHOLE),
        Spec("Reward", "mean over a rollout's answers", {"reward": ""}),
        Spec("Without a verdict", "share of answers", {"unjudged": ""}, SHARE),
        Spec(
            "Scoring given up",
            "values that took too long, or crashed",
            {"reward_timeouts": "late", "reward_crashes": "crashed"},
        ),
    ),
    "How the answers change": (
        Spec("Answer length", "tokens", {"length": ""}),
        Spec("Length without code", "tokens, answers in words alone", {"text_only_length": ""}),
        Spec("Attempts", "per answer", {"attempts": ""}),
        Spec(
            "Wrong give-ups",
            "share of answers to problems that can be solved",
            {"wrong_give_ups": ""},
            SHARE,
        ),
        Spec("Reflections", "per answer", {REFLECTIONS: ""}),
        Spec("The word wait", "per answer", {"waits": ""}, rare=True),
        Spec("Cut off", "share of answers that hit the length limit", {"cut": ""}, SHARE),
        Spec(
            "Right steps",
            "share right of sums, verdicts, uses of numbers",
            {"right_sums": "sums", "right_verdicts": "verdicts", "right_numbers": "numbers"},
            WHOLE,
        ),
        Spec("Steps", "marks of steps in an answer", {"steps": ""}),
        Spec("Repeated", "share of 20-grams that stood before", {"repeated": ""}, SHARE),
        Spec(
            "Length of text",
            "characters of an answer",
            {"characters": "all", "text_characters": "no code", "reasoning_characters": "thinking"},
        ),
        Spec(
            "Code",
            "share of answers with a block of it, and of all characters",
            {"code_answers": "answers", "code_share": "characters"},
            WHOLE,
            rare=True,
        ),
    ),
    "The optimisation": (
        Spec("Loss", "", {"loss": ""}, AROUND),
        Spec("KL", "from the reference model, nats a token", {"kl": ""}),
        Spec("KL weight", "where it is adaptive", {"kl_weight": ""}),
        Spec("KL of the rollout", "what moves the weight, nats a token", {"kl_rollout": ""}),
        Spec("KL of the update", "from the policy before it, nats a token", {"kl_old": ""}),
        Spec("Entropy", "nats a token", {"entropy": ""}),
        Spec(
            "Groups without contrast",
            "share of groups with equal rewards",
            {"equal_groups": ""},
            WHOLE,
        ),
        Spec("Prompts kept", "share of those that were asked", {"kept": ""}, WHOLE),
        Spec(
            "Log-prob gap",
            "sampler against trainer, largest, nats",
            {"gap": ""},
            Axis(log=True, limit=GAP_LIMIT),
        ),
        Spec("Ratio", "of new to old probability, mean over tokens", {"ratio": ""}, AROUND),
        Spec("Clipped", "share of tokens", {"clipped": ""}, SHARE),
        Spec("Gradient norm", "before clipping", {"grad_norm": ""}),
        Spec("Learning rate", "", {"learning_rate": ""}),
    ),
    "The critic": (
        Spec("Loss of the critic", "", {"critic/loss": ""}),
        Spec(
            "Explained variance",
            "of the returns, by the critic's values",
            {"critic/explained_variance": ""},
        ),
        Spec(
            "Outcomes told right",
            "by the process rewards' sum, share of answers",
            {"critic/accuracy": ""},
            WHOLE,
        ),
        Spec("Gradient norm of the critic", "before clipping", {"critic/grad_norm": ""}),
    ),
    "Experts and drafts": (
        Spec("Fullest expert", "times an even share, in the worst layer", {"experts/load_max": ""}),
        Spec("Idle experts", "share that no token chose", {"experts/load_idle": ""}, SHARE),
        Spec("Loss of the prediction modules", "nats a token", {"mtp_loss": ""}),
        Spec("Drafts accepted", "share of drafted tokens", {"drafts_accepted": ""}, WHOLE),
    ),
    "Speed": (
        Spec(
            "Throughput",
            "tokens a second",
            {"time/rollout_tokens_per_s": "rollout", "time/update_tokens_per_s": "update"},
        ),
        Spec("Time", "seconds a step", {"time/step": ""}),
        Spec("Slots in use", "share, mean over a rollout's steps", {"slots_busy": ""}, WHOLE),
        Spec("Decoding steps", "in a rollout", {"decode_steps": ""}),
    ),
}
# Shown within another chart, or said elsewhere.
HIDDEN = {
    *("stage", "step", "give_ups", "accuracy_low", "accuracy_high"),
    *("critic/learning_rate", "critic/value", "critic/value_clipped"),
}
# Drawn only where they are not 0 all along.
FAULTS = {"unjudged", "reward_timeouts", "reward_crashes"}


def sections(rows: Iterable[Row]) -> Iterator[tuple[str, list[Spec]]]:
    """The charts that `rows` have data for, by heading; unknown metrics come last, by name."""
    rows = list(rows)
    names = {name.removeprefix("test/") for row in rows for name in row} - HIDDEN
    seen = {name.removeprefix("test/") for row in rows for name, value in row.items() if value}
    names = sorted(names - (FAULTS - seen))
    parts = {name: name.removeprefix("reward/") for name in names if name.startswith("reward/")}
    known = set(parts)
    for heading, specs in CHARTS.items():
        found = [spec for spec in specs if any(name in names for name in spec.names)]
        known |= {name for spec in found for name in spec.names}
        found = [spec for spec in found if not spec.rare or seen & spec.names.keys()]
        if heading == "What is learned" and len(parts) > 1:
            found.insert(2, Spec("Reward by part", "means over a rollout's answers", parts))
        if found:
            yield heading, found
    rest = [name for name in names if name not in known and not name.startswith("time/")]
    if rest:
        yield "Also measured", [Spec(_words(name), "", {name: ""}) for name in rest]


def _words(name: str) -> str:
    return name.replace("_", " ").capitalize()


def points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if name in row]


def aha(rows: Sequence[Row]) -> float | None:
    """The step at which a stage's count of reflections takes off, or None."""
    return take_off(points(rows, REFLECTIONS))


def held_out(rows: Sequence[Row], name: str, label: str, colour: int) -> Series:
    ends = [f"test/{name}_low", f"test/{name}_high"]
    band = [(row["step"], *(row[end] for end in ends)) for row in rows if row.keys() >= {*ends}]
    values = points(rows, f"test/{name}")
    return Series(label=label, points=values, band=band, colour=colour, marked=True)


def chart(spec: Spec, rows: Sequence[Row]) -> str:
    """One stage's chart: rollouts and held-out problems, or several metrics of rollouts."""
    several = len(spec.names) > 1
    sampled = any("test/accuracy" in row for row in rows)
    series = []
    for colour, (name, label) in enumerate(spec.names.items()):
        label = label or ("rollout" if sampled else spec.title.lower())
        line = Series(label=label, points=points(rows, name), colour=colour % NUM_COLOURS)
        series.append(line)
        if not several:
            series.append(held_out(rows, name, "held-out", 1))
    axis = replace(spec.axis, mark=aha(rows)) if REFLECTIONS in spec.names else spec.axis
    return line_chart(spec.title, spec.note, series, axis)


def overlay(spec: Spec, runs: Sequence[Sequence[Row]], names: Sequence[str]) -> str:
    """Charts of one stage with a line for each run; held-out problems and rollouts apart."""
    charts = []
    for metric, part in spec.names.items():
        title = f"{spec.title}: {part}" if part else spec.title
        lines, tests = [], []
        for i, (rows, name) in enumerate(zip(runs, names, strict=True)):
            colour = i % NUM_COLOURS
            lines.append(Series(label=name, points=points(rows, metric), colour=colour))
            tests.append(held_out(rows, metric, name, colour))
        charts.append(line_chart(f"{title}, held-out", spec.note, tests, spec.axis))
        charts.append(line_chart(title, spec.note, lines, spec.axis))
    return "".join(charts)
