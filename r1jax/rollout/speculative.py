"""The token loop in which the model drafts for itself: a step gives one token or two.

At each step a slot draws its next token, the first prediction module guesses the one after, and the
model runs over both. If its own logits agree with the guess, two tokens are done for one reading
of the weights. Slots advance by different numbers of tokens, so each has a cache of its own length,
where token t of the sequence lies in column t; a guess that was wrong is written over.

Source: DeepSeek-V3, arXiv:2412.19437, section 5.4.3.
"""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from r1jax import settings
from r1jax.kernels.logprob import log_softmax
from r1jax.models import decoder, moe
from r1jax.rollout import cache as caching
from r1jax.rollout.sampling import DRAFTS, answer_keys, make_sampler
from r1jax.types import Limits, Params, Prompts, Rollout


class Slots(struct.PyTreeNode, kw_only=True):
    """What each slot is doing. `item` is its answer's number in the queue; -1: none."""

    item: Int[Array, " S"]
    key: Key[Array, " S"]
    prompt_length: Int[Array, " S"]
    count: Int[Array, " S"]  # tokens of the answer so far
    last: Int[Array, " S"]  # the last token
    hidden: Float[Array, "S 2 D"]  # after the token before the last, after the last
    given: Int[Array, " S"]  # the next token where a check has drawn it; -1: not yet
    tokens: Int[Array, "S A"]
    logp: Float[Array, "S A"]
    choice: Int[Array, "S A E k"] | None


class Loop(struct.PyTreeNode, kw_only=True):
    """All that the token loop carries. The last cache is the prediction module's."""

    step: Int[Array, ""]
    slot_steps: Int[Array, ""]
    drafted: Int[Array, ""]
    accepted: Int[Array, ""]
    next_item: Int[Array, ""]
    slots: Slots
    caches: list[caching.Arrays]
    answer: Int[Array, "B A"]
    answer_length: Int[Array, " B"]
    finished: Bool[Array, " B"]
    logp: Float[Array, "B A"]
    choice: Int[Array, "B A E k"] | None


