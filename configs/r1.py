"""R1 at its published size: all four stages of its training in one run.

    python -m r1jax.train --config configs/r1_zero.py        # the first data come from R1-Zero
    python -m r1jax.train --config configs/r1.py

`r1.py:tiny` runs all of it, R1-Zero and its base included, on two CPU cores in less than an hour,
from random weights, in the world of `r1jax.data.small_world`. It ends in a table of Zero, Dev1,
Dev2, Dev3 and R1 by reasoning, readability, language and preference; BENCHMARKS.md has measured
ones. Its first two stages are those of `r1_zero.py:tiny`, which `--after runs/r1_zero_tiny` takes
over. All that follows is about the full size.

    cold            R1-Zero's answers: right, readable, in one language, rewritten by DeepSeek-V3
    dev1            SFT of DeepSeek-V3-Base on them
    dev2            RL on reasoning problems, with a reward for one language
    reasoning       answers of dev2, rejection sampling
    mixed           600k of them with 200k others
    dev3            SFT of DeepSeek-V3-Base on these, 2 epochs
    helpful         a reward model of which of two answers is better
    harmless        a reward model of whether an answer is safe
    rl_reasoning    RL on reasoning problems, 1,300 updates
    rl_all          RL on all scenarios, 400 updates, with preferences

Needs: models/DeepSeek-V3-Base; the run runs/r1_zero; data/cold_start.jsonl and data/r1_rl.jsonl
with `question`, `verifier`, what that rule needs, and `language` ("en" or "zh"); data/general.jsonl
with `prompt` and `answer`; data/r1_all.jsonl, the problems of data/r1_rl.jsonl and general ones,
all with `kind`: "reasoning", "helpful" or "harmless"; data/helpful_pairs.jsonl with `prompt`, in
the chat's form, `chosen` and `rejected`, two summaries that `r1jax.rewards.judge.differences` told
apart; data/safety.jsonl with such a `prompt`, `answer` and `label`, 1 where it is safe;
data/aime24.jsonl; DeepSeek-V3 served at localhost:8000. None of the problems and samples is
published.

Hardware: 64 x 8 H800 of 80 GB, as published. The mesh is ours: by `--check 512` each holds 58 GB in
RL, and 72 GB in `rl_all` with the two reward models, activations within a layer apart.

Hours (published): about 80 for R1's training (x 512 = 41K GPU hours), and 5K GPU hours for its SFT
data; with R1-Zero's 101K in all 147K, $294K at the $2 that the paper reckons an H800 hour at
(`price`).

Published (arXiv:2501.12948v2; AIME 2024, IF-Eval, AlpacaEval 2.0):
    Zero 77.9 46.6 24.7   Dev1 59.0 71.7 50.1   Dev2 74.0 72.0 55.8   Dev3 78.1 78.1 62.1
    R1 79.8 83.3 87.6; MATH-500 97.3, GPQA-Diamond 71.5, LiveCodeBench 65.9, Codeforces 2029

Not yet run at this size.

Numbers: arXiv:2501.12948v2, section 3 and supplement B.3 and B.4.2; 16 updates are one rollout of
8,192 answers. Of SFT there are accounts with other numbers (a rate of 5e-6, a batch of 64): compare
the supplement before machines are booked. Not published, and ours: how many answers a problem gets
for data, the numbers of the filters, how many updates dev1 and dev2 have, slots, workers, rows at a
time, the longest prompt, how often is evaluated and saved, the words to the model that rewrites;
and whether SFT's batch is of samples or of packed rows: here it is of packed rows, as DeepSeek-V3's
SFT packs its samples. The cold start's code problems (5,151 of Codeforces, 2,504 of AtCoder) go
into data/cold_start.jsonl; the paper's prompts of the summary and of a judge (listings 1 and 4) are
not copied here, and a judge is one more pass (`passes.keep_judged`). The mean over tokens, Adam's
betas and the weight decay are as in r1_zero.py.

Preferences: the reward model of helpfulness learns from 66,000 pairs that DeepSeek-V3 judged four
times, in either order, with a mean difference of more than 1, and reads the summary alone; that of
safety from 106,000 prompts with an answer labelled safe or not, and reads all of it. The batch of
256, the rate of 6e-6, the one epoch and the 8,192 tokens are published for the first; that the
second has the same, that both begin as dev3, and the weights of the reward's parts, are ours. So
is that a batch is of rows: a row has room for the two longest answers, and holds more that are
shorter.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from r1jax.algos.advantages import grpo
from r1jax.algos.kl import k3
from r1jax.algos.losses import cross_entropy, policy_loss
from r1jax.algos.preferences import pairwise_loss, pointwise_loss
from r1jax.algos.weights import sequence_mean, token_mean
from r1jax.data import eval_sets, labelled, small_world
from r1jax.data.duplicates import decontaminate, distinct
from r1jax.data.filters import (
    finished,
    no_code_block,
    not_repetitive,
    one_language,
    right,
    short_paragraphs,
)
from r1jax.data.passes import keep, keep_best, mix, rewrite, verify
from r1jax.data.sources import jsonl
from r1jax.data.templates import r1_zero
from r1jax.data.tokenizer import from_folder
from r1jax.models import heads
from r1jax.models.zoo import MODELS
from r1jax.reward_model import RewardModel, scores
from r1jax.rewards import small_world as small
from r1jax.rewards.dispatch import by_verifier
from r1jax.rewards.endpoint import Endpoint, ask
from r1jax.rewards.format import think_answer, think_first
from r1jax.rewards.judge import summary
from r1jax.rewards.language import consistency, reasoning
from r1jax.rewards.prose import observe
from r1jax.rewards.weighted import Batched, weighted
from r1jax.settings import (
    FIRST,
    Build,
    Built,
    Checkpoints,
    Compare,
    Engine,
    Head,
    Mesh,
    Reinforce,
    Run,
    Sampled,
    Sampling,
    Supervised,
    Task,
    dense,
)
from r1jax.state import adamw

UPDATES = 16  # of one rollout
LENGTH, MAX_PROMPT = 32_768, 2048
BATCH, MEAN_TOKENS = 128, 5_355  # rows of an SFT update; of the 800k samples
JUDGED, JUDGED_LENGTH = 256, 8192  # rows of a reward model's update; tokens of a prompt and answer
FOLDER = "models/DeepSeek-V3-Base"
V3 = Endpoint(
    address="http://localhost:8000/v1",
    model="deepseek-v3",
    max_new=8192,
    seconds=1200.0,
    cache="data/r1_replies",
)
ENGINE = Engine(
    max_prompt=MAX_PROMPT, max_new=LENGTH, slots=512, prefill_chunk=MAX_PROMPT, draft="coupled"
)


def config() -> Run:
    """The four stages."""
    return Run(
        name="r1",
        model=replace(MODELS["deepseek-v3-671b"], dtype="bfloat16", remat="layer"),
        tokenizer=partial(from_folder, FOLDER),
        weights=FOLDER,
        stages=(
            cold(),
            # Two epochs of some 5,000 samples (the paper has thousands), were they as long.
            sft("dev1", "cold", steps=2 * 5_000 * MEAN_TOKENS // (BATCH * LENGTH)),
            rl("dev2"),
            rejection(),
            mixed(),
            sft("dev3", "mixed", steps=2 * 804_745 * MEAN_TOKENS // (BATCH * LENGTH)),
            preferences("helpful", "data/helpful_pairs.jsonl", rows=66_000),
            preferences("harmless", "data/safety.jsonl", rows=106_000),
            # In the published run these are one stage of 1,700 updates.
            later("rl_reasoning", steps=1_300 // UPDATES),
            everything(),
        ),
        mesh=Mesh(data=1, expert=64, tensor=8),
        price=2.0,  # an H800, as in table 7 of the supplement
    )


def aime() -> list[dict[str, Any]]:
    """AIME 2024, with the language that the reward asks for."""
    return [{**row, "language": "en"} for row in eval_sets.load("aime", "data/aime24.jsonl")]


# --------------------------------------------------------------------------- texts


def zero_prompt(row: Mapping[str, Any]) -> str:
    """What R1-Zero was asked."""
    return r1_zero(row["question"])


def chat(row: Mapping[str, Any]) -> str:
    """DeepSeek's chat template up to the answer, which begins with THINK."""
    return f"<｜begin▁of▁sentence｜><｜User｜>{row['question']}<｜Assistant｜>"


