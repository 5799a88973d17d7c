"""A run's checkpoint, or another Hugging Face folder, as a Hugging Face folder.

python -m r1jax.convert runs/countdown_tiny exported --dtype bfloat16
python -m r1jax.convert DeepSeek-V3 DeepSeek-V3-bf16
python -m r1jax.convert Qwen2.5-7B merged --adapters adapters.safetensors --scale 2
python -m r1jax.convert runs/countdown_tiny_lora adapters.safetensors --adapters-only

FP8 weights become bfloat16 unless --dtype says otherwise.
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from r1jax import restore, settings
from r1jax.config import one_line_errors

DTYPES = ("float32", "bfloat16", "float16")
# What a folder holds beside config and weights, and goes along unchanged.
ALONG = ("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json")
ALONG = (*ALONG, "chat_template*", "generation_config.json")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m r1jax.convert",
        description="Writes a Hugging Face folder from a run's checkpoint or from another such "
        "folder.",
    )
    parser.add_argument("source", type=Path, metavar="FROM", help="a run's folder, or one of a hub")
    parser.add_argument("target", type=Path, metavar="TO", help="a new folder or file")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as they are")
    parser.add_argument("--stage", metavar="NAME", help="of a run; default: the last with weights")
    parser.add_argument(
        "--checkpoint",
        type=restore.which,
        default="last",
        metavar="last|best|STEP",
        help="of a run",
    )
    parser.add_argument("--adapters", type=Path, metavar="FILE", help="LoRA weights to merge")
    parser.add_argument(
        "--adapters-only",
        action="store_true",
        help="of a run's stage: TO is a file, of the adapters that it trained; scale 1 merges them",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the adapters")
    return parser


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command."""
    args = parser().parse_args(arguments)
    if not args.source.is_dir():
        raise ValueError(f"no such folder: {args.source}")
    if args.target.exists():
        kind = "file" if args.adapters_only else "folder"
        raise ValueError(f"{args.target}: exists; need a new {kind}")

    from r1jax.models import hf, lora

    adapters = None if args.adapters is None else lora.read(args.adapters)
    published = not (args.source / "config.py").is_file()  # which a run's folder has
    if args.adapters_only and (published or args.adapters or args.dtype):
        raise ValueError("--adapters-only is for a run's folder, without --adapters and --dtype")
    if published:
        cfg, params = hf.load(args.source, dtype=args.dtype)
        tokenizer = None
    else:
        run = restore.open_run(args.source, stage=args.stage, checkpoint=args.checkpoint)
        cfg, params, tokenizer = run.run.model, run.params, run.tokenizer
        if args.adapters_only:
            stage = run.stage
            if not isinstance(stage, settings.Trained) or stage.lora is None:
                raise ValueError(f"{args.source}: stage {stage.name} trained no adapters")
            lora.write(args.target, run.adapters, scale=stage.lora.scale)
            print(args.target)
            return
    if adapters is not None:
        params = lora.merge(params, adapters, scale=args.scale)
    if args.dtype is not None:
        params = _cast(params, args.dtype)
    hf.save(args.target, cfg, params, tokenizer)
    if published:
        for pattern in ALONG:
            for file in args.source.glob(pattern):
                shutil.copy(file, args.target)
    print(args.target)


def _cast(params: Any, dtype: str) -> Any:
    """The weights in another dtype; a router's bias stays float32."""
    import jax

    from r1jax.models.hf import FLOAT32

    def one(path: Any, weight: jax.Array) -> jax.Array:
        return weight if FLOAT32 in jax.tree_util.keystr(path) else weight.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, params)


if __name__ == "__main__":
    main()
