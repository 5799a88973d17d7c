"""Objectives of supervised updates on other numbers than the log-probabilities of tokens."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from r1jax import settings
from r1jax.kernels.logprob import in_pieces
from r1jax.loops import auxiliary
from r1jax.loops.step import (
    Loss,
    Metrics,
    Numbers,
    Objective,
    make_objective,
    shifted,
    states_before,
)
from r1jax.models import decoder
from r1jax.types import Batch, Params


class Teacher(NamedTuple):
    """A model that is not trained, with the vocabulary of the one that is."""

    model: settings.Decoder
    params: Params


# (params, the model's pass, batch, **numbers) -> a number of each token
Score = Callable[..., Float[Array, "B T"]]


def of_stage(
    model: settings.Decoder, cfg: settings.Supervised, teacher: settings.Decoder | None
) -> Objective:
    """The objective of a stage. With a teacher, `numbers` must hold its weights as `teacher`."""
    if cfg.head is not None:
        return make_scored(model, cfg.loss, head_scores(model, cfg.head), extra=cfg.auxiliary)
    if cfg.divergence is not None:
        assert teacher is not None
        score = divergences(model, teacher, cfg.divergence)
        return make_scored(model, cfg.loss, score, extra=cfg.auxiliary)
    return make_objective(model, cfg.loss, extra=cfg.auxiliary)


def make_scored(
    cfg: settings.Decoder, loss: Loss, score: Score, *, extra: settings.Auxiliary
) -> Objective:
    """As `make_objective`, of a loss on what `score` says of each token. `numbers` go to it."""

    def objective(params: Params, batch: Batch, numbers: Numbers) -> tuple[jax.Array, Metrics]:
        out = auxiliary.run_batch(cfg, params, batch)
        value, metrics = loss(score(params, out, batch, **numbers), batch)
        more, found = auxiliary.added(cfg, extra, params, batch, out)
        return value + more, {"loss": value, **metrics, **found}

    return objective


def head_scores(cfg: settings.Decoder, head: settings.Head) -> Score:
    """What a head says after each token."""
    return lambda params, out, batch: head.score(cfg, params, out.hidden, batch)


def divergences(
    cfg: settings.Decoder, teacher_cfg: settings.Decoder, divergence: Callable[..., Any]
) -> Score:
    """How far the model's distribution is from the teacher's, where each token was to be chosen.

    The logits of a batch are never stored: as in `token_logp`, backward computes them again.
    """

    def logits(states: Float[Array, "B t D"], head: Float[Array, "V D"]) -> Float[Array, "B t V"]:
        head = head.astype(states.dtype)
        return jnp.einsum("btd,vd->btv", states, head, preferred_element_type=jnp.float32)

    def score(
        params: Params, out: decoder.Outputs, batch: Batch, *, teacher: Params
    ) -> Float[Array, "B T"]:
        own, theirs = decoder.head(cfg, params), decoder.head(teacher_cfg, teacher)
        known = jax.lax.stop_gradient(states_before(teacher_cfg, teacher, batch))
        return in_pieces(
            lambda mine, known: divergence(logits(mine, own), logits(known, theirs)),
            shifted(out.hidden, batch),
            known,
            logits=2 * batch.tokens.size * own.shape[0],
        )

    return score
