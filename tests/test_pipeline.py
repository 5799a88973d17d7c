"""A run of every kind of stage: to the end, killed in each of them, and with bad inputs."""

import hashlib
import json
import shutil
import signal
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from r1jax import (
    config,
    convert,
    dataset,
    host,
    inputs,
    manifest,
    metrics,
    pipeline,
    restore,
)
from r1jax.data import countdown, passes
from r1jax.data.sources import jsonl
from r1jax.local import Local, ask
from r1jax.models import decoder, hf, lora
from r1jax.reward_model import RewardModel, scores
from r1jax.rewards.countdown import accuracy
from r1jax.rewards.weighted import Batched, weighted
from r1jax.settings import Build, Built, Engine, Reinforce, Run, Supervised, Task

CONFIG = Path(__file__).with_name("pipeline_config.py")
ENGINE = Engine(max_prompt=8, max_new=16, slots=4)
STAGES = ["base", "sampled", "sft", "chosen", "judge", "rl", "table"]


@pytest.fixture(scope="module")
def straight(made_once: Callable[..., Path], start_train: Callable[..., Any]) -> Path:
    """The run, never stopped."""

    def make(out: Path) -> None:
        process = start_train("--config", CONFIG, "--out", out)
        assert process.wait(600.0) == 0, process.stderr

    return made_once("pipeline run", make)


@pytest.fixture
def copy(straight: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(straight, tmp_path / "run"))


def saved(out: Path, stage: str) -> Any:
    """All that the last checkpoint of a stage holds, on the host."""
    from orbax.checkpoint import v1 as ocp

    with warnings.catch_warnings():  # orbax warns that arrays go where they were saved
        warnings.simplefilter("ignore", UserWarning)
        tree = ocp.load(out / "checkpoints" / stage / "3" / "arrays")
    return jax.tree.map(np.asarray, tree)


def weights(out: Path) -> dict[str, bytes]:
    """The bits of the last checkpoint of each stage."""
    found = {}
    for name in ("base", "sft", "judge", "rl"):
        for path, x in jax.tree_util.tree_leaves_with_path(saved(out, name)):
            found[name + jax.tree_util.keystr(path)] = x.tobytes()
    return found


def logs(out: Path) -> list[dict[str, Any]]:
    """The lines of both logs, without times."""
    lines = [
        line
        for name in ("metrics.jsonl", "samples.jsonl")
        for line in (out / name).read_text().splitlines()
    ]
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith("time/")}
        for line in lines
    ]


def data(out: Path) -> dict[str, bytes]:
    return {
        str(f.relative_to(out)): f.read_bytes() for f in sorted((out / "data").rglob("*.json*"))
    }


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# --------------------------------------------------------------------------- to the end


def test_the_manifest_ties_each_stage_to_what_it_was_made_from(straight: Path) -> None:
    entries = manifest.read(straight)
    assert list(entries) == STAGES and all(entry.done for entry in entries.values())
    made = {name: entry.output["sha256"] for name, entry in entries.items()}
    assert entries["sampled"].inputs["weights of base"] == made["base"]
    sft = dict(entries["sft"].inputs)
    assert sft.pop("evaluation.task.test") == entries["rl"].inputs["task.test"]
    assert sft == {"weights of base": made["base"], "rows of sampled": made["sampled"]}
    assert entries["chosen"].inputs == {"rows of sampled": made["sampled"]}
    rl = entries["rl"].inputs
    assert rl["weights of sft"] == made["sft"] and rl["rows of chosen"] == made["chosen"]
    assert rl["reward model judge"] == made["judge"]
    assert set(rl) == {"weights of sft", "rows of chosen", "reward model judge", "task.test"}
    table = entries["table"].inputs
    assert table["weights of base"] == made["base"] and table["weights of rl"] == made["rl"]
    assert "rl.group: 2" in entries["rl"].config
    assert not any(line.startswith("sft") for line in entries["rl"].config)


def test_the_machine_is_noted_with_its_devices(straight: Path) -> None:
    machine = json.loads((straight / "machine.json").read_text())
    # The command has a device for each core, up to a power of two: r1jax.host.
    most = min(machine["cores"], host.MAX_DEVICES)
    assert machine["devices"] <= most < 2 * machine["devices"] and machine["device"] == "cpu"


