"""The token loop in which the model drafts for itself: a step gives one token or two.

At each step a slot draws its next token, the first prediction module guesses the one after, and the
model runs over both. If its own logits agree with the guess, two tokens are done for one reading
of the weights. Slots advance by different numbers of tokens, so each has a cache of its own length,
where token t of the sequence lies in column t; a guess that was wrong is written over.

Source: DeepSeek-V3, arXiv:2412.19437, section 5.4.3.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from r1jax import settings
from r1jax.models import decoder, moe
from r1jax.rollout import cache as caching
from r1jax.rollout.sampling import (
    DRAFTS,
    chosen_logp,
    is_one_of,
    make_sampler,
    next_logits,
    of_divided,
)
from r1jax.rollout.slots import (
    Advance,
    Queue,
    Run,
    Slots,
    Work,
    as_rollout,
    drain,
    empty_slots,
    next_answer,
    one_by_one,
    prepare,
)
from r1jax.types import Limits, Params, Prompts, Rollout


class Loop(struct.PyTreeNode, kw_only=True):
    """All that the token loop carries. The last cache is the prediction module's."""

    step: Int[Array, ""]
    slot_steps: Int[Array, ""]
    drafted: Int[Array, ""]
    accepted: Int[Array, ""]
    slots: Slots
    last: Int[Array, " S"]  # each slot's last token
    hidden: Float[Array, "S 2 D"]  # after the token before the last, after the last
    given: Int[Array, " S"]  # the next token where a check has drawn it; -1: not yet
    caches: list[caching.Arrays]
    queue: Queue


def make_run(
    cfg: settings.Decoder, engine: settings.Engine, *, group: int, stop: tuple[int, ...]
) -> Run:
    """The function (params, prompts, key, limits, slots) -> Rollout, with drafts.

    `decode_steps` counts runs over the model; `drafted` and `accepted` the drafts that an answer
    had room for, and those that became its tokens.

    Raises:
      ValueError: the model has no prediction module.
    """
    if not cfg.num_mtp:
        raise ValueError(
            f"engine.draft {engine.draft!r} needs a prediction module, the model has num_mtp=0"
        )

    def run(
        params: Params, prompts: Prompts, key: Key[Array, ""], limits: Limits, slots: int
    ) -> Rollout:
        work = prepare(cfg, engine, params, prompts, key, group=group, ahead=True)
        loop = drain(
            empty_loop(cfg, engine, work, slots),
            make_advance(cfg, engine, params, limits, stop),
            refill,
            work,
            together="expert" if moe.are_spread(cfg, params) else None,
        )
        return as_rollout(
            work,
            loop.queue,
            decode_steps=loop.step,
            slot_steps=loop.slot_steps,
            drafted=loop.drafted,
            accepted=loop.accepted,
        )

    return run


def make_advance(
    cfg: settings.Decoder,
    engine: settings.Engine,
    params: Params,
    limits: Limits,
    stop: tuple[int, ...],
) -> Advance[Loop]:
    """The function loop -> (loop, whose answer is done, whose ended by itself): one step."""
    sampling = of_divided(engine.sampling)
    sampler, draft = make_sampler(sampling), DRAFTS[engine.draft](sampling)
    logits_of = partial(next_logits, engine.sampling, limits, decoder.head(cfg, params))
    logp_of = partial(chosen_logp, sums=decoder.sums(cfg))
    unstacked = decoder.unstack(cfg, params)

    def advance(loop: Loop) -> tuple[Loop, jax.Array, jax.Array]:
        slots = loop.slots
        keys, next_keys = (
            jax.vmap(jax.random.fold_in)(slots.key, slots.count + i) for i in range(2)
        )
        with jax.named_scope("sample"):
            logits = logits_of(loop.hidden[:, 1])
            token = jnp.where(loop.given < 0, sampler(logits, keys), loop.given)
            logp = logp_of(logits, token)
        with jax.named_scope("draft"):
            state, ahead = _look_ahead(cfg, params, loop, token)
            guess = logits_of(state)
            drafted = draft.propose(guess, next_keys)
        with jax.named_scope("decode"):
            pair = jnp.stack([token, drafted], axis=1)
            out = _decode_pair(cfg, params, unstacked, loop, pair)
        with jax.named_scope("check"):
            logits = logits_of(out.hidden[:, 0])
            second = draft.check(logits, guess, drafted, next_keys)
            room = ~is_one_of(token, stop) & (slots.count + 1 < limits.max_new) & (slots.item >= 0)
            both = room & (second == drafted)
        logps = jnp.stack([logp, logp_of(logits, drafted)], axis=1)
        loop = loop.replace(
            step=loop.step + 1,
            slot_steps=loop.slot_steps + len(token),
            drafted=loop.drafted + jnp.sum(room),
            accepted=loop.accepted + jnp.sum(both),
            slots=_keep(slots, pair, logps, both, out.routing),
            last=jnp.where(both, drafted, token),
            hidden=jnp.where(
                both[:, None, None],
                out.hidden,
                jnp.stack([loop.hidden[:, 1], out.hidden[:, 0]], axis=1),
            ),
            given=jnp.where(both, -1, second),
            caches=[*out.cache, ahead],
        )
        stopped = is_one_of(loop.last, stop)
        done = (stopped | (loop.slots.count >= limits.max_new)) & (slots.item >= 0)
        return loop, done, stopped

    return advance


