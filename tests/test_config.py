"""Config files: what they may do, what is found wrong with them, and what a run keeps of them."""

import errno
import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from r1jax import config, metrics
from r1jax.config import (
    ConfigError,
    check,
    describe,
    is_saved,
    load,
    same_or_fail,
    save,
    saved,
    variants,
)
from r1jax.models import zoo
from r1jax.settings import Reinforce, Supervised

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden" / "configs"

CONFIG = """\
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from r1jax.algos import losses
from r1jax.algos.advantages import grpo as group_relative
from r1jax.algos.kl import k3
from r1jax.algos.weights import constant_budget
from r1jax.rewards.countdown import accuracy
from r1jax.rewards.weighted import weighted
from r1jax.settings import Engine, Reinforce, Run, Supervised, Task, dense


def rows(*, numbers: int = 3, part: "str | None" = None, sizes: tuple[int, ...] = (3, 4)):
    return [{"numbers": [1, 2, 3], "target": 6}]


def prompt(row):
    return f"{row['numbers']} -> {row['target']}"  # what the model reads


@jax.jit
def halved(x: Float[Array, " B"], y: jax.Array | None = None) -> jax.Array:
    return x / 2


def tokenizer():
    return None


def adam(steps):
    return optax.adamw(optax.cosine_decay_schedule(1e-3, steps))


def config() -> Run:
    task = Task(train=rows, test=partial(rows, part="test"), prompt=prompt, accuracy=accuracy)
    base = Supervised(
        name="base", source=rows, steps=10, batch_rows=8, row_length=128, micro_rows=4,
        loss=losses.cross_entropy, optimizer=adam,
    )
    rl = Reinforce(
        name="rl", task=task, steps=10, prompts=4, group=8, minibatches=2,
        engine=Engine(max_prompt=32, max_new=64, slots=16),
        reward=weighted(accuracy=(1.0, accuracy)),
        advantage=group_relative,
        loss=partial(losses.policy_loss, clip_high=0.28, kl=k3),
        weight=partial(constant_budget, budget=64),
        optimizer=partial(optax.adamw, b1=0.9),
        row_length=128, micro_rows=2,
    )
    model = dense(
        vocab_size=64, dim=32, num_layers=2, num_heads=2, num_kv_heads=1, mlp_dim=64
    )
    return Run(name="sample", model=model, tokenizer=tokenizer, stages=(base, rl))


def shorter() -> Run:
    run = config()
    return Run(name="shorter", model=run.model, tokenizer=tokenizer, stages=run.stages[:1])
"""

COMMAND = """\
import argparse, sys
from r1jax import config

@config.one_line_errors
def main():
    parser = argparse.ArgumentParser()
    config.arguments(parser)
    args = parser.parse_args()
    print(*config.describe(config.check(args.config, args.overrides)), sep="\\n")
    slow = {"jax", "jaxlib", "optax", "flax", "orbax", "transformers"} & {*sys.modules}
    if slow: raise SystemExit(f"imported: {slow}")

main()
"""


@pytest.fixture
def file(tmp_path, monkeypatch) -> Path:
    """The config above as `sample.py` in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    file = Path("sample.py")
    file.write_text(CONFIG)
    return file


def edited(file: Path, old: str, new: str) -> int:
    """Changes the config file; the number of the line that is changed."""
    assert CONFIG.count(old) == 1, old
    file.write_text(CONFIG.replace(old, new))
    return CONFIG[: CONFIG.index(old)].count("\n") + 1


def command(*arguments: str, cwd: Path) -> tuple[subprocess.CompletedProcess[str], float]:
    """A finished command and the seconds of processor time that it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# ----------------------------------------------------------------- quick


def test_a_config_that_imports_jax_is_printed_without_jax_in_under_a_second(file):
    done, seconds = command("-c", COMMAND, "--config", "sample.py", cwd=Path.cwd())
    assert done.returncode == 0, done.stderr
    assert "rl.group: 8" in done.stdout.splitlines()
    assert seconds < 1