def test_counts_of_every_filter_are_what_the_files_show(straight: Path) -> None:
    counts = manifest.read(straight)["sampled"].output["counts"]
    answers = [
        answer
        for line in jsonl(straight / "data" / "sampled" / dataset.ANSWERS)
        for answer in line["answers"]
    ]
    right = sum(answer["accuracy"] == 1.0 for answer in answers)
    assert [count["name"] for count in counts][2:] == ["wrong", "duplicates", "contaminated"]
    assert [count["rows"] for count in counts][:3] == [24, len(answers), right]
    assert len(answers) == 48 and 0 < right < 48
    assert counts[-1]["rows"] == len(jsonl(straight / "data" / "sampled" / dataset.ROWS))


def test_problems_of_a_built_set_are_asked_in_the_order_given(straight: Path) -> None:
    chosen = [row["id"] for row in jsonl(straight / "data" / "chosen" / dataset.ROWS)]
    lines = [line for line in logs(straight) if line.get("split") == "train"]
    asked = list(dict.fromkeys(line["row"]["id"] for line in lines if line["step"] == 1))
    assert asked == chosen[: len(asked)]


def test_a_supervised_stage_answers_held_out_problems_before_between_and_after(
    straight: Path,
) -> None:
    lines = [line for line in logs(straight) if line["stage"] == "sft"]
    tests = {line["step"]: line for line in lines if "test/accuracy" in line}
    assert list(tests) == [0, 2, 3] and "loss" not in tests[0] and "loss" in tests[2]
    for step, line in tests.items():
        answers = [one for one in lines if one.get("split") == "test" and one["step"] == step]
        assert len(answers) == 8
        assert line["test/accuracy"] == np.mean([one["accuracy"] for one in answers])
        assert line["test/length"] == np.mean([one["length"] for one in answers])
    sampled = [one["answer"] for one in lines if one.get("split") == "test" and one["step"] == 0]
    assert sampled != [one["answer"] for one in lines if one.get("split") == "test"][-8:]


def test_tokens_are_counted_where_they_are_sampled_and_where_they_are_trained_on(
    straight: Path,
) -> None:
    found: dict[str, dict[str, list[float]]] = {}
    for row in metrics.read(straight):
        for name, value in row.items():
            found.setdefault(row["stage"], {}).setdefault(name, []).append(value)

    def answered(file: Path) -> int:
        return sum(one["num_tokens"] for line in jsonl(file) for one in line["answers"])

    data = straight / "data"
    assert found["sampled"]["time/rollout_tokens"] == [answered(data / "sampled" / dataset.ANSWERS)]
    tables = sorted((data / "table").glob("*.jsonl"))
    assert len(tables) == 2
    assert found["table"]["time/evaluate_tokens"] == [sum(map(answered, tables))]
    tested = [8 * length for length in found["sft"]["test/length"]]
    assert found["sft"]["time/evaluate_tokens"] == pytest.approx(tested)
    # 3 updates of 4 rows of 32 tokens, not all of which hold a text.
    trained = found["sft"]["time/update_tokens"]
    assert len(trained) == 3 and 0.5 * 3 * 4 * 32 < sum(trained) <= 3 * 4 * 32
    made = [8 * length for length in found["rl"]["length"]]
    assert found["rl"]["time/rollout_tokens"] == found["rl"]["time/update_tokens"]
    assert found["rl"]["time/rollout_tokens"] == pytest.approx(made)


def test_what_was_given_up_is_logged_where_workers_can_give_up(straight: Path) -> None:
    names = {"reward_timeouts", "reward_crashes"}
    assert not any(names & {name.removeprefix("test/") for name in line} for line in logs(straight))
    task = Task(train=list, test=list, prompt=str, accuracy=accuracy)
    for workers in (0, 1):
        with pipeline.open_scorer(task.accuracy, task, workers=workers, seconds=1.0) as scorer:
            assert set(scorer.given_up()) == (names if workers else set())


# --------------------------------------------------------------------------- adapters


def with_adapters(params: Any, adapters: Any, scale: float) -> Any:
    """The sums of the paper, by numpy."""
    params = jax.tree.map(np.copy, params)
    for name, (a, b) in adapters.items():
        *path, last = name.split("/")
        place = params
        for word in path:
            place = place[int(word) if word.isdigit() else word]
        a, b = a.reshape(*a.shape[:2], -1), b.reshape(len(b), -1, b.shape[-1])
        place[last] = place[last] + scale * (b @ a).reshape(place[last].shape)
    return params


def test_the_sampler_has_the_adapters_that_are_trained(straight: Path) -> None:
    rl = [line for line in logs(straight) if line["stage"] == "rl" and "gap" in line]
    assert len(rl) == 3
    for line in rl:
        assert line["gap"] < 1e-5 and line["grad_norm"] > 0
    assert abs(rl[0]["kl"]) < 1e-6 < rl[2]["kl"]  # the reference is what it began with


