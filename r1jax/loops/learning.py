"""What a rollout teaches: who looks at it again, what the critic learns, how the policy moves."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from r1jax import schedules, settings, sharding
from r1jax.data.packing import collect
from r1jax.loops import adapters, auxiliary
from r1jax.loops.batches import pack_answers
from r1jax.loops.objectives import Teacher
from r1jax.loops.run import Context, stream_key, to_floats
from r1jax.loops.step import (
    make_critic_objective,
    make_logp,
    make_objective,
    make_score,
    make_update,
)
from r1jax.rollout.answers import fill_up, with_rows
from r1jax.state import init_state, last_learning_rate
from r1jax.types import Batch, Params, Rollout, TrainState

Fields = Mapping[str, Float[np.ndarray, "B A"]]  # of Batch, for each token of the answers
Update = Callable[..., tuple[TrainState, dict[str, jax.Array]]]


@dataclass(frozen=True, kw_only=True)
class Learner:
    """The compiled functions of a stage; of the critic there are none without one.

    `update_critic` is None too where the critic shares the policy's trunk: `update` moves both.
    """

    logp_of: Callable[..., tuple[jax.Array, jax.Array]]
    update: Update
    score: Callable[[Params, Batch], jax.Array] | None
    update_critic: Update | None
    teacher_logp: Callable[..., tuple[jax.Array, jax.Array]] | None = None  # (batch, temperature)
    adaptive: schedules.Adaptive | None = None  # what moves the weight of the KL term
    sampled: Callable[[Params], Params] = adapters.same  # what is trained -> the engine's weights


def begin(
    cfg: settings.Reinforce, context: Context, params: Params, *, teacher: Teacher | None = None
) -> tuple[Learner, TrainState]:
    """The functions of a stage that begins with the policy's weights `params`, and its state."""
    model, critic = context.run.model, cfg.critic
    weights = adapters.of_stage(cfg, context, params)
    each = cfg.minibatches * cfg.epochs
    warmup = 0 if critic is None else critic.warmup
    optimizer = cfg.optimizer((cfg.steps - warmup) * each)
    score = update_critic = beside = None
    if critic is not None:
        score_of = make_score(model, critic)
        score = lambda trained, batch: score_of(weights.whole(trained), batch)  # noqa: E731
        if critic.leaves is not None:
            key = stream_key(context.run.seed, f"{cfg.name}/critic", 0)
            beside = sharding.init(critic.leaves(model), key, context.mesh)
    shares = critic is not None and critic.trunk == "policy"
    first = {**weights.first, **(beside or {})}
    trained = first if shares else weights.first
    state = init_state(trained, optimizer, reference=cfg.reference != "none")
    if critic is not None and critic.optimizer is not None:
        second = critic.optimizer(cfg.steps * each)
        copied = jax.tree.map(jnp.copy, first)  # an update of the policy donates its own
        own = init_state(copied, second, reference=critic.reference)
        state = state.replace(critic=own)
        objective = weights.objective(make_critic_objective(model, critic))
        update_critic = partial(make_update(objective, second), **weights.told)
    adaptive = schedules.adaptive(cfg)
    if adaptive is not None:
        state = with_kl_weight(state, adaptive.first)
    objective = make_objective(
        model, cfg.loss, critic=critic if shares else None, extra=cfg.auxiliary
    )
    settle = partial(auxiliary.balanced, model, cfg.auxiliary)
    update = make_update(weights.objective(objective), optimizer, settle=settle)
    logp_of = make_logp(model)
    learner = Learner(
        sampled=weights.merged,
        logp_of=lambda trained, *args: logp_of(weights.whole(trained), *args),
        update=partial(update, **weights.told),
        score=score,
        update_critic=update_critic,
        teacher_logp=None if teacher is None else partial(make_logp(teacher.model), teacher.params),
        adaptive=adaptive,
    )
    return learner, state