@pytest.mark.parametrize("program", [["-c", COMMAND], ["-m", "r1jax.train"]])
def test_a_typo_on_the_command_line_is_one_line_in_under_a_second(file, program):
    done, seconds = command(*program, "--config", "sample.py", "--set", "rl.grop=3", cwd=Path.cwd())
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == (
        "error: --set rl.grop=3: no field 'grop' in rl (Reinforce); nearest: group\n"
    )
    assert seconds < 1


# ----------------------------------------------------------------- from a file to a run


def test_load_gives_the_true_functions_that_the_file_names(file):
    import optax

    from r1jax.algos import advantages, losses

    run = load("sample.py", ["rl.advantage.scale=false"])
    base, rl = run.stages
    assert isinstance(base, Supervised) and isinstance(rl, Reinforce)
    assert base.loss is losses.cross_entropy
    assert isinstance(rl.advantage, partial) and rl.advantage.func is advantages.grpo
    assert rl.advantage.keywords == {"scale": False}
    assert rl.optimizer.func is optax.adamw
    assert isinstance(base.optimizer(3), optax.GradientTransformation)


def test_check_and_load_describe_the_same_run(file):
    overrides = ["rl.loss.clip_low=0.1", "seed=3"]
    assert describe(check("sample.py", overrides)) == describe(load("sample.py", overrides))


def test_describe_lists_settings_defaults_and_dotted_function_names(file):
    text = describe(check("sample.py"))
    assert text == sorted(text, key=lambda line: line.partition(": ")[0])
    expected = {
        "stages: base, rl",
        "rl: Reinforce",
        "rl.group: 8",
        "rl.epochs: 1",
        'model.dtype: "float32"',
        "model.groups.0.mixer.num_heads: 2",
        "rl.advantage: r1jax.algos.advantages.grpo",
        "rl.advantage.scale: True",
        "rl.loss.clip_high: 0.28",
        "rl.loss.clip_low: 0.2",
        "rl.loss.kl: r1jax.algos.kl.k3",
        "rl.optimizer: optax.adamw",
        "rl.optimizer.b1: 0.9",
        "rl.reward.terms.accuracy.0: 1.0",
        "rl.reward.terms.accuracy.1: r1jax.rewards.countdown.accuracy",
        'rl.task.test.part: "test"',
        "rl.task.test.numbers: 3",
    }
    assert expected - set(text) == set()


def test_a_function_of_the_file_is_described_by_its_code_not_by_place_or_comments(file, tmp_path):
    def line(spec: str) -> str:
        return next(text for text in describe(check(spec)) if text.startswith("rl.task.prompt: "))

    there = tmp_path / "elsewhere.py"
    there.write_text(CONFIG.replace("  # what the model reads", ""))
    assert line("sample.py").startswith("rl.task.prompt: config:prompt@")
    assert line(str(there)) == line("sample.py")
    there.write_text(CONFIG.replace("-> {row", "=> {row"))
    assert line(str(there)) != line("sample.py")


def test_check_does_not_depend_on_what_was_imported_before_and_leaves_no_trace(file):
    import jax

    import r1jax.algos.losses as losses

    before, finders = dict(sys.modules), list(sys.meta_path)
    assert describe(check("sample.py"))
    with pytest.raises(ConfigError):
        check("sample.py", ["rl.grop=1"])
    gained = {name for name, module in sys.modules.items() if before.get(name) is not module}
    assert {name for name in gained if not name.startswith("r1jax.")} == set()
    assert before.keys() <= sys.modules.keys() and sys.meta_path == finders
    assert sys.modules["jax"] is jax and sys.modules["r1jax.algos"].losses is losses


