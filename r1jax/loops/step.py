"""One jitted update of the weights, and the trainer's log-probabilities."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from r1jax import settings
from r1jax.kernels.logprob import token_logp
from r1jax.loops import auxiliary
from r1jax.models import decoder
from r1jax.types import Batch, Params, TrainState

Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
Number = float | jax.Array
Numbers = dict[str, Any]
Objective = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
Metrics = dict[str, jax.Array]
Settle = Callable[[Params, Metrics], tuple[Params, Metrics]]
Sums = tuple[Params, dict[str, Any]]  # with a leading dimension: the parts of the `data` axis

# Micro-batches in one call of the compiled loop over them. On CPUs each call may get its temporary
# memory from the kernel anew, and the first touch of a page costs more than what is computed there.
TOGETHER = 8


def states_before(cfg: settings.Decoder, params: Params, batch: Batch) -> Float[Array, "B T D"]:
    """The final hidden state that each token is drawn from: that of the token before it.

    For the first answer token that is the prompt's last, wherever in the row the prompt lies. At
    position 0, which nothing precedes, it is anything finite.
    """
    return shifted(auxiliary.run_batch(cfg, params, batch).hidden, batch)


def shifted(hidden: Float[Array, "B T D"], batch: Batch) -> Float[Array, "B T D"]:
    """`states_before` from the states that the model ends in."""
    if batch.before is None:
        return jnp.pad(hidden[:, :-1], ((0, 0), (1, 0), (0, 0)))
    return jnp.take_along_axis(hidden, batch.before[..., None], axis=1)


def batch_logp(
    cfg: settings.Decoder,
    params: Params,
    states: Float[Array, "B T D"],
    batch: Batch,
    *,
    temperature: Number = 1.0,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Log-probability of each token given the state before it, and the entropy it was drawn with.

    Both are 0 at the first token of a sequence, which nothing precedes.
    """
    logp, entropy = token_logp(
        states,
        decoder.head(cfg, params),
        batch.tokens,
        temperature=temperature,
        sums=decoder.sums(cfg),
    )
    first = batch.position == 0
    return jnp.where(first, 0.0, logp), jnp.where(first, 0.0, entropy)


def make_objective(
    cfg: settings.Decoder,
    loss: Loss,
    *,
    critic: settings.Critic | None = None,
    extra: settings.Auxiliary | None = None,
) -> Objective:
    """The function (params, batch, numbers) -> (loss, metrics) whose gradient moves a policy.

    `numbers` go to the loss, but for `temperature`, at which the tokens were drawn. A critic on the
    policy's trunk adds `critic.share` times its own loss; its metrics are named critic/... `extra`
    adds what `auxiliary.added` does, and `make_update` then wants `auxiliary.balanced`. The metric
    `loss` is without either.
    """

    def objective(params: Params, batch: Batch, numbers: Numbers) -> tuple[jax.Array, Metrics]:
        numbers = dict(numbers)
        temperature = numbers.pop("temperature", 1.0)
        out = auxiliary.run_batch(cfg, params, batch)
        states = shifted(out.hidden, batch)
        logp, entropy = batch_logp(cfg, params, states, batch, temperature=temperature)
        value, metrics = loss(logp, batch.replace(entropy=entropy), **numbers)
        entropy = jnp.where(batch.mask, jax.lax.stop_gradient(entropy), 0.0)
        metrics = {"loss": value, "entropy": jnp.sum(entropy) / batch.num_tokens, **metrics}
        if batch.logp_rollout is not None:
            gap = jnp.where(batch.mask, jnp.abs(logp - batch.logp_rollout), 0.0)
            metrics["gap"] = jnp.max(jax.lax.stop_gradient(gap))
        if critic is not None:
            more, found = critic.loss(critic.score(cfg, params, states, batch), batch)
            value = value + critic.share * more
            metrics |= {f"critic/{name}": number for name, number in found.items()}
        if extra is not None:
            more, found = auxiliary.added(cfg, extra, params, batch, out)
            value, metrics = value + more, metrics | found
        return value, metrics

    return objective


def make_critic_objective(cfg: settings.Decoder, critic: settings.Critic) -> Objective:
    """As `make_objective`, of a critic with a trunk of its own; `numbers` go to its loss."""

    def objective(params: Params, batch: Batch, numbers: Numbers) -> tuple[jax.Array, Metrics]:
        batch = batch.replace(choice=None)  # a trunk of its own has a routing of its own
        states = states_before(cfg, params, batch)
        return critic.loss(critic.score(cfg, params, states, batch), batch, **numbers)

    return objective


