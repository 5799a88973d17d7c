"""A model of this machine as a judge: a tiny random one whose every word is a verdict."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from r1jax import local, sharding
from r1jax.local import Local, ask
from r1jax.models import decoder, hf
from r1jax.rewards.judge import CORRECT, pointwise
from r1jax.rewards.weighted import Batched, score_many, weighted
from r1jax.rollout.answers import decode_answers, encode_prompts, to_host
from r1jax.rollout.engine import make_engine
from r1jax.settings import Engine, Mesh, Sampling, dense
from r1jax.types import Prompts, Rollout

TEMPLATE = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant"
FIRST = 3  # the token of the score 0
CFG = dense(vocab_size=64, dim=16, num_layers=1, num_heads=2, num_kv_heads=1, mlp_dim=16)
ENGINE = Engine(max_prompt=256, max_new=4, slots=4, sampling=Sampling(temperature=0.0))


def verdict(score: int) -> str:
    return f'{{"score":{score}}}'


def tokenizer() -> PreTrainedTokenizerFast:
    """All that a model can say is scores from 0 to 60; other words are one unknown token."""
    names = ["<pad>", "<eos>", "<unk>", *(verdict(n) for n in range(61))]
    words = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def prompts(*lengths: int) -> list[list[dict[str, str]]]:
    """One of so many words for each length; the template adds two."""
    return [[{"role": "user", "content": " ".join(["word"] * length)}] for length in lengths]


@pytest.fixture
def complete(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], local.Complete]:
    """Makes `complete` for a temperature, over an engine that only says what it was asked: the
    length of the prompt, and its number."""

    def engine(cfg, engine, *, group: int, stop: tuple[int, ...]):
        def generate(params, prompts: Prompts, key: jax.Array) -> Rollout:
            size = prompts.length.shape[0]
            answer = jnp.stack([prompts.length, prompts.index], axis=1)
            return Rollout(
                prompt=prompts.tokens,
                prompt_length=prompts.length,
                answer=jnp.where(prompts.length[:, None] > 0, FIRST + answer, 0),
                answer_length=jnp.full(size, 2),
                finished=jnp.zeros(size, bool),
                logp_rollout=jnp.zeros((size, 2)),
                decode_steps=jnp.zeros((), int),
                slot_steps=jnp.zeros((), int),
            )

        return generate

    monkeypatch.setattr(local, "make_engine", engine)
    words = tokenizer()
    words.chat_template = TEMPLATE
    mesh = sharding.make_mesh(Mesh())

    def make(temperature: float) -> local.Complete:
        engine = Engine(
            max_prompt=16, max_new=4, slots=4, sampling=Sampling(temperature=temperature)
        )
        model = Local(folder="", engine=engine, at_once=4)
        return local.make_complete(CFG, {}, words, mesh=mesh, model=model)

    return make


def test_replies_come_in_the_order_of_the_prompts_however_many_are_asked(complete):
    lengths = [3, 10, 7, 3, 9, 12, 11]
    ask_all = complete(0.0)
    expected = [verdict(length + 2) + verdict(0) for length in lengths]
    assert ask_all(prompts(*lengths)) == expected
    assert [ask_all(prompts(length))[0] for length in lengths] == expected
    assert ask_all([]) == []


def test_above_temperature_0_equal_prompts_are_asked_each_by_itself(complete):
    assert complete(0.5)(prompts(*[5] * 6)) == [verdict(7) + verdict(number) for number in range(6)]
    assert complete(0.0)(prompts(*[5] * 6)) == [verdict(7) + verdict(0)] * 6


def test_a_prompt_that_is_too_long_gets_no_reply_and_the_others_do(complete):
    found = complete(0.0)(prompts(14, 15, 1))
    assert found == [verdict(16) + verdict(0), None, verdict(3) + verdict(0)]
    assert complete(1.0)(prompts(15)) == [None]


def test_a_model_without_a_chat_template_is_refused_in_one_line(tmp_path: Path):
    mesh, model = sharding.make_mesh(Mesh()), Local(folder=str(tmp_path / "none"), engine=ENGINE)
    with pytest.raises(ValueError, match="has no chat template: it cannot be given messages"):
        local.make_complete(CFG, {}, tokenizer(), mesh=mesh, model=model)
    with pytest.raises(ValueError, match="no such folder"):
        ask(prompts(1), model=model)
    with pytest.raises(ValueError, match="at_once must be >= 1, got 0"):
        Local(folder="x", engine=ENGINE, at_once=0)


def test_a_judge_on_this_machine_is_a_part_of_a_reward(tmp_path: Path):
    words = tokenizer()
    words.chat_template = TEMPLATE
    # Far from the even distribution of small weights, so that replies differ.
    params = jax.tree.map(lambda w: 20 * w, sharding.init(decoder.leaves(CFG), jax.random.key(1)))
    hf.save(tmp_path / "judge", CFG, params, words)
    model = Local(folder=str(tmp_path / "judge"), engine=ENGINE, at_once=4, dtype="float32")
    settings = {"rubric": CORRECT, "reference": "answer", "scale": (0, 60)}
    judge = Batched(partial(pointwise, complete=partial(ask, model=model), **settings))
    rows = [{"question": f"What comes after {verdict(n)} ?", "answer": "8"} for n in (3, 30, 50)]
    answers = [f"{verdict(8)} {verdict(41)}", verdict(1), "six or so"]
    with ThreadPoolExecutor(1) as other, jax.set_mesh(sharding.make_mesh(Mesh())):
        reward = weighted(correct=(2.0, judge))
        found = other.submit(score_many, reward, rows, answers).result()

    asked: list[str] = []

    def scripted(messages: local.Messages) -> list[str | None]:
        """The same model by way of the engine alone, one prompt at a time."""
        engine = jax.jit(make_engine(CFG, ENGINE, group=1, stop=(1,)))
        for [message] in messages:
            text = f"user {message['content']} assistant"
            encoded = encode_prompts(words, [text], max_prompt=256, index=[0])
            asked.extend(decode_answers(words, to_host(engine(params, encoded, jax.random.key(0)))))
        return list(asked)

    expected = pointwise(rows, answers, complete=scripted, **settings)
    assert None not in expected and len(set(asked)) > 1
    assert found == [(2 * value, {"correct": value}) for value in expected if value is not None]