def test_what_a_stage_leaves_are_merged_weights_and_an_adapters_file(
    straight: Path, tmp_path: Path
) -> None:
    """RL's adapters on SFT's on the base."""
    found = restore.open_run(straight, stage="rl")
    base, sft, judge, rl = (
        saved(straight, name)["params"] for name in ("base", "sft", "judge", "rl")
    )
    began = with_adapters(base, sft["lora"], 2.0)
    want = with_adapters(began, rl["lora"], 1.0)
    close = partial(np.testing.assert_allclose, atol=1e-6)
    jax.tree.map(close, found.params, want)
    assert rl.keys() == {"lora"} and judge.keys() == {"lora", "reward"}
    # As a Hugging Face folder: the merged weights.
    convert.main([str(straight), str(tmp_path / "rl"), "--stage", "rl"])
    cfg, exported = hf.load(tmp_path / "rl")
    jax.tree.map(np.testing.assert_array_equal, exported, found.params)
    # Or the adapters alone, for the weights that the stage began with.
    convert.main([str(straight), str(tmp_path / "sft"), "--stage", "sft"])
    file = tmp_path / "adapters.safetensors"
    convert.main([str(straight), str(file), "--stage", "rl", "--adapters-only"])
    convert.main([str(tmp_path / "sft"), str(tmp_path / "again"), "--adapters", str(file)])
    _, again = hf.load(tmp_path / "again")
    jax.tree.map(close, again, want)
    # The exported model says what the trained one does: adapters beside the weights.
    beside = lora.attach(jax.device_put(began), lora.read(file), scale=1.0)
    tokens = np.asarray([[5, 6, 7, 8, 9]], np.int32)
    logits = jax.jit(partial(decoder.logits, cfg))
    np.testing.assert_allclose(logits(beside, tokens), logits(exported, tokens), atol=1e-5)
    assert np.abs(logits(began, tokens) - logits(exported, tokens)).max() > 1e-3


def test_adapters_are_not_added_to_other_weights(copy: Path, capsys: Any) -> None:
    entries = manifest.read(copy)
    other = {**entries["sft"].inputs, "weights of base": "of another day"}
    manifest.write(copy, {**entries, "sft": replace(entries["sft"], inputs=other)})
    restore.open_run(copy, stage="base")
    with pytest.raises(ValueError, match="the adapters of sft belong to other weights of base"):
        restore.open_run(copy, stage="rl")
    with pytest.raises(SystemExit):
        convert.main([str(copy), str(copy / "file"), "--stage", "base", "--adapters-only"])
    assert "stage base trained no adapters" in capsys.readouterr().err


# --------------------------------------------------------------------------- killed


def test_killed_in_every_stage_it_ends_with_the_same_bits(
    straight: Path, tmp_path: Path, start_train: Callable[..., Any]
) -> None:
    out = tmp_path / "run"
    for moment in (
        ("base/unfinished/2/meta.json", 1),
        ("sampled/answers.jsonl", 3),
        ("sampled/.rows.jsonl.new", 2),  # it is about to get its name
        (".manifest.json.new", 8),  # the last checkpoint of sft is there, and not yet entered
        ("chosen/.rows.jsonl.new", 1),
        ("judge/unfinished/2/meta.json", 1),
        ("rl/unfinished/2/meta.json", 1),
        ("table/rl.jsonl", 2),
    ):
        killed = start_train("--config", CONFIG, "--out", out, kill=moment)
        assert killed.wait() == -signal.SIGKILL, killed.stderr
    last = start_train("--config", CONFIG, "--out", out)
    assert last.wait() == 0, last.stderr
    assert weights(out) == weights(straight)
    assert "rl['kl_weight']" in weights(out)
    assert data(out) == data(straight)
    assert logs(out) == logs(straight)


# --------------------------------------------------------------------------- refused


def settings_of(run: Run, **changes: Any) -> Run:
    """The run with one of its stages changed: `base={"steps": 4}`."""
    stages = tuple(replace(stage, **changes.get(stage.name, {})) for stage in run.stages)
    return replace(run, stages=stages)


def go_on(out: Path, run: Run | None = None) -> None:
    """What the train command does once the config is found to be the folder's."""
    text = config.describe(run or config.check(str(CONFIG)))
    pipeline.run(run or config.load(str(CONFIG)), out, text=text, stopping=lambda: False)