def make_run(
    cfg: settings.Decoder, engine: settings.Engine, *, group: int, stop: tuple[int, ...]
) -> Callable[[Params, Prompts, jax.Array, Limits, int], Rollout]:
    """The function (params, prompts, key, limits, slots) -> Rollout of `make_engine`, with drafts.

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
        keys = answer_keys(key, prompts.index, group)
        total = jnp.sum(prompts.length > 0) * group
        stored = caching.prefill(
            cfg,
            params,
            prompts,
            chunk=engine.prefill_chunk,
            choices=engine.keep_routing,
            ahead=True,
        )
        advance = make_advance(cfg, engine, params, limits, stop)

        def body(loop: Loop) -> Loop:
            loop, done, stopped = advance(loop)
            with jax.named_scope("refill"):
                return refill(loop, done, stopped, stored, keys, prompts, total)

        loop = empty_loop(cfg, engine, prompts, keys, slots)
        everyone = jnp.ones(loop.slots.item.shape, bool)
        loop = refill(loop, everyone, ~everyone, stored, keys, prompts, total)
        loop = jax.lax.while_loop(lambda loop: jnp.any(loop.slots.item >= 0), body, loop)
        size = prompts.tokens.shape[0] * group
        return Rollout(
            prompt=prompts.tokens,
            prompt_length=prompts.length,
            answer=loop.answer[:size],
            answer_length=loop.answer_length[:size],
            finished=loop.finished[:size],
            logp_rollout=loop.logp[:size],
            decode_steps=loop.step,
            slot_steps=loop.slot_steps,
            drafted=loop.drafted,
            accepted=loop.accepted,
            prompt_choice=stored.choice,
            answer_choice=None if loop.choice is None else loop.choice[:size],
        )

    return run


def make_advance(
    cfg: settings.Decoder,
    engine: settings.Engine,
    params: Params,
    limits: Limits,
    stop: tuple[int, ...],
) -> Callable[[Loop], tuple[Loop, jax.Array, jax.Array]]:
    """The function loop -> (loop, whose answer is done, whose ended by itself): one step."""
    greedy = engine.sampling.temperature == 0
    # Logits come divided: at 1, drawing leaves them as they are.
    sampling = engine.sampling if greedy else replace(engine.sampling, temperature=1.0)
    sampler, draft = make_sampler(sampling), DRAFTS[engine.draft](sampling)
    temperature = 1.0 if greedy else limits.temperature
    unstacked, head = decoder.unstack(cfg, params), decoder.head(cfg, params)
    mixers = [*(group.mixer for group, _ in unstacked), cfg.groups[-1].mixer]

    def logits_of(hidden: Float[Array, "S D"]) -> Float[Array, "S V"]:
        logits = jnp.einsum("vd,bd->vb", head, hidden, preferred_element_type=jnp.float32)
        return logits.T / temperature  # this way round for CPUs: see layers.linear

    def logp_of(logits: Float[Array, "S V"], token: Int[Array, " S"]) -> Float[Array, " S"]:
        every = log_softmax(logits, sums=decoder.sums(cfg))
        return jnp.take_along_axis(every, token[:, None], axis=-1)[:, 0]

    def ends(token: Int[Array, " S"]) -> Bool[Array, " S"]:
        found = jnp.zeros(token.shape, bool)
        for end in stop:
            found |= token == end
        return found

    def attends(loop: Loop, position: Int[Array, "S 2"], which: slice) -> list[decoder.Attend]:
        return [
            caching.extend(cfg, mixer, cache, position)
            for mixer, cache in zip(mixers[which], loop.caches[which], strict=True)
        ]

    def advance(loop: Loop) -> tuple[Loop, jax.Array, jax.Array]:
        slots = loop.slots
        keys, next_keys = (
            jax.vmap(jax.random.fold_in)(slots.key, slots.count + i) for i in range(2)
        )
        place = slots.prompt_length + slots.count  # of the token that is drawn now
        with jax.named_scope("sample"):
            logits = logits_of(slots.hidden[:, 1])
            token = jnp.where(slots.given < 0, sampler(logits, keys), slots.given)
            logp = logp_of(logits, token)
        with jax.named_scope("draft"):
            # Of the two columns the first is new only where a draft was accepted before.
            known = jnp.stack([slots.last, token], axis=1)
            position = place[:, None] + jnp.asarray([[-2, -1]])
            (attend,) = attends(loop, position, slice(-1, None))
            state, ahead = caching.look_ahead(cfg, params, slots.hidden, known, position, attend)
            guess = logits_of(state[:, 1])
            drafted = draft.propose(guess, next_keys)
        with jax.named_scope("decode"):
            pair = jnp.stack([token, drafted], axis=1)
            position = place[:, None] + jnp.asarray([[0, 1]])
            layers = attends(loop, position, slice(0, -1))
            out = decoder.decode_step(cfg, params, unstacked, pair, position, layers)
        with jax.named_scope("check"):
            logits = logits_of(out.hidden[:, 0])
            second = draft.check(logits, guess, drafted, next_keys)
            room = ~ends(token) & (slots.count + 1 < limits.max_new) & (slots.item >= 0)
            both = room & (second == drafted)
        stopped = ends(jnp.where(both, drafted, token))
        written = slots.replace(
            count=slots.count + 1 + both.astype(jnp.int32),
            last=jnp.where(both, drafted, token),
            hidden=jnp.where(
                both[:, None, None],
                out.hidden,
                jnp.stack([slots.hidden[:, 1], out.hidden[:, 0]], axis=1),
            ),
            given=jnp.where(both, -1, second),
            tokens=_write(slots.tokens, pair, slots.count),
            logp=_write(slots.logp, jnp.stack([logp, logp_of(logits, drafted)], 1), slots.count),
        )
        if slots.choice is not None:
            taken = moe.record([r.choice for r in out.routing if r is not None])
            written = written.replace(choice=_write(slots.choice, taken, slots.count))
        loop = loop.replace(
            step=loop.step + 1,
            slot_steps=loop.slot_steps + slots.item.shape[0],
            drafted=loop.drafted + jnp.sum(room),
            accepted=loop.accepted + jnp.sum(both),
            slots=written,
            caches=[*out.cache, ahead],
        )
        done = (stopped | (written.count >= limits.max_new)) & (slots.item >= 0)
        return loop, done, stopped

    return advance


def empty_loop(
    cfg: settings.Decoder,
    engine: settings.Engine,
    prompts: Prompts,
    keys: Key[Array, " B"],
    slots: int,
) -> Loop:
    """The loop's state before the first slot is filled. One answer row more than is asked for
    takes what slots without an answer hand out."""
    total, slots = keys.shape[0], min(slots, keys.shape[0])
    width = prompts.tokens.shape[1] + engine.max_new + 1  # a last guess is written too
    mixers = [group.mixer for group in cfg.groups for _ in range(group.count)]
    shape = moe.record_shape(cfg) if engine.keep_routing else None

    def choices(rows: int) -> jax.Array | None:
        return None if shape is None else jnp.zeros((rows, engine.max_new, *shape), jnp.int16)

    none, zero = jnp.zeros((slots,), jnp.int32), jnp.int32(0)
    return Loop(
        step=zero,
        slot_steps=zero,
        drafted=zero,
        accepted=zero,
        next_item=zero,
        slots=Slots(
            item=none - 1,
            key=jnp.broadcast_to(keys[0], (slots,)),
            prompt_length=none,
            count=none,
            last=none,
            hidden=jnp.zeros((slots, 2, cfg.dim), jnp.dtype(cfg.dtype)),
            given=none - 1,
            tokens=jnp.zeros((slots, engine.max_new), jnp.int32),
            logp=jnp.zeros((slots, engine.max_new), jnp.float32),
            choice=choices(slots),
        ),
        caches=[
            caching.empty(cfg, mixer, slots, width) for mixer in (*mixers, cfg.groups[-1].mixer)
        ],
        answer=jnp.zeros((total + 1, engine.max_new), jnp.int32),
        answer_length=jnp.zeros((total + 1,), jnp.int32),
        finished=jnp.zeros((total + 1,), bool),
        logp=jnp.zeros((total + 1, engine.max_new), jnp.float32),
        choice=choices(total + 1),
    )


def refill(
    loop: Loop,
    pending: Bool[Array, " S"],
    stopped: Bool[Array, " S"],
    stored: caching.Prefilled,
    keys: Key[Array, " B"],
    prompts: Prompts,
    total: Int[Array, ""],
) -> Loop:
    """Slots that are `pending` hand out their answers and take the next of the queue's `total`.

    One slot per turn of an inner loop, so the work is per answer and not per token.
    """
    group = keys.shape[0] // prompts.tokens.shape[0]
    assert stored.ahead is not None
    sources = [*stored.caches, stored.ahead]

    def turn(carry: tuple[Loop, jax.Array]) -> tuple[Loop, jax.Array]:
        loop, pending = carry
        slots, s = loop.slots, jnp.argmax(pending)
        item, count = slots.item[s], slots.count[s]
        row = jnp.where(item >= 0, item, keys.shape[0])
        own = jnp.arange(loop.answer.shape[1]) < count
        new = jnp.minimum(loop.next_item, keys.shape[0] - 1)  # when there is none: not used
        prompt = new // group
        length = prompts.length[prompt]
        handed = loop.replace(
            next_item=loop.next_item + 1,
            caches=[
                tuple(map(lambda to, x: _place(to, x[prompt], s), cache, source))
                for cache, source in zip(loop.caches, sources, strict=True)
            ],
            answer=loop.answer.at[row].set(jnp.where(own, slots.tokens[s], 0)),
            answer_length=loop.answer_length.at[row].set(count),
            finished=loop.finished.at[row].set(stopped[s]),
            logp=loop.logp.at[row].set(jnp.where(own, slots.logp[s], 0.0)),
        )
        if loop.choice is not None and slots.choice is not None:
            taken = jnp.where(own[:, None, None], slots.choice[s], 0)
            handed = handed.replace(choice=loop.choice.at[row].set(taken))
        begun = slots.replace(
            item=slots.item.at[s].set(jnp.where(loop.next_item < total, new, -1)),
            key=slots.key.at[s].set(keys[new]),
            prompt_length=slots.prompt_length.at[s].set(length),
            count=slots.count.at[s].set(0),
            last=slots.last.at[s].set(prompts.tokens[prompt, length - 1]),
            hidden=slots.hidden.at[s].set(stored.hidden[prompt]),
            given=slots.given.at[s].set(-1),
        )
        return handed.replace(slots=begun), pending.at[s].set(False)

    loop, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), turn, (loop, pending))
    return loop


def _write(array: jax.Array, pair: jax.Array, start: Int[Array, " S"]) -> jax.Array:
    """Two values to each slot's row from `start` on; what lies beyond its end is left out."""
    rows = jnp.arange(array.shape[0])[:, None]
    return array.at[rows, start[:, None] + jnp.arange(2)[None]].set(pair, mode="drop")


def _place(cache: jax.Array, prompt: jax.Array, slot: Int[Array, ""]) -> jax.Array:
    """A slot's cache beginning with the prompt's columns; those after them hold anything."""
    start = (slot, *(jnp.int32(0),) * prompt.ndim)
    return jax.lax.dynamic_update_slice(cache, prompt[None], start)
