"""Times one GRPO step of TRL's GRPOTrainer: the second peer of `python -m r1jax.bench grpo-step`.

    python third_party/trl_grpo_step.py --job full|tail|tiny [--repeats 3] [--vocabulary 100]

It needs trl with torch, transformers, accelerate and datasets, and imports nothing from r1jax. The
jobs are those of torch_grpo_step.py. The trainer, its sampler (transformers' `generate`) and its
optimizer are what `GRPOTrainer(...).train()` uses; set are only the job's sizes, float32, no KL
term, and what makes it faster here: no gradient checkpointing, the fused AdamW, nothing saved or
reported, old log-probabilities left out (one update on each rollout does not need them).

One line per repeat, then one of medians. Rollout is TRL's making of a batch: sampling, rewards,
advantages; update is the rest of the step. An untimed step comes first.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
import warnings
from dataclasses import replace

# As torch_grpo_step.py has it, and why.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch_grpo_step import (
    GROUP,
    JOBS,
    LEARNING_RATE,
    PAD,
    PROMPT_LENGTH,
    PROMPTS,
    STOP,
    build,
    matmul_gflops,
    positive,
)
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.utils.logging import disable_progress_bar
from trl import GRPOConfig, GRPOTrainer


def words(count: int) -> PreTrainedTokenizerFast:
    """One word for each of `count` tokens, apart by spaces."""
    backend = Tokenizer(WordLevel({f"w{i}": i for i in range(count)}, unk_token=f"w{PAD}"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=f"w{PAD}", eos_token=f"w{STOP}"
    )


class Clock(TrainerCallback):
    """Seconds of each step, of its rollout, and the lengths of its answers."""

    def __init__(self) -> None:
        self.steps: list[tuple[float, float, float, float]] = []
        self.rollout = 0.0
        self.lengths: list[int] = []

    def watch(self, trainer: GRPOTrainer) -> None:
        make = trainer._generate_and_score_completions

        def timed(inputs):
            began = time.perf_counter()
            batch = make(inputs)
            self.rollout += time.perf_counter() - began
            self.lengths = batch["completion_mask"].sum(1).tolist()
            return batch

        trainer._generate_and_score_completions = timed

    def on_step_begin(self, args, state, control, **_) -> None:
        self.rollout, self.began = 0.0, time.perf_counter()

    def on_step_end(self, args, state, control, **_) -> None:
        update = time.perf_counter() - self.began - self.rollout
        if len(self.lengths) != PROMPTS * GROUP:
            raise RuntimeError(f"a step had {len(self.lengths)} answers")
        self.steps.append((self.rollout, update, sum(self.lengths), max(self.lengths)))


def line(rollout: float, update: float, tokens: float, longest: float) -> str:
    return (
        f"rollout {rollout:.2f} s, update {update:.2f} s, total {rollout + update:.2f} s, "
        f"tokens/s rollout {tokens / rollout:.0f} update {tokens / update:.0f}, "
        f"answers mean {tokens / (PROMPTS * GROUP):.1f} longest {longest:.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--job", choices=JOBS, required=True)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--micro-batch", type=positive, default=8, help="answers")
    parser.add_argument("--vocabulary", type=positive, default=100, help="tokens")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    warnings.simplefilter("ignore")
    datasets.disable_progress_bars()
    disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    job = replace(JOBS[args.job], vocabulary=args.vocabulary)
    draw = random.Random(args.seed)
    texts = [
        " ".join(f"w{draw.randrange(STOP + 1, job.vocabulary)}" for _ in range(PROMPT_LENGTH))
        for _ in range(PROMPTS)
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=build(job, "sdpa"),
            processing_class=words(job.vocabulary),
            reward_funcs=lambda completions, **_: [draw.random() for _ in completions],
            train_dataset=datasets.Dataset.from_dict({"prompt": texts}),
            callbacks=[clock],
            args=GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=args.micro_batch,
                gradient_accumulation_steps=PROMPTS * GROUP // args.micro_batch,
                num_generations=GROUP,
                max_completion_length=job.max_new,
                generation_kwargs={} if job.stops else {"min_new_tokens": job.max_new},
                beta=0.0,
                learning_rate=LEARNING_RATE,
                optim="adamw_torch_fused",
                max_steps=1 + args.repeats,
                seed=args.seed,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
        )
        clock.watch(trainer)
        trainer.train()
    timed = clock.steps[1:]
    for repeat, step in enumerate(timed, 1):
        print(f"{args.job} {repeat}: {line(*step)}")
    median = [statistics.median(column) for column in zip(*timed, strict=True)]
    print(f"{args.job} median: {line(*median)}, matmul {matmul_gflops():.0f} GFLOP/s")


if __name__ == "__main__":
    main()
