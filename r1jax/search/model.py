"""A restored model as what strategies ask for: continuations of paths, forced text, scores."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from r1jax import restore, settings, sharding
from r1jax.data.tokenizer import decode, encode
from r1jax.models import decoder, heads
from r1jax.rollout.answers import stop_tokens, to_host
from r1jax.rollout.engine import make_engine
from r1jax.search.paths import Force, Path, Sample, Score
from r1jax.types import Limits, Params, Prompts, Rollout

PLACES = 1 << 12  # paths of one problem that one call can continue with keys of their own
GROWTH = 4  # between the sizes that programs are compiled for


def root(model: restore.Restored, problem: int, prompt: str) -> Path:
    """The path of a problem before its answer begins.

    Raises:
      ValueError: the tokenizer has no token for a part of the prompt.
    """
    return Path(problem=problem, prompt=prompt, prompt_length=len(encode(model.tokenizer, prompt)))


def make_samples(
    model: restore.Restored, engine: settings.Engine, *, at_once: int
) -> Callable[[Any], Sample]:
    """The function (random key) -> `Sample` by the rollout engine, whose programs all share.

    An answer has room for `engine.max_new` tokens in all. A call's paths are read again from their
    tokens, `at_once` of them at a time, and are never tokenized again from text. Programs are
    compiled for few sizes: prompts and numbers of paths are filled up to one of them.
    """
    ends = stop_tokens(model.tokenizer)
    parts = math.prod(model.mesh.shape[axis] for axis in sharding.RULES["batch"])
    most = -(-at_once // parts) * parts
    widths = _sizes(engine.max_prompt, engine.max_prompt + engine.max_new)
    counts = sorted({-(-count // parts) * parts for count in _sizes(min(16, most), most)})

    @cache
    def program(samples: int, width: int, until: str | None) -> Callable[..., Rollout]:
        fitted = replace(engine, max_prompt=width)
        stop = ends if until is None else (*ends, *_holding(model.tokenizer, until))
        return jax.jit(make_engine(model.run.model, fitted, group=samples, stop=stop))

    def sample(
        key: Any,
        paths: Sequence[Path],
        *,
        samples: int,
        turn: int,
        until: str | None = None,
        limit: int | None = None,
    ) -> list[list[Path]]:
        room = max(engine.max_new - len(path.tokens) for path in paths)
        limits = Limits(
            temperature=np.float32(engine.sampling.temperature),
            max_new=np.int32(room if limit is None else min(limit, room)),
        )
        index = _index(paths)
        found = []
        for start in range(0, len(paths), most):
            some = paths[start : start + most]
            tokens = [encode(model.tokenizer, path.prompt) + list(path.tokens) for path in some]
            width = _fit(widths, max(map(len, tokens)))
            count = _fit(counts, len(some))
            prompts = _prompts(tokens, index[start : start + most], count, width)
            with jax.set_mesh(model.mesh):
                placed = sharding.put(prompts, model.mesh, "batch")
                generate = program(samples, width, until)
                own = jax.random.fold_in(key, turn)
                rollout = to_host(generate(model.params, placed, own, limits))
            for i, path in enumerate(some):
                places = range(i * samples, (i + 1) * samples)
                found.append([_longer(model, engine, path, rollout, j, ends) for j in places])
        return found

    return lambda key: partial(sample, key)


def make_force(model: restore.Restored, engine: settings.Engine) -> Force:
    """`Force` with the model's tokenizer. A path that has no room left for a token is cut."""

    def force(path: Path, text: str, *, drop: int = 0) -> Path:
        kept = path.tokens[: len(path.tokens) - drop]
        tokens = (*kept, *encode(model.tokenizer, text))
        return replace(
            path,
            text=decode(model.tokenizer, tokens),
            tokens=tokens,
            finished=False,
            cut=len(tokens) >= engine.max_new,
        )

    return force