def look_again(
    cfg: settings.Reinforce,
    context: Context,
    rollout: Rollout,
    state: TrainState,
    learner: Learner,
    step: int,
) -> tuple[Rollout, Fields]:
    """The rollout with what is computed before the first update, and what the critic said.

    That is log-probabilities of the reference or of a teacher, and with `cfg.old` "trainer" the
    trainer's own, with entropies; and what the advantage wants of the critic. What it said is named
    as its loss wants it: `value_old`, and `logp_ref` of its first weights.
    """
    temperature = temperature_at(cfg, step)
    passes: dict[tuple[str, ...], Callable[[Batch], tuple[jax.Array, ...]]] = {}
    if state.reference is not None:
        passes["logp_ref",] = (
            lambda b: learner.logp_of(
                state.reference,
                b.replace(choice=None),  # it has a routing of its own
                temperature,
            )[:1]
        )
    teacher_logp = learner.teacher_logp
    if teacher_logp is not None:
        passes["logp_ref",] = lambda b: teacher_logp(b.replace(choice=None), temperature)[:1]
    if cfg.old == "trainer":
        passes["logp_old", "entropy"] = lambda b: learner.logp_of(state.params, b, temperature)
    own = state if state.critic is None else state.critic
    score = learner.score
    if score is not None:
        passes["score",] = lambda b: (score(own.params, b),)
        if own is state.critic and own.reference is not None:
            passes["first",] = lambda b: (score(own.reference, b),)
    if not passes:
        return rollout, {}
    packing, batches = pack_answers(
        rollout,
        np.arange(len(rollout.answer)),
        {"weight": np.zeros_like(rollout.logp_rollout)},
        row_length=cfg.row_length,
        micro_rows=cfg.micro_rows,
    )
    placed = [sharding.put(b, context.mesh, "batch") for b in batches]
    found: dict[str, np.ndarray] = {}
    for names, run in passes.items():
        columns = zip(*(run(b) for b in placed), strict=True)
        for name, rows in zip(names, columns, strict=True):
            whole = np.concatenate(jax.device_get(list(rows)))
            found[name] = collect(packing, whole, width=rollout.answer.shape[1])
    said = {
        field: found.pop(name)
        for name, field in (("score", "value_old"), ("first", "logp_ref"))
        if name in found
    }
    rollout = rollout.replace(**found)
    if cfg.critic is not None:
        rollout = cfg.critic.fill(rollout, said["value_old"], said.get("logp_ref"))
    return rollout, said


def improve(
    cfg: settings.Reinforce,
    context: Context,
    rollout: Rollout,
    said: Fields,
    state: TrainState,
    learner: Learner,
    step: int,
) -> tuple[TrainState, dict[str, float]]:
    """All updates on one rollout: of the critic, and then of the policy, if it is not to stay.

    The advantages are of what the critic said before it learned from this rollout. An adaptive
    weight of the KL term moves after the update that it was used in, by the KL of this rollout;
    where the policy stays it does too.
    """
    weight = kl_weight_of(state)
    advantage = of_answers(cfg, schedules.resolve(cfg.advantage, step, adapted=weight), rollout)
    mask = np.arange(rollout.answer.shape[1])[None] < rollout.answer_length[:, None]
    fields = {
        "advantage": advantage,
        "logp_rollout": rollout.logp_rollout,
    }
    for name in ("logp_old", "logp_ref"):
        if getattr(rollout, name) is not None:
            fields[name] = getattr(rollout, name)
    values: dict[str, float] = {}
    if weight is not None:
        values |= {"kl_weight": weight, "kl_rollout": kl_of(rollout)}
    if cfg.critic is not None:
        state, found, lesson = improve_critic(
            cfg, cfg.critic, context, rollout, said, state, learner, step
        )
        values |= {f"critic/{name}": value for name, value in found.items()}
        if step <= cfg.critic.warmup:
            return state, values
        if learner.update_critic is None:
            fields |= lesson
    numbers = {
        "temperature": temperature_at(cfg, step),
        **schedules.arguments(cfg.loss, step, adapted=weight),
    }
    state, found = learn(
        cfg,
        context,
        rollout,
        state,
        learner.update,
        fields=fields,
        mask=mask,
        weight=cfg.weight,
        numbers=numbers,
        step=step,
    )
    if learner.adaptive is not None:
        moved = learner.adaptive.after(values["kl_weight"], values["kl_rollout"])
        state = with_kl_weight(state, moved)
    return state, values | found


