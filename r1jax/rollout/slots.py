"""Slots, and the queue of answers that fills them: what both token loops share.

A fixed number of slots decode side by side, each at an answer of its own. One whose answer ends
hands it out and takes the next (prompt, sample) of the queue, inside the compiled loop.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from r1jax import settings
from r1jax.models import moe
from r1jax.rollout import cache as caching
from r1jax.rollout.sampling import answer_keys
from r1jax.types import Limits, Params, Prompts, Rollout

# (params, prompts, key, limits, slots) -> Rollout, on one device's share of the prompts
Run = Callable[[Params, Prompts, jax.Array, Limits, int], Rollout]


class Work(NamedTuple):
    """What a call is asked for. Answer i is to prompt i // (B // N)."""

    prompts: Prompts
    keys: Key[Array, " B"]
    total: Int[Array, ""]  # answers that are wanted; those to empty prompts, the last, are not
    stored: caching.Prefilled


class Slots(struct.PyTreeNode, kw_only=True):
    """What each slot is doing. `item` is its answer's number in the queue; -1: none."""

    item: Int[Array, " S"]
    key: Key[Array, " S"]
    prompt_length: Int[Array, " S"]
    count: Int[Array, " S"]  # tokens of the answer so far
    tokens: Int[Array, "S A"]
    logp: Float[Array, "S A"]
    choice: Int[Array, "S A E k"] | None  # experts that the tokens took


class Queue(struct.PyTreeNode, kw_only=True):
    """Which answer is begun next, and those that were handed out. One row more than is asked for
    takes what slots without an answer hand out."""

    next_item: Int[Array, ""]
    answer: Int[Array, "B A"]
    answer_length: Int[Array, " B"]
    finished: Bool[Array, " B"]
    logp: Float[Array, "B A"]
    choice: Int[Array, "B A E k"] | None


def prepare(
    cfg: settings.Decoder,
    engine: settings.Engine,
    params: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    *,
    group: int,
    ahead: bool = False,
) -> Work:
    """The work of `group` answers to each prompt, the prompts prefilled; `ahead` is `prefill`'s."""
    keys = answer_keys(key, prompts.index, group)
    total = jnp.sum(prompts.length > 0) * group
    stored = caching.prefill(
        cfg,
        params,
        prompts,
        chunk=engine.prefill_chunk,
        choices=engine.keep_routing,
        ahead=ahead,
    )
    return Work(prompts, keys, total, stored)


def empty_slots(
    cfg: settings.Decoder, engine: settings.Engine, work: Work, count: int
) -> tuple[Slots, Queue]:
    """So many slots without an answer, or as many as there are answers, and the whole queue."""
    total = work.keys.shape[0]
    count = min(count, total)
    shape = moe.record_shape(cfg) if engine.keep_routing else None

    def choices(rows: int) -> jax.Array | None:
        return None if shape is None else jnp.zeros((rows, engine.max_new, *shape), jnp.int16)

    none = jnp.zeros((count,), jnp.int32)
    slots = Slots(
        item=none - 1,
        key=jnp.broadcast_to(work.keys[0], (count,)),
        prompt_length=none,
        count=none,
        tokens=jnp.zeros((count, engine.max_new), jnp.int32),
        logp=jnp.zeros((count, engine.max_new), jnp.float32),
        choice=choices(count),
    )
    queue = Queue(
        next_item=jnp.int32(0),
        answer=jnp.zeros((total + 1, engine.max_new), jnp.int32),
        answer_length=jnp.zeros((total + 1,), jnp.int32),
        finished=jnp.zeros((total + 1,), bool),
        logp=jnp.zeros((total + 1, engine.max_new), jnp.float32),
        choice=choices(total + 1),
    )
    return slots, queue


@runtime_checkable
class HasSlots(Protocol):
    """What a token loop carries, whatever else is in it."""

    @property
    def slots(self) -> Slots: ...


Loop = TypeVar("Loop", bound=HasSlots)
Advance = Callable[[Loop], tuple[Loop, jax.Array, jax.Array]]  # see `make_advance` of each loop


