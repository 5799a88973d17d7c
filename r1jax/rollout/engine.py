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

Where a mesh splits the batch, each device has a queue, slots and a loop of its own. Devices over
which experts are spread send each other tokens at every step, so their loops go on together.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int, Key

from r1jax import settings
from r1jax.kernels.sums import as_dtype
from r1jax.models import decoder, moe
from r1jax.rollout import cache as caching
from r1jax.rollout import speculative
from r1jax.rollout.sampling import (
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
from r1jax.sharding import RULES, Leaf, is_leaf, spec
from r1jax.types import Limits, Params, Prompts, Rollout

CHUNK = 64  # columns of the ring's first chunk
SHRINK = 2  # as the queue drains, the loop goes on with this part of the slots; one more to compile
FEWEST = 8  # slots at the least: with 4, XLA's CPU attention rounds in another order

Generate = Callable[..., Rollout]


class LayerCache(struct.PyTreeNode, kw_only=True):
    """One layer's cache for each slot (`r1jax.rollout.cache`): the prompt's, and each chunk's."""

    prompt: caching.Arrays
    ring: tuple[caching.Arrays, ...]


class Loop(struct.PyTreeNode, kw_only=True):
    """All that the token loop carries. Tokens of a slot lie in columns as in the cache's ring."""

    step: Int[Array, ""]
    slot_steps: Int[Array, ""]
    slots: Slots
    hidden: Float[Array, "S D"]  # each slot's state, from which its next token is drawn
    caches: list[LayerCache]
    queue: Queue


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

    Raises:
      ValueError: routing is to be kept of a model without experts, or a model without a prediction
        module is to draft.
    """
    if engine.keep_routing:
        moe.record_shape(cfg)  # refuses a model without experts
    make = make_run if engine.draft == "none" else speculative.make_run
    run = make(cfg, engine, group=group, stop=stop)
    own = Limits(
        temperature=np.float32(engine.sampling.temperature), max_new=np.int32(engine.max_new)
    )

    def generate(
        params: Params, prompts: Prompts, key: Key[Array, ""], limits: Limits = own
    ) -> Rollout:
        params = decoder.compute_weights(cfg, params)
        return over_devices(cfg, run, params, prompts, key, limits, slots=engine.slots)

    return generate


def over_devices(
    cfg: settings.Decoder,
    run: Run,
    params: Params,
    prompts: Prompts,
    key: Key[Array, ""],
    limits: Limits,
    *,
    slots: int,
) -> Rollout:
    """`run` on each device's share of the prompts and slots, by the mesh that is set.

    Devices that split the batch do not wait for each other at a token, but for those along `expert`
    that each hold a part of the experts. All other weights a device needs whole, but for what
    `tensor` splits. Prompts are filled up with empty ones to a multiple of the devices, and the
    rollout has their answers too; `decode_steps` and `slot_steps` are one for each device:
    `to_host` puts it right, as a collective here would make devices wait.
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

    def of_experts(leaf: Leaf) -> PartitionSpec:
        axes = tuple(axis if axis == "experts" else None for axis in leaf.axes)
        return spec(leaf.shape, axes, {"expert": mesh.shape.get("expert", 1)})

    # Of a weight that is no decoder's, such as a value head's, nothing is said by its leaves.
    spread = jax.tree.map(of_experts, decoder.leaves(cfg), is_leaf=is_leaf)
    weights = {name: spread.get(name, PartitionSpec()) for name in params}
    split = PartitionSpec(axes)
    return jax.shard_map(
        share,
        in_specs=(weights, split, PartitionSpec(), PartitionSpec()),
        out_specs=split,
        axis_names=set(axes),
        check_vma=False,
    )(params, prompts, key, limits)


def make_run(
    cfg: settings.Decoder, engine: settings.Engine, *, group: int, stop: tuple[int, ...]
) -> Run:
    """The function (params, prompts, key, limits, slots) -> Rollout, one token a step and slot."""

    def run(
        params: Params, prompts: Prompts, key: Key[Array, ""], limits: Limits, slots: int
    ) -> Rollout:
        work = prepare(cfg, engine, params, prompts, key, group=group)
        loop = empty_loop(cfg, engine, work, slots)
        loop = drain(
            loop,
            make_advance(cfg, engine, params, limits, stop),
            refill,
            work,
            together="expert" if moe.are_spread(cfg, params) else None,
            fewer=slot_counts(len(loop.slots.item))[1:],
            shrink=keep_busy,
        )
        return as_rollout(work, loop.queue, decode_steps=loop.step, slot_steps=loop.slot_steps)

    return run


def make_advance(
    cfg: settings.Decoder,
    engine: settings.Engine,
    params: Params,
    limits: Limits,
    stop: tuple[int, ...],
) -> Advance[Loop]:
    """The function loop -> (loop, whose answer is done, whose ended by itself): one token each."""
    sampler = make_sampler(of_divided(engine.sampling))
    logits_of = partial(next_logits, engine.sampling, limits, decoder.head(cfg, params))
    unstacked = decoder.unstack(cfg, params)

    def advance(loop: Loop) -> tuple[Loop, jax.Array, jax.Array]:
        slots, column = loop.slots, loop.step % loop.slots.tokens.shape[1]
        with jax.named_scope("sample"):
            logits = logits_of(loop.hidden)
            token = sampler(logits, jax.vmap(jax.random.fold_in)(slots.key, slots.count))
            logp = chosen_logp(logits, token, sums=decoder.sums(cfg))
        slots = slots.replace(
            count=slots.count + 1,
            tokens=_write_column(slots.tokens, token, column),
            logp=_write_column(slots.logp, logp, column),
        )
        stopped = is_one_of(token, stop)
        done = (stopped | (slots.count >= limits.max_new)) & (slots.item >= 0)
        with jax.named_scope("decode"):
            out = _decode(cfg, params, unstacked, loop.replace(slots=slots), token, column)
        if slots.choice is not None:
            taken = moe.record([r.choice for r in out.routing if r is not None])
            slots = slots.replace(choice=_write_column(slots.choice, taken, column))
        loop = loop.replace(
            step=loop.step + 1,
            slot_steps=loop.slot_steps + len(token),
            slots=slots,
            hidden=out.hidden,
            caches=out.cache,
        )
        return loop, done, stopped

    return advance


def slot_counts(slots: int) -> list[int]:
    """With how many slots the loop goes on as the queue drains: half as many each time."""
    counts = [slots]
    while counts[-1] // SHRINK >= FEWEST:
        counts.append(counts[-1] // SHRINK)
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


def empty_loop(cfg: settings.Decoder, engine: settings.Engine, work: Work, slots: int) -> Loop:
    """The loop's state before the first slot is filled."""
    own, queue = empty_slots(cfg, engine, work, slots)
    count, width = len(own.item), work.prompts.tokens.shape[1]
    chunks = chunk_sizes(engine.max_new)
    caches = [
        LayerCache(
            prompt=caching.empty(cfg, block.mixer, count, width, wide=True),
            ring=tuple(caching.empty(cfg, block.mixer, count, c, wide=True) for c in chunks),
        )
        for block in cfg.groups
        for _ in range(block.count)
    ]
    return Loop(
        step=jnp.int32(0),
        slot_steps=jnp.int32(0),
        slots=own,
        hidden=jnp.zeros((count, cfg.dim), jnp.dtype(cfg.dtype)),
        caches=caches,
        queue=queue,
    )


def refill(loop: Loop, pending: Bool[Array, " S"], stopped: Bool[Array, " S"], work: Work) -> Loop:
    """Slots that are `pending` hand out their answers and take the next of the queue."""

    def turn(loop: Loop, s: Int[Array, ""]) -> Loop:
        slots, size = loop.slots, loop.slots.tokens.shape[1]
        columns = (loop.step - slots.count[s] + jnp.arange(size)) % size
        queue, slots, prompt = next_answer(loop.queue, slots, s, stopped[s], columns, work)
        caches = [
            cache.replace(
                prompt=tuple(
                    _write_slot(array, x[prompt], s)
                    for array, x in zip(cache.prompt, kept, strict=True)
                )
            )
            for cache, kept in zip(loop.caches, work.stored.caches, strict=True)
        ]
        hidden = loop.hidden.at[s].set(work.stored.hidden[prompt, 1])
        return loop.replace(slots=slots, hidden=hidden, caches=caches, queue=queue)

    return one_by_one(turn, loop, pending)


def keep_busy(loop: Loop, count: int) -> Loop:
    """The loop with its first `count` slots of those that are busy, in their order."""
    kept = jnp.argsort(loop.slots.item < 0, stable=True)[:count]
    busy = jax.tree.map(lambda x: x.at[kept].get(), (loop.slots, loop.hidden, loop.caches))
    return loop.replace(slots=busy[0], hidden=busy[1], caches=busy[2])


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
