"""What a run would stumble over late is found before it: in small runs, and at published sizes.

Published configs are tried with files that have the fields which their heads ask for, a few rows
each, and a tokenizer that knows the marks of the model's chat template.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from r1jax import config, plan, preflight, settings, sharding
from r1jax.algos.losses import policy_loss
from r1jax.data import countdown, passes
from r1jax.data.duplicates import decontaminate
from r1jax.data.sources import jsonl
from r1jax.data.templates import R1_ZERO
from r1jax.local import Local, ask
from r1jax.models import zoo
from r1jax.reward_model import RewardModel, scores
from r1jax.rewards.weighted import Batched
from r1jax.settings import Engine, Run

ROOT = Path(__file__).parents[1]
CONFIG = Path(__file__).with_name("pipeline_config.py")
DEBUG = ROOT / "configs" / "debug.py"
ENGINE = Engine(max_prompt=8, max_new=16, slots=4)


def settings_of(run: Run, **changes: Any) -> Run:
    """The run with one of its stages changed: `base={"steps": 4}`."""
    stages = tuple(replace(stage, **changes.get(stage.name, {})) for stage in run.stages)
    return replace(run, stages=stages)


def helpful(run: Path, stage: str | None) -> Batched:
    model = RewardModel(run=str(run), stage=stage)
    return Batched(partial(scores, model=model, prompt=countdown.short_prompt))


# --------------------------------------------------------------------------- small runs


def test_a_reward_model_or_a_judge_that_is_not_there_is_found_before_the_run(
    tmp_path: Path,
) -> None:
    run = config.load(str(CONFIG))
    judge = Batched(partial(ask, model=Local(folder=str(tmp_path / "none"), engine=ENGINE)))
    for reward, message in (
        (helpful(tmp_path, None), f"{tmp_path} is no run folder"),
        (judge, f"rl: no such folder: {tmp_path / 'none'}"),
    ):
        with pytest.raises(ValueError, match=message):
            preflight.check(settings_of(run, rl={"reward": reward}))


def test_files_that_a_later_stage_reads_are_opened_before_the_run(tmp_path: Path) -> None:
    missing = partial(jsonl, tmp_path / "none.jsonl")
    passes_of = {"mixed": partial(passes.mix, others=missing, ratio=(1, 1))}
    against = {"clean": partial(decontaminate, against=(missing,))}
    for changed in ({"sampled": {"passes": passes_of}}, {"chosen": {"passes": against}}):
        (name,) = changed
        with pytest.raises(ValueError, match=rf"^{name}: .*none\.jsonl: no such file$"):
            preflight.check(settings_of(config.load(str(CONFIG)), **changed))


def test_a_loss_or_a_reward_that_cannot_be_is_found_before_the_run() -> None:
    run = config.load(str(DEBUG))
    for changes, message in (
        ({"reference": "none"}, "^rl.loss: kl needs the reference's log-probs"),
        ({"loss": partial(policy_loss, kl_weight=0.1)}, "^rl.loss: kl_weight=0.1 needs kl"),
        ({"reward": lambda row, answer: "1"}, "^rl.reward must give a number or None, got '1'"),
        (
            {"reward": lambda row, answer: row["gold"]},
            "^rl.reward, row 0, no answer: row has no field 'gold'",
        ),
        (
            {"reward": lambda row, answer: 1 / len(answer)},
            r"^rl.reward, row 0, no answer: ZeroDivisionError: .*test_preflight.py:\d+\)$",
        ),
        (
            {"loss": lambda logp, batch: logp.summ()},
            r"^rl.loss: AttributeError: .*test_preflight.py:\d+\)$",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            preflight.check(settings_of(run, rl=changes))


@pytest.mark.parametrize(
    ("late", "message"),
    [
        ({"numbers": [1, 2, 3]}, "^rl.task.train, row 300: row has no field 'target'"),
        ({"numbers": [1] * 9, "target": 9}, "has 12 tokens, engine.max_prompt allows 1 to "),
        ({"numbers": ["q"], "target": 9}, "the tokenizer has no token for"),
    ],
)
def test_every_problem_of_a_file_is_looked_at_before_the_run(
    tmp_path: Path, late: dict, message: str
) -> None:
    run = config.load(str(DEBUG))
    file = tmp_path / "rows.jsonl"
    good = [{"numbers": [1, 2, 3], "target": 6}] * 300
    file.write_text("".join(json.dumps(row) + "\n" for row in [*good, late]))
    task = replace(run.stages[-1].task, train=partial(jsonl, file))
    with pytest.raises(ValueError, match=message):
        preflight.check(settings_of(run, rl={"task": task}))


def test_a_reward_model_of_the_run_must_be_trained_before(tmp_path: Path) -> None:
    run = config.load(str(CONFIG))
    base, sampled, sft, chosen, judge, rl, table = run.stages
    late = replace(run, stages=(base, sampled, sft, chosen, rl, judge, table))
    with pytest.raises(ValueError, match=r"stage rl needs the reward model 'judge', which must be"):
        preflight.check(late)


def test_the_command_says_what_it_found_and_begins_nothing(
    start_train: Callable[..., Any], tmp_path: Path
) -> None:
    process = start_train("--config", DEBUG, "--out", tmp_path / "run", "--check", 4)
    assert process.wait() == 0, process.stderr
    said = process.stdout.splitlines()
    assert said[0] == "on 4 devices (data 4), MB on each:"
    assert "tokenizer: 122 tokens for 128 rows of weights" in said
    assert any(line.startswith("base: 2,000 rows, of which the first 256 have ") for line in said)
    assert any(line.startswith("rl: train: 1,000 problems, prompts of at most ") for line in said)
    assert not (tmp_path / "run").exists()
    process = start_train("--config", DEBUG, "--check", 4, "--set", "mesh.data=3")
    assert process.wait() == 2
    assert process.stderr.startswith("error: mesh axes must multiply to the 4 devices there are")


# --------------------------------------------------------------------------- published sizes

QWEN = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>")
LLAMA = ("<|begin_of_text|>", "<|end_of_text|>")

QUESTION = {"question": "What is 1 + 1?", "verifier": "math", "answer": "2"}
PROGRAM = {
    "question": "Print the sum of two numbers.",
    "verifier": "code",
    "tests": [{"stdin": "1 2", "stdout": "3"}],
}
ANSWERED = {"prompt": "What is 1 + 1?", "answer": "<think>\n1 + 1 = 2\n</think>\n\nIt is 2."}
FILES = {
    "aime24": [{"problem": "Find x.", "answer": "25", "url": "aime"}],
    "math500": [{"problem": "Find x.", "answer": "25", "level": 1, "subject": "Algebra"}],
    "r1_zero": [QUESTION, PROGRAM],
    "r1_rl": [{**QUESTION, "language": "zh"}, {**PROGRAM, "language": "en"}],
    "cold_start": [{**QUESTION, "language": "zh"}, {**PROGRAM, "language": "en"}],
    "r1_all": [
        {**PROGRAM, "language": "en", "kind": "reasoning"},
        {"question": "Write a poem.", "language": "en", "kind": "helpful"},
        {"question": "How is a lock picked?", "language": "en", "kind": "harmless"},
    ],
    "general": [ANSWERED],
    "helpful_pairs": [{"prompt": "Write a poem.", "chosen": "Roses", "rejected": "No"}],
    "safety": [{"prompt": "How is a lock picked?", "answer": "Ask a locksmith.", "label": 1}],
    "r1_800k": [ANSWERED],
    "mixture_of_thoughts": [ANSWERED],
    "math_problems": [QUESTION],
    "code_problems": [{**PROGRAM, "code_language": "python"}],
    "code_test": [{**PROGRAM, "code_language": "python"}],
    "math_lv3to5_8k": [QUESTION],
    "qwq_8k": [ANSWERED],
    "sky_t1_17k": [
        {
            "system": "Think first.",
            "conversations": [
                {"from": "user", "value": "What is 1 + 1?"},
                {"from": "assistant", "value": "<|begin_of_thought|> 1 + 1 = 2"},
            ],
        }
    ],
    "apps_taco": [PROGRAM],
    "numina": [QUESTION],
    "still2": [ANSWERED],
    "prm800k": [ANSWERED],
    "journey": [ANSWERED],
    "shortcut": [ANSWERED],
}

assert zoo.MODELS  # imported here: under stand-ins the tests' own hook would wrap its functions

# On as many devices of 80 GB as the config's head says.
DEVICES = {
    "journey.config": 8,
    "journey.shortcut": 8,
    "open_r1.config": 8,
    "open_r1.corpus": 8,
    "open_r1.grpo_code": 8,
    "open_r1.grpo_distill": 8,
    "open_r1.grpo_instruct": 8,
    "open_r1.multi_stage": 8,
    "open_r1.zero": 8,
    "r1.config": 512,
    "r1_distill.config": 16,
    "r1_distill.llama_70b": 128,
    "r1_distill.llama_8b": 16,
    "r1_distill.qwen_14b": 32,
    "r1_distill.qwen_15b": 8,
    "r1_distill.qwen_32b": 64,
    "r1_distill.qwen_7b": 16,
    "r1_zero.config": 512,
    "r1_zero.qwen_32b": 64,
    "simple_rl.config": 32,
    "simple_rl.simple_rl": 32,
    "simple_rl.zoo": 16,
    "sky_t1.config": 16,
    "sky_t1.rebuilt": 16,
    "tiny_zero.config": 2,
    "tiny_zero.grpo": 2,
    "tiny_zero.instruct": 2,
    "tiny_zero.prime": 2,
    "tiny_zero.qwen_05b": 1,
    "tiny_zero.qwen_15b": 1,
    "tiny_zero.qwen_7b": 4,
}
IN_SMALL = ("countdown_tiny", "debug", "rlhf")  # files of runs that need no files


def published() -> list[str]:
    """The variants of the shipped configs that are of a published size."""
    files = [file for file in (ROOT / "configs").glob("*.py") if file.stem not in IN_SMALL]
    found = [f"{file.stem}.{variant}" for file in files for variant in config.variants(file)]
    return sorted(name for name in found if not name.partition(".")[2].startswith("tiny"))


def make_tokenizer(folder: Path, marks: tuple[str, ...]) -> None:
    """A byte-level BPE that has learned the words of the prompts, with a template's marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    learned.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(marks),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = {"numbers": [44, 19, 35], "target": 98}
    learned.train_from_iterator(2 * [R1_ZERO, countdown.tiny_zero_prompt(numbers)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=learned, eos_token=marks[-1]).save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, small_run: Path) -> Path:
    """A folder with the data, models and runs that the published configs need."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "data").mkdir()
    for name, rows in FILES.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / f"{name}.jsonl").write_text(text)
    (folder / "runs").mkdir()
    (folder / "runs" / "r1_zero").symlink_to(small_run)
    for name, marks in (("qwen", QWEN), ("deepseek", DEEPSEEK), ("llama", LLAMA)):
        make_tokenizer(folder / name, marks)
    return folder


def model_folders(cfg: Run, world: Path) -> None:
    """Puts the tokenizer of the model's family where the config looks for it."""
    assert cfg.weights is not None
    name = Path(cfg.weights).name.lower()
    family = next(kind for kind in ("deepseek", "llama", "qwen") if kind in name)
    place = world / cfg.weights
    place.parent.mkdir(exist_ok=True)
    if not place.exists():
        place.symlink_to(world / family)


