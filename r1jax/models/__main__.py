"""The published models that are known by name, with their sizes.

python -m r1jax.models
python -m r1jax.models qwen2.5-7b
"""

import argparse
from collections.abc import Sequence

from r1jax.config import one_line_errors
from r1jax.models.zoo import MODELS


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a line for each model."""
    parser = argparse.ArgumentParser(
        prog="python -m r1jax.models",
        description="Prints the weights of each known model in billions: all of them, and those "
        "that one token meets (multi-token-prediction modules apart).",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    names = parser.parse_args(arguments).names or list(MODELS)
    for name in names:
        if name not in MODELS:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(MODELS)}")

    from r1jax.models.decoder import count_weights

    print(f"{'model':<20}{'total':>10}{'active':>10}{'layers':>8}{'width':>8}{'tokens':>9}")
    for name in names:
        cfg = MODELS[name]
        count = count_weights(cfg)
        layers = sum(group.count for group in cfg.groups)
        total, active = f"{count.total / 1e9:.2f}", f"{count.active / 1e9:.2f}"
        print(f"{name:<20}{total:>10}{active:>10}{layers:>8}{cfg.dim:>8}{cfg.vocab_size:>9}")


if __name__ == "__main__":
    main()