def make_update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    settle: Settle | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The function (state, micro-batches, **numbers) -> (state, metrics): one update.

    `state` is donated. `numbers`, and trees of weights that stay, go to the objective, traced: they
    may change without compiling.

    Gradients of the micro-batches are summed, each part of the `data` axis by itself until the
    last. A batch's weights carry the normaliser of the whole update, so the result does not depend
    on how it was cut. All micro-batches have one shape: three programs are compiled, whatever
    their number. One of them loops over up to TOGETHER micro-batches. Metrics are means over the
    update's tokens, but `gap`, the largest. `settle` gets the new weights and the metrics, and
    gives both as they shall be.
    """

    gradient = jax.grad(objective, has_aux=True)

    def more(total: Sums, params: Params, batch: Batch, numbers: Numbers) -> Sums:
        grads, metrics = gradient(params, batch, numbers)
        metrics = {
            name: (jnp.maximum if name == "gap" else jnp.add)(total[1][name], value)
            for name, value in metrics.items()
        }
        return jax.tree.map(jnp.add, total[0], grads), metrics

    @jax.jit
    def empty(params: Params, batch: Batch, numbers: Numbers) -> Sums:
        _, metrics = jax.eval_shape(objective, params, batch, numbers)
        parts = data_parts(batch)
        zeros = lambda x: jnp.zeros((parts, *x.shape), x.dtype)  # noqa: E731
        grads = jax.tree.map(zeros, params)
        return grads, jax.tree.map(zeros, metrics)

    @partial(jax.jit, donate_argnums=0)
    def add(
        total: Sums, params: Params, batches: tuple[Batch, ...], count: jax.Array, numbers: Numbers
    ) -> Sums:
        share = partial(add_all, more)
        whole = PartitionSpec()
        specs = PartitionSpec("data"), whole, whole, whole
        return by_rows(share, batches, *specs)(total, params, count, numbers, batches)

    @partial(jax.jit, donate_argnums=0)
    def apply(state: TrainState, total: Sums) -> tuple[TrainState, Metrics]:
        grads = jax.tree.map(lambda x: jnp.sum(x, axis=0), total[0])
        metrics = {
            name: (jnp.max if name == "gap" else jnp.sum)(value, axis=0)
            for name, value in total[1].items()
        }
        changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, changes)
        if settle is not None:
            params, metrics = settle(params, metrics)
        metrics = {**metrics, "grad_norm": optax.tree.norm(grads)}
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), metrics

    def update(
        state: TrainState, batches: Sequence[Batch], **numbers: Any
    ) -> tuple[TrainState, Metrics]:
        total = empty(state.params, batches[0], numbers)
        for start in range(0, len(batches), TOGETHER):
            some = tuple(batches[start : start + TOGETHER])
            filled = some + some[-1:] * (TOGETHER - len(some))  # one shape, whatever their number
            total = add(total, state.params, filled, np.int32(len(some)), numbers)
        return apply(state, sum_parts(total))

    return update


def add_all(
    more: Callable[[Sums, Params, Batch, Numbers], Sums],
    total: Sums,
    params: Params,
    count: jax.Array,
    numbers: Numbers,
    batches: tuple[Batch, ...],
) -> Sums:
    """The total with the first `count` of the micro-batches added by `more`; of one part."""
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *batches)

    def one(i: jax.Array, total: Sums) -> Sums:
        batch = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False), stacked)
        return more(total, params, batch, numbers)

    total = jax.tree.map(lambda x: x[0], total)
    return jax.tree.map(lambda x: x[None], jax.lax.fori_loop(0, count, one, total))


def sum_parts(total: Sums) -> Sums:
    """Sums over the parts, with a leading dimension of 1, where the parts are CPU devices.

    By numpy: the devices that `r1jax.host` makes must not meet in a collective. All else stays as
    it is, for a program to sum.
    """
    first = jax.tree.leaves(total[0])[0]
    devices = first.sharding.device_set
    if len(devices) != len(first.addressable_shards) or next(iter(devices)).platform != "cpu":
        return total
    if first.shape[0] != len(devices):  # other axes split the weights too
        return total
    grads = jax.tree.map(lambda x: np.asarray(x).sum(axis=0, keepdims=True), total[0])
    metrics = {
        name: (np.max if name == "gap" else np.sum)(np.asarray(value), axis=0, keepdims=True)
        for name, value in total[1].items()
    }
    return grads, metrics


def data_parts(batch: Batch) -> int:
    """In how many parts the mesh's `data` axis splits the rows; 1 where it does not divide them."""
    parts = jax.sharding.get_abstract_mesh().shape.get("data", 1)
    return parts if batch.tokens.shape[0] % parts == 0 else 1


def by_rows(
    function: Callable[..., Any], batch: Batch | tuple[Batch, ...], *specs: PartitionSpec
) -> Callable[..., Any]:
    """`function(*args, batch)`, run by each part of the `data` axis on its rows of the batch, or of
    each of several that are cut alike.

    `specs` say how the other arguments are split over `data`. Results are put together along their
    first dimension.
    """
    if data_parts(batch if isinstance(batch, Batch) else batch[0]) == 1:
        return function
    split = PartitionSpec("data")
    rows = jax.tree.map(lambda x: split if x.ndim else PartitionSpec(), batch)
    return jax.shard_map(
        function,
        in_specs=(*specs, rows),
        out_specs=split,
        axis_names={"data"},
        check_vma=False,
    )


def make_logp(
    cfg: settings.Decoder,
) -> Callable[..., tuple[Float[Array, "B T"], Float[Array, "B T"]]]:
    """The jitted function (params, batch, temperature=1.0) -> `batch_logp` of the batch."""

    def share(
        params: Params, temperature: Number, batch: Batch
    ) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
        states = states_before(cfg, params, batch)
        return batch_logp(cfg, params, states, batch, temperature=temperature)

    def logp_of(params: Params, batch: Batch, temperature: Number = 1.0) -> Any:
        whole = PartitionSpec()
        return by_rows(share, batch, whole, whole)(params, temperature, batch)

    return jax.jit(logp_of)


def make_score(
    cfg: settings.Decoder, critic: settings.Critic
) -> Callable[[Params, Batch], Float[Array, "B T"]]:
    """The jitted function (params, batch) -> what the critic says of each token."""

    def share(params: Params, batch: Batch) -> Float[Array, "B T"]:
        if critic.trunk != "policy":
            batch = batch.replace(choice=None)  # it has a routing of its own
        return critic.score(cfg, params, states_before(cfg, params, batch), batch)

    return jax.jit(lambda params, batch: by_rows(share, batch, PartitionSpec())(params, batch))
