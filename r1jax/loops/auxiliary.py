"""What an update does for models with experts or prediction modules: more losses, a balanced load,
the rollout's routing taken again, and numbers for the log."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from r1jax import settings
from r1jax.models import decoder, moe, mtp
from r1jax.types import Batch, Params

Metrics = dict[str, jax.Array]
LOAD = "load/"  # metrics that are no numbers but counts for each expert, until `balanced`


def run_batch(cfg: settings.Decoder, params: Params, batch: Batch) -> decoder.Outputs:
    """The model's pass over a batch. Experts are those of `batch.choice`, where there is one."""
    experts = any(isinstance(group.mlp, settings.Experts) for group in cfg.groups)
    return decoder.run(
        cfg,
        params,
        batch.tokens,
        batch.position,
        batch.segment,
        batch.prompt,
        keep_routing=experts,
        choices=None if batch.choice is None else moe.choices_of(cfg, batch.choice),
    )


def added(
    cfg: settings.Decoder,
    extra: settings.Auxiliary,
    params: Params,
    batch: Batch,
    out: decoder.Outputs,
) -> tuple[Float[Array, ""], Metrics]:
    """What is added to the loss, and metrics that are summed over an update's micro-batches.

    Both losses are means over the update's tokens that count, those of `mask`: so neither they nor
    the load of the experts depend on how rows are packed or cut.

    Raises:
      ValueError: prediction modules are to be trained on rows whose answers share prompts: what
        follows the prompt's last token would be several things.
    """
    value, metrics = jnp.zeros((), jnp.float32), {}
    share = batch.mask.astype(jnp.float32) / batch.num_tokens
    routings = {
        f"{LOAD}{g}": routing for g, routing in enumerate(out.routing or ()) if routing is not None
    }
    for name, routing in routings.items():
        metrics[name] = jax.vmap(lambda r: _load(r, batch.mask))(routing)
    if extra.balance_weight:
        balance = jnp.zeros((), jnp.float32)
        for routing in routings.values():
            each = jax.vmap(lambda r: moe.sequence_balance(r, batch.segment, share))(routing)
            balance = balance + jnp.sum(each)
        value = value + extra.balance_weight * balance
        metrics["experts/balance"] = balance / moe.record_shape(cfg)[0]
    if extra.mtp_weight:
        if batch.prompt is not None:
            raise ValueError("the loss of prediction modules needs a prompt to each answer")
        weights, hidden = params, out.hidden
        if extra.mtp_alone:
            frozen = {name: w for name, w in params.items() if name != "mtp"}
            frozen, hidden = jax.lax.stop_gradient((frozen, hidden))
            weights = {**frozen, "mtp": params["mtp"]}
        loss, made = mtp.loss(
            cfg, weights, hidden, batch.tokens, batch.position, batch.segment, share
        )
        value = value + extra.mtp_weight * loss
        metrics["mtp_loss"] = loss
        # A state counts where what it predicts is of its own sequence.
        loads = [
            _load(routing, batch.mask & mtp.ahead(batch.segment, k + 2))
            for k, routing in enumerate(made)
            if routing is not None
        ]
        if loads:
            metrics[f"{LOAD}mtp"] = jnp.stack(loads)
    return value, jax.lax.stop_gradient(metrics)


def _load(routing: moe.Routing, mask: Bool[Array, "B T"]) -> Float[Array, " E"]:
    return moe.load(routing, mask, num_experts=routing.score.shape[-1])


def balanced(
    cfg: settings.Decoder, extra: settings.Auxiliary, params: Params, metrics: Metrics
) -> tuple[Params, Metrics]:
    """The weights with every router's bias moved by the whole update's load, and the metrics with
    statistics in the place of loads: the worst layer's fullest expert, and means over layers."""
    loads = {name: value for name, value in metrics.items() if name.startswith(LOAD)}
    metrics = {name: value for name, value in metrics.items() if name not in loads}
    if not loads:
        return params, metrics
    if extra.bias_rate:
        of_groups = [loads.get(f"{LOAD}{g}") for g in range(len(cfg.groups))]
        mtp_load = loads.get(f"{LOAD}mtp")
        params = moe.moved(params, of_groups, rate=extra.bias_rate, mtp_load=mtp_load)
    layers = [jax.vmap(moe.statistics)(load) for load in loads.values()]
    every = jax.tree.map(lambda *x: jnp.concatenate(x), *layers)
    for name, value in every.items():
        metrics[f"experts/{name}"] = jnp.max(value) if name == "load_max" else jnp.mean(value)
    return params, metrics
