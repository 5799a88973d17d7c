"""R1-Zero on a laptop: Countdown with three numbers, from random weights, on two CPU cores.

    make train          or: python -m r1jax.train --config configs/countdown_tiny.py

A base of 0.35M weights is pretrained on text that tries, fails and gives up too early. Then GRPO
with a rule reward, and nothing else, teaches it to go on searching.

Variants, `countdown_tiny.py:ppo`, differ from that by the algorithm alone, and each says what it
passes: `grpo`, `dr_grpo`, `dapo`, `gspo`, `cispo`, `rloo`, `reinforce_pp`,
`reinforce_pp_baseline`, `ppo`, `ppo_shared`, `prime`, `adaptive_kl`, `gdpo`. `lora`: of adapters.

In the place of rewards, `dpo`, `ipo`, `simpo`, `orpo` and `kto` have pairs of texts, of which the
one that goes on is better than the one that gives up; `reward_model` learns to tell them apart.
`process_model` learns of the base's own answers, step by step, whether they will come out right.
Both score answers: `python -m r1jax.evaluate RUN --strategy best --score RUN_OF_THE_MODEL`.
`distil`, `distil_top_k` and `on_policy` learn from the model in runs/countdown_tiny. Of these,
and of `adaptive_kl` and `gdpo`, nothing has been measured yet.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from r1jax.algos import (
    advantages,
    critics,
    distillation,
    losses,
    preferences,
    ratios,
    selection,
    weights,
)
from r1jax.algos.kl import k1, k2, k3
from r1jax.data import countdown, labelled, passes
from r1jax.data.tokenizer import tiny
from r1jax.models import heads
from r1jax.rewards.countdown import accuracy, answer_key, honesty, observe
from r1jax.rewards.weighted import weighted
from r1jax.schedules import Adaptive
from r1jax.settings import (
    Build,
    Built,
    Checkpoints,
    Critic,
    Engine,
    Head,
    Lora,
    Reinforce,
    Run,
    Sampled,
    Supervised,
    Task,
    Teacher,
    dense,
)
from r1jax.state import adamw

WORLD = {"counts": (3,), "low": 1, "high": 20, "operators": "+-"}


def config() -> Run:
    """The base, then GRPO."""
    return Run(
        name="countdown_tiny",
        model=dense(
            vocab_size=128,
            dim=96,
            num_layers=3,
            num_heads=4,
            num_kv_heads=4,
            mlp_dim=256,
            bias=True,
            scan=False,
            sums="float64",
        ),
        tokenizer=tiny,
        stages=(base(), rl()),
    )


def base() -> Supervised:
    """Pretraining on texts that compute and judge well but give up too early."""
    return Supervised(
        name="base",
        source=partial(
            countdown.attempts_rows,
            400_000,
            seed=0,
            **WORLD,
            give_up=0.85,
            persistent=0.15,
            max_attempts=11,
        ),
        steps=1200,
        batch_rows=32,
        row_length=144,
        micro_rows=8,
        loss=losses.cross_entropy,
        optimizer=partial(adamw, learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        on_prompt=False,
        checkpoints=Checkpoints(every=200),
    )


def rl() -> Reinforce:
    """GRPO with the accuracy reward alone."""
    return Reinforce(
        name="rl",
        task=Task(
            train=partial(countdown.rows, "train", num=200_000, seed=1, **WORLD),
            test=partial(countdown.rows, "test", num=512, seed=2, **WORLD),
            prompt=countdown.short_prompt,
            accuracy=accuracy,
            observe=observe,
            vote=answer_key,
        ),
        steps=80,
        prompts=32,
        group=8,
        engine=Engine(max_prompt=8, max_new=136, slots=64),
        reward=accuracy,
        advantage=advantages.grpo,
        loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.28),
        weight=weights.token_mean,
        optimizer=partial(adamw, learning_rate=1e-4, warmup=5),
        row_length=144,
        micro_rows=8,
        reference="start",  # for the KL in the log: the loss does not use it
        evaluate_every=20,
        evaluate_rows=512,
        checkpoints=Checkpoints(every=20),
    )


# --------------------------------------------------------------------------- other algorithms


def changed(**changes: Any) -> tuple[Supervised, Reinforce]:
    """The same base, then reinforcement learning with other parts."""
    return base(), replace(rl(), **changes)


def grpo() -> Run:
    """GRPO as published: mean over answers of means over tokens, KL to the base in the loss."""
    return replace(
        config(),
        name="countdown_tiny_grpo",
        stages=changed(
            loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2, kl=k3, kl_weight=0.001),
            weight=weights.sequence_mean,
        ),
    )


def dr_grpo() -> Run:
    """Dr. GRPO: no division by the group's deviation, nor by the answer's length."""
    return replace(
        config(),
        name="countdown_tiny_dr_grpo",
        stages=changed(
            advantage=partial(advantages.grpo, scale=False),
            loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2),
            weight=partial(weights.constant_budget, budget=136),
        ),
    )


def dapo() -> Run:
    """DAPO: more room above, mean over tokens, prompts with signal only, a price for overlength."""
    return replace(
        config(),
        name="countdown_tiny_dapo",
        stages=changed(
            advantage=partial(
                advantages.shaped,
                advantage=advantages.grpo,
                shape=partial(advantages.overlong_penalty, limit=136, buffer=24),
            ),
            loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.28),
            weight=weights.token_mean,
            select=selection.has_signal,
            rounds=3,
        ),
    )


def gspo() -> Run:
    """GSPO: one ratio for a whole answer. The paper's bounds of 3e-4 and 4e-4 go with a learning
    rate that is a hundred times lower."""
    return replace(
        config(),
        name="countdown_tiny_gspo",
        stages=changed(
            loss=partial(
                losses.policy_loss, ratio=ratios.by_sequence, clip_low=0.03, clip_high=0.04
            ),
            weight=weights.sequence_mean,
            minibatches=2,
        ),
    )


def cispo() -> Run:
    """CISPO: ratios are cut, and no token loses its gradient."""
    return replace(
        config(), name="countdown_tiny_cispo", stages=changed(loss=losses.cispo, minibatches=2)
    )


def rloo() -> Run:
    """RLOO: against the mean of the other answers, KL to the base in the reward."""
    return replace(
        config(),
        name="countdown_tiny_rloo",
        stages=changed(
            advantage=partial(advantages.rloo, kl=k1, kl_weight=0.001),
            loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2),
            weight=weights.sequence_sum,
        ),
    )


def reinforce_pp() -> Run:
    """REINFORCE++: returns of the whole batch brought to one scale, no groups."""
    return replace(
        config(),
        name="countdown_tiny_reinforce_pp",
        stages=changed(
            advantage=partial(advantages.reinforce_plus_plus, kl=k1, kl_weight=0.001),
            loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2),
        ),
    )


def reinforce_pp_baseline() -> Run:
    """REINFORCE++ with the group's mean taken off first, KL in the loss."""
    return replace(
        config(),
        name="countdown_tiny_reinforce_pp_baseline",
        stages=changed(
            advantage=advantages.reinforce_plus_plus_baseline,
            loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2, kl=k2, kl_weight=0.001),
        ),
    )


