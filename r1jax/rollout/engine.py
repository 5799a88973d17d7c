"""Continuous batching in one compiled program.

A fixed number of slots decode side by side in a `lax.while_loop`. Prompts are prefilled once, by a
scan over layers, and shared by their answers. A slot whose answer ends hands it out and takes the
next (prompt, sample) of the queue, inside the loop.

Cached keys and values of generated tokens lie in a ring: at step t every slot writes column
t mod C, whatever its own length, so the write is one slice and no scatter; a slot sees the columns
written since its answer began. The ring is cut into chunks, each as long as all before it, and
until the first lap is over only the chunks that hold something are read.

When the queue is empty and half of the slots are idle, the others move together and the loop goes
on with half as many, again and again: the last long answers do not pay for the slots of the short
ones.

Where a mesh splits the batch, each device has a queue, slots and a loop of its own.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from r1jax import settings
from r1jax.kernels.logprob import log_softmax
from r1jax.kernels.sums import as_dtype
from r1jax.models import decoder, moe
from r1jax.rollout import cache as caching
from r1jax.rollout import speculative
from r1jax.rollout.sampling import answer_keys, make_sampler
from r1jax.sharding import RULES
from r1jax.types import Limits, Params, Prompts, Rollout

CHUNK = 64  # columns of the ring's first chunk
FEWER = 2  # as the queue drains, the loop goes on with this part of the slots; one more to compile
FEW = 8  # slots at the least: with 4, XLA's CPU attention rounds in another order
MANY = 64  # slots from which on a CPU is as fast with weights as they are: see layers.linear

Generate = Callable[..., Rollout]


class LayerCache(struct.PyTreeNode, kw_only=True):
    """One layer's cache for each slot (`r1jax.rollout.cache`): the prompt's, and each chunk's."""

    prompt: caching.Arrays
    ring: tuple[caching.Arrays, ...]


class Slots(struct.PyTreeNode, kw_only=True):
    """What each slot is doing. `item` is its answer's number in the queue; -1: none."""

    item: Int[Array, " S"]
    key: Key[Array, " S"]
    prompt_length: Int[Array, " S"]
    count: Int[Array, " S"]  # tokens sampled so far
    hidden: Float[Array, "S D"]  # state from which the next token is drawn
    tokens: Int[Array, "S C"]  # rings, columns as in the cache
    logp: Float[Array, "S C"]
    choice: Int[Array, "S C E k"] | None  # experts that the tokens took


class Loop(struct.PyTreeNode, kw_only=True):
    """All that the token loop carries."""

    step: Int[Array, ""]
    slot_steps: Int[Array, ""]
    next_item: Int[Array, ""]
    slots: Slots
    caches: list[LayerCache]
    answer: Int[Array, "B A"]
    answer_length: Int[Array, " B"]
    finished: Bool[Array, " B"]
    logp: Float[Array, "B A"]
    choice: Int[Array, "B A E k"] | None