def reward_model(
    cfg: settings.Decoder,
    params: Params,
    head: Params,
    tokenizer: Any,
    *,
    at_once: int = 64,
    end: tuple[int, ...] = (),
) -> Score:
    """The scorer of a reward or process model: a decoder with a head of `r1jax.models.heads`.

    A text's score is the head's number at its last token, also where the text is a part of an
    answer; `end` is read behind it: the end token, where whole answers are scored. `at_once` texts
    are read in one program, filled up to the next power of two.
    """

    @partial(jax.jit, static_argnames="width")
    def scores(params: Params, head: Params, tokens: jax.Array, length: jax.Array, width: int):
        position = jnp.broadcast_to(jnp.arange(width), tokens.shape)
        segment = (position < length[:, None]).astype(jnp.int32)
        hidden = decoder.run(cfg, params, tokens, position, segment).hidden
        return heads.sequence_scores(head, hidden, segment, max_segments=1)[:, 0]

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        texts = list(zip(prompts, answers, strict=True))
        found: list[float] = []
        for start in range(0, len(texts), at_once):
            # Prompt and answer by themselves, as they are in training.
            tokens = [
                [*encode(tokenizer, prompt), *encode(tokenizer, answer), *end]
                for prompt, answer in texts[start : start + at_once]
            ]
            width = max(16, 1 << (max(map(len, tokens)) - 1).bit_length())
            filled = _prompts(tokens, [0] * len(tokens), at_once, width)
            values = scores(params, head, filled.tokens, filled.length, width=width)
            found += np.asarray(values)[: len(tokens)].tolist()
        return found

    return score


# --------------------------------------------------------------------------- sizes


def _sizes(first: int, last: int) -> list[int]:
    """first, times GROWTH, and so on; the last is `last` or, if it is larger, `first`."""
    sizes = [first]
    while sizes[-1] < last:
        sizes.append(min(sizes[-1] * GROWTH, last))
    return sizes


def _fit(sizes: Sequence[int], size: int) -> int:
    """The smallest of `sizes` that holds `size`.

    Raises:
      ValueError: none does.
    """
    if size > sizes[-1]:
        raise ValueError(f"a prompt with its answer has {size} tokens, room is for {sizes[-1]}")
    return next(each for each in sizes if each >= size)


def _prompts(
    tokens: Sequence[Sequence[int]], index: Sequence[int], count: int, width: int
) -> Prompts:
    """Padded to `count` prompts of `width` tokens; those without tokens get no answers."""
    filled = np.zeros((count, width), np.int32)
    for i, ids in enumerate(tokens):
        filled[i, : len(ids)] = ids
    rest = [0] * (count - len(tokens))
    return Prompts(
        tokens=filled,
        length=np.asarray([*map(len, tokens), *rest], np.int32),
        index=np.asarray([*index, *rest], np.int32),
    )


def _index(paths: Sequence[Path]) -> list[int]:
    """A number for each path: its problem's, and its place among the paths of that problem.

    Raises:
      ValueError: there are more than PLACES paths of one problem.
    """
    places: dict[int, int] = {}
    index = []
    for path in paths:
        place = places.get(path.problem, 0)
        places[path.problem] = place + 1
        if place >= PLACES:
            raise ValueError(f"at most {PLACES} paths of a problem can go on together")
        index.append(path.problem * PLACES + place)
    return index


# --------------------------------------------------------------------------- tokens


def _holding(tokenizer: Any, text: str) -> tuple[int, ...]:
    """The ids of all tokens whose text holds `text`.

    Raises:
      ValueError: there is none.
    """
    ids = [i for i in range(len(tokenizer)) if text in tokenizer.decode([i])]
    if not ids:
        raise ValueError(
            f"no single token of the tokenizer holds {text!r}: a step cannot end there"
        )
    return tuple(ids)


def _longer(
    model: restore.Restored,
    engine: settings.Engine,
    path: Path,
    rollout: Rollout,
    place: int,
    ends: tuple[int, ...],
) -> Path:
    """The path with the answer at `place` of a rollout behind it, as far as there is room."""
    room = engine.max_new - len(path.tokens)
    ids = rollout.answer[place, : int(rollout.answer_length[place])][:room].tolist()
    tokens = (*path.tokens, *ids)
    finished = ids[-1] in ends
    return replace(
        path,
        text=decode(model.tokenizer, tokens),
        tokens=tokens,
        logp=path.logp + float(rollout.logp_rollout[place, : len(ids)].sum()),
        finished=finished,
        cut=not finished and len(tokens) >= engine.max_new,
    )