def test_a_decorated_function_and_an_expression_of_names_are_shown_as_written(file):
    edited(file, "optimizer=partial(optax.adamw, b1=0.9)", "optimizer=optax.adamw(1e-3, b1=0.8)")
    assert "rl.optimizer: optax.adamw(0.001, b1=0.8)" in describe(check("sample.py"))
    edited(file, "advantage=group_relative", "advantage=halved")
    text = next(line for line in describe(check("sample.py")) if line.startswith("rl.advantage:"))
    assert text.startswith("rl.advantage: jax.jit(config:halved@")


@pytest.mark.parametrize(
    "new", ["group=int(jnp.sum(jnp.ones(6)))", "group=len(jax.devices()[:1]) + 5", "group=SIX"]
)
def test_a_config_that_computes_with_jax_is_executed_for_real(file, new):
    edited(file, "group=8", new)
    edited_text = file.read_text().replace("def rows", "SIX = jnp.ones(6).size\n\n\ndef rows")
    file.write_text(edited_text)
    assert "rl.group: 6" in describe(check("sample.py"))


def test_a_module_beside_the_config_is_executed_for_real_by_load(file, monkeypatch):
    Path("beside.py").write_text("import jax.numpy as jnp\none = jnp.ones\n")
    monkeypatch.syspath_prepend(Path.cwd())
    edited(file, "    return None", "    return one(3)")
    file.write_text("from beside import one\n" + file.read_text())
    check("sample.py")
    assert "beside" not in sys.modules
    assert load("sample.py").tokenizer().shape == (3,)
    del sys.modules["beside"]


def test_a_variant_is_a_function_of_the_file(file):
    assert variants(file) == ["config", "shorter"]
    assert check("sample.py:shorter").name == "shorter"
    with pytest.raises(ConfigError, match=r"sample.py has no variant 'short'; nearest: shorter"):
        check("sample.py:short")


def test_an_unknown_config_names_those_there_are(file):
    with pytest.raises(ConfigError, match=r"^no config file simple.py; there are: sample.py$"):
        check("simple.py")


# ----------------------------------------------------------------- overrides


@pytest.mark.parametrize(
    ("path", "text", "line"),
    [
        ("seed", "7", "seed: 7"),
        ("name", "a b", 'name: "a b"'),
        ("rl.group", "16", "rl.group: 16"),
        ("base.on_prompt", "true", "base.on_prompt: True"),
        ("model.rope_theta", "1e6", "model.rope_theta: 1000000.0"),
        ("model.rope_theta", "5", "model.rope_theta: 5.0"),
        ("model.remat", "none", 'model.remat: "none"'),
        ("model.groups.0.mixer.qk_norm", "True", "model.groups.0.mixer.qk_norm: True"),
        ("rl.engine.sampling.top_k", "20", "rl.engine.sampling.top_k: 20"),
        ("rl.loss.clip_high", "0.3", "rl.loss.clip_high: 0.3"),
        ("rl.loss.kl", "none", "rl.loss.kl: None"),
        ("rl.advantage.scale", "false", "rl.advantage.scale: False"),
        ("rl.weight.budget", "100", "rl.weight.budget: 100"),
        ("rl.optimizer.b1", "0.8", "rl.optimizer.b1: 0.8"),
        ("rl.task.train.numbers", "4", "rl.task.train.numbers: 4"),
        ("rl.task.train.part", "dev", 'rl.task.train.part: "dev"'),
        ("rl.task.train.sizes", "4, 5,6", "rl.task.train.sizes: (4, 5, 6)"),
        ("rl.task.observe", "none", "rl.task.observe: None"),
        ("rl.reward.terms.accuracy.0", "2", "rl.reward.terms.accuracy.0: 2.0"),
    ],
)
def test_set_changes_one_setting_by_its_type(file, path, text, line):
    before = describe(check("sample.py"))
    after = describe(check("sample.py", [f"{path}={text}"]))
    assert line in after
    assert [one for one in before if one.partition(": ")[0] != path] == [
        one for one in after if one.partition(": ")[0] != path
    ]


