"""Strategies over the rollout engine, with a tiny random model."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import report, restore, sharding
from r1jax.evaluate import __main__ as evaluate
from r1jax.evaluate import curves, strategies
from r1jax.evaluate.problems import find_problems
from r1jax.models import decoder, heads
from r1jax.search.model import make_force, make_samples, reward_model, root
from r1jax.search.paths import Path as Answer
from r1jax.settings import Engine, Reinforce, Sampling

PROMPTS = ["make 9 from 7 5 3", "make 24 from 6 13 17", "make 3 from 1 2"]


@pytest.fixture(scope="module")
def model(small_run: Path) -> restore.Restored:
    """The small run's, on one device: its programs are compiled in half the time."""
    model = restore.open_run(small_run)
    one = jax.make_mesh(
        (1,) * len(sharding.AXES),
        sharding.AXES,
        devices=jax.devices()[:1],
        axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
    )
    params = sharding.put(jax.device_get(model.params), one)
    return replace(model, mesh=one, params=params)


def engine(model: restore.Restored, temperature: float) -> Engine:
    stage = restore.task_stage(model)
    assert isinstance(stage, Reinforce)
    return replace(stage.engine, sampling=Sampling(temperature=temperature))


def test_a_greedy_answer_in_steps_is_the_greedy_answer_in_one_go(model: restore.Restored):
    greedy = engine(model, 0.0)
    sample = make_samples(model, greedy, at_once=4)(jax.random.key(0))
    roots = [root(model, i, prompt) for i, prompt in enumerate(PROMPTS)]
    answers = restore.make_answers(model, greedy, samples=1, at_once=4, key=jax.random.key(7))
    expected = [group[0] for group in answers(PROMPTS, 0)]

    paths, turn = list(roots), 0
    while any(path.open for path in paths):
        still = [path for path in paths if path.open]
        longer = iter(sample(still, samples=1, turn=turn, limit=5))
        paths = [next(longer)[0] if path.open else path for path in paths]
        turn += 1
    assert [path.text for path in paths] == [answer.text for answer in expected]
    assert [len(path.tokens) for path in paths] == [answer.length for answer in expected]
    assert [path.finished for path in paths] == [answer.finished for answer in expected]
    assert turn == 3 and all(path.cut != path.finished for path in paths)  # 12 tokens: 5, 5 and 2


def test_a_step_ends_with_the_token_that_holds_its_text(model: restore.Restored):
    sample = make_samples(model, engine(model, 1.0), at_once=4)(jax.random.key(0))
    roots = [root(model, i, prompt) for i, prompt in enumerate(PROMPTS)]
    end = model.tokenizer.eos_token_id
    held = {i for i in range(len(model.tokenizer)) if "1" in model.tokenizer.decode([i])}
    groups = sample(roots, samples=8, turn=0, until="1")
    paths = [path for group in groups for path in group]
    assert any(path.open for path in paths) and len({path.tokens for path in paths}) > 12
    for path in paths:
        *before, last = path.tokens
        assert not {end, *held} & set(before)
        assert last == end if path.finished else last in held or path.cut
        assert path.text == model.tokenizer.decode(path.tokens, skip_special_tokens=True)
    # The same again; and what comes of a problem does not depend on the others.
    assert sample(roots, samples=8, turn=0, until="1") == groups
    others = [path for group in sample(roots[1:], samples=8, turn=0, until="1") for path in group]
    alone = [path for group in groups[1:] for path in group]
    # XLA may round a row of a batch of another size otherwise, in the last bit.
    assert [replace(p, logp=0.0) for p in others] == [replace(p, logp=0.0) for p in alone]
    np.testing.assert_allclose([p.logp for p in others], [p.logp for p in alone], rtol=1e-6)
    assert sample(roots, samples=8, turn=1, until="1") != groups


