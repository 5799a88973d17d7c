"""config.json of a Hugging Face folder, into a `Decoder` and back."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from r1jax import settings

FP8_BLOCK = (128, 128)  # entries of a weight that share one scale


def read(file: Path) -> settings.Decoder:
    """The model that a config.json describes, in the form of transformers 5 or the one before.

    Raises:
      ValueError: the file cannot be read, is of another family, or asks for something that this
        decoder does not do; one line that names the file and the field.
    """
    try:
        config = json.loads(file.read_bytes())
        if not isinstance(config, dict):
            raise ValueError("no JSON object")
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: cannot be read as JSON ({error})") from None
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in READERS:
        raise ValueError(f"{file}: unsupported model_type {kind!r}; known: {', '.join(READERS)}")
    try:
        return READERS[kind](Fields(config))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


class Fields:
    """Values of a JSON object, checked when they are asked for."""

    def __init__(self, values: Mapping[str, Any], place: str = "") -> None:
        self._values, self._place = values, place

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        """The field's value, or the default where it is missing or null; without one, an error."""
        value = self._values.get(name)
        if value is None:
            if default is None:
                raise ValueError(f"{self._place}{name} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self._place}{name} must be {kind.__name__}, got {value!r}")
        return value

    def size(self, name: str, default: int | None = None) -> int:
        """A number that is at least 1."""
        value = self.get(name, int, default)
        if value < 1:
            raise ValueError(f"{self._place}{name} must be >= 1, got {value}")
        return value

    def raw(self, name: str) -> Any:
        """The value as it stands; None where it is missing."""
        return self._values.get(name)

    def refuse(self, name: str, *harmless: Any) -> None:
        """Passes where the field is missing, null, false, or one of the harmless values."""
        value = self._values.get(name)
        if value is not None and value is not False and value not in harmless:
            raise ValueError(f"{self._place}{name} {value!r} is not supported")


# --------------------------------------------------------------------------- reading


def _llama(config: Fields) -> settings.Decoder:
    config.refuse("attention_bias")
    return _dense(config, bias=False, qk_norm=False)


def _mistral(config: Fields) -> settings.Decoder:
    window, length = config.raw("sliding_window"), config.size("max_position_embeddings", 131_072)
    if window is not None and (type(window) is not int or window < length):
        raise ValueError(f"sliding_window {window!r} is not supported")
    return _dense(config, bias=False, qk_norm=False)


def _qwen2(config: Fields) -> settings.Decoder:
    return _dense(config, bias=True, qk_norm=False)


def _qwen3(config: Fields) -> settings.Decoder:
    config.refuse("attention_bias")
    return _dense(config, bias=False, qk_norm=True, head_dim=128)


def _dense(
    config: Fields, *, bias: bool, qk_norm: bool, head_dim: int | None = None
) -> settings.Decoder:
    mlp = settings.Mlp(dim=config.size("intermediate_size"))
    count = config.size("num_hidden_layers")
    mixer = _attention(config, bias=bias, qk_norm=qk_norm, head_dim=head_dim)
    return _decoder(config, (settings.Group(count=count, mixer=mixer, mlp=mlp),))


def _qwen3_moe(config: Fields) -> settings.Decoder:
    config.refuse("attention_bias")
    mixer = _attention(config, bias=False, qk_norm=True, head_dim=None)
    count, step = config.size("num_hidden_layers"), config.size("decoder_sparse_step", 1)
    only = config.get("mlp_only_layers", list, [])
    # Either name: transformers 5 writes the second.
    name = "num_experts" if config.raw("num_experts") is not None else "num_local_experts"
    sparse = settings.Experts(
        num_experts=config.size(name),
        top_k=config.size("num_experts_per_tok"),
        dim=config.size("moe_intermediate_size"),
        normalise=config.get("norm_topk_prob", bool, False),
    )
    flags = [i not in only and (i + 1) % step == 0 for i in range(count)]
    groups = []
    for is_sparse, run in groupby(flags):
        mlp = sparse if is_sparse else settings.Mlp(dim=config.size("intermediate_size"))
        groups.append(settings.Group(count=len(list(run)), mixer=mixer, mlp=mlp))
    return _decoder(config, tuple(groups))


