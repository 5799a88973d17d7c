"""A run that a test can make in seconds. Random weights are right about half of the time."""

from dataclasses import replace
from functools import partial

from r1jax.algos.advantages import grpo
from r1jax.algos.losses import cross_entropy, policy_loss
from r1jax.algos.weights import token_mean
from r1jax.data import countdown
from r1jax.data.tokenizer import tiny
from r1jax.settings import Engine, Evaluation, Reinforce, Run, Supervised, Task, dense
from r1jax.state import adamw

WORLD = {"counts": (3,), "low": 1, "high": 20, "operators": "+-"}


def even(row, answer):
    return float(len(answer.split()) % 2 == 0)


def last_word(row, answer):
    return answer.split()[-1] if answer.split() else None


def observe(row, answer):
    return {"words": float(len(answer.split()))}


def ascii_tokenizer():
    """A token for each printable character of ASCII and for the line break."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<pad>", "<eos>", "<unk>", "\n", *map(chr, range(32, 127))]
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def config() -> Run:
    return Run(
        name="small",
        model=dense(vocab_size=128, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16),
        tokenizer=tiny,
        stages=(
            Supervised(
                name="base",
                source=partial(countdown.attempts_rows, 50, seed=0, **WORLD),
                steps=1,
                batch_rows=4,
                row_length=24,
                micro_rows=4,
                loss=cross_entropy,
                optimizer=partial(adamw, learning_rate=1e-3),
            ),
            Reinforce(
                name="rl",
                task=Task(
                    train=partial(countdown.rows, "train", num=50, seed=1, **WORLD),
                    test=partial(countdown.rows, "test", num=9, seed=2, **WORLD),
                    prompt=countdown.short_prompt,
                    accuracy=even,
                    observe=observe,
                    vote=last_word,
                ),
                steps=1,
                prompts=4,
                group=2,
                engine=Engine(max_prompt=8, max_new=12, slots=2),
                reward=even,
                advantage=grpo,
                loss=partial(policy_loss, clip_low=0.2, clip_high=0.2),
                weight=token_mean,
                optimizer=partial(adamw, learning_rate=1e-3),
                row_length=24,
                micro_rows=4,
                evaluate_rows=8,
            ),
        ),
    )


def ascii() -> Run:
    """The same with a tokenizer that reads English."""
    return replace(config(), tokenizer=ascii_tokenizer)


def texts() -> Run:
    """The first stage alone, with held-out problems of its own."""
    run = config()
    base, rl = run.stages
    assert isinstance(base, Supervised) and isinstance(rl, Reinforce)
    asked = Evaluation(task=rl.task, engine=replace(rl.engine, max_new=9), rows=5)
    return replace(run, stages=(replace(base, evaluation=asked),))
