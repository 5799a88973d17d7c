"""What a stage trains: all weights, or low-rank adapters beside weights that stay as they are.

With adapters the tree that is trained, and with it gradients, the optimizer's state, a reference
and the checkpoints, is {LORA: adapters} with the heads' weights beside. The weights that stay are
held once, whoever uses them: policy, reference (whose `b` is 0) and critic.

Each micro-batch goes back through the sum w + scale * a @ b. To sum gradients of w, and go back
through it once an update, would save that product, of a cost of rank / tokens of the layer's own,
and take a gradient as large as the weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax

from r1jax import settings, sharding
from r1jax.loops.run import Context, stream_key
from r1jax.loops.step import Metrics, Numbers, Objective
from r1jax.models import lora
from r1jax.types import Batch, Params

LORA = "lora"  # in a trained tree: the adapters, by the name of their weight


def same(x: Any) -> Any:
    """What it is given."""
    return x


@dataclass(frozen=True, kw_only=True)
class Weights:
    """What a stage trains, and how that becomes a model's weights."""

    first: Params  # what is trained, before the first update
    whole: Callable[[Params], Params] = same  # for passes over rows; computes nothing
    merged: Callable[[Params], Params] = same  # for the rollout engine: sums, made once
    told: Mapping[str, Params] = field(default_factory=dict)  # an update's numbers: what stays
    objective: Callable[[Objective], Objective] = same  # of what is trained


def of_stage(
    cfg: settings.Supervised | settings.Reinforce, context: Context, params: Params
) -> Weights:
    """How a stage that begins with the decoder's weights `params` trains them."""
    asked, model = cfg.lora, context.run.model
    if asked is None:
        return Weights(first=params)
    leaves = lora.adapter_leaves(model, rank=asked.rank, targets=asked.targets)
    key = stream_key(context.run.seed, f"{cfg.name}/{LORA}", 0)

    def attach(base: Params, trained: Params) -> Params:
        return {**lora.attach(base, trained[LORA], scale=asked.scale), **heads(trained)}

    def merged(trained: Params) -> Params:
        # In the dtype that the engine would cast them to.
        found = lora.merge(params, trained[LORA], scale=asked.scale, dtype=model.dtype)
        return {**found, **heads(trained)}

    def of_trained(objective: Objective) -> Objective:
        def run(trained: Params, batch: Batch, numbers: Numbers) -> tuple[jax.Array, Metrics]:
            numbers = dict(numbers)
            return objective(attach(numbers.pop("frozen"), trained), batch, numbers)

        return run

    return Weights(
        first={LORA: sharding.init(leaves, key, context.mesh)},
        whole=lambda trained: attach(params, trained),
        merged=merged,
        told={"frozen": params},
        objective=of_trained,
    )


def heads(trained: Params) -> Params:
    """What is trained beside the adapters."""
    return {name: value for name, value in trained.items() if name != LORA}
