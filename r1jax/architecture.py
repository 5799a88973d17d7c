"""The settings of a decoder: its layers, positions and sizes. `r1jax.settings` has them all."""

import math
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Grouped-query attention with rotary positions (Llama, Qwen2, Qwen3)."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    bias: bool = False  # on q, k and v, as in Qwen2
    qk_norm: bool = False  # RMS norm of each head's q and k, as in Qwen3

    def __post_init__(self) -> None:
        if self.num_kv_heads < 1 or self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads must be a multiple of num_kv_heads, "
                f"got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary pairs), got {self.head_dim}")


@dataclass(frozen=True, kw_only=True)
class Latent:
    """Multi-head latent attention (DeepSeek-V2, V3, R1): keys and values of all heads come from
    one short vector a token, beside which one rotary key is shared by the heads."""

    num_heads: int
    q_rank: int | None  # width of the compressed query; None: not compressed
    kv_rank: int  # width of the compressed keys and values
    nope_dim: int  # of a head's query and key, without position
    rope_dim: int  # of a head's query and of the shared key, rotated
    value_dim: int  # of a head's value
    interleaved: bool = True  # rotary pairs are neighbours in the stored weights

    def __post_init__(self) -> None:
        if self.rope_dim % 2:
            raise ValueError(f"rope_dim must be even (rotary pairs), got {self.rope_dim}")
        if self.value_dim > self.nope_dim + self.rope_dim:
            raise ValueError(
                f"value_dim must be <= nope_dim + rope_dim, "
                f"got {self.value_dim} > {self.nope_dim} + {self.rope_dim}"
            )


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """Gated SiLU feed-forward of width `dim`."""

    dim: int


@dataclass(frozen=True, kw_only=True)
class Experts:
    """Mixture of gated SiLU feed-forwards of width `dim`, of which a token takes `top_k`."""

    num_experts: int
    top_k: int
    dim: int
    score: Literal["softmax", "sigmoid"] = "softmax"  # sigmoid: with a bias for the choice only
    normalise: bool = True  # a token's weights sum to `scale`
    scale: float = 1.0
    num_groups: int = 1  # of experts; a token's choice is from the best `top_groups` of them
    top_groups: int = 1
    shared_dim: int = 0  # width of the feed-forward that every token takes; 0: none

    def __post_init__(self) -> None:
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(
                f"top_k must be in 1..num_experts, got {self.top_k} of {self.num_experts}"
            )
        if self.num_experts % self.num_groups:
            raise ValueError(
                f"num_experts must be a multiple of num_groups, "
                f"got {self.num_experts} and {self.num_groups}"
            )
        size = self.num_experts // self.num_groups
        if not 1 <= self.top_groups <= self.num_groups or self.top_groups * size < self.top_k:
            raise ValueError(
                f"top_groups must be in 1..num_groups and hold top_k experts, got "
                f"{self.top_groups} of {self.num_groups} groups of {size} for top_k {self.top_k}"
            )
        if self.num_groups > 1 and size < 2:
            raise ValueError("a group needs 2 experts or more: its score is the sum of its best 2")


@dataclass(frozen=True, kw_only=True)
class Group:
    """`count` equal layers in a row; their weights are stacked and scanned over."""

    count: int
    mixer: Attention | Latent
    mlp: Mlp | Experts

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"a group needs at least one layer, got count {self.count}")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters: for each weight w of `targets`, w + scale * b @ a with a and b of `rank`.

    A stage with them trains them alone; the weights that it begins with stay.
    """

    rank: int
    scale: float = 1.0  # the paper's alpha / r
    # By the last part of a weight's name; see `r1jax.models.lora.TARGETS`. Groups' layers alone.
    targets: tuple[str, ...] = ("qkv", "out", "gate", "up", "down")

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be >= 1, got {self.rank}")
        if not 0 < self.scale < math.inf:
            raise ValueError(f"scale must be > 0 and finite, got {self.scale}")
        if not self.targets:
            raise ValueError("targets must name a weight at least, got none")


@dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's longer context: slow rotary pairs turn `factor` times slower."""

    factor: float
    original_length: int  # of the context before
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_length < 1:
            raise ValueError(
                f"factor and original_length must be >= 1, "
                f"got {self.factor} and {self.original_length}"
            )
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"need 0 < low_freq_factor < high_freq_factor, "
                f"got {self.low_freq_factor} and {self.high_freq_factor}"
            )


@dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN's longer context: slow rotary pairs turn `factor` times slower, and scores grow.

    `mscale` and `mscale_all_dim` are DeepSeek's: the first over the second scales cosine and sine,
    and the second's square the scores of latent attention. 0: not given.
    """

    factor: float
    original_length: int  # of the context before
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None  # what scales cosine and sine; None: as YaRN advises

    def __post_init__(self) -> None:
        if self.factor < 1 or self.original_length < 1:
            raise ValueError(
                f"factor and original_length must be >= 1, "
                f"got {self.factor} and {self.original_length}"
            )
        if not 0 < self.beta_slow < self.beta_fast:
            raise ValueError(
                f"need 0 < beta_slow < beta_fast, got {self.beta_slow} and {self.beta_fast}"
            )


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A decoder-only transformer: groups of equal layers between an embedding and a head."""

    vocab_size: int
    dim: int
    groups: tuple[Group, ...]
    rope_theta: float = 10_000.0
    rope_scaling: Llama3Rope | Yarn | None = None
    max_length: int = 32_768  # tokens that it is meant for; written on export, checked by nobody
    norm_eps: float = 1e-6
    tied: bool = True  # the head is the embedding, transposed
    num_mtp: int = 0  # multi-token-prediction modules; each is a layer like the last group's
    remat: Literal["none", "layer"] = "none"  # recompute a layer's activations in backward
    scan: bool = True  # over a group's layers in training; False: unrolled, for a few small layers
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the compute; weights are float32
    sums: Literal["float32", "float64"] = "float32"  # float64: on CPUs, in attention, norms and
    # softmax, so that sampler and trainer agree to the bit; costs up to a third of the speed

    def __post_init__(self) -> None:
        if not self.groups:
            raise ValueError("a decoder needs at least one group of layers")


def dense(
    *,
    vocab_size: int,
    dim: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    mlp_dim: int,
    head_dim: int | None = None,
    bias: bool = False,
    qk_norm: bool = False,
    **rest: Any,
) -> Decoder:
    """A decoder of equal layers: Qwen2 with `bias`, Qwen3 with `qk_norm`, Llama with neither."""
    mixer = Attention(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=dim // num_heads if head_dim is None else head_dim,
        bias=bias,
        qk_norm=qk_norm,
    )
    group = Group(count=num_layers, mixer=mixer, mlp=Mlp(dim=mlp_dim))
    return Decoder(vocab_size=vocab_size, dim=dim, groups=(group,), **rest)
