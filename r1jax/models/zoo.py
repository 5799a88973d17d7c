"""Published models by name: every number as in their config.json. Nothing is downloaded."""

from dataclasses import replace

from r1jax.settings import (
    Attention,
    Decoder,
    Experts,
    Group,
    Latent,
    Llama3Rope,
    Mlp,
    Yarn,
    dense,
)


def _qwen2(
    dim: int,
    layers: int,
    heads: int,
    kv_heads: int,
    mlp: int,
    *,
    vocab: int = 152_064,
    tied: bool = False,
    length: int = 131_072,
    eps: float = 1e-6,
) -> Decoder:
    return dense(
        vocab_size=vocab,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        mlp_dim=mlp,
        bias=True,
        rope_theta=1e6,
        max_length=length,
        norm_eps=eps,
        tied=tied,
    )


def _qwen3(
    dim: int, layers: int, heads: int, mlp: int, *, tied: bool = False, kv_heads: int = 8
) -> Decoder:
    return dense(
        vocab_size=151_936,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        mlp_dim=mlp,
        qk_norm=True,
        rope_theta=1e6,
        max_length=40_960,
        tied=tied,
    )


def _qwen3_moe() -> Decoder:
    mixer = Attention(num_heads=32, num_kv_heads=4, head_dim=128, qk_norm=True)
    group = Group(count=48, mixer=mixer, mlp=Experts(num_experts=128, top_k=8, dim=768))
    return replace(_qwen3(2048, 48, 32, 6144), groups=(group,))


def _llama(dim: int, layers: int, heads: int, mlp: int) -> Decoder:
    return dense(
        vocab_size=128_256,
        dim=dim,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        mlp_dim=mlp,
        rope_theta=500_000.0,
        rope_scaling=Llama3Rope(factor=8.0, original_length=8192),
        max_length=131_072,
        norm_eps=1e-5,
        tied=False,
    )


def _deepseek_v3() -> Decoder:
    mixer = Latent(
        num_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, value_dim=128
    )
    sparse = Experts(
        num_experts=256,
        top_k=8,
        dim=2048,
        score="sigmoid",
        scale=2.5,
        num_groups=8,
        top_groups=4,
        shared_dim=2048,
    )
    return Decoder(
        vocab_size=129_280,
        dim=7168,
        groups=(
            Group(count=3, mixer=mixer, mlp=Mlp(dim=18_432)),
            Group(count=58, mixer=mixer, mlp=sparse),
        ),
        rope_scaling=Yarn(factor=40.0, original_length=4096, mscale=1.0, mscale_all_dim=1.0),
        max_length=163_840,
        tied=False,
        num_mtp=1,
    )


_MATH = {"rope_theta": 10_000.0, "max_length": 4096}  # Qwen2.5-Math kept the shorter context

# Qwen2.5 are the base models; the instructed ones differ in length and eps. Qwen3 are those after
# post-training. R1-Zero and R1 are DeepSeek-V3; R1-Distill are Qwen2.5 and Llama of their sizes.
MODELS: dict[str, Decoder] = {
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 4864, vocab=151_936, tied=True, length=32_768),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 8960, vocab=151_936, tied=True),
    "qwen2.5-3b": _qwen2(2048, 36, 16, 2, 11_008, vocab=151_936, tied=True, length=32_768),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 18_944),
    "qwen2.5-14b": _qwen2(5120, 48, 40, 8, 13_824, eps=1e-5),
    "qwen2.5-32b": _qwen2(5120, 64, 40, 8, 27_648, eps=1e-5),
    "qwen2.5-math-1.5b": replace(_qwen2(1536, 28, 12, 2, 8960, vocab=151_936, tied=True), **_MATH),
    "qwen2.5-math-7b": replace(_qwen2(3584, 28, 28, 4, 18_944), **_MATH),
    "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
    "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
    "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
    "qwen3-8b": _qwen3(4096, 36, 32, 12_288),
    "qwen3-14b": _qwen3(5120, 40, 40, 17_408),
    "qwen3-32b": _qwen3(5120, 64, 64, 25_600),
    "qwen3-30b-a3b": _qwen3_moe(),
    "llama-3.1-8b": _llama(4096, 32, 32, 14_336),
    "llama-3.3-70b": _llama(8192, 80, 64, 28_672),
    "deepseek-v3-671b": _deepseek_v3(),
}
