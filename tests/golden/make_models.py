"""Makes tests/golden/models: tiny models of every family, and what transformers computes with them.

    python tests/golden/make_models.py [--out FOLDER] [--seed N]

Needs torch and transformers. Each family gets a folder as `save_pretrained` writes it (bfloat16, in
two files) and `expected.safetensors`, all float32 of the same weights:
  tokens [2, T], logits [2, T, V]    plain rows, past the length where a context was extended
  prompt [P], greedy [64]            the greedy continuation of a prompt
  grad.<name>                        gradient of the mean log-probability of tokens[:, 1:]
  mtp_logits [2, T - 1, V]           of the multi-token-prediction module, where there is one
Experts that transformers joins are taken apart as in the files.
"""

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel

LENGTH = 48
PROMPT = 5
NEW = 64
FLOAT32 = "e_score_correction_bias"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
DEEPSEEK = {
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "num_key_value_heads": 4,
    "num_mtp_layers": 1,
}

# Name -> transformers' config.
FAMILIES = {
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen2_yarn": lambda: transformers.Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": lambda: transformers.Qwen3Config(
        **SIZES,
        head_dim=16,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "llama3": lambda: transformers.LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "mistral": lambda: transformers.MistralConfig(**SIZES, head_dim=10, sliding_window=None),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES, **EXPERTS, head_dim=8, num_experts=4, mlp_only_layers=[0]
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SIZES, **EXPERTS, **DEEPSEEK},
        rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    ),
}


def make(name: str, folder: Path, seed: int) -> None:
    """One family's folder and what is expected of it."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        FAMILIES[name](), attn_implementation="eager", experts_implementation="eager"
    )
    model = model.eval().float()
    randomise(model)
    expected = outputs(model)
    extra = {}
    if name == "deepseek_v3":
        extra, expected["mtp_logits"] = mtp(model, expected["tokens"])
    expected |= gradients(model, expected["tokens"])
    shutil.rmtree(folder, ignore_errors=True)
    biases = {key: b.clone() for key, b in model.named_buffers() if key.endswith(FLOAT32)}
    model.to(torch.bfloat16)
    for key, bias in biases.items():
        model.get_submodule(key.removesuffix(f".{FLOAT32}")).register_buffer(FLOAT32, bias)
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "README.md").unlink(missing_ok=True)
    if extra:
        file, index = "model-mtp.safetensors", folder / "model.safetensors.index.json"
        save_file(extra, folder / file, metadata={"format": "pt"})
        content = json.loads(index.read_text())
        content["weight_map"] |= dict.fromkeys(extra, file)
        index.write_text(json.dumps(content, indent=2) + "\n")
    expected = {key: value.contiguous() for key, value in expected.items()}
    save_file(expected, folder / "expected.safetensors")
    for file in folder.iterdir():
        file.chmod(0o644)


def randomise(model: torch.nn.Module) -> None:
    """Weights for which every part of the model matters; nearly all exact in bfloat16."""
    with torch.no_grad():
        for key, weight in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in key:
                continue
            noise = torch.randn_like(weight)
            if "norm" in key:
                weight.copy_(1 + 0.1 * noise)
            elif "bias" in key:
                weight.copy_(0.1 * noise)
            else:
                weight.copy_(noise * weight.shape[-1] ** -0.5)
            if not key.endswith(FLOAT32):
                weight.copy_(weight.bfloat16().float())


def outputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    vocabulary = model.config.vocab_size
    tokens = torch.randint(3, vocabulary, (2, LENGTH))
    prompt = torch.randint(3, vocabulary, (1, PROMPT))
    with torch.no_grad():
        logits = model(tokens, use_cache=False).logits
        text = prompt
        for _ in range(NEW):  # without a cache, and past end tokens
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return {
        "tokens": tokens.int(),
        "logits": logits,
        "prompt": prompt[0].int(),
        "greedy": text[0, PROMPT:].int(),
    }


def mtp(
    model: torch.nn.Module, tokens: torch.Tensor
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tensors of one prediction module, and the logits it gives for the token after next."""
    tokens = tokens.long()
    module = MtpModel(model, 1).eval().float()
    module.set_attn_implementation("eager")
    own = torch.nn.Module()
    own.layers = module.layers
    randomise(own)
    with torch.no_grad():
        hidden = model.model(tokens, use_cache=False).last_hidden_state[:, :-1]
        position = torch.arange(1, tokens.shape[1])[None].expand(len(tokens), -1)
        cache = MtpCache(config=model.config.get_mtp_config())
        hidden = module.forward_layer(0, hidden, position, cache, input_ids=tokens[:, 1:])
        logits = module._project_to_logits(hidden)
    number = model.config.num_hidden_layers
    renamed = {}
    for key, weight in apart({**dict(own.named_parameters()), **dict(own.named_buffers())}).items():
        key = key.removeprefix("layers.0.").removeprefix("mtp_block.")
        key = key.replace("post_norm", "shared_head.norm")
        dtype = torch.float32 if key.endswith(FLOAT32) else torch.bfloat16
        renamed[f"model.layers.{number}.{key}"] = weight.detach().to(dtype).contiguous()
    for name, table in (
        ("embed_tokens", model.model.embed_tokens),
        ("shared_head.head", model.lm_head),
    ):
        renamed[f"model.layers.{number}.{name}.weight"] = table.weight.detach().bfloat16()
    return renamed, logits


def gradients(model: torch.nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    tokens = tokens.long()
    logp = model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    logp.gather(-1, tokens[:, 1:, None]).mean().backward()
    # Copies: when a model is cast, so are its gradients, in place.
    found = {key: weight.grad.clone() for key, weight in model.named_parameters()}
    return {f"grad.{key}": grad for key, grad in apart(found).items()}


def apart(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors named as in the files, where each expert has its own."""
    out = {}
    for key, tensor in tensors.items():
        if key.endswith("experts.gate_up_proj"):
            for e, both in enumerate(tensor):
                base = f"{key.removesuffix('gate_up_proj')}{e}"
                out[f"{base}.gate_proj.weight"], out[f"{base}.up_proj.weight"] = both.chunk(2)
        elif key.endswith("experts.down_proj"):
            for e, one in enumerate(tensor):
                out[f"{key.removesuffix('down_proj')}{e}.down_proj.weight"] = one
        else:
            out[key] = tensor
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "models")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for i, name in enumerate(FAMILIES):
        make(name, args.out / name, args.seed + i)
        total = sum(file.stat().st_size for file in (args.out / name).iterdir())
        print(f"{name}: {math.ceil(total / 1024)} KB")


if __name__ == "__main__":
    main()