def _look_ahead(
    cfg: settings.Decoder, params: Params, loop: Loop, token: Int[Array, " S"]
) -> tuple[Float[Array, "S D"], caching.Arrays]:
    """The prediction module's state after the token that is drawn now, and its cache.

    Of the two columns that are written the first is new only where a draft was accepted before.
    """
    place = loop.slots.prompt_length + loop.slots.count
    position = place[:, None] + jnp.asarray([[-2, -1]])
    attend = caching.extend(cfg, cfg.groups[-1].mixer, loop.caches[-1], position)
    known = jnp.stack([loop.last, token], axis=1)
    state, cache = caching.look_ahead(cfg, params, loop.hidden, known, position, attend)
    return state[:, 1], cache


def _decode_pair(
    cfg: settings.Decoder,
    params: Params,
    unstacked: list[tuple[settings.Group, Params]],
    loop: Loop,
    pair: Int[Array, "S 2"],
) -> decoder.Decoded:
    """Runs the token that is drawn now, and the one drafted after it, through the model."""
    place = loop.slots.prompt_length + loop.slots.count
    position = place[:, None] + jnp.asarray([[0, 1]])
    attends = [
        caching.extend(cfg, group.mixer, cache, position)
        for (group, _), cache in zip(unstacked, loop.caches[:-1], strict=True)
    ]
    return decoder.decode_step(cfg, params, unstacked, pair, position, attends)


def _keep(
    slots: Slots,
    pair: Int[Array, "S 2"],
    logp: Float[Array, "S 2"],
    both: Bool[Array, " S"],
    routing: list[moe.Routing | None],
) -> Slots:
    """The slots with one token more, or `both`; what lies after it is written over next."""
    kept = slots.replace(
        count=slots.count + 1 + both.astype(jnp.int32),
        tokens=_write(slots.tokens, pair, slots.count),
        logp=_write(slots.logp, logp, slots.count),
    )
    if slots.choice is None:
        return kept
    taken = moe.record([r.choice for r in routing if r is not None])
    return kept.replace(choice=_write(slots.choice, taken, slots.count))


def empty_loop(cfg: settings.Decoder, engine: settings.Engine, work: Work, slots: int) -> Loop:
    """The loop's state before the first slot is filled."""
    own, queue = empty_slots(cfg, engine, work, slots)
    count = len(own.item)
    width = work.prompts.tokens.shape[1] + engine.max_new + 1  # a last guess is written too
    mixers = [group.mixer for group in cfg.groups for _ in range(group.count)]
    none, zero = jnp.zeros((count,), jnp.int32), jnp.int32(0)
    return Loop(
        step=zero,
        slot_steps=zero,
        drafted=zero,
        accepted=zero,
        slots=own,
        last=none,
        hidden=jnp.zeros((count, 2, cfg.dim), jnp.dtype(cfg.dtype)),
        given=none - 1,
        caches=[
            caching.empty(cfg, mixer, count, width) for mixer in (*mixers, cfg.groups[-1].mixer)
        ],
        queue=queue,
    )


def refill(loop: Loop, pending: Bool[Array, " S"], stopped: Bool[Array, " S"], work: Work) -> Loop:
    """Slots that are `pending` hand out their answers and take the next of the queue."""
    assert work.stored.ahead is not None
    sources = [*work.stored.caches, work.stored.ahead]

    def turn(loop: Loop, s: Int[Array, ""]) -> Loop:
        columns = jnp.arange(loop.slots.tokens.shape[1])
        queue, slots, prompt = next_answer(loop.queue, loop.slots, s, stopped[s], columns, work)
        first = work.prompts.tokens[prompt, work.prompts.length[prompt] - 1]
        return loop.replace(
            slots=slots,
            last=loop.last.at[s].set(first),
            hidden=loop.hidden.at[s].set(work.stored.hidden[prompt]),
            given=loop.given.at[s].set(-1),
            caches=[
                tuple(map(lambda to, x: _place(to, x[prompt], s), cache, source))
                for cache, source in zip(loop.caches, sources, strict=True)
            ],
            queue=queue,
        )

    return one_by_one(turn, loop, pending)


def _write(array: jax.Array, pair: jax.Array, start: Int[Array, " S"]) -> jax.Array:
    """Two values to each slot's row from `start` on; what lies beyond its end is left out."""
    rows = jnp.arange(array.shape[0])[:, None]
    return array.at[rows, start[:, None] + jnp.arange(2)[None]].set(pair, mode="drop")


def _place(cache: jax.Array, prompt: jax.Array, slot: Int[Array, ""]) -> jax.Array:
    """A slot's cache beginning with the prompt's columns; those after them hold anything."""
    start = (slot, *(jnp.int32(0),) * prompt.ndim)
    return jax.lax.dynamic_update_slice(cache, prompt[None], start)