def drain(
    loop: Loop,
    advance: Advance[Loop],
    refill: Callable[[Loop, jax.Array, jax.Array, Work], Loop],
    work: Work,
    *,
    together: str | None,
    fewer: Sequence[int] = (),
    shrink: Callable[[Loop, int], Loop] = lambda loop, count: loop,
) -> Loop:
    """The loop when all of the work is done, from one whose slots have no answer yet.

    It steps by `advance` and `refill`. Once no more than one of the numbers `fewer` of slots are
    busy, it goes on with so many, by `shrink`. Devices along the mesh axis `together` take the
    same steps: as many as the one that has most to do.
    """

    def busy(loop: Loop) -> Int[Array, ""]:
        count = jnp.sum(loop.slots.item >= 0)
        return count if together is None else jax.lax.pmax(count, together)

    def body(loop: Loop) -> Loop:
        loop, done, stopped = advance(loop)
        with jax.named_scope("refill"):
            return refill(loop, done, stopped, work)

    everyone = jnp.ones(loop.slots.item.shape, bool)
    loop = refill(loop, everyone, ~everyone, work)
    for enough in (*fewer, 0):
        loop = jax.lax.while_loop(lambda loop, n=enough: busy(loop) > n, body, loop)
        if enough:
            loop = shrink(loop, enough)
    return loop


def one_by_one(
    turn: Callable[[Loop, Int[Array, ""]], Loop], loop: Loop, pending: Bool[Array, " S"]
) -> Loop:
    """The loop after turn(loop, s) for each slot s that is `pending`.

    One slot per turn of an inner loop, so the work is per answer and not per token.
    """

    def step(carry: tuple[Loop, jax.Array]) -> tuple[Loop, jax.Array]:
        loop, pending = carry
        s = jnp.argmax(pending)
        return turn(loop, s), pending.at[s].set(False)

    return jax.lax.while_loop(lambda carry: jnp.any(carry[1]), step, (loop, pending))[0]


def next_answer(
    queue: Queue,
    slots: Slots,
    s: Int[Array, ""],
    stopped: Bool[Array, ""],
    columns: Int[Array, " A"],
    work: Work,
) -> tuple[Queue, Slots, Int[Array, ""]]:
    """Slot `s` hands out its answer and takes the next of the queue; third, to which prompt.

    The answer's tokens lie at `columns` of the slot's row, one after another; `stopped` says
    whether it ended by itself.
    """
    item, count, total = slots.item[s], slots.count[s], work.keys.shape[0]
    row = jnp.where(item >= 0, item, total)
    own = jnp.arange(queue.answer.shape[1]) < count
    new = jnp.minimum(queue.next_item, total - 1)  # when there is none: not used
    prompt = new // (total // work.prompts.tokens.shape[0])
    handed = queue.replace(
        next_item=queue.next_item + 1,
        answer=queue.answer.at[row].set(jnp.where(own, slots.tokens[s, columns], 0)),
        answer_length=queue.answer_length.at[row].set(count),
        finished=queue.finished.at[row].set(stopped),
        logp=queue.logp.at[row].set(jnp.where(own, slots.logp[s, columns], 0.0)),
    )
    if queue.choice is not None and slots.choice is not None:
        taken = jnp.where(own[:, None, None], slots.choice[s, columns], 0)
        handed = handed.replace(choice=queue.choice.at[row].set(taken))
    begun = slots.replace(
        item=slots.item.at[s].set(jnp.where(queue.next_item < work.total, new, -1)),
        key=slots.key.at[s].set(work.keys[new]),
        prompt_length=slots.prompt_length.at[s].set(work.prompts.length[prompt]),
        count=slots.count.at[s].set(0),
    )
    return handed, begun, prompt


def as_rollout(work: Work, queue: Queue, **counts: Int[Array, ""]) -> Rollout:
    """All that was handed out; `counts` are `decode_steps` and the like."""
    size = work.keys.shape[0]
    return Rollout(
        prompt=work.prompts.tokens,
        prompt_length=work.prompts.length,
        answer=queue.answer[:size],
        answer_length=queue.answer_length[:size],
        finished=queue.finished[:size],
        logp_rollout=queue.logp[:size],
        prompt_choice=work.stored.choice,
        answer_choice=None if queue.choice is None else queue.choice[:size],
        **counts,
    )
