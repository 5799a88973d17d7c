"""Times fixed jobs against the floor of their arithmetic: `python -m r1jax.bench grpo-step`.

A job is 16 random prompts of 40 tokens with 8 answers each and one update on all of them, float32,
without a KL term, from random weights. The floor is the FLOPs that the matmuls of the job need at
the least, over the rate of a large matmul measured in the same run.
"""

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

from r1jax import config, host
from r1jax.settings import Attention, Decoder, Engine, Mesh, dense

PROMPTS, GROUP, PROMPT, VOCABULARY, STOP = 16, 8, 40, 100, 1
EMBED_STD = 0.02  # as transformers begins: nearly even chances, for the stop token of `tail` too


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model, an engine for it, and how the update is cut."""

    model: Decoder
    engine: Engine
    stops: bool  # whether an answer may end before max_new
    row_length: int
    micro_rows: int
    about: str


FULL = dense(
    vocab_size=VOCABULARY,
    dim=256,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=1024,
    bias=True,
    scan=False,
)
TINY = dense(
    vocab_size=VOCABULARY,
    dim=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=4,
    mlp_dim=256,
    bias=True,
    scan=False,
)
JOBS = {
    "full": Job(
        model=FULL,
        engine=Engine(max_prompt=PROMPT, max_new=128, slots=128),
        stops=False,
        row_length=PROMPT + GROUP * 128,
        micro_rows=2,
        about="hidden 256, 4 layers, MLP 1024; exactly 128 new tokens",
    ),
    "tail": Job(
        model=FULL,
        engine=Engine(max_prompt=PROMPT, max_new=512, slots=128),
        stops=True,
        row_length=768,
        micro_rows=2,
        about="the same model; answers stop by themselves, at most 512 new tokens",
    ),
    "tiny": Job(
        model=TINY,
        engine=Engine(max_prompt=PROMPT, max_new=128, slots=128),
        stops=False,
        row_length=PROMPT + GROUP * 128,
        micro_rows=2,
        about="hidden 96, 3 layers, MLP 256; exactly 128 new tokens",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One repeat of a job: seconds, and what they were spent on."""

    rollout: float
    update: float
    rollout_flops: float
    update_flops: float
    shared_flops: float  # of the update, prompts counted once
    tokens: int  # of answers
    longest: int
    decode_steps: int
    gap: float

    @property
    def total(self) -> float:
        return self.rollout + self.update

    @property
    def flops(self) -> float:
        return self.rollout_flops + self.update_flops


def forward_flops(model: Decoder, tokens: float, keys: float) -> float:
    """FLOPs of the matmuls of one forward pass: 2 for each weight and token, and attention's.

    `keys` is the number of (query, visible key) pairs; each costs 4 a head and head dimension.
    """
    total = 2.0 * model.dim * model.vocab_size * tokens
    for group in model.groups:
        attention = group.mixer
        assert isinstance(attention, Attention)
        width = attention.num_heads * attention.head_dim
        kv = attention.num_kv_heads * attention.head_dim
        weights = model.dim * (2 * width + 2 * kv) + 3 * model.dim * group.mlp.dim
        total += group.count * (2.0 * weights * tokens + 4.0 * width * keys)
    return total


def job_flops(model: Decoder, lengths: Any) -> tuple[float, float, float]:
    """What rollout and update need at the least, and the update if answers share their prompts.

    Prompts are prefilled once; backward is twice forward; a causal token sees itself and what is
    before it.
    """
    prompt_keys = PROMPT * (PROMPT + 1) / 2
    answer_keys = float(sum(PROMPT * n + n * (n + 1) / 2 for n in lengths.tolist()))
    prefill = forward_flops(model, PROMPTS * PROMPT, PROMPTS * prompt_keys)
    decode = forward_flops(model, float(lengths.sum()), answer_keys)
    whole = forward_flops(
        model,
        float((lengths + PROMPT).sum()),
        answer_keys + len(lengths) * prompt_keys,
    )
    return prefill + decode, 3 * whole, 3 * (prefill + decode)


