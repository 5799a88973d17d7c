"""Rotary positions: how fast each pair turns, with the scalings that lengthen a context."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from r1jax import settings

Rope = tuple[jax.Array, jax.Array]


def rates(cfg: settings.Decoder, size: int) -> np.ndarray:
    """Radians a token that each of `size` / 2 rotary pairs turns, float32.

    Source: RoFormer, arXiv:2104.09864; YaRN, arXiv:2309.00071, section 3.2; Llama 3.1's is defined
    by its published code.
    """
    plain = cfg.rope_theta ** (-np.arange(0, size, 2) / size)
    match cfg.rope_scaling:
        case None:
            scaled = plain
        case settings.Llama3Rope() as scaling:
            # Turns within the old context: many are kept, few are slowed, between it is blended.
            turns = scaling.original_length * plain / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            keep = np.clip((turns - low) / (high - low), 0, 1)
            scaled = plain * (keep + (1 - keep) / scaling.factor)
        case settings.Yarn() as scaling:
            keep = 1 - _yarn_ramp(scaling, size, cfg.rope_theta)
            scaled = plain * (keep + (1 - keep) / scaling.factor)
    return scaled.astype(np.float32)


def _yarn_ramp(scaling: settings.Yarn, size: int, theta: float) -> np.ndarray:
    """0 for the pairs that keep their rate, 1 for those that are slowed, and between them a line.

    It runs along the pairs' numbers, as in the published code of YaRN and DeepSeek-V3; YaRN's
    eq. 18 has it along their turns in the old context. The ends are the same but for rounding.
    """

    def pair(turns: float) -> float:  # that turns so many times in the old context
        angle = scaling.original_length / (turns * 2 * math.pi)
        return size * math.log(angle) / (2 * math.log(theta))

    low = max(math.floor(pair(scaling.beta_fast)), 0)
    high = min(math.ceil(pair(scaling.beta_slow)), size - 1)
    return np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1 if factor > 1 else 1.0


def magnitude(cfg: settings.Decoder) -> float:
    """What cosine and sine are multiplied by, and so, twice, the scores of rotated heads."""
    scaling = cfg.rope_scaling
    if not isinstance(scaling, settings.Yarn):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        above = _mscale(scaling.factor, scaling.mscale)
        return above / _mscale(scaling.factor, scaling.mscale_all_dim)
    return _mscale(scaling.factor, 1.0)


def score_scale(cfg: settings.Decoder) -> float:
    """What latent attention multiplies its scores by, beside 1/sqrt(head size).

    Source: DeepSeek-V3's published `inference/model.py`.
    """
    scaling = cfg.rope_scaling
    if not isinstance(scaling, settings.Yarn) or not scaling.mscale_all_dim:
        return 1.0
    return _mscale(scaling.factor, scaling.mscale_all_dim) ** 2


def rope_angles(
    cfg: settings.Decoder, position: Int[Array, "..."], size: int
) -> tuple[Float[Array, "... 1 half"], Float[Array, "... 1 half"]]:
    """Cosine and sine of each pair's angle, float32, with a dimension for the heads.

    Scaled by `magnitude(cfg)`. `size` is the number of rotated entries of a head.

    XLA on a CPU fuses cosine and sine into whatever reads them, and so computes them again for each
    head of each layer, forward and backward. Through a conditional it does not fuse; both of its
    branches are the same, and what it asks only must not be a constant.
    """
    rate = jnp.asarray(rates(cfg, size)).reshape((1,) * (position.ndim + 1) + (size // 2,))
    angle = position[..., None, None].astype(jnp.float32) * rate
    scale = magnitude(cfg)
    turns = lambda angle: (jnp.cos(angle) * scale, jnp.sin(angle) * scale)  # noqa: E731
    once = lambda angle: jax.lax.cond(jnp.all(angle >= 0), turns, turns, angle)  # noqa: E731
    return jax.lax.platform_dependent(angle, cpu=once, default=turns)


def rotate(x: Float[Array, "... heads H"], rope: Rope) -> jax.Array:
    """Rotates pair (i, i + H/2) of each head by its angle (the half-split form of Llama, Qwen)."""
    cos, sin = rope
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
