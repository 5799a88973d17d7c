"""The supervised loop with other losses than cross-entropy: pairs, labels, heads, teachers."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from r1jax import checkpoint, config, metrics, restore, reward_model, settings, sharding
from r1jax.algos import distillation, preferences
from r1jax.data import labelled, packing
from r1jax.data.tokenizer import tiny
from r1jax.evaluate import pairs, strategies
from r1jax.kernels import logprob
from r1jax.loops import learning, objectives, supervised
from r1jax.loops.run import Context
from r1jax.models import decoder
from r1jax.rewards.weighted import Batched, score_many, weighted
from r1jax.search.paths import Path as Answer
from r1jax.types import Batch, Rollout

SPEC = str(Path(__file__).with_name("preference_config.py"))
RUN = config.load(SPEC)
(STAGE,) = RUN.stages
assert isinstance(STAGE, settings.Supervised) and isinstance(STAGE.source, partial)
CFG = STAGE
made_up = CFG.source.func
DPO = replace(CFG, head=None, loss=preferences.dpo, reference=True, steps=2)


def labels() -> list[dict[str, Any]]:
    """The answers of the pairs, each alone."""
    return [
        {"prompt": row["prompt"], "answer": row[name], "label": label}
        for row in made_up(32)
        for name, label in (("chosen", 1), ("rejected", 0))
    ]


KTO = replace(
    DPO,
    source=labels,
    texts=labelled.labels,
    loss=preferences.kto,
    reference_point=preferences.kto_reference_point,
)


def one_device() -> jax.sharding.Mesh:
    """Programs for one device are compiled in half the time."""
    return jax.make_mesh(
        (1,) * len(sharding.AXES),
        sharding.AXES,
        devices=jax.devices()[:1],
        axis_types=(jax.sharding.AxisType.Auto,) * len(sharding.AXES),
    )


def make_context(folder: Path, mesh: jax.sharding.Mesh) -> Context:
    return Context(
        run=RUN,
        folder=folder,
        text=[],
        tokenizer=tiny(),
        mesh=mesh,
        writer=metrics.open_writer(folder),
        stopping=lambda: False,
    )


def train(
    folder: Path, cfg: settings.Supervised, teacher: objectives.Teacher | None = None
) -> list[dict[str, Any]]:
    """Trains in `folder`, or goes on there; gives the rows of its log."""
    mesh = one_device()
    with jax.set_mesh(mesh):
        params = sharding.init(decoder.leaves(RUN.model), jax.random.key(0), mesh)
        left = supervised.train(cfg, make_context(folder, mesh), params, teacher=teacher)
    assert left.keys() == params.keys()  # without a head
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_a_reward_model_learns_to_prefer_and_serves_as_a_reward(tmp_path: Path, capsys) -> None:
    config.save(tmp_path, config.describe(config.check(SPEC)), SPEC)
    log = train(tmp_path, CFG)
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)  # a new head says 0 of all
    held_out = made_up(96, first=64)
    model = reward_model.RewardModel(run=str(tmp_path))
    score = partial(reward_model.scores, model=model, prompt=lambda row: row["prompt"])
    rows = [row for row in held_out for _ in range(2)]
    answers = [row[name] for row in held_out for name in ("chosen", "rejected")]
    reward = weighted(helpful=(2.0, Batched(score)))
    scored = score_many(reward, rows, answers)
    parts = np.asarray([parts["helpful"] for _, parts in scored]).reshape(-1, 2)
    assert (parts[:, 0] > parts[:, 1]).mean() > 0.9
    assert [value for value, _ in scored] == pytest.approx(2 * parts.ravel())
    # The command counts the same pairs.
    right = (parts[:, 0] > parts[:, 1]).mean()
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held_out))
    pairs.main([str(tmp_path), str(tmp_path / "pairs.jsonl")])
    assert f"32 pairs, right {right:.1%} [" in capsys.readouterr().out
    # Scored alone or beside others: the same. And a reward model is no policy of pairs.
    assert score(rows[:1], answers[:1]) == pytest.approx(parts[0, :1], abs=1e-5)
    # What guides a search is the probability that the score is the log odds of.
    value = strategies.scorer(str(tmp_path), restore.open_run(tmp_path))
    path = Answer(problem=0, prompt=rows[0]["prompt"], text=answers[0])
    assert value([path]) == pytest.approx([1 / (1 + math.exp(-parts[0, 0]))], abs=1e-5)
    # In training it reads the same tokens: its last loss is that of such scores.
    assert log[-1]["loss"] < 0.3 and log[-1]["accuracy"] > 0.9


@pytest.mark.parametrize(("cfg", "first"), [(DPO, math.log(2)), (KTO, 0.5)], ids=["dpo", "kto"])
def test_a_run_with_a_reference_goes_on_with_the_same_bits(
    cfg: settings.Supervised, first: float, tmp_path: Path
) -> None:
    cfg = replace(cfg, checkpoints=settings.Checkpoints(every=1))
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    log = train(straight, cfg)
    # The policy is its own reference: every gap is 0.
    assert log[0]["loss"] == pytest.approx(first, rel=1e-6)
    assert abs(log[1]["loss"] - first) > 1e-4
    shutil.copytree(straight, stopped)
    shutil.rmtree(stopped / "checkpoints" / cfg.name / "2")
    again = train(stopped, cfg)
    assert [row["loss"] for row in again] == [row["loss"] for row in log]
    like = {"params": sharding.abstract(decoder.leaves(RUN.model), one_device())}
    both = [
        checkpoint.load(folder / "checkpoints" / cfg.name, 2, {**like, "reference": like["params"]})
        for folder in (straight, stopped)
    ]
    chex.assert_trees_all_equal(both[0].state, both[1].state)
    moved = jax.tree.map(
        lambda a, b: bool((a != b).any()), both[0].state["params"], both[0].state["reference"]
    )
    assert moved["embed"]  # the reference stays as it was


def test_the_time_of_a_step_is_that_of_those_since_the_last_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]

    def update(state: Any, batches: Any) -> Any:
        clock[0] += 2.0
        return state, {"loss": np.float32(1)}

    monkeypatch.setattr(supervised, "make_update", lambda *_, **__: update)
    monkeypatch.setattr(supervised, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    log = train(tmp_path, replace(CFG, steps=5, log_every=3))
    assert [(row["step"], row["time/step"]) for row in log] == [(3, 2.0), (5, 2.0)]


def log_probs(cfg: settings.Decoder, params: Any, tokens: Any, position: Any, segment: Any) -> Any:
    """Of every token after each one, from logits kept whole."""
    hidden = jax.jit(partial(decoder.run, cfg))(params, tokens, position, segment).hidden
    logits = np.asarray(hidden, np.float64) @ np.asarray(decoder.head(cfg, params), np.float64).T
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def test_the_loss_of_a_divergence_is_the_mean_over_answers_of_whole_distributions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against logits kept whole, in numpy; in pieces, of a teacher that is wider."""
    monkeypatch.setattr(logprob, "CHUNK", 2048)
    model, wide = RUN.model, replace(RUN.model, dim=24)
    own, theirs = (
        sharding.init(decoder.leaves(cfg), jax.random.key(i)) for i, cfg in enumerate((model, wide))
    )
    rows = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in made_up(3)]
    items = labelled.answers(tiny(), rows)
    where = packing.pack([labelled.size(item) for item in items], 24)
    batch = Batch(**labelled.place(where, items, labelled=False))
    cfg = replace(
        DPO,
        texts=None,
        reference=False,
        loss=distillation.distillation_loss,
        divergence=distillation.forward_kl,
        teacher=settings.Teacher(run="another"),
    )
    objective = jax.jit(objectives.of_stage(model, cfg, wide))
    value, found = objective(own, batch, {"teacher": theirs})

    rows = batch.tokens, batch.position, batch.segment
    q, p = log_probs(model, own, *rows)[:, :-1], log_probs(wide, theirs, *rows)[:, :-1]
    gap = (np.exp(p) * (p - q)).sum(axis=-1)[np.asarray(batch.mask)[:, 1:]]
    assert value == pytest.approx(gap.mean(), rel=1e-4) and value > 1e-3
    assert found["loss"] == value