def test_text_that_is_put_in_takes_the_place_of_what_is_dropped(model: restore.Restored):
    force = make_force(model, engine(model, 1.0))
    path = force(root(model, 0, PROMPTS[0]), " <think> 7 + 5 </think>")
    assert path.text == " <think> 7 + 5 </think>" and len(path.tokens) == 5
    ended = replace(path, finished=True)
    longer = force(ended, " no .", drop=1)
    assert longer.text == " <think> 7 + 5 no ." and longer.open and len(longer.tokens) == 6
    assert force(longer, " no . no . no .").cut
    with pytest.raises(ValueError, match="has no token for"):
        force(path, " Wait")


def test_a_reward_models_score_is_its_heads_number_at_the_last_token(model: restore.Restored):
    key = jax.random.key(1)
    head = sharding.init(heads.scalar_leaves(model.run.model), key, model.mesh)
    head = {"scale": jax.random.normal(key, head["scale"].shape), "bias": head["bias"] + 0.5}
    score = reward_model(model.run.model, model.params, head, model.tokenizer, at_once=2)
    answers = [" 7 + 5 - 3 = 9 yes", "", " 7 + 5 - 3 = 8 yes"]
    found = score([PROMPTS[0]] * 3, answers)
    run = jax.jit(partial(decoder.run, model.run.model))
    for answer, value in zip(answers, found, strict=True):
        ids = jnp.asarray([model.tokenizer.encode(PROMPTS[0] + answer)], jnp.int32)
        ones, place = jnp.ones_like(ids), jnp.arange(ids.shape[1])[None]
        hidden = run(model.params, ids, place, ones).hidden
        last = np.asarray(hidden)[0, -1].astype(np.float64)
        expected = last @ np.asarray(head["scale"], np.float64) + 0.5
        assert value == pytest.approx(expected, abs=1e-5)
    assert len(set(found)) == 3