def make_engine(
    cfg: settings.Decoder, engine: settings.Engine, *, group: int, stop: tuple[int, ...]
) -> Generate:
    """The function (params, prompts, key, limits) -> Rollout with `group` answers to each prompt.

    An answer ends with a token of `stop` or after `engine.max_new` tokens; with `limits`, which may
    be left out, their temperature and number of tokens hold instead. Its tokens depend on
    (params, its prompt, key, prompts.index, its number in the group) and on nothing else that is
    in flight. Log-probabilities are of the whole distribution at the sampling temperature (1 when
    greedy), before top-k and top-p. With `engine.draft` the loop is that of `speculative`. To be
    jitted by the caller; shapes are all static.
    """
    greedy = engine.sampling.temperature == 0
    # Logits come divided: at 1, drawing leaves them as they are.
    sampler = make_sampler(engine.sampling if greedy else replace(engine.sampling, temperature=1.0))
    own = Limits(
        temperature=np.float32(engine.sampling.temperature), max_new=np.int32(engine.max_new)
    )

    def generate(
        params: Params, prompts: Prompts, key: Key[Array, ""], limits: Limits = own
    ) -> Rollout:
        params = decoder.compute_weights(cfg, params)
        return over_devices(compute, params, prompts, key, limits, slots=engine.slots)

    def run(
        params: Params, prompts: Prompts, key: Key[Array, ""], limits: Limits, slots: int
    ) -> Rollout:
        temperature = 1.0 if greedy else limits.temperature
        keys = answer_keys(key, prompts.index, group)
        total = jnp.sum(prompts.length > 0) * group
        stored = caching.prefill(
            cfg, params, prompts, chunk=engine.prefill_chunk, choices=engine.keep_routing
        )
        loop = empty_loop(cfg, engine, prompts, keys, slots)
        weights = decoder.unstack(cfg, params)
        weights_for_few = weights
        if jax.default_backend() == "cpu":
            weights_for_few = decoder.unstack(cfg, params, turn=True)
        head = decoder.head(cfg, params)

        def sample(slots: Slots) -> tuple[Int[Array, " S"], Float[Array, " S"]]:
            logits = jnp.einsum("vd,bd->vb", head, slots.hidden, preferred_element_type=jnp.float32)
            logits = logits.T / temperature  # this way round for CPUs: see layers.linear
            step_keys = jax.vmap(jax.random.fold_in)(slots.key, slots.count)
            token = sampler(logits, step_keys)
            logp = log_softmax(logits, sums=decoder.sums(cfg))
            return token, jnp.take_along_axis(logp, token[:, None], axis=-1)[:, 0]

        def body(loop: Loop) -> Loop:
            with jax.named_scope("sample"):
                token, logp = sample(loop.slots)
            column = loop.step % loop.slots.tokens.shape[1]
            slots = loop.slots.replace(
                count=loop.slots.count + 1,
                tokens=_write_column(loop.slots.tokens, token, column),
                logp=_write_column(loop.slots.logp, logp, column),
            )
            stopped = jnp.zeros_like(token, dtype=bool)
            for end in stop:
                stopped |= token == end
            done = (stopped | (slots.count >= limits.max_new)) & (slots.item >= 0)
            with jax.named_scope("decode"):
                unstacked = weights_for_few if len(token) < MANY else weights
                out = _decode(cfg, params, unstacked, loop.replace(slots=slots), token, column)
            slots = slots.replace(hidden=out.hidden)
            if slots.choice is not None:
                taken = moe.record([r.choice for r in out.routing if r is not None])
                slots = slots.replace(choice=_write_column(slots.choice, taken, column))
            loop = loop.replace(slots=slots, caches=out.cache)
            with jax.named_scope("refill"):
                loop = refill(loop, done, stopped, stored, keys, prompts, total)
            return loop.replace(
                step=loop.step + 1, slot_steps=loop.slot_steps + loop.slots.item.shape[0]
            )

        everyone = jnp.ones(loop.slots.item.shape, bool)
        loop = refill(loop, everyone, ~everyone, stored, keys, prompts, total)
        sizes = slot_counts(loop.slots.item.shape[0])
        for enough in (*sizes[1:], 0):
            loop = jax.lax.while_loop(
                lambda loop, n=enough: jnp.sum(loop.slots.item >= 0) > n, body, loop
            )
            if enough:
                loop = keep_busy(loop, enough)
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
            prompt_choice=stored.choice,
            answer_choice=None if loop.choice is None else loop.choice[:size],
        )

    if engine.keep_routing:
        moe.record_shape(cfg)  # refuses a model without experts
    compute = run
    if engine.draft != "none":
        compute = speculative.make_run(cfg, engine, group=group, stop=stop)
    return generate


