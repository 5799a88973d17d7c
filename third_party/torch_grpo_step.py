"""Times one GRPO step of a plain PyTorch trainer: the peer of `python -m r1jax.bench grpo-step`.

    python third_party/torch_grpo_step.py --job full|tail|tiny [--repeats 3] [--vocabulary 100]

It needs torch and transformers and imports nothing from r1jax. A job is 16 random prompts of 40
tokens with 8 answers each, sampled at temperature 1 from a Qwen2 model with random weights, then
one update on all 128 answers: clipped ratio loss, group advantages of random rewards, gradient
clipping, AdamW. Everything is float32, without a KL term.

    full   hidden 256, 4 layers, 4 heads, 2 key-value heads, MLP 1024; exactly 128 new tokens
    tail   the same model with a live stop token, at most 512 new tokens
    tiny   hidden 96, 3 layers, 4 heads, MLP 256; exactly 128 new tokens

What a careful person does without leaving transformers' model is done here: prompts are read
once and their cache is shared out to the 8 answers, the cache is written in place, logits are
computed only where they are used, micro-batches hold answers of similar length, and padding is
on the right, where a causal model needs no mask. What such a trainer does not do is left out: a
batch decodes until its longest answer has ended, and nothing is compiled.

One line per repeat, then one of medians. Tokens/s count the tokens of answers, stop tokens
included. An untimed step with short answers comes first, so that threads and optimizer exist.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

# Read when torch loads. By default idle threads spin: where another process wants a core, each
# small operation then waits for the scheduler, and a step takes up to ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.cache_utils import DynamicLayer

PROMPTS, GROUP, PROMPT_LENGTH = 16, 8, 40
PAD, STOP = 0, 1
CLIP, MAX_GRAD_NORM, LEARNING_RATE = 0.2, 1.0, 1e-5
MAX_GAP = 1e-4  # float32 rounding is about 1e-6; more would be a fault of this script


@dataclass(frozen=True, kw_only=True)
class Job:
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    max_new: int
    stops: bool  # whether token STOP ends an answer
    vocabulary: int = 100  # tokens; random weights stop after about as many


FULL = {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "mlp": 1024}
JOBS = {
    "full": Job(**FULL, max_new=128, stops=False),
    "tail": Job(**FULL, max_new=512, stops=True),
    "tiny": Job(hidden=96, layers=3, heads=4, kv_heads=4, mlp=256, max_new=128, stops=False),
}


@dataclass(frozen=True)
class Rollout:
    """128 answers; rows [8 k, 8 k + 8) answer prompt k. Past an answer's length: PAD and 0."""

    prompts: torch.Tensor  # [B, PROMPT_LENGTH]
    answers: torch.Tensor  # [B, longest]
    logp: torch.Tensor  # [B, longest], the sampler's
    lengths: torch.Tensor  # [B], the stop token included


@dataclass(frozen=True)
class Measured:
    rollout: float  # seconds
    update: float  # seconds
    tokens: float  # of all answers
    longest: float  # tokens
    gap: float  # largest |trainer - sampler log-prob| before the update
    gflops: float  # float32 matmul rate just after the step


def build(job: Job, attention: str) -> Qwen2ForCausalLM:
    """A float32 Qwen2 with a tied head and transformers' own random initial weights."""
    config = Qwen2Config(
        vocab_size=job.vocabulary,
        hidden_size=job.hidden,
        num_hidden_layers=job.layers,
        num_attention_heads=job.heads,
        num_key_value_heads=job.kv_heads,
        intermediate_size=job.mlp,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation=attention,
        dtype="float32",
    )
    return Qwen2ForCausalLM(config)


# --------------------------------------------------------------------------- rollout


class InPlaceLayer(DynamicLayer):
    """One layer's keys and values in buffers of the final size.

    The parent class concatenates at every token, and copying the cache comes to cost more than
    the model does.
    """

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.used = 0

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            rows, heads, _, size = key_states.shape
            self.key_buffer = key_states.new_empty(rows, heads, self.capacity, size)
            self.value_buffer = value_states.new_empty(rows, heads, self.capacity, size)
        end = self.used + key_states.shape[2]
        self.key_buffer[:, :, self.used : end] = key_states
        self.value_buffer[:, :, self.used : end] = value_states
        self._show(end)
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.key_buffer = self.key_buffer.repeat_interleave(repeats, dim=0)
        self.value_buffer = self.value_buffer.repeat_interleave(repeats, dim=0)
        self._show(self.used)

    def _show(self, end: int) -> None:
        self.used = end
        self.keys = self.key_buffer[:, :, :end]
        self.values = self.value_buffer[:, :, :end]


def new_cache(job: Job, kind: str) -> DynamicCache:
    cache = DynamicCache()
    if kind == "in-place":
        capacity = PROMPT_LENGTH + job.max_new
        cache.layers = [InPlaceLayer(capacity) for _ in range(job.layers)]
    return cache


