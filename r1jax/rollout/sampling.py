"""How the next token is drawn from logits, and how a drafted one is checked."""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from r1jax import settings
from r1jax.kernels.logprob import log_softmax
from r1jax.kernels.sums import Sums
from r1jax.types import Limits

Sampler = Callable[[jax.Array, jax.Array], jax.Array]


def keep_top(logits: Float[Array, "B V"], *, top_k: int, top_p: float) -> Float[Array, "B V"]:
    """Logits outside the top_k highest, or outside the smallest set of mass top_p, become -inf.

    The token that crosses top_p stays in, so one is always left. Tokens of equal logit stay or go
    together. Source: The Curious Case of Neural Text Degeneration, arXiv:1904.09751.
    """
    ordered = -jnp.sort(-logits, axis=-1)
    floor = jnp.full((*logits.shape[:1], 1), -jnp.inf, logits.dtype)
    if top_k:
        last = min(top_k, logits.shape[-1]) - 1
        floor = jnp.maximum(floor, ordered[:, last : last + 1])
    if top_p < 1:
        within = jnp.where(ordered >= floor, ordered, -jnp.inf)  # top_p counts what top_k left
        mass = jax.nn.softmax(within, axis=-1)
        before = jnp.cumsum(mass, axis=-1) - mass
        lowest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
        floor = jnp.maximum(floor, lowest)
    return jnp.where(logits >= floor, logits, -jnp.inf)


def shaped(cfg: settings.Sampling, logits: Float[Array, "B V"]) -> Float[Array, "B V"]:
    """Logits of the distribution that is drawn from: tempered, and cut by top_k and top_p."""
    logits = logits / cfg.temperature
    if cfg.top_k or cfg.top_p < 1:
        logits = keep_top(logits, top_k=cfg.top_k, top_p=cfg.top_p)
    return logits


def draw(logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
    """A token of softmax(logits) for each row, by the row's own key."""
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)


def make_sampler(cfg: settings.Sampling) -> Sampler:
    """(logits [B, V], one key per row [B]) -> token ids [B]. A row depends on its own key only."""

    def greedy(logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        del keys
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sample(logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return draw(shaped(cfg, logits), keys)

    return greedy if cfg.temperature == 0 else sample


class Draft(NamedTuple):
    """How a token is guessed ahead and checked; both take the keys of the token's position.

    `propose(guess, keys)` draws it from the drafting module's logits. `check(logits, guess, token,
    keys)` gives the token that takes the place, by the model's own logits: if it is the same one,
    the draft is accepted. What `check` gives has exactly the model's distribution.
    """

    propose: Sampler
    check: Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


def coupled(cfg: settings.Sampling) -> Draft:
    """The draft is drawn with the noise that the token itself will be drawn with.

    An answer is token for token what it would be without drafts. Where the two distributions
    differ by D in total variation, at least (1 - D) / (1 + D) of the drafts are accepted.

    Source: Coupling without Communication and Drafter-Invariant Speculative Decoding,
    arXiv:2408.07978.
    """
    sampler = make_sampler(cfg)

    def check(
        logits: jax.Array, guess: jax.Array, token: jax.Array, keys: jax.Array
    ) -> Int[Array, " B"]:
        del guess, token
        return sampler(logits, keys)

    return Draft(sampler, check)


def rejection(cfg: settings.Sampling) -> Draft:
    """A draft x is accepted with probability p(x) / q(x), at most 1; else a token of what p has
    above q is drawn. Of the drafts 1 - D are accepted, the most that is possible.

    Answers have the distribution of plain ones, but are others. Greedy, this is `coupled`.

    Source: Fast Inference from Transformers via Speculative Decoding, arXiv:2211.17192.
    """
    if cfg.temperature == 0:
        return coupled(cfg)
    fold = jax.vmap(jax.random.fold_in, in_axes=(0, None))

    def propose(guess: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        return draw(shaped(cfg, guess), fold(keys, 1))

    def check(
        logits: Float[Array, "B V"],
        guess: Float[Array, "B V"],
        token: Int[Array, " B"],
        keys: Key[Array, " B"],
    ) -> Int[Array, " B"]:
        p = jax.nn.softmax(shaped(cfg, logits), axis=-1)
        q = jax.nn.softmax(shaped(cfg, guess), axis=-1)
        chance = jax.vmap(jax.random.uniform)(fold(keys, 2))
        at = lambda x: jnp.take_along_axis(x, token[:, None], axis=-1)[:, 0]  # noqa: E731
        other = draw(jnp.log(jnp.maximum(p - q, 0.0)), fold(keys, 3))
        return jnp.where(chance * at(q) < at(p), token, other)

    return Draft(propose, check)


DRAFTS = {"coupled": coupled, "rejection": rejection}

# --------------------------------------------------------------------------- in a token loop


def of_divided(cfg: settings.Sampling) -> settings.Sampling:
    """The same sampling, for logits that come divided by the temperature, as `next_logits` are."""
    return cfg if cfg.temperature == 0 else replace(cfg, temperature=1.0)


def next_logits(
    cfg: settings.Sampling, limits: Limits, head: Float[Array, "V D"], hidden: Float[Array, "S D"]
) -> Float[Array, "S V"]:
    """Logits of the token after each state, float32, divided by the temperature of `limits`; by 1
    where `cfg` is greedy."""
    logits = jnp.einsum("sd,vd->sv", hidden, head, preferred_element_type=jnp.float32)
    return logits / (1.0 if cfg.temperature == 0 else limits.temperature)


def chosen_logp(
    logits: Float[Array, "S V"], token: Int[Array, " S"], *, sums: Sums
) -> Float[Array, " S"]:
    """Each token's log-probability in the whole distribution of its logits."""
    every = log_softmax(logits, sums=sums)
    return jnp.take_along_axis(every, token[:, None], axis=-1)[:, 0]


def is_one_of(token: Int[Array, " S"], stop: tuple[int, ...]) -> Bool[Array, " S"]:
    """Which tokens end an answer."""
    found = jnp.zeros_like(token, dtype=bool)
    for end in stop:
        found |= token == end
    return found


def answer_keys(key: Key[Array, ""], index: Int[Array, " N"], group: int) -> Key[Array, " B"]:
    """One key per answer from (run and step key, prompt index, sample number)."""
    prompt = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    sample = jnp.arange(group)
    return jax.vmap(lambda k: jax.vmap(lambda s: jax.random.fold_in(k, s))(sample))(prompt).reshape(
        -1
    )