def ppo() -> Run:
    """PPO with TinyZero's settings: GAE with gamma = lam = 1, KL in the reward, value network."""
    penalty = {"kl": k1, "kl_weight": 0.001}
    return replace(
        config(),
        name="countdown_tiny_ppo",
        stages=changed(
            advantage=partial(advantages.ppo, **penalty),
            loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2, entropy_weight=0.001),
            critic=Critic(
                score=heads.values,
                leaves=heads.value_leaves,
                fill=critics.as_value,
                target=partial(advantages.value_targets, **penalty),
                loss=partial(critics.value_loss, clip=0.5),
                measure={"explained_variance": critics.explained_variance},
                optimizer=partial(adamw, learning_rate=5e-4, warmup=5),
                warmup=4,
            ),
        ),
    )


def ppo_shared() -> Run:
    """PPO whose value network is a head on the policy."""
    run = ppo()
    base, stage = run.stages
    assert isinstance(stage, Reinforce)
    assert stage.critic is not None
    critic = replace(stage.critic, trunk="policy", share=0.1, optimizer=None, warmup=0)
    stages = base, replace(stage, critic=critic)
    return replace(run, name="countdown_tiny_ppo_shared", stages=stages)


def prime() -> Run:
    """PRIME: a process reward model learns from outcomes as the policy does, and says which token
    was worth what."""
    return replace(
        config(),
        name="countdown_tiny_prime",
        stages=changed(
            advantage=advantages.prime,
            loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.2),
            reference="none",
            select=partial(selection.within_band, low=0.2, high=0.8),
            rounds=2,
            critic=Critic(
                score=heads.logps,
                fill=partial(critics.as_process, beta=0.05),
                target=critics.outcomes,
                loss=partial(critics.implicit_prm_loss, beta=0.05),
                weight=weights.sequence_mean,
                optimizer=partial(adamw, learning_rate=2e-4, warmup=5),
                reference=True,
            ),
        ),
    )


def adaptive_kl() -> Run:
    """A KL to the base in the loss whose weight moves, by a tenth a step at most, to hold it at
    0.02 nats a token."""
    penalty: dict[str, Any] = {
        "kl": k3,
        "kl_weight": Adaptive(first=0.01, target=0.02, gain=0.5),
    }
    return replace(
        config(),
        name="countdown_tiny_adaptive_kl",
        stages=changed(loss=partial(losses.policy_loss, clip_low=0.2, clip_high=0.28, **penalty)),
    )


def gdpo() -> Run:
    """GDPO: two parts of a reward, each brought to one scale by itself. Here the second takes off
    for a wrong answer that claims to be right, and not for none."""
    return replace(
        config(),
        name="countdown_tiny_gdpo",
        stages=changed(
            reward=weighted(accuracy=(1.0, accuracy), honesty=(0.2, honesty)),
            advantage=partial(advantages.by_source, weight=(1.0, 0.2)),
        ),
    )