def test_overrides_are_made_at_once_and_of_two_the_later_counts(file):
    # Alone, a prompt of 100 tokens would not fit into the row, nor 3 minibatches divide 4 * 8.
    overrides = ["rl.engine.max_prompt=100", "rl.row_length=164", "rl.minibatches=3"]
    rl = check("sample.py", [*overrides, "rl.prompts=5", "rl.prompts=6"]).stages[1]
    assert isinstance(rl, Reinforce)
    assert (rl.engine.max_prompt, rl.row_length, rl.minibatches, rl.prompts) == (100, 164, 3, 6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.grop=3", "--set rl.grop=3: no field 'grop' in rl (Reinforce); nearest: group"),
        ("sed=3", "--set sed=3: no field 'sed' in the run (Run); nearest: seed"),
        (
            "rll.group=3",
            "--set rll.group=3: no field 'rll' in the run (Run); nearest: rl",
        ),
        (
            "rl.advantage.scal=false",
            "--set rl.advantage.scal=false: no argument 'scal' in rl.advantage "
            "(r1jax.algos.advantages.grpo); nearest: scale",
        ),
        (
            "model.groups.1.count=3",
            "--set model.groups.1.count=3: no item '1' in model.groups; there are: 0",
        ),
        ("rl.group.x=3", "--set rl.group.x=3: rl.group is 8; nothing inside it can be set"),
        ("rl.group=many", "--set rl.group=many: group needs int, got 'many'"),
        ("rl.group=2.5", "--set rl.group=2.5: group needs int, got '2.5'"),
        ("model.rope_theta=nan", "--set model.rope_theta=nan: rope_theta needs float, got 'nan'"),
        (
            "rl.task.train.sizes=4,x",
            "--set rl.task.train.sizes=4,x: sizes needs a tuple of int, got '4,x'",
        ),
        ("model.tied=1", "--set model.tied=1: tied needs true or false, got '1'"),
        (
            "model.remat=all",
            "--set model.remat=all: remat needs one of none, layer, got 'all'",
        ),
        ("rl.loss.kl=k1", "--set rl.loss.kl=k1: kl needs a function or none, got 'k1'"),
        (
            "rl.reward=accuracy",
            "--set rl.reward=accuracy: reward is a whole record (Weighted); "
            "set one of rl.reward.(terms)",
        ),
        (
            "rl.task.accuracy=1",
            "--set rl.task.accuracy=1: accuracy is a function; a config file passes those",
        ),
        (
            "rl.engine.sampling=1",
            "--set rl.engine.sampling=1: sampling is a whole record (Sampling); "
            "set one of rl.engine.sampling.(temperature|top_k|top_p)",
        ),
        (
            "rl.group=1",
            "rl.group must be >= 2: an answer is scored against the others to its prompt, got 1",
        ),
        ("rl.engine.slots=0", "rl.engine.slots must be >= 1, got 0"),
        ("rl.steps=0", "rl.steps must be >= 1, got 0"),
        ("rl.minibatches=0", "rl.minibatches must be >= 1, got 0"),
        ("rl.micro_rows=-3", "rl.micro_rows must be >= 1, got -3"),
        ("rl.evaluate_rows=0", "rl.evaluate_rows must be >= 1, got 0"),
        ("rl.reward_workers=-1", "rl.reward_workers must be >= 0, got -1"),
        ("rl.checkpoints.every=0", "rl.checkpoints.every must be >= 1, got 0"),
        ("name=../x", "a run and its stages need names of folders, got '../x'"),
        ("rl.group", "--set rl.group: need name=value, as in rl.group=16"),
        ("rl..group=3", "--set rl..group=3: need name=value, as in rl.group=16"),
    ],
)
def test_an_override_that_cannot_be_says_what_was_needed(file, override, message):
    with pytest.raises(ConfigError) as caught:
        check("sample.py", [override])
    assert str(caught.value) == message


