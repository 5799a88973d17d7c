"""The whole of a run in seconds, to see that everything works: nothing is learned.

    python -m r1jax.train --config configs/debug.py

Variants: `no_jit` compiles nothing, so arrays can be printed anywhere; `deepseek` and `qwen3_moe`
are the same run with the parts of DeepSeek-V3 and of Qwen3's mixture of experts.
"""

from dataclasses import replace
from functools import partial
from typing import Any

from r1jax.algos.advantages import grpo
from r1jax.algos.kl import k3
from r1jax.algos.losses import cross_entropy, policy_loss
from r1jax.algos.weights import sequence_mean
from r1jax.data import countdown
from r1jax.data.tokenizer import tiny
from r1jax.rewards.countdown import accuracy, answer_key, observe
from r1jax.rewards.format import think_answer
from r1jax.rewards.weighted import weighted
from r1jax.settings import (
    Attention,
    Auxiliary,
    Checkpoints,
    Decoder,
    Engine,
    Experts,
    Group,
    Latent,
    Mlp,
    Reinforce,
    Run,
    Supervised,
    Task,
    dense,
)
from r1jax.state import adamw

WORLD = {"counts": (3,), "low": 1, "high": 9, "operators": "+-"}


def config() -> Run:
    """Both stages, with every part of an RL step in use."""
    return Run(
        name="debug",
        model=dense(
            vocab_size=128,
            dim=32,
            num_layers=2,
            num_heads=4,
            num_kv_heads=2,
            mlp_dim=64,
            scan=False,
        ),
        tokenizer=tiny,
        stages=(
            Supervised(
                name="base",
                source=partial(countdown.attempts_rows, 2000, seed=0, max_attempts=3, **WORLD),
                steps=6,
                batch_rows=8,
                row_length=64,
                micro_rows=4,
                loss=cross_entropy,
                optimizer=partial(adamw, learning_rate=1e-2),
                checkpoints=Checkpoints(every=2),
                log_every=2,
            ),
            Reinforce(
                name="rl",
                task=Task(
                    train=partial(countdown.rows, "train", num=1000, seed=1, **WORLD),
                    test=partial(countdown.rows, "test", num=16, seed=2, **WORLD),
                    prompt=countdown.short_prompt,
                    accuracy=accuracy,
                    observe=observe,
                    vote=answer_key,
                ),
                steps=6,
                prompts=4,
                group=4,
                engine=Engine(max_prompt=8, max_new=32, slots=8),
                reward=weighted(accuracy=(1.0, accuracy), format=(0.1, think_answer)),
                advantage=grpo,
                loss=partial(policy_loss, kl=k3, kl_weight=0.001),
                weight=sequence_mean,
                optimizer=partial(adamw, learning_rate=1e-3),
                minibatches=2,
                epochs=2,
                row_length=64,
                micro_rows=4,
                reference="moving",
                reference_every=3,
                evaluate_every=3,
                evaluate_rows=16,
                checkpoints=Checkpoints(every=2),
            ),
        ),
    )


def no_jit() -> Run:
    """Fewer and shorter steps, uncompiled."""
    run = config()
    base, rl = run.stages
    assert isinstance(base, Supervised)
    assert isinstance(rl, Reinforce)
    rl = replace(rl, steps=1, epochs=1, engine=replace(rl.engine, max_new=8), evaluate_rows=4)
    return replace(run, name="debug_no_jit", jit=False, stages=(replace(base, steps=2), rl))


def deepseek() -> Run:
    """Latent attention, experts balanced without a loss, and a prediction module that is trained in
    both stages and drafts in rollouts; the update takes the rollout's experts again."""
    mixer = Latent(num_heads=4, q_rank=12, kv_rank=16, nope_dim=8, rope_dim=4, value_dim=8)
    experts = Experts(
        num_experts=8,
        top_k=2,
        dim=16,
        score="sigmoid",
        scale=2.5,
        num_groups=4,
        top_groups=2,
        shared_dim=16,
    )
    model = Decoder(
        vocab_size=128,
        dim=32,
        groups=(
            Group(count=1, mixer=mixer, mlp=Mlp(dim=64)),
            Group(count=1, mixer=mixer, mlp=experts),
        ),
        tied=False,
        num_mtp=1,
        scan=False,
    )
    balance = Auxiliary(mtp_weight=0.3, balance_weight=0.0001, bias_rate=0.001)
    stages = _stages(
        balance,
        replace(balance, mtp_weight=0.1, mtp_alone=True),
        draft="coupled",
        keep_routing=True,
        prefill_chunk=4,
    )
    return replace(config(), name="debug_deepseek", model=model, stages=stages)


def qwen3_moe() -> Run:
    """Grouped queries with normed keys, and softmax experts balanced by a loss."""
    mixer = Attention(num_heads=4, num_kv_heads=2, head_dim=8, qk_norm=True)
    experts = Experts(num_experts=8, top_k=2, dim=16)
    model = Decoder(
        vocab_size=128,
        dim=32,
        groups=(Group(count=2, mixer=mixer, mlp=experts),),
        rope_theta=1e6,
        scan=False,
    )
    balance = Auxiliary(balance_weight=0.001)
    stages = _stages(balance, balance, keep_routing=True)
    return replace(config(), name="debug_qwen3_moe", model=model, stages=stages)


def _stages(base: Auxiliary, rl: Auxiliary, **engine: Any) -> tuple[Supervised, Reinforce]:
    """Both stages of `config`, with these parts."""
    first, second = config().stages
    assert isinstance(first, Supervised)
    assert isinstance(second, Reinforce)
    second = replace(second, auxiliary=rl, engine=replace(second.engine, **engine))
    return replace(first, auxiliary=base), second
