"""How the next token is drawn from logits."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from r1jax import settings

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


def make_sampler(cfg: settings.Sampling) -> Sampler:
    """(logits [B, V], one key per row [B]) -> token ids [B]. A row depends on its own key only."""

    def greedy(logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        del keys
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def sample(logits: Float[Array, "B V"], keys: Key[Array, " B"]) -> Int[Array, " B"]:
        logits = logits / cfg.temperature
        if cfg.top_k or cfg.top_p < 1:
            logits = keep_top(logits, top_k=cfg.top_k, top_p=cfg.top_p)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        return jnp.argmax(logits + noise, axis=-1).astype(jnp.int32)

    return greedy if cfg.temperature == 0 else sample


def answer_keys(key: Key[Array, ""], index: Int[Array, " N"], group: int) -> Key[Array, " B"]:
    """One key per answer from (run and step key, prompt index, sample number)."""
    prompt = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    sample = jnp.arange(group)
    return jax.vmap(lambda k: jax.vmap(lambda s: jax.random.fold_in(k, s))(sample))(prompt).reshape(
        -1
    )