# ----------------------------------------------------------------- mistakes in the file


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("group=8", "grop=8", "sample.py:LINE: Reinforce has no field 'grop'; nearest: group"),
        ("max_new=64", "max_knew=64", "sample.py:LINE: Engine has no field 'max_knew'; nearest: "),
        ("group=8", 'group="8"', 'sample.py:LINE: Reinforce.group needs int, got "8"'),
        ("group=8", "group=1", "sample.py:LINE: Reinforce: group must be >= 2: "),
        ("slots=16", "slots=16.5", "sample.py: rl.engine.slots needs int, got 16.5"),
        ("advantage=group_relative", "advantage=3", "sample.py: rl.advantage needs a function, "),
        ("clip_high=0.28", "clip_hi=1", "sample.py: rl.loss: r1jax.algos.losses.policy_loss has "),
        (
            "clip_high=0.28",
            'clip_high="0.28"',
            "sample.py: rl.loss.clip_high needs float or Steps or Linear or Cosine or "
            'Adaptive, got "0.28"',
        ),
        (
            "=partial(constant_budget, budget=64)",
            "=constant_budget",
            "sample.py: rl.weight: r1jax.algos.weights.constant_budget needs budget, as in "
            "partial(constant_budget, budget=...)",
        ),
        (
            "import grpo as",
            "import gropo as",
            "sample.py:LINE: r1jax.algos.advantages has no 'gropo'; nearest: grpo",
        ),
        (
            "from r1jax.algos.weights import",
            "from r1jax.algos.weight import",
            "sample.py:LINE: no module r1jax.algos.weight; nearest: weights",
        ),
        ("losses.cross_entropy", "losses.cross_entropi", "sample.py:LINE: r1jax.algos.losses has "),
        ("import optax", "import optacks", "sample.py:LINE: no module 'optacks'; nearest: "),
        ('test=partial(rows, part="test")', "test=partial(rows, par=1)", "sample.py: rl.task.test"),
        ("optimizer=adam,", "optimizer=adan,", "sample.py:LINE: name 'adan' is not defined; neare"),
        ("    return None", "    return return", "sample.py:LINE: invalid syntax"),
        ("model = dense(", "model = 1 / 0, dense(", "sample.py:LINE: ZeroDivisionError: "),
        ('name="rl"', 'name="mesh"', "sample.py: a stage's name must be a word other than name, "),
    ],
)
def test_a_mistake_in_the_file_is_one_line_that_says_where(file, old, new, message):
    line = edited(file, old, new)
    if "Reinforce" in message:  # Python places a call at its first line
        line = CONFIG[: CONFIG.index("rl = Reinforce(")].count("\n") + 1
    with pytest.raises(ConfigError) as caught:
        check("sample.py")
    found = str(caught.value)
    assert found.startswith(message.replace("LINE", str(line))), found
    assert "\n" not in found


def test_a_direct_call_with_a_wrong_keyword_names_the_nearest(file):
    line = edited(file, "    return x / 2", "    return x / 2\n\n\nkl = losses.policy_loss(klip=1)")
    with pytest.raises(ConfigError, match=rf"sample.py:{line + 3}: r1jax.algos.losses.policy_loss"):
        check("sample.py")


def test_a_wrong_name_of_another_library_is_found_by_load(file):
    edited(file, "partial(optax.adamw, b1=0.9)", "optax.adamm")
    check("sample.py")
    with pytest.raises(ConfigError, match=r"sample.py:\d+: module 'optax' has no .*'adamm'; near"):
        load("sample.py")


def test_a_function_that_needs_arguments_is_no_variant(file):
    more = "def sized(size, *, name='') -> Run:\n    return config()\n"
    file.write_text(f"{file.read_text()}\n\n{more}")
    assert variants(file) == ["config", "shorter"]


def test_a_variant_that_returns_no_run_is_refused(file):
    with pytest.raises(ConfigError, match=r"sample.py: tokenizer\(\) must return a Run, got None"):
        check("sample.py:tokenizer")


# ----------------------------------------------------------------- a run's folder