def test_a_student_learns_from_a_teachers_likeliest_tokens(tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "answer": row["chosen"]} for row in made_up(8)]
    cfg = replace(
        CFG,
        source=lambda: rows,
        texts=None,
        steps=6,
        row_length=24,
        head=None,
        loss=distillation.distillation_loss,
        divergence=partial(distillation.top_k, k=3),
        teacher=settings.Teacher(run="another"),
        checkpoints=settings.Checkpoints(every=6),
    )
    own, theirs = (
        sharding.init(decoder.leaves(RUN.model), jax.random.key(i), one_device()) for i in (0, 1)
    )
    theirs = jax.tree.map(lambda w: 4 * w, theirs)  # sure of itself
    log = train(tmp_path, cfg, objectives.Teacher(RUN.model, theirs))
    with jax.set_mesh(one_device()):
        first = supervised.make_stream(cfg, make_context(tmp_path, one_device())).batch(0)
    rows = first["tokens"], first["position"], first["segment"]
    q, p = (np.exp(log_probs(RUN.model, params, *rows)[:, :-1]) for params in (own, theirs))
    best = np.argsort(-p, axis=-1)[..., :3]
    q, p = (np.take_along_axis(x, best, axis=-1) for x in (q, p))
    q, p = (np.concatenate([x, 1 - x.sum(axis=-1, keepdims=True)], axis=-1) for x in (q, p))
    gap = (p * np.log(p / q)).sum(axis=-1)[first["mask"][:, 1:]]
    assert log[0]["loss"] == pytest.approx(gap.mean(), rel=1e-4)
    assert log[-1]["loss"] < 0.8 * log[0]["loss"]


