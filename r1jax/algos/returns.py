"""Sums of rewards over the tokens that follow: Monte Carlo returns and GAE.

Rewards of tokens, [B, T], stand where they are earned. A mask is True on the tokens that the
policy chose; those between (a tool's output in the middle of an answer) are stepped over as if
they were not there, and get 0. With `segment`, as in a packed `Batch`, nothing flows from one
sequence of a row to another; without it a row is one sequence.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def discounted_return(
    reward: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float = 1.0,
    segment: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T"]:
    """sum over s >= t of gamma^(s - t) * reward_s, to the end of the sequence; 0 off the mask."""
    follows = _follows(reward, segment)
    total = _from_the_end(
        jnp.where(mask, reward, 0.0), follows * jnp.where(mask, jnp.float32(gamma), 1.0)
    )
    return jnp.where(mask, total, 0.0)


def gae(
    reward: Float[Array, "B T"],
    value: Float[Array, "B T"],
    mask: Bool[Array, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    segment: Int[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"]]:
    """Generalised advantage estimates, and the returns that the critic is to learn.

    A_t = sum over s >= t of (gamma * lam)^(s - t) * (reward_s + gamma * V_{s+1} - V_s), with V = 0
    after the last token, also of an answer that was cut off. The return is A_t + V_t. `value[t]`
    is what the critic expects before token t is known. Both are 0 off the mask, where nothing is
    read. lam = 1 gives the Monte Carlo return less the value, lam = 0 the one-step error.

    Source: arXiv:1506.02438, eq. 16.
    """
    follows = _follows(reward, segment)
    reward, value = jnp.where(mask, reward, 0.0), jnp.where(mask, value, 0.0)
    # The value at the first masked token at or after t, then after t.
    coming = _from_the_end(value, follows * jnp.where(mask, 0.0, 1.0))
    coming = follows * jnp.pad(coming[:, 1:], ((0, 0), (0, 1)))
    error = jnp.where(mask, reward + gamma * coming - value, 0.0)
    advantage = _from_the_end(error, follows * jnp.where(mask, jnp.float32(gamma * lam), 1.0))
    advantage = jnp.where(mask, advantage, 0.0)
    return advantage, advantage + value


def _follows(x: Float[Array, "B T"], segment: Int[Array, "B T"] | None) -> Float[Array, "B T"]:
    """1 where the next token of the row is of the same sequence, 0 where it is not."""
    if segment is None:
        return jnp.ones_like(x).at[:, -1].set(0.0)
    same = segment[:, 1:] == segment[:, :-1]
    return jnp.pad(same.astype(x.dtype), ((0, 0), (0, 1)))


@jax.jit  # operation by operation, every new number of rows would compile some hundred of them
def _from_the_end(b: Float[Array, "B T"], a: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """x with x_t = b_t + a_t * x_{t+1}, in log(T) steps."""

    def join(later: tuple[Array, Array], earlier: tuple[Array, Array]) -> tuple[Array, Array]:
        return earlier[0] * later[0], earlier[1] + earlier[0] * later[1]

    return jax.lax.associative_scan(join, (a, b), reverse=True, axis=1)[1]