def _deepseek_v3(config: Fields) -> settings.Decoder:
    config.refuse("attention_bias")
    config.refuse("topk_method", "noaux_tc")
    config.refuse("scoring_func", "sigmoid")
    config.refuse("moe_layer_freq", 1)
    mixer = settings.Latent(
        num_heads=config.size("num_attention_heads"),
        q_rank=None if config.raw("q_lora_rank") is None else config.size("q_lora_rank"),
        kv_rank=config.size("kv_lora_rank"),
        nope_dim=config.size("qk_nope_head_dim"),
        rope_dim=config.size("qk_rope_head_dim"),
        value_dim=config.size("v_head_dim"),
        interleaved=config.get("rope_interleave", bool, True),
    )
    width = config.size("moe_intermediate_size")
    sparse = settings.Experts(
        num_experts=config.size("n_routed_experts"),
        top_k=config.size("num_experts_per_tok"),
        dim=width,
        score="sigmoid",
        normalise=config.get("norm_topk_prob", bool, True),
        scale=config.get("routed_scaling_factor", float),
        num_groups=config.size("n_group"),
        top_groups=config.size("topk_group"),
        shared_dim=width * config.size("n_shared_experts"),
    )
    count = config.size("num_hidden_layers")
    first = min(config.get("first_k_dense_replace", int), count)
    kinds = ((first, settings.Mlp(dim=config.size("intermediate_size"))), (count - first, sparse))
    groups = [settings.Group(count=n, mixer=mixer, mlp=mlp) for n, mlp in kinds if n]
    cfg = _decoder(config, tuple(groups))
    return replace(cfg, num_mtp=config.get("num_nextn_predict_layers", int, 0))


READERS = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek_v3,
}


def _attention(
    config: Fields, *, bias: bool, qk_norm: bool, head_dim: int | None
) -> settings.Attention:
    heads, dim = config.size("num_attention_heads"), config.size("hidden_size")
    return settings.Attention(
        num_heads=heads,
        num_kv_heads=config.size("num_key_value_heads", heads),
        head_dim=config.size("head_dim", head_dim or dim // heads),
        bias=bias,
        qk_norm=qk_norm,
    )


def _decoder(config: Fields, groups: tuple[settings.Group, ...]) -> settings.Decoder:
    config.refuse("hidden_act", "silu")
    config.refuse("mlp_bias")
    config.refuse("use_sliding_window")
    for kind in config.get("layer_types", list, []):
        if kind != "full_attention":
            raise ValueError(f"layer_types with {kind!r} are not supported")
    quantized = config.get("quantization_config", dict, {})
    if quantized:  # other kinds keep their weights in tensors of other names
        kind = Fields(quantized, "quantization_config.")
        kind.refuse("quant_method", "fp8")
        kind.refuse("weight_block_size", list(FP8_BLOCK))
    theta, scaling = _rope(config)
    return settings.Decoder(
        vocab_size=config.size("vocab_size"),
        dim=config.size("hidden_size"),
        groups=groups,
        rope_theta=theta,
        rope_scaling=scaling,
        max_length=config.size("max_position_embeddings", 32_768),
        norm_eps=config.get("rms_norm_eps", float, 1e-6),
        tied=config.get("tie_word_embeddings", bool, False),
    )


def _rope(config: Fields) -> tuple[float, settings.Llama3Rope | settings.Yarn | None]:
    """The base and the scaling, from `rope_parameters` or the older `rope_scaling`."""
    name = "rope_parameters" if config.raw("rope_parameters") else "rope_scaling"
    values = config.raw(name) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{name} must be an object, got {values!r}")
    rope = Fields(values, f"{name}.")
    theta = rope.get("rope_theta", float, config.get("rope_theta", float, 10_000.0))
    rope.refuse("partial_rotary_factor", 1, 1.0)
    config.refuse("partial_rotary_factor", 1, 1.0)
    kind = rope.get("rope_type", str, rope.get("type", str, "default"))
    longest = config.size("max_position_embeddings", 32_768)
    if kind == "default":
        return theta, None
    if kind not in ("llama3", "yarn"):
        raise ValueError(f"unknown rope type {kind!r}; known: default, llama3, yarn")
    length = rope.size("original_max_position_embeddings", longest)
    if kind == "llama3":
        return theta, settings.Llama3Rope(
            factor=rope.get("factor", float),
            original_length=length,
            low_freq_factor=rope.get("low_freq_factor", float),
            high_freq_factor=rope.get("high_freq_factor", float),
        )
    rope.refuse("truncate", True)
    factor = rope.raw("attention_factor")
    return theta, settings.Yarn(
        factor=rope.get("factor", float),
        original_length=length,
        beta_fast=rope.get("beta_fast", float, 32.0),
        beta_slow=rope.get("beta_slow", float, 1.0),
        mscale=rope.get("mscale", float, 0.0),
        mscale_all_dim=rope.get("mscale_all_dim", float, 0.0),
        attention_factor=None if factor is None else rope.get("attention_factor", float),
    )


# --------------------------------------------------------------------------- writing


def family(cfg: settings.Decoder) -> str:
    """The `model_type` of a decoder's folder.

    Raises:
      ValueError: no family that is known has such layers.
    """
    mixers = {group.mixer for group in cfg.groups}
    sparse = {group.mlp for group in cfg.groups if isinstance(group.mlp, settings.Experts)}
    dense = {group.mlp for group in cfg.groups if isinstance(group.mlp, settings.Mlp)}
    mixer = cfg.groups[0].mixer
    found = None
    if len(mixers) == 1 and len(dense) <= 1 and len(sparse) <= 1:
        if isinstance(mixer, settings.Latent):
            ordered = all(isinstance(group.mlp, settings.Mlp) for group in cfg.groups[:-1])
            (mlp,) = sparse or (None,)
            if mlp and ordered and len(cfg.groups) <= 2 and mlp.score == "sigmoid":
                found = "deepseek_v3" if mlp.shared_dim and not mlp.shared_dim % mlp.dim else None
        elif sparse:
            (mlp,) = sparse
            plain = replace(mlp, score="softmax", scale=1.0, num_groups=1, top_groups=1)
            fits = mixer.qk_norm and not mixer.bias and not mlp.shared_dim
            found = "qwen3_moe" if mlp == replace(plain, shared_dim=0) and fits else None
        else:
            kinds = {(False, False): "llama", (True, False): "qwen2", (False, True): "qwen3"}
            found = kinds.get((mixer.bias, mixer.qk_norm))
    if found is None or (cfg.num_mtp and found != "deepseek_v3"):
        raise ValueError("no Hugging Face family has these layers: the model cannot be exported")
    return found


ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}


