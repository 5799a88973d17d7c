"""Every setting of a run, as frozen records. Nothing is imported but the standard library,
`r1jax.architecture` and `r1jax.schedules`.

A config file is a function that returns a `Run` (see `r1jax.config`). Settings are plain values
and functions; no array and no part of JAX is needed to build, check or print them.
"""

import traceback
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from r1jax.architecture import Attention as Attention
from r1jax.architecture import Decoder as Decoder
from r1jax.architecture import Experts as Experts
from r1jax.architecture import Group as Group
from r1jax.architecture import Latent as Latent
from r1jax.architecture import Llama3Rope as Llama3Rope
from r1jax.architecture import Lora as Lora
from r1jax.architecture import Mlp as Mlp
from r1jax.architecture import Yarn as Yarn
from r1jax.architecture import dense as dense
from r1jax.schedules import Schedule, adaptive, bounds
from r1jax.schedules import inside as inside

# Settings of a stage that change what is kept of it and nothing that it makes: they may be others
# when it goes on.
ONLY_KEPT = ("checkpoints", "log_samples")

Row = Mapping[str, Any]
Rows = Sequence[Row]


def _at_least(record: Any, **least: float) -> None:
    """Raises ValueError for the first of a record's numbers that is below its least."""
    for name, low in least.items():
        if not (value := getattr(record, name)) >= low:
            raise ValueError(f"{name} must be >= {low}, got {value}")


# --------------------------------------------------------------------------- machine


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Devices along each mesh axis. One axis may be -1: it takes the devices that are left."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    context: int = 1
    stage: int = 1


# --------------------------------------------------------------------------- data and sampling


@dataclass(frozen=True, kw_only=True)
class Task:
    """Problems with a rule that scores answers to them."""

    train: Callable[[], Rows]
    test: Callable[[], Rows]
    prompt: Callable[[Row], str]  # the text that the model continues
    prefill: str = ""  # how the answer begins; part of the prompt, and of the text that is scored
    accuracy: Callable[[Row, str], float | None]  # 1.0 right, 0.0 wrong
    observe: Callable[[Row, str], Mapping[str, float]] | None = None  # e.g. attempts; only logged
    vote: Callable[[Row, str], Hashable | None] | None = None  # what maj@k counts; None: abstains


@contextmanager
def located(place: str, row: Row | None = None) -> Iterator[None]:
    """Whatever a function of the user's raises becomes a ValueError that says at which place of the
    settings it was; a KeyError while it reads `row` says what the row has."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
    except KeyError as error:
        if row is None:
            raise ValueError(f"{place}: {told(error)}") from error
        raise ValueError(
            f"{place}: row has no field {error.args[0]!r}; it has {', '.join(row) or 'none'}"
        ) from None
    except Exception as error:  # it may be any program
        raise ValueError(f"{place}: {told(error)}") from error


def told(error: Exception) -> str:
    """An error in one line: its class, what it says, and the file and line that raised it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    said = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {said} ({frame.filename}:{frame.lineno})"


def prompt_of(task: Task, row: Row, place: str) -> str:
    """The text that the model continues for `row`; `place` says where the row is from.

    Raises:
      ValueError: the row lacks a field that the prompt needs.
    """
    with located(place, row):
        return task.prompt(row) + task.prefill


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy; top_k 0 and top_p 1 leave all in."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be >= 0 (0: all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """The rollout engine's fixed sizes."""

    max_prompt: int  # tokens; a longer prompt is an error, never cut
    max_new: int  # tokens an answer may have, its end token included
    slots: int  # answers decoded at the same time
    sampling: Sampling = field(default_factory=Sampling)
    prefill_chunk: int = 0  # prompt tokens computed at a time; 0: all of them
    keep_routing: bool = False  # the experts of each token, for the update to take them again
    draft: Literal["none", "coupled", "rejection"] = "none"  # the first prediction module drafts a
    # token at each step; see `r1jax.rollout.sampling.DRAFTS` for how it is checked

    def __post_init__(self) -> None:
        _at_least(self, max_prompt=1, max_new=1, slots=1, prefill_chunk=0)


# --------------------------------------------------------------------------- stages

FIRST = "weights"  # in the place of a stage's name: the weights that the run begins with