def test_what_is_saved_makes_the_same_run(file):
    overrides = ["seed=5"]
    text = describe(check("sample.py", overrides))
    save(Path("runs/a"), text, "sample.py", overrides)
    assert describe(check(*saved(Path("runs/a")))) == text
    assert Path("runs/a/config.txt").read_text().splitlines() == text
    assert Path("runs/a/config.py").read_text() == CONFIG
    assert json.loads(Path("runs/a/config.json").read_text())["variant"] == "config"
    assert {f.name for f in Path("runs/a").iterdir()} == {"config.py", "config.txt", "config.json"}


def test_a_folder_made_by_another_config_is_refused_and_another_mesh_or_price_is_not(file):
    folder = Path("runs/a")
    same_or_fail(folder, ["seed: 1"])
    folder.mkdir(parents=True)
    (folder / "config.txt").write_text("mesh.data: -1\nrl.group: 16\nrl.x: 1\nseed: 1\n")
    same_or_fail(folder, ["mesh.data: 4", "rl.group: 16", "rl.x: 1", "seed: 1"])
    dearer = ["mesh.data: -1", "price: 2.0", "rl.group: 16", "rl.x: 1", "seed: 1"]
    same_or_fail(folder, dearer)
    # A setting that came after the run was made, and changes nothing.
    same_or_fail(folder, ["mesh.data: 4", "rl.group: 16", "rl.lora: None", "rl.x: 1", "seed: 1"])
    assert not is_saved(folder, dearer)  # a new price is written down, for the report
    assert is_saved(folder, ["mesh.data: 4", *dearer[2:]])
    with pytest.raises(ConfigError) as caught:
        same_or_fail(folder, ["mesh.data: 4", "rl.group: 8", "seed: 2"])
    assert str(caught.value) == (
        "runs/a was made by another config: rl.group is 16 there and 8 here (and 2 more); "
        "use --out for a new folder, and --after runs/a to keep stages that are the same"
    )


def test_how_often_a_stage_that_has_begun_is_saved_may_change(file):
    folder = Path("runs/a")
    folder.mkdir(parents=True)
    there = ["rl.checkpoints.every: 5", "rl.log_samples: 4", "rl.steps: 9", "stages: rl"]
    (folder / "config.txt").write_text("".join(f"{line}\n" for line in there))
    here = ["rl.checkpoints.every: 1", "rl.log_samples: 0", "rl.steps: 9", "stages: rl"]
    same_or_fail(folder, here, begun={"rl": False})
    same_or_fail(folder, here, begun={"rl": True})
    assert not is_saved(folder, here)
    with pytest.raises(ConfigError, match=r"rl.steps is 9 there and 8 here; use --out"):
        same_or_fail(folder, [*here[:2], "rl.steps: 8", here[3]], begun={"rl": False})


def test_settings_of_stages_that_have_not_begun_may_change(file):
    folder = Path("runs/a")
    folder.mkdir(parents=True)
    (folder / "config.txt").write_text("base.steps: 1\nrl.group: 16\nseed: 1\nstages: base, rl\n")
    changed = ["base.steps: 1", "more.steps: 5", "rl.group: 8", "seed: 1", "stages: base, rl, more"]
    same_or_fail(folder, changed, begun={"base": True})
    with pytest.raises(ConfigError, match=r"rl.group is 16 there and 8 here"):
        same_or_fail(folder, changed, begun={"base": True, "rl": False})
    with pytest.raises(ConfigError, match=r"more.steps is absent there and 5 here"):
        same_or_fail(folder, changed)
    changed[0] = "base.steps: 2"
    with pytest.raises(ConfigError, match=r"base.steps is 1 there and 2 here; use --out"):
        same_or_fail(folder, changed, begun={"base": True})
    with pytest.raises(ConfigError, match="seed is 1 there and 2 here"):
        same_or_fail(folder, ["base.steps: 1", "seed: 2", "stages: base"], begun={"base": True})
    with pytest.raises(ConfigError, match="stages is base there and  here"):
        same_or_fail(folder, ["base.steps: 1", "seed: 1", "stages: rl"], begun={"base": True})