def over_devices(
    run: Callable[[Params, Prompts, jax.Array, Limits, int], Rollout],
    params: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    limits: Limits,
    *,
    slots: int,
) -> Rollout:
    """`run` on each device's share of the prompts and slots, by the mesh that is set.

    Devices that split the batch do not wait for each other at a token, and each needs the weights
    whole, but for what `tensor` splits. Prompts are filled up with empty ones to a multiple of the
    devices, and the rollout has their answers too; `decode_steps` and `slot_steps` are one for each
    device: `to_host` puts it right, as a collective here would make devices wait.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in RULES["batch"] if mesh.shape.get(axis, 1) > 1)
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if parts == 1:
        return run(params, prompts, key, limits, slots)
    missing = -prompts.tokens.shape[0] % parts
    prompts = jax.tree.map(
        lambda x: jnp.pad(x, ((0, missing),) + ((0, 0),) * (x.ndim - 1)), prompts
    )

    def share(params: Params, prompts: Prompts, key: Key[Array, ""], limits: Limits) -> Rollout:
        rollout = run(params, prompts, key, limits, -(-slots // parts))
        return jax.tree.map(lambda x: x if x.ndim else x[None], rollout)

    split = PartitionSpec(axes)
    return jax.shard_map(
        share,
        in_specs=(PartitionSpec(), split, PartitionSpec(), PartitionSpec()),
        out_specs=split,
        axis_names=set(axes),
        check_vma=False,
    )(params, prompts, key, limits)


def slot_counts(slots: int) -> list[int]:
    """With how many slots the loop goes on as the queue drains: half as many each time."""
    counts = [slots]
    while counts[-1] // FEWER >= FEW:
        counts.append(counts[-1] // FEWER)
    return counts


def chunk_sizes(size: int) -> list[int]:
    """How a ring of `size` columns is cut: CHUNK columns, then as many as all before, and so on.

    Few chunks, as each number of them is compiled apart, and no more than twice what is needed is
    ever read.
    """
    sizes = [min(CHUNK, size)]
    while (total := sum(sizes)) < size:
        sizes.append(min(total, size - total))
    return sizes


def empty_loop(
    cfg: settings.Decoder,
    engine: settings.Engine,
    prompts: Prompts,
    keys: Key[Array, " B"],
    slots: int,
) -> Loop:
    """The loop's state before the first slot is filled. One answer row more than is asked for
    takes what slots without an answer hand out."""
    total = keys.shape[0]
    slots = min(slots, total)
    chunks = chunk_sizes(engine.max_new)
    width = prompts.tokens.shape[1]
    caches = [
        LayerCache(
            prompt=caching.empty(cfg, block.mixer, slots, width, wide=True),
            ring=tuple(caching.empty(cfg, block.mixer, slots, c, wide=True) for c in chunks),
        )
        for block in cfg.groups
        for _ in range(block.count)
    ]
    shape = moe.record_shape(cfg) if engine.keep_routing else None

    def choices(rows: int) -> jax.Array | None:
        return None if shape is None else jnp.zeros((rows, engine.max_new, *shape), jnp.int16)

    none = jnp.zeros((slots,), jnp.int32)
    return Loop(
        step=jnp.int32(0),
        slot_steps=jnp.int32(0),
        next_item=jnp.int32(0),
        slots=Slots(
            item=none - 1,
            key=jnp.broadcast_to(keys[0], (slots,)),
            prompt_length=none,
            count=none,
            hidden=jnp.zeros((slots, cfg.dim), jnp.dtype(cfg.dtype)),
            tokens=jnp.zeros((slots, engine.max_new), jnp.int32),
            logp=jnp.zeros((slots, engine.max_new), jnp.float32),
            choice=choices(slots),
        ),
        caches=caches,
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
    width = loop.answer.shape[1]

    def turn(carry: tuple[Loop, jax.Array]) -> tuple[Loop, jax.Array]:
        loop, pending = carry
        slots, s = loop.slots, jnp.argmax(pending)
        item, count = slots.item[s], slots.count[s]
        row = jnp.where(item >= 0, item, keys.shape[0])
        index = jnp.arange(width)
        columns = (loop.step - count + 1 + index) % slots.tokens.shape[1]
        own = index < count
        answer = jnp.where(own, slots.tokens[s, columns], 0)
        logp = jnp.where(own, slots.logp[s, columns], 0.0)

        new = jnp.minimum(loop.next_item, keys.shape[0] - 1)  # when there is none: not used
        prompt = new // group
        caches = [
            cache.replace(
                prompt=tuple(
                    _write_slot(array, x[prompt], s)
                    for array, x in zip(cache.prompt, kept, strict=True)
                )
            )
            for cache, kept in zip(loop.caches, stored.caches, strict=True)
        ]
        slots = slots.replace(
            item=slots.item.at[s].set(jnp.where(loop.next_item < total, new, -1)),
            key=slots.key.at[s].set(keys[new]),
            prompt_length=slots.prompt_length.at[s].set(prompts.length[prompt]),
            count=slots.count.at[s].set(0),
            hidden=slots.hidden.at[s].set(stored.hidden[prompt, 1]),
        )
        loop = loop.replace(
            next_item=loop.next_item + 1,
            slots=slots,
            caches=caches,
            answer=loop.answer.at[row].set(answer),
            answer_length=loop.answer_length.at[row].set(count),
            finished=loop.finished.at[row].set(stopped[s]),
            logp=loop.logp.at[row].set(logp),
        )
        if loop.choice is not None and slots.choice is not None:
            taken = jnp.where(own[:, None, None], slots.choice[s, columns], 0)
            loop = loop.replace(choice=loop.choice.at[row].set(taken))
        return loop, pending.at[s].set(False)

    loop, _ = jax.lax.while_loop(lambda carry: jnp.any(carry[1]), turn, (loop, pending))
    return loop


def keep_busy(loop: Loop, count: int) -> Loop:
    """The loop with its first `count` slots of those that are busy, in their order."""
    kept = jnp.argsort(loop.slots.item < 0, stable=True)[:count]
    take = partial(jax.tree.map, lambda x: x.at[kept].get())
    return loop.replace(slots=take(loop.slots), caches=take(loop.caches))


def _write_slot(cache: jax.Array, value: jax.Array, slot: Int[Array, ""]) -> jax.Array:
    value = as_dtype(value, cache.dtype)
    return jax.lax.dynamic_update_index_in_dim(cache, value, slot, axis=0)


def _write_column(ring: jax.Array, value: jax.Array, column: Int[Array, ""]) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(ring, value[:, None], column, axis=1)


def _decode(
    cfg: settings.Decoder,
    params: Params,
    unstacked: list[tuple[settings.Group, Params]],
    loop: Loop,
    token: Int[Array, " S"],
    column: Int[Array, ""],
) -> decoder.Decoded:
    """Runs the token through the model and keeps what it leaves behind at `column` of the ring."""
    slots, size = loop.slots, loop.slots.tokens.shape[1]
    width = caching.num_columns(unstacked[0][0].mixer, loop.caches[0].prompt)
    chunks = chunk_sizes(size)
    ends = np.cumsum(chunks)
    starts = ends - chunks
    age = (column - jnp.arange(size)) % size
    visible = jnp.concatenate(
        [
            jnp.arange(width)[None] < slots.prompt_length[:, None],
            age[None] < slots.count[:, None],
        ],
        axis=1,
    )
    full = jnp.sum(jnp.minimum(loop.step, size - 1) >= ends[:-1])  # chunks to read, less one
    full = full.astype(jnp.int32)

    def attend_with(mixer: caching.Mixer, cache: LayerCache) -> decoder.Attend:
        dims = caching.kind(mixer).columns

        def attend(q: jax.Array, *new: jax.Array) -> tuple[jax.Array, LayerCache]:
            ring = tuple(
                tuple(
                    _write_chunk(array, jnp.expand_dims(x, dim), column - start, dim=dim)
                    for array, x, dim in zip(piece, new, dims, strict=True)
                )
                for piece, start in zip(cache.ring, starts, strict=True)
            )
            written = cache.replace(ring=ring)

            def read(count: int, q: jax.Array, cache: LayerCache) -> jax.Array:
                seen = visible[:, : width + ends[count - 1]]
                return caching.read(cfg, mixer, q, [cache.prompt, *cache.ring[:count]], seen)

            branches = [lambda q, cache, n=n: read(n + 1, q, cache) for n in range(len(chunks))]
            return jax.lax.switch(full, branches, q, written), written

        return attend

    attends = [
        attend_with(group.mixer, cache)
        for (group, _), cache in zip(unstacked, loop.caches, strict=True)
    ]
    position = slots.prompt_length + slots.count - 1
    return decoder.decode_step(cfg, params, unstacked, token, position, attends)


def _write_chunk(ring: jax.Array, value: jax.Array, at: jax.Array, *, dim: int) -> jax.Array:
    """`value` at `at` along `dim` if the chunk has that place. Otherwise what is there is written
    again: a conditional write would copy the chunk."""
    size = ring.shape[dim]
    place = jnp.clip(at, 0, size - 1)
    old = jax.lax.dynamic_slice_in_dim(ring, place, 1, axis=dim)
    new = jax.lax.select(at == place, as_dtype(value, ring.dtype), old)
    return jax.lax.dynamic_update_slice_in_dim(ring, new, place, axis=dim)