@dataclass(frozen=True, kw_only=True)
class Built:
    """The rows that an earlier `Build` stage of the same run wrote; stands for a source of rows."""

    stage: str

    def __call__(self) -> Rows:
        raise ValueError(f"the rows of stage {self.stage} are there only while the run is trained")


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When a stage's state is saved and what is kept."""

    every: int = 50  # steps
    keep: int = 2  # the newest so many, and the best one

    def __post_init__(self) -> None:
        _at_least(self, every=1, keep=1)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Held-out problems that are answered while a stage trains: one answer to each, always drawn
    with the same random numbers."""

    task: Task
    engine: Engine
    rows: int = 256  # problems
    every: int = 0  # steps; also before the first and after the last. 0: only these two
    reward_workers: int = 0  # processes that judge; 0: this one, and nothing stops an answer
    reward_seconds: float = 60.0  # a worker has for one answer

    def __post_init__(self) -> None:
        _at_least(self, rows=1, every=0, reward_workers=0)


@dataclass(frozen=True, kw_only=True)
class Auxiliary:
    """What an update does beside its loss, for models with experts or prediction modules."""

    mtp_weight: float = 0.0  # of the prediction modules' loss; DeepSeek-V3: 0.3, later 0.1
    mtp_alone: bool = False  # that loss trains the modules and leaves the model as it is
    balance_weight: float = 0.0  # of the sequence-wise balance loss; DeepSeek-V3: 0.0001
    bias_rate: float = 0.0  # by which an update moves routers' biases; DeepSeek-V3: 0.001, then 0

    def __post_init__(self) -> None:
        _at_least(self, mtp_weight=0, balance_weight=0, bias_rate=0)


@dataclass(frozen=True, kw_only=True)
class Head:
    """What says a number after each token, beside the head of the language model. A reward model
    is a decoder with one."""

    score: Callable[..., Any]  # (Decoder, params, states after the tokens, batch) -> [B, T]
    leaves: Callable[..., Any]  # (Decoder) -> the weights it has beside a decoder's


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The model of another run, of the same vocabulary, from whose probabilities a stage learns."""

    run: str  # its folder
    stage: str | None = None  # whose weights; None: the last


@dataclass(frozen=True, kw_only=True)
class Supervised:
    """Training on given texts: pretraining, SFT, preferences, reward models, distillation.

    Rows have `prompt` and `answer`, or what `texts` reads. The loss is of the log-probabilities of
    their tokens; with a `head` of its scores; with a `divergence` of that to the teacher.
    """

    name: str
    source: Callable[[], Rows]
    begin: str | None = None  # the stage whose weights it begins with, or "weights"; None: the last
    steps: int
    batch_rows: int  # packed rows in one update
    row_length: int  # tokens in a packed row
    micro_rows: int  # packed rows that are on the device at once
    loss: Callable[..., Any]
    optimizer: Callable[..., Any]  # steps -> optax.GradientTransformation
    lora: Lora | None = None  # adapters are trained, beside weights that stay; None: all weights
    on_prompt: bool = False  # train on the prompt's tokens too
    # One of r1jax.data.labelled: (tokenizer, rows) -> the texts of each. None: prompt and answer
    texts: Callable[..., Any] | None = None
    weight: Callable[..., Any] | None = None  # (mask [texts, A]) -> [texts, A]; None: token mean
    head: Head | None = None
    reference: bool = False  # its first weights are kept, for losses that want `logp_ref`
    # KTO's: (logp, batch) of answers to other prompts -> sum, count; needs the reference
    reference_point: Callable[..., Any] | None = None
    teacher: Teacher | None = None
    divergence: Callable[..., Any] | None = None  # (student's, teacher's logits) -> nats
    auxiliary: Auxiliary = field(default_factory=Auxiliary)
    evaluation: Evaluation | None = None
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    log_every: int = 10

    def __post_init__(self) -> None:
        _at_least(self, steps=1, batch_rows=1, row_length=1, micro_rows=1, log_every=1)
        if self.reference_point is not None and not self.reference:
            raise ValueError(f"{self.name}: reference_point needs reference=True")
        if (self.teacher is None) != (self.divergence is None):
            raise ValueError(f"{self.name}: teacher and divergence need each other")
        if self.head is not None and (self.reference or self.teacher is not None):
            raise ValueError(f"{self.name}: a head's scores have no reference and no teacher")
        if self.texts is not None and self.weight is None:
            raise ValueError(
                f"{self.name}: texts needs weight, as in r1jax.algos.weights.sequence_mean: "
                f"without it a long text would count for more"
            )
        if self.batch_rows % self.micro_rows:
            raise ValueError(
                f"batch_rows must be a multiple of micro_rows, "
                f"got {self.batch_rows} and {self.micro_rows}"
            )