THINK = "<think>\n"


def as_chat(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers to R1-Zero's template as answers to the chat's."""
    return [{**row, "prompt": chat(row["row"])} for row in rows]


def to_v3(row: Mapping[str, Any]) -> Sequence[Mapping[str, str]]:
    """What rewrites a sample; the sentence on the language is the paper's, the rest is ours."""
    asked = (
        "Rewrite this solution so that it is easy to read, keep every step of its thinking, and "
        "end with a summary. Translate the thinking process to the same language as the question. "
        f"Form: {THINK}the thinking\n</think>\n\nthe summary with the final answer in \\boxed{{}}."
    )
    material = f"Question:\n{row['row']['question']}\n\nSolution:\n{row['answer']}"
    return [{"role": "user", "content": f"{asked}\n\n{material}"}]


def thought(reply: str) -> str | None:
    """A reply in that form; None for any other."""
    text = reply.strip()
    return text if text.startswith("<think>") and text.count("</think>") == 1 else None


def in_thinking(row: Mapping[str, Any], *, where: Any) -> bool:
    """Whether a filter lets the thinking pass; a program belongs into the answer to its problem."""
    return where({**row, "answer": reasoning(row["answer"])})


# --------------------------------------------------------------------------- data and SFT


def cold() -> Build:
    """Thousands of long answers that people can read."""
    return Build(
        name="cold",
        source=partial(jsonl, "data/cold_start.jsonl", need=("question", "verifier", "language")),
        prompt=zero_prompt,
        answers=Sampled(engine=ENGINE, run="runs/r1_zero"),  # at temperature 1, as published
        samples=4,
        accuracy=by_verifier,
        reward_workers=64,
        passes={
            "wrong": partial(keep, where=right),
            "unfinished": partial(keep, where=finished),
            "repetitive": partial(keep, where=not_repetitive),
            "mixed languages": partial(keep, where=one_language),
            "best": keep_best,
            "rewritten": partial(
                rewrite, complete=partial(ask, endpoint=V3), messages=to_v3, read=thought
            ),
            "verified": partial(verify, accuracy=by_verifier),
            "wrong after": partial(keep, where=right),
            "chat": as_chat,
            "duplicates": distinct,
            "contaminated": partial(decontaminate, against=(aime,), size=10),
        },
    )


def rejection() -> Build:
    """Right answers of dev2, without those that are hard to read."""
    return Build(
        name="reasoning",
        source=partial(jsonl, "data/r1_rl.jsonl", need=("question", "verifier", "language")),
        prompt=chat,
        answers=Sampled(engine=ENGINE, prefill=THINK, stage="dev2"),
        samples=16,
        accuracy=by_verifier,
        reward_workers=64,
        passes={
            "wrong": partial(keep, where=right),
            "mixed languages": partial(keep, where=one_language),
            "long paragraphs": partial(keep, where=partial(in_thinking, where=short_paragraphs)),
            "code blocks": partial(keep, where=partial(in_thinking, where=no_code_block)),
            "duplicates": distinct,
            "contaminated": partial(decontaminate, against=(aime,), size=10),
        },
    )


def mixed() -> Build:
    """600k reasoning samples to 200k others. In the end there were 626,933 and 177,812."""
    others = partial(jsonl, "data/general.jsonl", need=("prompt", "answer"))
    return Build(
        name="mixed",
        source=Built(stage="reasoning"),
        passes={"general": partial(mix, others=others, ratio=(600, 200))},
    )


def sft(name: str, data: str, *, steps: int) -> Supervised:
    """SFT of the base: batch 128, length 32,768, 5e-5 along a cosine to 5e-6, for 2 to 3 epochs."""
    return Supervised(
        name=name,
        source=Built(stage=data),
        begin=FIRST,
        steps=steps,
        batch_rows=BATCH,
        row_length=LENGTH,
        micro_rows=64,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=5e-5, final=0.1),
        checkpoints=Checkpoints(every=200),
    )