def test_every_strategy_is_a_curve_of_accuracy_against_tokens(
    model: restore.Restored, tmp_path: Path, capsys, monkeypatch
):
    out = tmp_path / "all.jsonl"
    (tmp_path / "long_answers.py").write_text(
        "def prefer(model):\n"
        "    assert model.run.name == 'small'\n"
        "    return lambda prompts, answers: [score(answer) for answer in answers]\n"
        "def score(answer):\n"
        "    return len(answer) / 100 + sum(map(ord, answer)) % 97 / 1e5  # no ties\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    flags = [f"--strategy={name}" for name in curves.STRATEGIES]
    flags += ["--sizes=2", "--budgets=12", "--branch=2", "--step=.", "--rows=4", "--temperature=2"]
    flags += ["--closing= </think>", "--wait= no", "--score=long_answers:prefer"]
    args = evaluate.parser().parse_args([model.run.name, *flags])
    strategies.check(args)
    strategies.main(args, model, find_problems(args, model), out, 0)
    points = lines(out.with_suffix(".curves.jsonl"))
    sizes = {
        name: [p["size"] for p in points if p["strategy"] == name] for name in curves.STRATEGIES
    }
    assert sizes == {
        "plain": [1], "majority": [2], "weighted": [2], "best": [2], "direct": [0],
        "cut": [12], "wait": [2], "beam": [2], "guided": [2], "tree": [2],
    }  # fmt: skip
    kept = lines(out)
    pool = [each for each in kept if each["strategy"] == "pool"]
    assert len(pool) == 4 * 2
    by_name = {(p["strategy"], p["size"]): p for p in points}
    mean = sum(each["accuracy"] for each in pool) / 8
    assert by_name["plain", 1]["accuracy"] == pytest.approx(mean)
    for name, share in (("plain", 8), ("majority", 4), ("weighted", 4), ("best", 4)):
        spent = sum(each["length"] for each in pool) / share
        assert by_name[name, 2 if share == 4 else 1]["sampled"] == pytest.approx(spent)
    longest = [max(pool[i : i + 2], key=lambda each: each["score"]) for i in range(0, 8, 2)]
    assert by_name["best", 2]["accuracy"] == sum(each["accuracy"] for each in longest) / 4
    assert by_name["best", 2]["scored"] > 0 == by_name["majority", 2]["scored"]
    for name, size in (("beam", 2), ("guided", 2), ("tree", 2), ("wait", 2), ("direct", 0)):
        chosen = [
            e for e in kept if (e["strategy"], e.get("size"), e.get("chosen")) == (name, size, True)
        ]
        assert len(chosen) == 4
        for each in chosen:
            words = each["answer"].split()
            assert each["accuracy"] == float(len(words) % 2 == 0) and each["length"] <= 12
        right = sum(each["accuracy"] for each in chosen) / 4
        assert by_name[name, size]["accuracy"] == right
        spent = sum(each["tokens"] for each in chosen) / 4
        assert by_name[name, size]["sampled"] == pytest.approx(spent)
    assert all(e["answer"].startswith(" </think>") for e in kept if e["strategy"] == "direct")
    printed = capsys.readouterr().out
    assert "4 problems of test" in printed and "guided" in printed

    run = tmp_path / "run"
    (run / "evaluations").mkdir(parents=True)
    out.with_suffix(".curves.jsonl").rename(run / "evaluations" / "a.curves.jsonl")
    (run / "metrics.jsonl").write_text("")
    html = report.build(run)
    assert "Accuracy against tokens" in html and html.count("<tr><td>") == len(points)
    (run / "evaluations" / "a.curves.jsonl").write_text('{"strategy": "tree"}\n')
    with pytest.raises(ValueError, match="point 1 has no accuracy, cut, high"):
        report.build(run)


def test_what_one_strategy_found_is_kept_when_the_next_one_fails(
    model: restore.Restored, tmp_path: Path, capsys, monkeypatch
):
    def fail(*_: object, **__: object) -> None:
        raise MemoryError("gone")

    monkeypatch.setattr(curves, "beam_search", fail)
    flags = ["--strategy=beam", "--strategy=majority", "--sizes=2", "--step=.", "--rows=4"]
    args = evaluate.parser().parse_args([model.run.name, *flags, "--temperature=2"])
    out = tmp_path / "all.jsonl"
    with pytest.raises(MemoryError, match="gone"):
        strategies.main(args, model, find_problems(args, model), out, 0)
    assert len(lines(out)) == 8
    assert [p["strategy"] for p in lines(out.with_suffix(".curves.jsonl"))] == ["majority"]
    assert "majority" in capsys.readouterr().out


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys: pytest.CaptureFixture, *arguments: object) -> str:
    with pytest.raises(SystemExit) as left:
        evaluate.main([str(each) for each in arguments])
    assert left.value.code == 2
    return capsys.readouterr().err


def test_strategies_that_cannot_be_run_are_one_line(small_run: Path, capsys):
    some = [small_run, "--rows", 2, "--strategy"]
    assert "unknown strategy 'x'; known: plain, majority" in refused(capsys, *some, "x")
    assert "--strategy best needs a scorer" in refused(capsys, *some, "best")
    assert "--strategy cut needs --budgets" in refused(capsys, *some, "cut")
    assert "are not for --strategy" in refused(capsys, *some, "plain", "--samples", 2)
    err = refused(capsys, *some, "beam", "--step", "x y", "--sizes", 1)
    assert err.endswith("no single token of the tokenizer holds 'x y': a step cannot end there\n")
    err = refused(capsys, *some, "best", "--score", "r1jax.none:f")
    assert "--score r1jax.none:f cannot be found" in err
    err = refused(capsys, *some, "best", "--score", small_run)
    assert err.endswith("stage rl trained no reward model: it has no head\n")
    assert "greedy continuations are all the same" in refused(
        capsys, *some, "majority", "--temperature", 0
    )


def test_more_paths_of_a_problem_than_there_are_keys_are_refused(model: restore.Restored):
    sample = make_samples(model, engine(model, 1.0), at_once=4)(jax.random.key(0))
    many = [Answer(problem=0, prompt=PROMPTS[0])] * 5000
    with pytest.raises(ValueError, match="at most 4096 paths"):
        sample(many, samples=1, turn=0)