def improve_critic(
    cfg: settings.Reinforce,
    critic: settings.Critic,
    context: Context,
    rollout: Rollout,
    said: Fields,
    state: TrainState,
    learner: Learner,
    step: int,
) -> tuple[TrainState, dict[str, float], Fields]:
    """The state with the critic updated, unless it shares the policy's trunk; metrics; what it is
    to learn. A token whose target is nan gets no weight in its loss."""
    weight = kl_weight_of(state)
    target = of_answers(cfg, schedules.resolve(critic.target, step, adapted=weight), rollout)
    mask = np.arange(target.shape[1])[None] < rollout.answer_length[:, None]
    mask &= ~np.isnan(target)
    target = np.where(mask, target, 0.0)
    whole = cfg.prompts * cfg.group  # as in `of_answers`
    seen = [jnp.asarray(with_rows(x, whole)) for x in (said["value_old"], target, mask)]
    values = {name: float(measure(*seen)) for name, measure in critic.measure.items()}
    lesson = {**said, "target": target}
    if learner.update_critic is None or state.critic is None:
        return state, values, lesson
    learned, found = learn(
        cfg,
        context,
        rollout,
        state.critic,
        learner.update_critic,
        fields=lesson,
        mask=mask,
        weight=critic.weight or cfg.weight,
        numbers=schedules.arguments(critic.loss, step, adapted=weight),
        step=step,
    )
    return state.replace(critic=learned), values | found, lesson


def of_answers(
    cfg: settings.Reinforce,
    function: Callable[[Rollout], Float[Array, "B A"]],
    rollout: Rollout,
) -> Float[np.ndarray, "B A"]:
    """What a function of rollouts says of the tokens of this one, on the host.

    It is shown a step's whole number of prompts, empty ones after those that `cfg.select` kept:
    its operations, which are compiled one by one for each shape, are then compiled once.
    """
    said = function(fill_up(rollout, cfg.prompts))
    return np.asarray(said, np.float32)[: len(rollout.answer)]


def learn(
    cfg: settings.Reinforce,
    context: Context,
    rollout: Rollout,
    state: TrainState,
    update: Update,
    *,
    fields: Fields,
    mask: Bool[np.ndarray, "B A"],
    weight: Callable[[np.ndarray], np.ndarray],
    numbers: Mapping[str, float],
    step: int,
) -> tuple[TrainState, dict[str, float]]:
    """The updates of one network: `cfg.epochs` passes over random minibatches of the answers.

    It learns from the tokens of `mask`, which `weight` weighs, what `fields` say of each of them;
    `numbers` go to the objective. Where `cfg.select` left fewer answers there are fewer
    minibatches, as even as can be and none larger than in a full step. Metrics are means over the
    updates, but `gap` is of the first, when sampler and trainer have the same weights.
    """
    history = []
    largest = cfg.prompts * cfg.group // cfg.minibatches
    for epoch in range(cfg.epochs):
        order = np.arange(len(mask))
        if cfg.minibatches > 1:
            order = np.random.default_rng([context.run.seed, step, epoch]).permutation(len(mask))
        for part in np.array_split(order, math.ceil(len(order) / largest)):
            part = np.sort(part)
            extras = {name: values[part] for name, values in fields.items()}
            _, batches = pack_answers(
                rollout,
                part,
                {**extras, "weight": weight(mask[part])},
                row_length=cfg.row_length,
                micro_rows=cfg.micro_rows,
                share_prompts=not cfg.auxiliary.mtp_weight,
            )
            placed = [sharding.put(b, context.mesh, "batch") for b in batches]
            state, measured = update(state, placed, **numbers)
            history.append(measured)
    found = [to_floats(measured) for measured in history]
    values = {name: float(np.mean([f[name] for f in found])) for name in found[0]}
    if "gap" in values:
        values["gap"] = found[0]["gap"]
    rate = last_learning_rate(state.opt_state)
    if rate is not None:
        values["learning_rate"] = float(rate)
    return state, values


def kl_weight_of(state: TrainState) -> float | None:
    """The adaptive weight of the KL term in this step; None where it is none."""
    return None if state.kl_weight is None else float(jax.device_get(state.kl_weight))


def with_kl_weight(state: TrainState, weight: float) -> TrainState:
    """The state with that adaptive weight, on all devices as the count of steps is."""
    return state.replace(kl_weight=jax.device_put(np.float32(weight), state.step.sharding))


def kl_of(rollout: Rollout) -> float:
    """The KL to the reference that a rollout shows: the mean over its tokens of the log-ratio."""
    assert rollout.logp_ref is not None
    policy = rollout.logp_rollout if rollout.logp_old is None else rollout.logp_old
    mask = np.arange(policy.shape[1])[None] < rollout.answer_length[:, None]
    return float(np.mean(policy - rollout.logp_ref, dtype=np.float64, where=mask))


def temperature_at(cfg: settings.Reinforce, step: int) -> float:
    """What logits are divided by; greedy answers are looked at as if it were 1."""
    if cfg.temperature is not None:
        return schedules.at(cfg.temperature, step)
    return cfg.engine.sampling.temperature or 1.0