def lora() -> Run:
    """The same GRPO, of adapters of rank 8 beside each matrix of the base, which stays as it is.
    Not measured yet."""
    return replace(config(), name="countdown_tiny_lora", stages=changed(lora=Lora(rank=8)))


# --------------------------------------------------------------------------- preferences, teachers

ATTEMPTS = partial(countdown.attempts_rows, 20_000, seed=3, **WORLD, max_attempts=11)
PAIRS = partial(
    labelled.compared,
    chosen=partial(ATTEMPTS, give_up=0.0, persistent=1.0),
    rejected=partial(ATTEMPTS, give_up=1.0, persistent=0.0),
)


def preferred(**changes: Any) -> tuple[Supervised, Supervised]:
    """The same base, then training on pairs of texts."""
    stage = Supervised(
        name="preferred",
        source=PAIRS,
        texts=labelled.pairs,
        steps=60,
        batch_rows=32,
        row_length=288,  # both answers of a pair lie in one row
        micro_rows=8,
        loss=preferences.dpo,
        weight=weights.sequence_mean,
        reference=True,
        optimizer=partial(adamw, learning_rate=1e-4, warmup=5),
        checkpoints=Checkpoints(every=20),
    )
    return base(), replace(stage, **changes)


def dpo() -> Run:
    """DPO: the log-ratio to the base of the better text is to be above that of the worse."""
    return replace(config(), name="countdown_tiny_dpo", stages=preferred())


def ipo() -> Run:
    """IPO: that gap is drawn to a size."""
    stages = preferred(loss=preferences.ipo)
    return replace(config(), name="countdown_tiny_ipo", stages=stages)


def simpo() -> Run:
    """SimPO: means of log-probabilities, with a margin and without a reference."""
    stages = preferred(loss=preferences.simpo, reference=False)
    return replace(config(), name="countdown_tiny_simpo", stages=stages)


def orpo() -> Run:
    """ORPO: surprise at the better text and odds against the worse, without a reference."""
    stages = preferred(loss=preferences.orpo, reference=False)
    return replace(config(), name="countdown_tiny_orpo", stages=stages)


def kto() -> Run:
    """KTO: the same texts one by one, good or bad, against a reference point of each update."""
    stages = preferred(
        source=partial(labelled.apart, PAIRS),
        texts=labelled.labels,
        loss=preferences.kto,
        reference_point=preferences.kto_reference_point,
    )
    return replace(config(), name="countdown_tiny_kto", stages=stages)


def reward_model() -> Run:
    """A reward model of the pairs, for `r1jax.reward_model` to be asked."""
    stages = preferred(
        loss=preferences.pairwise_loss,
        head=Head(score=heads.rewards, leaves=heads.reward_leaves),
        reference=False,
    )
    return replace(config(), name="countdown_tiny_reward_model", stages=stages)


def process_model() -> Run:
    """A process model of the base: from its answers up to the end of a step it learns the chance
    that they come out right, for beams and trees to be guided by."""
    answers = Build(
        name="answers",
        source=partial(countdown.rows, "train", num=3072, seed=4, **WORLD),
        prompt=countdown.short_prompt,
        answers=Sampled(engine=rl().engine),
        samples=4,
        accuracy=accuracy,
        passes={"steps": partial(passes.steps, end=" .")},
        at_once=256,
    )
    model = Supervised(
        name="process",
        source=Built(stage="answers"),
        texts=labelled.labels,
        steps=200,
        batch_rows=32,
        row_length=144,
        micro_rows=8,
        loss=preferences.pointwise_loss,
        weight=weights.sequence_mean,
        head=Head(score=heads.rewards, leaves=heads.reward_leaves),
        optimizer=partial(adamw, learning_rate=3e-4, warmup=10, final=0.1),
        checkpoints=Checkpoints(every=50),
    )
    return replace(config(), name="countdown_tiny_process_model", stages=(base(), answers, model))


def distil() -> Run:
    """The base learns the whole distributions of the model that GRPO made, on the base's texts."""
    stage = replace(
        base(),
        name="distil",
        steps=200,
        loss=distillation.distillation_loss,
        divergence=distillation.forward_kl,
        teacher=Teacher(run="runs/countdown_tiny"),
    )
    return replace(config(), name="countdown_tiny_distil", stages=(base(), stage))


def distil_top_k() -> Run:
    """The same from the teacher's eight likeliest tokens at each place, and what is left in all."""
    run = distil()
    base, stage = run.stages
    assert isinstance(stage, Supervised)
    divergence = partial(distillation.top_k, k=8)
    stages = base, replace(stage, divergence=divergence)
    return replace(run, name="countdown_tiny_distil_top_k", stages=stages)


def on_policy() -> Run:
    """The base learns what that model makes of the base's own samples. No reward is read."""
    return replace(
        config(),
        name="countdown_tiny_on_policy",
        stages=changed(
            advantage=advantages.on_policy_distillation,
            reference="none",
            teacher=Teacher(run="runs/countdown_tiny"),
        ),
    )