def to_json(cfg: settings.Decoder, *, dtype: str) -> dict[str, Any]:
    """What config.json says of a decoder, in the form of transformers 5.

    Raises:
      ValueError: no family has such layers.
    """
    kind = family(cfg)
    mixer = cfg.groups[0].mixer
    out: dict[str, Any] = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "dtype": dtype,
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.dim,
        "hidden_act": "silu",
        "num_hidden_layers": sum(group.count for group in cfg.groups),
        "num_attention_heads": mixer.num_heads,
        "max_position_embeddings": cfg.max_length,
        "rms_norm_eps": cfg.norm_eps,
        "tie_word_embeddings": cfg.tied,
        "rope_parameters": _rope_json(cfg),
        "attention_bias": False,
    }
    for group in cfg.groups:
        if isinstance(group.mlp, settings.Mlp):
            out["intermediate_size"] = group.mlp.dim
    if isinstance(mixer, settings.Latent):
        return out | _latent_json(cfg, mixer)
    out |= {"num_key_value_heads": mixer.num_kv_heads, "head_dim": mixer.head_dim}
    sparse = [group.mlp for group in cfg.groups if isinstance(group.mlp, settings.Experts)]
    if sparse:
        flags = [
            isinstance(group.mlp, settings.Mlp) for group in cfg.groups for _ in range(group.count)
        ]
        out |= {
            "num_experts": sparse[0].num_experts,
            "num_experts_per_tok": sparse[0].top_k,
            "moe_intermediate_size": sparse[0].dim,
            "norm_topk_prob": sparse[0].normalise,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [i for i, is_dense in enumerate(flags) if is_dense],
        }
        out.setdefault("intermediate_size", sparse[0].dim)  # of no layer, but asked for
    return out


def _latent_json(cfg: settings.Decoder, mixer: settings.Latent) -> dict[str, Any]:
    last = cfg.groups[-1].mlp
    assert isinstance(last, settings.Experts)
    out = {
        "num_key_value_heads": mixer.num_heads,
        "q_lora_rank": mixer.q_rank,
        "kv_lora_rank": mixer.kv_rank,
        "qk_nope_head_dim": mixer.nope_dim,
        "qk_rope_head_dim": mixer.rope_dim,
        "v_head_dim": mixer.value_dim,
        "rope_interleave": mixer.interleaved,
        "first_k_dense_replace": sum(group.count for group in cfg.groups[:-1]),
        "n_routed_experts": last.num_experts,
        "n_shared_experts": last.shared_dim // last.dim,
        "num_experts_per_tok": last.top_k,
        "moe_intermediate_size": last.dim,
        "moe_layer_freq": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "norm_topk_prob": last.normalise,
        "routed_scaling_factor": last.scale,
        "n_group": last.num_groups,
        "topk_group": last.top_groups,
        "num_nextn_predict_layers": cfg.num_mtp,
    }
    if len(cfg.groups) == 1:
        out["intermediate_size"] = last.dim  # of no layer, but asked for
    return out


def _rope_json(cfg: settings.Decoder) -> dict[str, Any]:
    match cfg.rope_scaling:
        case None:
            return {"rope_type": "default", "rope_theta": cfg.rope_theta}
        case settings.Llama3Rope() as scaling:
            return {
                "rope_type": "llama3",
                "rope_theta": cfg.rope_theta,
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
            }
        case settings.Yarn() as scaling:
            out = {
                "rope_type": "yarn",
                "rope_theta": cfg.rope_theta,
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.beta_fast,
                "beta_slow": scaling.beta_slow,
            }
            for name in ("mscale", "mscale_all_dim"):
                if getattr(scaling, name):
                    out[name] = getattr(scaling, name)
            if scaling.attention_factor is not None:
                out["attention_factor"] = scaling.attention_factor
            return out