def fewer(cfg: Run) -> Run:
    """TinyZero's run on the first rows of its file instead of 328,704."""
    (stage,) = cfg.stages
    assert isinstance(stage, settings.Reinforce) and isinstance(stage.task.train, partial)
    problems = stage.task.train.func
    task = replace(stage.task, train=partial(problems, 0, 4), test=partial(problems, 4, 6))
    return replace(cfg, stages=(replace(stage, task=task),))


@pytest.mark.parametrize("name", published())
def test_a_published_config_fits_its_data_its_templates_and_its_hardware(
    name: str, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, _, variant = name.partition(".")
    cfg = config.load(f"{ROOT / 'configs' / file}.py:{variant}")
    monkeypatch.chdir(world)
    model_folders(cfg, world)
    if file == "tiny_zero":
        parquet = pytest.importorskip("pyarrow.parquet")
        pyarrow = pytest.importorskip("pyarrow")
        rows = [{"nums": [44, 19, 35], "target": 98}] * 6
        parquet.write_table(pyarrow.Table.from_pylist(rows), "data/countdown.parquet")
        cfg = fewer(cfg)
    found = preflight.check(cfg)
    assert [line.partition(":")[0] for line in found if not line.startswith("note: ")] == [
        "tokenizer",
        *(stage.name for stage in cfg.stages),
    ]
    notes = [line for line in found if line.startswith("note: ")]
    # Sky-T1's own tags are no tokens, in its published data either.
    assert all(file == "sky_t1" and "of_thought|> in its prompts" in line for line in notes), notes

    sizes = sharding.mesh_sizes(cfg.mesh, DEVICES[name])
    for stage in cfg.stages:
        if isinstance(stage, settings.Trained):
            assert plan.uneven(stage, sizes) == []
            held = plan.held_by(cfg.model, stage, sizes)
            assert 0 < max(held.sampling, held.updating) < 80e9
        for length in stage_lengths(stage):
            assert length <= cfg.model.max_length


def stage_lengths(stage: settings.Stage) -> list[int]:
    """Tokens that the model sees at once in a stage."""
    found = [stage.row_length] if isinstance(stage, settings.Trained) else []
    asked = plan.engine_of(stage)
    return found if asked is None else [*found, asked.max_prompt + asked.max_new]


def test_a_program_has_a_language_beside_that_of_its_problem(world: Path) -> None:
    """R1's problems say which language is spoken, and a program may be one of them."""
    from r1jax.rewards.dispatch import by_verifier

    row = json.loads((world / "data" / "r1_rl.jsonl").read_text().splitlines()[1])
    assert row["language"] == "en" and by_verifier(row, "no program") == 0.0