@dataclass(frozen=True, kw_only=True)
class Critic:
    """A network that says one number of each token, for the advantage, and learns as it goes.

    PPO's value network and PRIME's implicit process reward model are both this. In a step it first
    scores the rollout (`fill`), then learns (`target`, `loss`), then the policy is updated.

    With a trunk of its own it begins as a copy of the stage's first weights, and has its own
    optimizer. With the policy's trunk its leaves are weights of the policy, and one gradient, of
    the policy's loss + `share` * its own, moves both.
    """

    score: Callable[..., Any]  # (Decoder, params, states before the tokens, batch) -> [B, T]
    leaves: Callable[..., Any] | None = None  # (Decoder) -> the weights it has beside a decoder's
    fill: Callable[..., Any]  # (rollout, score [B, A], the first weights' score) -> rollout
    target: Callable[..., Any]  # (rollout) -> [B, A]: what it learns; nan: not from this token
    loss: Callable[..., Any]  # (score, batch) -> (scalar, metrics)
    measure: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    # for the log, before it learns: (score, target, mask), all [B, A] -> number
    trunk: Literal["own", "policy"] = "own"
    share: float = 1.0  # of its loss in the gradient of a shared trunk
    weight: Callable[..., Any] | None = None  # (mask) -> [B, A]; None: as the policy's tokens
    optimizer: Callable[..., Any] | None = None  # steps -> optax.GradientTransformation
    reference: bool = False  # keep its first weights, and score with them too
    warmup: int = 0  # steps in which it learns and the policy stays

    def __post_init__(self) -> None:
        if self.trunk == "own" and self.optimizer is None:
            raise ValueError("a critic with a trunk of its own needs an optimizer")
        if self.trunk == "policy":
            own = self.optimizer, self.weight, self.reference or None, self.warmup or None
            if own != (None,) * 4:
                raise ValueError(
                    "a critic on the policy's trunk learns with the policy: it has no optimizer, "
                    "weight, reference or warmup of its own"
                )
        _at_least(self, warmup=0)


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """Reinforcement learning with rule rewards: rollout, score, update."""

    name: str
    task: Task
    begin: str | None = None  # the stage whose weights it begins with, or "weights"; None: the last
    steps: int
    order: Literal["shuffled", "given"] = "shuffled"  # of the problems; given: a curriculum
    prompts: int  # problems in one rollout
    group: int  # answers to each problem
    engine: Engine
    reward: Callable[[Row, str], float | None]
    advantage: Callable[..., Any]  # (rollout) -> [B, A]
    loss: Callable[..., Any]  # (logp, batch) -> (scalar, metrics)
    weight: Callable[..., Any]  # (mask [B, A]) -> [B, A]: how tokens are added up in the loss
    optimizer: Callable[..., Any]  # steps -> optax.GradientTransformation
    lora: Lora | None = None  # adapters are trained, of a critic too; None: all weights
    critic: Critic | None = None  # for advantages that need more than rewards
    select: Callable[..., Any] | None = None  # (reward [B], G) -> [N]: prompts worth keeping
    rounds: int = 1  # rollouts of fresh prompts in a step, at the most, until `prompts` are kept
    temperature: float | Schedule | None = None  # of the rollout; None: the engine's
    max_new: int | Schedule | None = None  # tokens an answer may have; None: as the engine's
    old: Literal["sampler", "trainer"] = "sampler"  # whose log-probs the ratio's lower part has
    reward_workers: int = 0  # processes that score; 0: this one, and nothing stops an answer
    reward_seconds: float = 60.0  # a worker has for one answer; rewards with limits end before
    minibatches: int = 1  # updates for one pass over a rollout
    epochs: int = 1  # passes over a rollout
    row_length: int  # tokens in a packed row of the update
    micro_rows: int  # packed rows that are on the device at once
    auxiliary: Auxiliary = field(default_factory=Auxiliary)
    reference: Literal["none", "start", "moving"] = "none"  # the frozen model of the KL term
    reference_every: int = 400  # steps between replacements of a moving reference
    teacher: Teacher | None = None  # its log-probs stand for a reference's: on-policy distillation
    evaluate_every: int = 25  # steps; also before the first and after the last
    evaluate_rows: int = 256  # held-out problems
    evaluate_sampling: Sampling = field(default_factory=Sampling)
    checkpoints: Checkpoints = field(default_factory=Checkpoints)
    log_samples: int = 4  # answers of a rollout written to samples.jsonl

    def __post_init__(self) -> None:
        once = ("steps", "prompts", "minibatches", "epochs", "row_length", "micro_rows")
        _at_least(self, **dict.fromkeys(once, 1), reference_every=1, evaluate_rows=1)
        _at_least(self, reward_workers=0, evaluate_every=0, log_samples=0)
        if self.group < (2 if self.critic is None else 1):
            raise ValueError(
                f"group must be >= 2: an answer is scored against the others "
                f"to its prompt, got {self.group}"
            )
        if self.temperature is not None:
            if not self.engine.sampling.temperature:
                raise ValueError("temperature needs an engine that samples, but its own is 0")
            if bounds(self.temperature)[0] <= 0:
                raise ValueError(f"temperature must stay above 0, got {self.temperature}")
        if self.max_new is not None:
            low, high = bounds(self.max_new)
            if not 1 <= low <= high <= self.engine.max_new:
                raise ValueError(
                    f"max_new must be 1 to engine.max_new={self.engine.max_new}, got {self.max_new}"
                )
        if self.teacher is not None and self.reference != "none":
            raise ValueError("a teacher takes the reference's place: reference must be none")
        if adaptive(self) is not None and self.reference == "none" and self.teacher is None:
            raise ValueError(
                "an adaptive weight follows the KL to a reference: reference must not be none"
            )
        if self.critic is not None and self.critic.warmup >= self.steps:
            raise ValueError(
                f"critic.warmup must be less than steps, got {self.critic.warmup} of {self.steps}"
            )
        if self.rounds < 1 or (self.rounds > 1 and self.select is None):
            raise ValueError(
                f"rounds must be >= 1, and more than 1 needs select, got {self.rounds}"
            )
        if (self.prompts * self.group) % self.minibatches:
            raise ValueError(
                f"prompts * group must be a multiple of minibatches, "
                f"got {self.prompts} * {self.group} and {self.minibatches}"
            )
        if self.engine.max_prompt + self.engine.max_new > self.row_length:
            raise ValueError(
                f"row_length must hold a whole prompt and answer, got {self.row_length} < "
                f"{self.engine.max_prompt} + {self.engine.max_new}"
            )


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Answers that a model of this run, or of another one, gives to prompts."""

    engine: Engine
    prefill: str = ""  # how the answer begins; part of the prompt, and of the answer that is kept
    run: str | None = None  # the folder of another run; None: this one
    stage: str | None = None  # whose weights; None: the last. In this run also "weights"


@dataclass(frozen=True, kw_only=True)
class Taught:
    """Answers that a teacher gives: any function from prompts to replies."""

    # As r1jax.rewards.endpoint.ask: (messages of each prompt) -> reply, or None, to each.
    complete: Callable[..., Sequence[str | None]]
    messages: Callable[[Row], Sequence[Mapping[str, str]]]  # what the teacher is asked


@dataclass(frozen=True, kw_only=True)
class Build:
    """Making of a data set: problems are answered, the answers verified, filtered and kept.

    Without `answers` the source's rows go through the passes as they are. With them, the passes
    see a row for each answer: `prompt`, `answer`, `accuracy`, `num_tokens`, `finished`, `problem`
    and `sample` (numbers from 0), and `row`, which is the problem's own.
    """

    name: str
    source: Callable[[], Rows]
    passes: Mapping[str, Callable[..., Any]]  # rows -> rows, in order; the name is for the counts
    prompt: Callable[[Row], str] | None = None  # the text that a model is to continue
    answers: Sampled | Taught | None = None
    samples: int = 1  # answers to each problem
    accuracy: Callable[[Row, str], float | None] | None = None  # 1.0 right, 0.0 wrong
    reward_workers: int = 0  # processes that verify; 0: this one, and nothing stops an answer
    reward_seconds: float = 10.0  # a worker has for one answer before it is killed
    at_once: int = 64  # problems that are answered between two saves

    def __post_init__(self) -> None:
        _at_least(self, samples=1, at_once=1, reward_workers=0)
        if self.answers is not None and self.prompt is None:
            raise ValueError("prompt is needed where there are answers: it makes a row's text")
        if self.answers is None and (self.accuracy is not None or self.samples > 1):
            raise ValueError("accuracy and samples need answers, got answers=None")


@dataclass(frozen=True, kw_only=True)
class Compare:
    """A table: the models of several stages answer the same problems, and are measured."""

    name: str
    models: Mapping[str, str]  # what a model is called in the table -> the stage that trained it
    source: Callable[[], Rows]
    prompt: Callable[[Row], str]
    prefill: str = ""  # how the answer begins; part of the prompt, and of the text that is measured
    engine: Engine
    samples: int = 1  # answers to each problem
    # What an answer scores, by the name of a column; None: a measure that is not for this problem.
    measures: Mapping[str, Callable[[Row, str], float | None]]

    def __post_init__(self) -> None:
        if not self.models or not self.measures:
            raise ValueError("compare needs models and measures, one of each at least")
        _at_least(self, samples=1)


Trained = Supervised | Reinforce
Stage = Trained | Build | Compare


@dataclass(frozen=True, kw_only=True)
class Run:
    """One experiment: a model, a tokenizer, and stages that train it and build data, in order."""

    name: str
    model: Decoder
    tokenizer: Callable[[], Any]  # -> transformers.PreTrainedTokenizerFast
    stages: tuple[Stage, ...]
    weights: str | None = None  # the Hugging Face folder to begin from; None: random weights
    seed: int = 0
    mesh: Mesh = field(default_factory=Mesh)
    jit: bool = True  # False: run operation by operation, to print arrays while debugging
    price: float | None = None  # of one device for an hour, in dollars; for the report alone

    def __post_init__(self) -> None:
        names = [stage.name for stage in self.stages]
        for name in (self.name, *names):
            if "/" in name or name in ("", ".", ".."):
                raise ValueError(f"a run and its stages need names of folders, got {name!r}")
        if len(set(names)) != len(names) or not names:
            raise ValueError(f"stages need names of their own, got {names}")
        if self.price is not None and self.price < 0:
            raise ValueError(f"price must be >= 0 dollars a device-hour, got {self.price}")
        for place, stage in enumerate(self.stages):
            before = self.stages[:place]
            trained = [one.name for one in before if isinstance(one, Trained)]
            made = [one.name for one in before if isinstance(one, Build)]
            for wanted, known in (
                *((one, [None, FIRST, *trained]) for one in named_weights(stage)),
                *((one.stage, made) for one in inside(stage, Built)),
            ):
                if wanted not in known:
                    raise ValueError(
                        f"stage {stage.name} needs {wanted!r}, which must be a stage before it: "
                        f"{', '.join(filter(None, known)) or 'there is none that it could use'}"
                    )
            if isinstance(stage, Trained):
                _check_parts(self.model, stage)


def named_weights(stage: Stage) -> Sequence[str | None]:
    """The stages of the same run whose weights a stage names: its own first, "weights", or None."""
    if isinstance(stage, Compare):
        return list(stage.models.values())
    if isinstance(stage, Trained):
        return [stage.begin]
    answers = stage.answers
    return [answers.stage] if isinstance(answers, Sampled) and answers.run is None else []


def evaluation_of(stage: Stage) -> Evaluation | None:
    """How the weights of a stage are measured on held-out problems; None: they are not."""
    if not isinstance(stage, Reinforce):
        return stage.evaluation if isinstance(stage, Supervised) else None
    return Evaluation(
        task=stage.task,
        engine=replace(stage.engine, sampling=stage.evaluate_sampling, keep_routing=False),
        rows=stage.evaluate_rows,
        every=stage.evaluate_every,
        reward_workers=stage.reward_workers,
        reward_seconds=stage.reward_seconds,
    )


def _check_parts(model: Decoder, stage: Trained) -> None:
    """Raises ValueError if a stage counts on parts that the model lacks."""
    scores = {group.mlp.score for group in model.groups if isinstance(group.mlp, Experts)}
    needs = [
        ("auxiliary.mtp_weight", stage.auxiliary.mtp_weight, model.num_mtp, "num_mtp >= 1"),
        ("auxiliary.balance_weight", stage.auxiliary.balance_weight, scores, "experts"),
        ("auxiliary.bias_rate", stage.auxiliary.bias_rate, "sigmoid" in scores, "sigmoid experts"),
    ]
    engines = {"engine": stage.engine} if isinstance(stage, Reinforce) else {}
    if isinstance(stage, Supervised) and stage.evaluation is not None:
        engines = {"evaluation.engine": stage.evaluation.engine}
    for name, engine in engines.items():
        needs += [
            (f"{name}.draft", engine.draft != "none", model.num_mtp, "num_mtp >= 1"),
            (f"{name}.keep_routing", engine.keep_routing, scores, "experts"),
        ]
    for name, wanted, there, what in needs:
        if wanted and not there:
            raise ValueError(f"{stage.name}.{name} needs a model with {what}")
    if stage.lora is not None and (stage.auxiliary.mtp_weight or stage.auxiliary.bias_rate):
        raise ValueError(
            f"{stage.name}.lora leaves prediction modules and routers as they are: "
            f"auxiliary.mtp_weight and auxiliary.bias_rate must be 0"
        )
