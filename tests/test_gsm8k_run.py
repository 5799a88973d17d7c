"""GSM8K's real training file, all of it, through a run: template, filters, packing, SFT and RL.

The model is small and random and its tokenizer is trained on the file, so nothing is learned: what
is shown is that real text passes through every part.
"""

import json
from functools import cache, partial
from pathlib import Path

import pytest

from r1jax import config, manifest, metrics, pipeline, preflight
from r1jax.algos.advantages import grpo
from r1jax.algos.losses import cross_entropy, policy_loss
from r1jax.algos.weights import token_mean
from r1jax.data.duplicates import decontaminate, distinct, grams, words
from r1jax.data.sources import LazyRows, jsonl
from r1jax.data.templates import r1_zero
from r1jax.rewards.math import accuracy
from r1jax.settings import Build, Built, Engine, Reinforce, Run, Supervised, Task, dense
from r1jax.state import adamw

DATA = Path(__file__).parents[2] / "shared" / "data"
TRAIN, TEST = DATA / "gsm8k_train.jsonl", DATA / "gsm8k_test.jsonl"
VOCAB, PROMPT, NEW, LENGTH = 2048, 512, 16, 1024

pytestmark = pytest.mark.skipif(
    not TRAIN.is_file(), reason=f"no file {TRAIN.name} in ../shared/data"
)


def zero_prompt(row) -> str:
    return r1_zero(row["question"])


def solved(row) -> dict:
    """A row to be trained on: R1-Zero's prompt, and the solution in its tags."""
    solution, _, result = row["answer"].rpartition("\n#### ")
    answer = f" <think> {solution} </think> <answer> {result} </answer>"
    return {"prompt": zero_prompt(row), "answer": answer}


def solutions() -> LazyRows:
    rows = jsonl(TRAIN, need=("question", "answer"))
    return LazyRows(len(rows), lambda i: solved(rows[i]), rows.files)


@cache
def tokenizer():
    """A byte-level BPE of 2,048 tokens, trained on every fourth row of the file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = jsonl(TRAIN)[::4]
    texts = (text for row in rows for text in (zero_prompt(row), solved(row)["answer"]))
    learned.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=learned, pad_token="<pad>", eos_token="<eos>")


def run() -> Run:
    model = dense(
        vocab_size=VOCAB, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16, scan=False
    )
    clean = Build(
        name="clean",
        source=solutions,
        passes={
            "contaminated": partial(decontaminate, against=(partial(jsonl, TEST),)),
            "duplicates": distinct,
        },
    )
    sft = Supervised(
        name="sft",
        source=Built(stage="clean"),
        steps=2,
        batch_rows=4,
        row_length=LENGTH,
        micro_rows=4,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=1e-2),
        log_every=1,
    )
    rl = Reinforce(
        name="rl",
        task=Task(
            train=partial(jsonl, TRAIN),
            test=partial(jsonl, TEST),
            prompt=zero_prompt,
            accuracy=accuracy,
        ),
        steps=1,
        prompts=4,
        group=2,
        engine=Engine(max_prompt=PROMPT, max_new=NEW, slots=8),
        reward=accuracy,
        advantage=grpo,
        loss=partial(policy_loss, clip_low=0.2, clip_high=0.2),
        weight=token_mean,
        optimizer=partial(adamw, learning_rate=1e-3),
        row_length=LENGTH,
        micro_rows=4,
        evaluate_rows=4,
        log_samples=8,
    )
    return Run(name="gsm8k", model=model, tokenizer=tokenizer, stages=(clean, sft, rl))


def test_the_whole_file_passes_through_template_filters_packing_sft_and_rl(tmp_path: Path):
    cfg = run()
    folder = tmp_path / "run"
    preflight.check(cfg)
    pipeline.run(cfg, folder, text=config.describe(cfg), stopping=lambda: False)

    counts = {c["name"]: c["rows"] for c in manifest.read(folder)["clean"].output["counts"]}
    with TRAIN.open() as file:
        rows = [json.loads(line) for line in file]
    assert counts["source"] == len(rows) == 7_473
    # One by one, with sentences joined: what shares ten words in a row with the test file.
    with TEST.open() as file:
        tests = [json.loads(line) for line in file]
    known = {
        " ".join(gram) for row in tests for text in row.values() for gram in grams(words(text), 10)
    }
    bad = sum(
        any(
            " ".join(gram) in known
            for text in (row["question"], solved(row)["answer"])
            for gram in grams(words(text), 10)
        )
        for row in rows
    )
    assert counts["source"] - counts["contaminated"] == bad
    assert 0 < bad < 0.05 * len(rows)

    lines = metrics.read(folder)
    losses = [line["loss"] for line in lines if line["stage"] == "sft"]
    assert len(losses) == 2 and 0.9 < losses[0] / 7.62 < 1.1  # log 2048: no token is favoured
    assert all(line["gap"] <= 1e-5 for line in lines if "gap" in line)
    asked = [s for s in metrics.read_samples(folder) if s.get("split") == "train"]
    assert len(asked) == 8
    for sample in asked:
        assert sample["prompt"] == zero_prompt(sample["row"])
        assert sample["row"]["question"] in {row["question"] for row in rows}
        assert sample["reward"] in (0.0, 1.0)


def test_every_text_of_the_file_comes_back_from_its_tokens():
    from r1jax.data.tokenizer import decode

    longest = 0
    for row in jsonl(TRAIN)[::7]:
        text = zero_prompt(row)
        ids = tokenizer().encode(text, add_special_tokens=False)
        assert decode(tokenizer(), ids) == text
        longest = max(longest, len(ids))
    assert longest <= PROMPT