def matmul_rate(size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of float32 matmuls on all devices at once, the median of a few."""
    import jax
    import jax.numpy as jnp

    multiply = jax.jit(jnp.matmul)
    squares = [jax.device_put(jnp.ones((size, size)), device) for device in jax.devices()]
    times = []
    for _ in range(repeats + 1):  # the first compiles
        began = time.perf_counter()
        jax.block_until_ready([multiply(a, a) for a in squares])
        times.append(time.perf_counter() - began)
    return 2.0 * size**3 * len(squares) / statistics.median(times[1:])


def run(job: Job, repeats: int, mesh: Any) -> list[Timing]:
    """`repeats` timed steps, after two that compile, the batch split over all devices."""
    import jax
    import numpy as np

    from r1jax import sharding, state
    from r1jax.algos.losses import policy_loss
    from r1jax.algos.weights import token_mean
    from r1jax.loops.batches import pack_answers
    from r1jax.loops.step import make_objective, make_update
    from r1jax.models import decoder
    from r1jax.rollout.answers import to_host
    from r1jax.rollout.engine import make_engine
    from r1jax.types import Prompts

    params = sharding.init(decoder.leaves(job.model), jax.random.key(0), mesh)
    params["embed"] *= EMBED_STD * job.model.dim**0.5
    rng = np.random.default_rng(0)
    prompts = Prompts(
        tokens=rng.integers(2, job.model.vocab_size, (PROMPTS, PROMPT)).astype(np.int32),
        length=np.full(PROMPTS, PROMPT, np.int32),
        index=np.arange(PROMPTS, dtype=np.int32),
    )
    placed = sharding.put(prompts, mesh, "batch")
    stop = (STOP,) if job.stops else ()
    generate = jax.jit(make_engine(job.model, job.engine, group=GROUP, stop=stop))
    optimizer = state.adamw(100, learning_rate=1e-5)
    update = make_update(make_objective(job.model, policy_loss), optimizer)
    train_state = state.init_state(params, optimizer)
    timings = []
    for step in range(repeats + 2):
        began = time.perf_counter()
        rollout = to_host(generate(train_state.params, placed, jax.random.key(step)))
        sampled = time.perf_counter()
        mask = np.arange(job.engine.max_new)[None] < rollout.answer_length[:, None]
        advantage = rng.normal(size=(len(mask), 1)).astype(np.float32) * mask
        extras = {
            "weight": token_mean(mask),
            "advantage": advantage,
            "logp_rollout": rollout.logp_rollout,
        }
        everything = np.arange(len(mask))
        _, batches = pack_answers(
            rollout, everything, extras, row_length=job.row_length, micro_rows=job.micro_rows
        )
        batches = [sharding.put(batch, mesh, "batch") for batch in batches]
        train_state, metrics = update(train_state, batches)
        jax.block_until_ready(train_state.params)
        finished = time.perf_counter()
        rollout_flops, update_flops, shared_flops = job_flops(job.model, rollout.answer_length)
        timings.append(
            Timing(
                rollout=sampled - began,
                update=finished - sampled,
                rollout_flops=rollout_flops,
                update_flops=update_flops,
                shared_flops=shared_flops,
                tokens=int(rollout.answer_length.sum()),
                longest=int(rollout.answer_length.max()),
                decode_steps=int(rollout.decode_steps),
                gap=float(metrics["gap"]),
            )
        )
    return timings[2:]


def line(timing: Timing, rate: float) -> str:
    """One step's times, speeds, and how often its floor it took.

    The floor counts a prompt once for each answer in the update; the second one, once for all.
    """
    floor = timing.flops / rate
    shared = (timing.rollout_flops + timing.shared_flops) / rate
    return (
        f"rollout {timing.rollout:6.3f} s {timing.tokens / timing.rollout:8,.0f} tokens/s | "
        f"update {timing.update:6.3f} s {timing.tokens / timing.update:8,.0f} tokens/s | "
        f"total {timing.total:6.3f} s, floor {floor:.3f} s at {rate / 1e9:.0f} GFLOP/s: "
        f"{timing.total / floor:.2f} times (prompts shared in the update: {shared:.3f} s, "
        f"{timing.total / shared:.2f} times) | {timing.tokens / (PROMPTS * GROUP):.0f} tokens an "
        f"answer, longest {timing.longest}, {timing.decode_steps} decode steps, gap "
        f"{timing.gap:.0e}"
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m r1jax.bench", description=__doc__)
    parser.add_argument("what", choices=["grpo-step"], help="one rollout and one update")
    parser.add_argument(
        "--job",
        choices=sorted(JOBS),
        default="full",
        help="; ".join(f"{name}: {job.about}" for name, job in JOBS.items()),
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed steps (default: 5)")
    parser.add_argument(
        "--vocabulary",
        type=int,
        default=VOCABULARY,
        help=f"tokens; answers of `tail` have about as many on average (default: {VOCABULARY})",
    )
    return parser


@config.one_line_errors
def main() -> int:
    """Runs the command: a line for each step, then the one of median total."""
    args = parser().parse_args()
    if args.repeats < 1:
        config.fail(f"--repeats must be >= 1, got {args.repeats}")
    if args.vocabulary <= STOP + 1:
        config.fail(f"--vocabulary must be > {STOP + 1}, got {args.vocabulary}")
    job = JOBS[args.job]
    job = replace(job, model=replace(job.model, vocab_size=args.vocabulary))
    host.prepare()
    before = matmul_rate()
    import jax

    from r1jax import sharding

    mesh = sharding.make_mesh(Mesh())
    with jax.set_mesh(mesh):
        timings = run(job, args.repeats, mesh)
    rate = max(before, matmul_rate())  # the machine may be busier at one time than at the other
    for timing in timings:
        print(line(timing, rate))
    middle = sorted(timings, key=lambda timing: timing.total)[len(timings) // 2]
    print(f"median of {len(timings)}, job {args.job}:\n{line(middle, rate)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