def test_passes_of_a_data_set_may_change_until_it_is_done(file):
    folder = Path("runs/a")
    folder.mkdir(parents=True)
    there = ["cold.passes.long.most: 9", "cold.samples: 4", "stages: cold"]
    (folder / "config.txt").write_text("".join(f"{line}\n" for line in there))
    changed = ["cold.passes: {}", *there[1:]]
    same_or_fail(folder, changed, begun={"cold": False})
    with pytest.raises(ConfigError, match=r"cold.passes is absent there and \{\} here"):
        same_or_fail(folder, changed, begun={"cold": True})
    changed[1] = "cold.samples: 5"
    with pytest.raises(ConfigError, match=r"cold.samples is 4 there and 5 here"):
        same_or_fail(folder, changed, begun={"cold": False})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("begin='rl'", "stage base needs 'rl', which must be a stage before it: weights"),
        ("source=Built(stage='rl')", "stage base needs 'rl', which must be a stage before it: th"),
    ],
)
def test_a_stage_can_only_use_stages_before_it(file, change, message):
    edited(
        file, "source=rows,", f"{change}, source=rows," if "source" not in change else f"{change},"
    )
    file.write_text("from r1jax.settings import Built\n" + file.read_text())
    with pytest.raises(ConfigError) as caught:
        check("sample.py")
    assert f"Run: {message}" in str(caught.value)


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is no run folder: it has no config.json"):
        saved(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config.json is damaged"):
        saved(tmp_path)


def test_a_full_disk_is_one_line_and_leaves_no_half_file(file, monkeypatch, capsys):
    def full(path: Path, data: bytes) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(metrics, "append", full)
    with pytest.raises(SystemExit) as caught:
        config.one_line_errors(save)(Path("a"), ["seed: 1"], "sample.py")
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: no space left on device: a/config.py\n"
    assert list(Path("a").iterdir()) == []


# ----------------------------------------------------------------- one line or a traceback


def test_a_users_mistake_is_one_line_and_a_programmers_keeps_its_traceback(file, capsys):
    import jax
    import jax.numpy as jnp

    from r1jax.algos.groups import group_advantages

    with pytest.raises(SystemExit) as caught:
        config.one_line_errors(check)("nowhere.py")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("error: no config file nowhere.py; ")

    # Raised by r1jax while JAX traces it.
    traced = jax.jit(partial(group_advantages, group=3))
    with pytest.raises(SystemExit):
        config.one_line_errors(traced)(jnp.ones(4))
    assert capsys.readouterr().err == "error: need whole groups of >= 2 rows, got B=4, group=3\n"

    for mistake in (lambda: json.loads("{"), lambda: jnp.stack([])):
        with pytest.raises(ValueError):
            config.one_line_errors(mistake)()


# ----------------------------------------------------------------- shipped configs

assert zoo.MODELS  # imported here: under stand-ins the tests' own hook would wrap its functions

SHIPPED = [
    (file, variant)
    for file in sorted((ROOT / "configs").glob("*.py"))
    for variant in variants(file)
]


@pytest.mark.parametrize(("file", "variant"), SHIPPED)
def test_the_settings_of_a_shipped_config_are_those_on_record(file, variant):
    """After a change that is meant: `UPDATE_GOLDEN=1 pytest tests/test_config.py`."""
    text = "".join(f"{line}\n" for line in describe(check(f"{file}:{variant}")))
    golden = GOLDEN / f"{file.stem}.{variant}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    assert golden.is_file(), f"no {golden.name}: UPDATE_GOLDEN=1 pytest tests/test_config.py"
    assert text == golden.read_text()


def test_there_is_no_golden_text_without_its_config():
    known = {f"{file.stem}.{variant}.txt" for file, variant in SHIPPED}
    assert {file.name for file in GOLDEN.glob("*")} <= known