def test_in_reinforcement_learning_a_teacher_says_how_likely_it_finds_the_samples(
    two_pairs: Rollout, tmp_path: Path
) -> None:
    rollout = two_pairs.replace(reward=None)
    stage = config.load(str(Path(__file__).with_name("small_config.py"))).stages[1]
    assert isinstance(stage, settings.Reinforce)
    cfg = replace(stage, teacher=settings.Teacher(run="another"))
    with pytest.raises(ValueError, match="reference must be none"):
        replace(cfg, reference="start")
    wide, mesh = replace(RUN.model, dim=24), one_device()
    with jax.set_mesh(mesh):
        own, theirs = (
            sharding.init(decoder.leaves(model), jax.random.key(i), mesh)
            for i, model in enumerate((RUN.model, wide))
        )
        context, teacher = make_context(tmp_path, mesh), objectives.Teacher(wide, theirs)
        learner, state = learning.begin(cfg, context, own, teacher=teacher)
        found, _ = learning.look_again(cfg, context, rollout, state, learner, 1)
    assert found.logp_ref is not None
    tokens = jnp.asarray([[3, 4, 6, 1], [3, 4, 1, 0], [5, 1, 0, 0], [5, 7, 1, 0]], jnp.int32)
    position = jnp.broadcast_to(jnp.arange(4), (4, 4))
    every = log_probs(wide, theirs, tokens, position, jnp.ones_like(tokens))
    for i, start in enumerate((2, 2, 1, 1)):
        for t in range(rollout.answer_length[i]):
            expected = every[i, start + t - 1, tokens[i, start + t]]
            assert found.logp_ref[i, t] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": False}, "reference_point needs reference=True"),
        ({"teacher": settings.Teacher(run="x")}, "teacher and divergence need each other"),
        ({"head": CFG.head}, "no reference and no teacher"),
        ({"weight": None}, "texts needs weight"),
    ],
)
def test_a_stage_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(KTO, **changes)


def test_a_row_that_cannot_be_trained_on_is_one_line_before_the_run() -> None:
    rows = [*made_up(2), {"prompt": "p", "chosen": "1"}]
    with pytest.raises(ValueError, match=r"^preference: a row has no field 'rejected'"):
        supervised.check(replace(DPO, source=lambda: rows), tiny())
    with pytest.raises(ValueError, match=r"row 0 has .* tokens, row_length allows 8"):
        supervised.check(replace(DPO, row_length=8), tiny())


def test_a_run_without_a_head_is_no_reward_model(small_run: Path) -> None:
    model = reward_model.RewardModel(run=str(small_run), stage="base")
    with pytest.raises(ValueError, match="stage base trained no reward model: it has no head"):
        reward_model.scores([{}], ["a"], model=model, prompt=lambda row: "1")