@torch.inference_mode()
def sample(
    model: Qwen2ForCausalLM, prompts: torch.Tensor, job: Job, cache: DynamicCache
) -> Rollout:
    """GROUP answers to each prompt, all in one batch that runs until its longest answer ends."""
    model.eval()
    inputs = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(prompts, **inputs).logits[:, -1].repeat_interleave(GROUP, dim=0)
    cache.batch_repeat_interleave(GROUP)

    num_rows = PROMPTS * GROUP
    running = torch.ones(num_rows, dtype=torch.bool)
    lengths = torch.zeros(num_rows, dtype=torch.long)
    answers, logps = [], []
    while True:
        all_logp = logits.log_softmax(dim=-1)
        token = torch.multinomial(all_logp.exp(), num_samples=1)
        logp = all_logp.gather(1, token)
        answers.append(token.masked_fill(~running[:, None], PAD))
        logps.append(logp.masked_fill(~running[:, None], 0.0))
        lengths += running
        if job.stops:
            running &= token[:, 0] != STOP
        if len(answers) == job.max_new or not running.any():
            break
        logits = model(answers[-1], **inputs).logits[:, -1]
    return Rollout(
        prompts.repeat_interleave(GROUP, dim=0),
        torch.cat(answers, dim=1),
        torch.cat(logps, dim=1),
        lengths,
    )


# --------------------------------------------------------------------------- update


def group_advantages(reward: torch.Tensor) -> torch.Tensor:
    """(reward - mean) / standard deviation within each group; reward and result are [B]."""
    groups = reward.view(PROMPTS, GROUP)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + 1e-6)).view(-1)


def update(
    model: Qwen2ForCausalLM,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    advantage: torch.Tensor,
    micro_batch: int,
) -> float:
    """One optimizer step on the mean loss over all tokens; the largest log-prob gap before it."""
    model.train()
    num_tokens = rollout.lengths.sum()
    gap = torch.zeros(())
    for rows in rollout.lengths.argsort(descending=True).split(micro_batch):
        length = int(rollout.lengths[rows].max())
        answer = rollout.answers[rows, :length]
        tokens = torch.cat([rollout.prompts[rows], answer], dim=1)
        mask = torch.arange(length) < rollout.lengths[rows, None]
        # The last token predicts nothing that is kept, and the prompt's logits are not needed.
        # Padding is on the right, so no token of an answer sees it.
        logits = model(tokens[:, :-1], use_cache=False, logits_to_keep=length).logits
        logp = logits.log_softmax(dim=-1).gather(2, answer[..., None])[..., 0]

        log_ratio = (logp - rollout.logp[rows, :length]) * mask
        ratio = log_ratio.exp()
        gain = torch.minimum(
            ratio * advantage[rows, None],
            ratio.clamp(1 - CLIP, 1 + CLIP) * advantage[rows, None],
        )
        loss = -(gain * mask).sum() / num_tokens
        loss.backward()
        gap = torch.maximum(gap, log_ratio.detach().abs().max())
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return gap.item()


# --------------------------------------------------------------------------- clock


def timed(function: Callable, *args):
    """The function's result and the seconds it took."""
    began = time.perf_counter()
    result = function(*args)
    return result, time.perf_counter() - began


def matmul_gflops(size: int = 1024, count: int = 8) -> float:
    """Float32 matmul rate of this process: the fastest of `count` products of square matrices."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    seconds = min(timed(torch.mm, left, right)[1] for _ in range(count))
    return 2 * size**3 / seconds / 1e9


def step(
    model: Qwen2ForCausalLM, optimizer: torch.optim.Optimizer, job: Job, args: argparse.Namespace
) -> Measured:
    """One rollout and one update on it, each timed; prompts and rewards are drawn before."""
    prompts = torch.randint(STOP + 1, job.vocabulary, (PROMPTS, PROMPT_LENGTH))
    advantage = group_advantages(torch.rand(PROMPTS * GROUP))
    cache = new_cache(job, args.cache)
    rollout, rollout_seconds = timed(sample, model, prompts, job, cache)
    del cache
    gap, update_seconds = timed(update, model, optimizer, rollout, advantage, args.micro_batch)
    if gap > MAX_GAP:
        raise RuntimeError(f"sampler and trainer log-probs differ by {gap:.1e}, over {MAX_GAP:.0e}")
    return Measured(
        rollout_seconds,
        update_seconds,
        float(rollout.lengths.sum()),
        float(rollout.lengths.max()),
        gap,
        matmul_gflops(),
    )


def line(measured: Measured) -> str:
    rollout, update_, tokens = measured.rollout, measured.update, measured.tokens
    return (
        f"rollout {rollout:.2f} s, update {update_:.2f} s, total {rollout + update_:.2f} s, "
        f"tokens/s rollout {tokens / rollout:.0f} update {tokens / update_:.0f}, "
        f"answers mean {tokens / (PROMPTS * GROUP):.1f} longest {measured.longest:.0f}, "
        f"gap {measured.gap:.0e}, matmul {measured.gflops:.0f} GFLOP/s"
    )


def median(measured: Sequence[Measured]) -> Measured:
    """The median of each field by itself."""
    names = [field.name for field in fields(Measured)]
    return Measured(*(statistics.median(getattr(one, name) for one in measured) for name in names))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"needs a whole number >= 1, got {text}")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=JOBS, required=True)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--micro-batch", type=positive, default=8, help="answers")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument(
        "--cache",
        choices=("in-place", "concatenated"),
        default="in-place",
        help="concatenated: transformers' default, slower",
    )
    parser.add_argument("--vocabulary", type=positive, default=100, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    job = replace(JOBS[args.job], vocabulary=args.vocabulary)
    model = build(job, args.attention)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)
    step(model, optimizer, replace(job, max_new=8), args)
    results = []
    for repeat in range(args.repeats):
        results.append(step(model, optimizer, job, args))
        print(f"{args.job} {repeat + 1}: {line(results[-1])}", flush=True)
    print(f"{args.job} median: {line(median(results))}")


if __name__ == "__main__":
    main()