def undone(out: Path, *names: str) -> None:
    """Makes these stages, the last ones, such as had never begun."""
    entries = {n: e for n, e in manifest.read(out).items() if n not in names}
    manifest.write(out, entries)
    for name in names:
        for folder in ("checkpoints", "data"):
            shutil.rmtree(out / folder / name, ignore_errors=True)


def test_done_stages_are_left_alone(copy: Path) -> None:
    kept = ("checkpoints", "data", "manifest.json", "metrics.jsonl", "samples.jsonl")
    before = {name: data for name, data in everything(copy).items() if name.startswith(kept)}
    go_on(copy)
    after = {name: data for name, data in everything(copy).items() if name.startswith(kept)}
    assert after == before
    # How often it would be saved today is no reason to do it again.
    often = str(CONFIG), ["base.checkpoints.every=1"]
    text = config.describe(config.check(*often))
    pipeline.run(config.load(*often), copy, text=text, stopping=lambda: False)
    after = {name: data for name, data in everything(copy).items() if name.startswith(kept)}
    assert after == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampled": {"samples": 3}},
            "stage sampled was made with another setting: sampled.samples was 2 and is 3 now; "
            "use --out for a new folder",
        ),
        (
            {"base": {"source": lambda: [{"prompt": "make", "answer": " 1"}]}},
            "stage base was made with another setting: base.source was ",
        ),
    ],
)
def test_a_changed_setting_of_a_done_stage_is_one_line(copy: Path, changes, message) -> None:
    before = everything(copy)
    run = settings_of(config.load(str(CONFIG)), **changes)
    with pytest.raises(ValueError) as caught:
        go_on(copy, run)
    assert str(caught.value).startswith(f"{copy}: {message}")
    assert {**everything(copy), "machine.json": b""} == {**before, "machine.json": b""}


def test_a_changed_input_of_a_done_stage_is_one_line(copy: Path) -> None:
    entries = manifest.read(copy)
    inputs = {**entries["base"].inputs, "source": "0" * 64}  # as if made from other rows
    manifest.write(copy, {**entries, "base": replace(entries["base"], inputs=inputs)})
    with pytest.raises(ValueError, match=r"another input: source was 000000000000\.\.\. and is "):
        go_on(copy)


def test_passes_may_change_until_the_data_set_is_done(tmp_path: Path) -> None:
    config = ["cold.passes.long.most: 9", "cold.samples: 4"]
    there = manifest.Entry(name="cold", config=config, inputs={"source": "1", "passes: a": "2"})
    here = replace(there, config=config[1:], inputs={"source": "1"})
    manifest.same_or_fail(tmp_path, there, here)
    with pytest.raises(ValueError, match=r"setting: cold.passes.long.most was 9 and is absent now"):
        manifest.same_or_fail(tmp_path, replace(there, done=True), here)
    with pytest.raises(ValueError, match=r"another input: source was 1 and is 3 now"):
        manifest.same_or_fail(tmp_path, there, replace(here, inputs={"source": "3"}))