# --------------------------------------------------------------------------- RL


def rl(name: str) -> Reinforce:
    """As R1-Zero's, with a clip of 10, 32,768 tokens, and the share of words in one language.

    The rule reward is accuracy and format (eq. 4), to which language is added (eq. 7 to 10).
    """
    return Reinforce(
        name=name,
        task=Task(
            train=partial(jsonl, "data/r1_rl.jsonl", need=("question", "verifier", "language")),
            test=aime,
            prompt=chat,
            prefill=THINK,
            accuracy=by_verifier,
            observe=observe,
        ),
        steps=80_000 // 512,  # one pass over 80K problems
        prompts=512,
        group=16,
        engine=ENGINE,
        reward=weighted(
            accuracy=(1.0, by_verifier), format=(1.0, think_first), language=(1.0, consistency)
        ),
        advantage=grpo,
        loss=partial(policy_loss, clip_low=10.0, clip_high=10.0, kl=k3, kl_weight=0.001),
        weight=sequence_mean,
        optimizer=partial(adamw, learning_rate=3e-6),
        reward_workers=64,
        minibatches=UPDATES,
        row_length=MAX_PROMPT + LENGTH,
        micro_rows=64,
        reference="moving",
        reference_every=400 // UPDATES,
        evaluate_every=400 // UPDATES,
        evaluate_rows=30,
        evaluate_sampling=Sampling(temperature=0.6, top_p=0.95),
        checkpoints=Checkpoints(every=400 // UPDATES),
    )


def later(name: str, *, steps: int) -> Reinforce:
    """RL at temperature 0.7: above it, answers were incoherent."""
    engine = replace(ENGINE, sampling=Sampling(temperature=0.7))
    return replace(rl(name), steps=steps, engine=engine)


def preferences(kind: Literal["helpful", "harmless"], file: str, *, rows: int) -> Supervised:
    """A reward model: of pairs of summaries, or of whole answers by themselves."""
    compared = kind == "helpful"
    need = ("prompt", "chosen", "rejected") if compared else ("prompt", "answer", "label")
    return Supervised(
        name=kind,
        source=partial(jsonl, file, need=need),
        begin="dev3",
        texts=labelled.pairs if compared else labelled.labels,
        steps=rows // JUDGED,
        batch_rows=JUDGED,
        row_length=2 * JUDGED_LENGTH if compared else JUDGED_LENGTH,
        micro_rows=64,
        loss=pairwise_loss if compared else pointwise_loss,
        weight=sequence_mean,
        head=Head(score=heads.rewards, leaves=heads.reward_leaves),
        optimizer=partial(adamw, learning_rate=6e-6),
        checkpoints=Checkpoints(every=100),
    )


def everything() -> Reinforce:
    """The last 400 updates: rules for reasoning, preferences for the rest, one language for all."""
    stage = later("rl_all", steps=400 // UPDATES)
    need = ("question", "kind", "language")
    task = replace(stage.task, train=partial(jsonl, "data/r1_all.jsonl", need=need), accuracy=rules)
    reward = weighted(
        rules=(1.0, rules),
        helpful=(1.0, preference("helpful", prompt=chat, part=summary)),
        harmless=(1.0, preference("harmless", prompt=chat, part=str)),
        format=(1.0, think_first),
        language=(1.0, consistency),
    )
    # Functions of a config cannot be sent to workers; programs run in their sandbox all the same.
    return replace(stage, task=task, reward=reward, reward_workers=0)


def rules(row: Mapping[str, Any], answer: str) -> float | None:
    """The rule's score of a reasoning problem; 0.0 for a row without a rule."""
    return by_verifier(row, answer) if "verifier" in row else 0.0


def preference(kind: str, *, prompt: Any, part: Any) -> Batched:
    """The score of the reward model that the stage `kind` trained, of requests of that kind."""
    model = RewardModel(stage=kind)
    return Batched(partial(preferred, kind=kind, model=model, prompt=prompt, part=part))


def preferred(
    rows: Sequence[Mapping[str, Any]],
    answers: Sequence[str],
    *,
    kind: str,
    model: RewardModel,
    prompt: Callable[[Mapping[str, Any]], str],
    part: Callable[[str], str],
) -> list[float | None]:
    """The reward model's scores of a part of each answer to one kind of rows, 0.0 for the rest."""
    chosen = [i for i, row in enumerate(rows) if row["kind"] == kind]
    parts = [part(answers[i]) for i in chosen]
    found = scores([rows[i] for i in chosen], parts, model=model, prompt=prompt) if chosen else []
    values: list[float | None] = [0.0] * len(rows)
    for i, score in zip(chosen, found, strict=True):
        values[i] = score
    return values


# --------------------------------------------------------------------------- tiny

KINDS = ("math", "math", "math", "code")
EVERY_KIND = ("math", "helpful", "math", "harmless", "code", "helpful", "math", "harmless")
TINY_ENGINE = Engine(max_prompt=8, max_new=144, slots=64)


def tiny() -> Run:
    """All stages of R1, R1-Zero and its base before them, and a table at the end."""
    return Run(
        name="r1_tiny",
        model=dense(
            vocab_size=224,
            dim=96,
            num_layers=3,
            num_heads=4,
            num_kv_heads=4,
            mlp_dim=256,
            bias=True,
            scan=False,
            sums="float64",
        ),
        tokenizer=small_world.small_tokenizer,
        stages=(
            tiny_base(),
            tiny_rl("zero", "base", reward=weighted(accuracy=ACCURACY, format=FORMAT)),
            tiny_cold(),
            tiny_sft("dev1", "cold", steps=30),
            tiny_rl("dev2", "dev1", reward=weighted(accuracy=ACCURACY, language=LANGUAGE)),
            tiny_rejection(),
            tiny_mixed(),
            tiny_sft("dev3", "mixed", steps=300),
            tiny_preferences("helpful"),
            tiny_preferences("harmless"),
            tiny_later(),
            tiny_everything(),
            tiny_table(),
        ),
    )


ACCURACY = (1.0, small.accuracy)
FORMAT = (1.0, think_answer)
LANGUAGE = (1.0, consistency)


def tiny_base() -> Supervised:
    """Texts that compute and judge well, give up too early, and mix their languages."""
    return Supervised(
        name="base",
        source=partial(small_world.base_rows, 400_000, seed=0),
        steps=1600,
        batch_rows=32,
        row_length=152,
        micro_rows=8,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=3e-3, warmup=50, final=0.05, weight_decay=0.01),
        checkpoints=Checkpoints(every=200),
    )


def tiny_rl(name: str, begin: str, *, reward: Any) -> Reinforce:
    """RL on reasoning problems, three sums to one program."""
    return Reinforce(
        name=name,
        begin=begin,
        task=Task(
            train=partial(small_world.rows, "train", num=200_000, seed=1, kinds=KINDS),
            test=partial(small_world.rows, "test", num=512, seed=2, kinds=KINDS),
            prompt=small_world.prompt,
            accuracy=small.accuracy,
            observe=small.observe,
        ),
        steps=80,
        prompts=32,
        group=8,
        engine=TINY_ENGINE,
        reward=reward,
        advantage=grpo,
        loss=partial(policy_loss, clip_low=0.2, clip_high=0.28),
        weight=token_mean,
        optimizer=partial(adamw, learning_rate=1e-4, warmup=5),
        row_length=152,
        micro_rows=8,
        reference="start",  # for the KL in the log: the loss does not use it
        evaluate_every=20,
        evaluate_rows=512,
        checkpoints=Checkpoints(every=20),
    )


def tiny_cold() -> Build:
    """Right answers of R1-Zero in one language, translated to the problem's, with a summary."""
    return Build(
        name="cold",
        source=partial(small_world.rows, "train", num=200, seed=3, kinds=KINDS),
        prompt=small_world.prompt,
        answers=Sampled(engine=TINY_ENGINE, stage="zero"),
        samples=2,
        accuracy=small.accuracy,
        passes={
            "wrong": partial(keep, where=right),
            "unfinished": partial(keep, where=finished),
            "rewritten": small_world.readable_rows,
            "verified": partial(verify, accuracy=small.accuracy),
            "wrong after": partial(keep, where=right),
            "duplicates": distinct,
        },
    )


def tiny_sft(name: str, data: str, *, steps: int) -> Supervised:
    """SFT of the base."""
    return Supervised(
        name=name,
        source=Built(stage=data),
        begin="base",
        steps=steps,
        batch_rows=32,
        row_length=160,
        micro_rows=8,
        loss=cross_entropy,
        optimizer=partial(adamw, learning_rate=5e-4, warmup=10, final=0.1),
        checkpoints=Checkpoints(every=100),
    )


def tiny_rejection() -> Build:
    """Right answers of dev2 that are easy to read."""
    return Build(
        name="reasoning",
        source=partial(small_world.rows, "train", num=2500, seed=4, kinds=KINDS),
        prompt=small_world.prompt,
        answers=Sampled(engine=TINY_ENGINE, stage="dev2"),
        samples=2,
        accuracy=small.accuracy,
        passes={
            "wrong": partial(keep, where=right),
            "mixed languages": partial(keep, where=one_language),
            "duplicates": distinct,
        },
    )


def tiny_mixed() -> Build:
    """Three of these to one answer to a request."""
    others = partial(small_world.general_rows, 4000, seed=5)
    return Build(
        name="mixed",
        source=Built(stage="reasoning"),
        passes={"general": partial(mix, others=others, ratio=(600, 200))},
    )


def tiny_preferences(kind: Literal["helpful", "harmless"]) -> Supervised:
    """A reward model of what people prefer, 5% of the pairs being the wrong way round.

    Of both kinds from pairs, where R1's model of safety learns from single answers.
    """
    return Supervised(
        name=kind,
        source=partial(small_world.compared_rows, kind, 20_000, seed=6),
        begin="base",
        texts=labelled.pairs,
        steps=100,
        batch_rows=16,
        row_length=152,
        micro_rows=8,
        loss=pairwise_loss,
        weight=sequence_mean,
        head=Head(score=heads.rewards, leaves=heads.reward_leaves),
        optimizer=partial(adamw, learning_rate=5e-4, warmup=10, final=0.1),
        checkpoints=Checkpoints(every=50),
    )


def tiny_later() -> Reinforce:
    """The first part of RL on all scenarios, without preferences."""
    reward = weighted(accuracy=ACCURACY, language=LANGUAGE)
    return replace(tiny_rl("rl_reasoning", "dev3", reward=reward), steps=40)


def tiny_everything() -> Reinforce:
    """The last part: rules for reasoning, preferences for requests, one language for all."""
    reward = weighted(
        rules=ACCURACY,
        helpful=(0.5, tiny_preference("helpful")),
        harmless=(0.5, tiny_preference("harmless")),
        format=(1.0, small.one_thought),
        language=LANGUAGE,
    )
    stage = tiny_rl("rl_all", "rl_reasoning", reward=reward)
    train = partial(small_world.rows, "train", num=200_000, seed=7, kinds=EVERY_KIND)
    test = partial(small_world.rows, "test", num=512, seed=2, kinds=EVERY_KIND)
    task = replace(stage.task, train=train, test=test, accuracy=small.reasoned)
    return replace(stage, task=task, steps=60)


def tiny_preference(kind: str) -> Batched:
    """The reward model's score, in the small world."""
    part = partial(small.judged_part, kind)
    return preference(kind, prompt=small_world.prompt, part=part)


def tiny_table() -> Compare:
    """What each of R1's models can do."""
    return Compare(
        name="table",
        models={"Zero": "zero", "Dev1": "dev1", "Dev2": "dev2", "Dev3": "dev3", "R1": "rl_all"},
        source=partial(small_world.rows, "test", num=1024, seed=8, kinds=EVERY_KIND),
        prompt=small_world.prompt,
        engine=TINY_ENGINE,
        measures={
            "reasoning": small.reasoned,
            "readability": small.readable,
            "language": small.own_language,
            "preference": small.won,
        },
    )