def test_a_file_that_a_pass_reads_is_an_input(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text("{}\n")
    against = partial(len, [partial(jsonl, file), partial(jsonl, tmp_path / "none")])
    asked = {"contaminated": against, "judged": {"rubric": "Is it right? " * 99}}
    assert list(inputs.files_in(asked)) == [file]


def helpful(run: Path, stage: str | None) -> Batched:
    model = RewardModel(run=str(run), stage=stage)
    return Batched(partial(scores, model=model, prompt=countdown.short_prompt))


def test_the_weights_of_a_reward_model_are_an_input(small_run: Path) -> None:
    run = config.load(str(CONFIG))
    entries = {
        name: manifest.Entry(name=name, config=[], inputs={}, output={"sha256": name})
        for name in STAGES
    }
    base, rl = (
        hashlib.sha256((small_run / "checkpoints" / name / "SHA256SUMS").read_bytes()).hexdigest()
        for name in ("base/1", "rl/3")
    )
    assert base != rl
    plain = run.stages[5]
    assert isinstance(plain, Reinforce)
    reward = weighted(right=(1.0, plain.reward), helpful=(0.5, helpful(small_run, "base")))
    asking = replace(plain, reward=reward)
    found = inputs.digests(asking, "sft", entries, "")
    named = f"weights of reward model {small_run}"
    assert found == {
        **inputs.digests(plain, "sft", entries, ""),
        f"{named}, stage base": base,
    }
    judged = partial(passes.keep_judged, reward=helpful(small_run, None), least=0)
    chosen = settings_of(run, chosen={"passes": {"judged": judged}}).stages[3]
    found = inputs.digests(chosen, "sft", entries, "")
    assert found == {"rows of sampled": "sampled", f"passes: {named}": rl}  # the last there is


def test_a_judges_weights_are_an_input(tmp_path: Path) -> None:
    for size in (1, 2):
        (tmp_path / "model.safetensors").write_bytes(b"1" * size)
        reward = Batched(partial(ask, model=Local(folder=str(tmp_path), engine=ENGINE)))
        (found,) = inputs.of_models({"judge": (1.0, reward)}).items()
        content = b"model.safetensors %d\n" % size + 2 * b"1" * size
        assert found == (f"weights of judge {tmp_path}", hashlib.sha256(content).hexdigest())


def test_a_missing_or_changed_input_is_one_line_that_names_both_stages(copy: Path) -> None:
    undone(copy, "sft", "chosen", "judge", "rl", "table")
    rows = copy / "data" / "sampled" / dataset.ROWS
    good = rows.read_bytes()
    rows.write_bytes(good[: good.index(b"\n") + 1])
    last = manifest.read(copy)["sampled"]
    run = config.load(str(CONFIG))
    sft = run.stages[2]
    assert isinstance(sft, Supervised)
    for found, message in (
        (good[: good.index(b"\n") + 1], "was changed after it was made"),
        (None, "no such file"),
    ):
        rows.unlink(missing_ok=True)
        if found:
            rows.write_bytes(found)
        with pytest.raises(ValueError, match=rf"^stage sft needs the rows of sampled: .*{message}"):
            pipeline.whole_or_fail("sft", "sampled", copy, {"sampled": last})
    rows.write_bytes(good)
    shutil.rmtree(copy / "checkpoints" / "base" / "3")
    with pytest.raises(
        ValueError, match=r"^stage sft needs the weights of base: no checkpoint 3 in "
    ):
        go_on(copy)
    assert rows.read_bytes() == good


def test_a_new_stage_can_only_come_after_those_that_have_begun(copy: Path) -> None:
    run = config.load(str(CONFIG))
    base, sampled, *rest = run.stages
    with pytest.raises(ValueError, match=r"has begun with the stages base, sampled, sft, chosen"):
        go_on(copy, replace(run, stages=(base, replace(base, name="more"), sampled, *rest)))


def test_a_damaged_manifest_is_one_line(copy: Path) -> None:
    (copy / manifest.FILE).write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is damaged: "):
        go_on(copy)


def test_rows_of_another_stage_stand_wherever_a_source_can() -> None:
    mixed = partial(passes.mix, others=Built(stage="a"), ratio=(3, 1))
    cfg = Build(name="b", source=Built(stage="a"), passes={"mixed": mixed})
    found = pipeline.with_rows(cfg, lambda name: lambda: [{"stage": name}])
    assert found.source() == [{"stage": "a"}]
    assert found.passes["mixed"].keywords["others"]() == [{"stage": "a"}]
    assert found.passes["mixed"].keywords["ratio"] == (3, 1)
    with pytest.raises(ValueError, match="the rows of stage a are there only while"):
        cfg.source()


def test_a_table_has_the_means_of_what_the_answers_score(straight: Path) -> None:
    table = json.loads((straight / "data" / "table" / "table.json").read_text())["models"]
    assert list(table) == ["before", "after"]
    problems = countdown.rows("test", num=9, seed=2, counts=(3,), low=1, high=20, operators="+-")
    for model, stage in (("before", "base"), ("after", "rl")):
        lines = list(jsonl(straight / "data" / "table" / f"{stage}.jsonl"))
        texts = [[one["answer"] for one in line["answers"]] for line in lines]
        assert [len(group) for group in texts] == [2] * 9
        even = [np.mean([len(text.split()) % 2 == 0 for text in group]) for group in texts]
        assert table[model]["even"]["mean"] == pytest.approx(np.mean(even))
        small = [i for i, row in enumerate(problems) if row["target"] < 20]
        short = [np.mean([len(text) < 20 for text in texts[i]]) for i in small]
        assert table[model]["short"]["mean"] == pytest.approx(np.mean(short))
        assert table[model]["short"]["problems"] == len(small) < 9
    page = (straight / "report.html").read_text()
    assert "<h1>before and after</h1>" in page and f"{table['after']['even']['mean']:.1%}" in page


def test_the_report_shows_how_many_rows_each_pass_left(straight: Path) -> None:
    page = (straight / "report.html").read_text()
    counts = manifest.read(straight)["sampled"].output["counts"]
    places = [page.index(f"<td>{one['name']}</td><td>{one['rows']}</td>") for one in counts]
    assert "sampled: data building" in page and places == sorted(places)
