"""Which tensor of a Hugging Face folder is which part of which weight."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from r1jax import settings

Path = tuple[Any, ...]  # keys from the root of the tree to a leaf


@dataclass(frozen=True, kw_only=True)
class Place:
    """One tensor of the files and the block of a weight that it fills.

    The tensor, reshaped to `block`, is what the weight has from `at` on. `same_as` names a tensor
    that must hold the same numbers: the file repeats it, the tree does not.
    """

    name: str
    shape: tuple[int, ...]
    path: Path
    block: tuple[int, ...]
    at: tuple[int, ...]
    same_as: str | None = None


def places(cfg: settings.Decoder) -> list[Place]:
    """Every tensor of the model's folder, in the order in which it is written."""
    out = [_whole("model.embed_tokens.weight", ("embed",), (cfg.vocab_size, cfg.dim))]
    number = 0
    for g, group in enumerate(cfg.groups):
        for i in range(group.count):
            out += _layer(cfg, group, f"model.layers.{number}.", ("groups", g), i)
            number += 1
    out.append(_whole("model.norm.weight", ("norm",), (cfg.dim,)))
    if not cfg.tied:
        out.append(_whole("lm_head.weight", ("head",), (cfg.vocab_size, cfg.dim)))
    for i in range(cfg.num_mtp):
        out += _mtp(cfg, f"model.layers.{number + i}.", i)
    return out


def repeats(cfg: settings.Decoder) -> dict[str, str]:
    """Tensors that a folder may hold beside those of `places`, and what they must be equal to."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if cfg.tied else {}


def repeated(name: str, shape: tuple[int, ...], same_as: str) -> Place:
    """A tensor that is only compared with another."""
    return _whole(name, (), shape, same_as)


def _whole(name: str, path: Path, shape: tuple[int, ...], same_as: str | None = None) -> Place:
    at = (0,) * len(shape)
    return Place(name=name, shape=shape, path=path, block=shape, at=at, same_as=same_as)


def _mtp(cfg: settings.Decoder, prefix: str, i: int) -> Iterator[Place]:
    """Module i's own weights, its layer, and its copies of embedding and head."""
    table = (cfg.vocab_size, cfg.dim)
    head = "model.embed_tokens.weight" if cfg.tied else "lm_head.weight"
    yield _whole(f"{prefix}embed_tokens.weight", (), table, same_as="model.embed_tokens.weight")
    for name, file in (("embed_norm", "enorm"), ("hidden_norm", "hnorm")):
        yield _part(f"{prefix}{file}.weight", ("mtp", name), (cfg.dim,), i)
    yield _part(f"{prefix}eh_proj.weight", ("mtp", "join"), (cfg.dim, 2 * cfg.dim), i)
    yield from _layer(cfg, cfg.groups[-1], prefix, ("mtp", "layer"), i)
    yield _part(f"{prefix}shared_head.norm.weight", ("mtp", "norm"), (cfg.dim,), i)
    yield _whole(f"{prefix}shared_head.head.weight", (), table, same_as=head)


def _layer(
    cfg: settings.Decoder, group: settings.Group, prefix: str, root: Path, i: int
) -> Iterator[Place]:
    """Layer i of a stack of equal layers."""
    yield _part(f"{prefix}input_layernorm.weight", (*root, "mixer_norm"), (cfg.dim,), i)
    attention = f"{prefix}self_attn."
    if isinstance(group.mixer, settings.Latent):
        yield from _latent(group.mixer, cfg.dim, attention, (*root, "mixer"), i)
    else:
        yield from _gqa(group.mixer, cfg.dim, attention, (*root, "mixer"), i)
    yield _part(f"{prefix}post_attention_layernorm.weight", (*root, "mlp_norm"), (cfg.dim,), i)
    if isinstance(group.mlp, settings.Experts):
        yield from _experts(group.mlp, cfg.dim, f"{prefix}mlp.", (*root, "mlp"), i)
    else:
        yield from _mlp(group.mlp.dim, cfg.dim, f"{prefix}mlp.", (*root, "mlp"), i)


def _part(
    name: str,
    path: Path,
    block: tuple[int, ...],
    *index: int,
    at: tuple[int, ...] | None = None,
    shape: tuple[int, ...] | None = None,
) -> Place:
    """A tensor that fills the block at `index` of the leading dimensions, which are stacked.

    `block` and `at` speak of the dimensions behind those.
    """
    return Place(
        name=name,
        shape=block if shape is None else shape,
        path=path,
        block=(1,) * len(index) + block,
        at=(*index, *((0,) * len(block) if at is None else at)),
    )


def _gqa(cfg: settings.Attention, dim: int, prefix: str, root: Path, i: int) -> Iterator[Place]:
    kv, head = cfg.num_kv_heads, cfg.head_dim
    per_kv = cfg.num_heads // kv
    # Of qkv[k]: how many rows, and after how many others.
    rows = (("q", per_kv, 0), ("k", 1, per_kv), ("v", 1, per_kv + 1))
    for name, count, begin in rows:
        yield _part(
            f"{prefix}{name}_proj.weight",
            (*root, "qkv"),
            (kv, count, head, dim),
            i,
            at=(0, begin, 0, 0),
            shape=(kv * count * head, dim),
        )
        if cfg.bias:
            yield _part(
                f"{prefix}{name}_proj.bias",
                (*root, "bias"),
                (kv, count, head),
                i,
                at=(0, begin, 0),
                shape=(kv * count * head,),
            )
    yield _part(
        f"{prefix}o_proj.weight",
        (*root, "out"),
        (dim, kv, per_kv, head),
        i,
        shape=(dim, cfg.num_heads * head),
    )
    if cfg.qk_norm:
        yield _part(f"{prefix}q_norm.weight", (*root, "q_norm"), (head,), i)
        yield _part(f"{prefix}k_norm.weight", (*root, "k_norm"), (head,), i)


def _latent(cfg: settings.Latent, dim: int, prefix: str, root: Path, i: int) -> Iterator[Place]:
    heads, query = cfg.num_heads, cfg.nope_dim + cfg.rope_dim

    def up(name: str, leaf: str, size: int, rank: int) -> Place:
        block, shape = (heads, size, rank), (heads * size, rank)
        return _part(f"{prefix}{name}", (*root, leaf), block, i, shape=shape)

    def down(name: str, leaf: str, size: int) -> Place:
        return _part(f"{prefix}{name}", (*root, leaf), (size, dim), i)

    if cfg.q_rank is None:
        yield up("q_proj.weight", "q", query, dim)
    else:
        yield down("q_a_proj.weight", "q_down", cfg.q_rank)
        yield _part(f"{prefix}q_a_layernorm.weight", (*root, "q_norm"), (cfg.q_rank,), i)
        yield up("q_b_proj.weight", "q_up", query, cfg.q_rank)
    yield down("kv_a_proj_with_mqa.weight", "kv_down", cfg.kv_rank + cfg.rope_dim)
    yield _part(f"{prefix}kv_a_layernorm.weight", (*root, "kv_norm"), (cfg.kv_rank,), i)
    yield up("kv_b_proj.weight", "kv_up", cfg.nope_dim + cfg.value_dim, cfg.kv_rank)
    yield _part(
        f"{prefix}o_proj.weight",
        (*root, "out"),
        (dim, heads, cfg.value_dim),
        i,
        shape=(dim, heads * cfg.value_dim),
    )


def _mlp(width: int, dim: int, prefix: str, root: Path, *index: int) -> Iterator[Place]:
    for name, shape in (("gate", (width, dim)), ("up", (width, dim)), ("down", (dim, width))):
        yield _part(f"{prefix}{name}_proj.weight", (*root, name), shape, *index)


def _experts(cfg: settings.Experts, dim: int, prefix: str, root: Path, i: int) -> Iterator[Place]:
    yield _part(f"{prefix}gate.weight", (*root, "router"), (cfg.num_experts, dim), i)
    if cfg.score == "sigmoid":
        name = f"{prefix}gate.e_score_correction_bias"
        yield _part(name, (*root, "router_bias"), (cfg.num_experts,), i)
    for e in range(cfg.num_experts):
        yield from _mlp(cfg.dim, dim, f"{prefix}experts.{e}.", root, i, e)
    if cfg.shared_dim:
        yield from _mlp(cfg.shared_dim, dim, f"{prefix}shared_experts.", (*root, "shared"), i)


def pieces(place: Place, size: int) -> Iterator[tuple[Place, int]]:
    """A tensor cut into runs of its rows: their places, and the row that each begins with.

    A piece has at most `size` numbers if the tensor's layout allows it.
    """
    axis = next((i for i, n in enumerate(place.block) if n > 1), 0)
    count = place.block[axis]
    rows = place.shape[0] // count  # of the tensor, for one step along the axis
    step = max(1, size * count // max(1, prod(place.shape)))
    for begin in range(0, count, step):
        n = min(step, count - begin)
        at = list(place.at)
        at[axis] += begin
        block = (*place.block[:axis], n, *place.block[axis + 1 :])
        shape = (n * rows, *place.shape[1:])
        yield replace(place, shape=shape, block=block, at=tuple(at)), begin * rows


def check_block(place: Place, leaf: tuple[int, ...]) -> None:
    """An invariant of this module: a block lies inside its weight, and holds its tensor."""
    ends = [begin + size for begin, size in zip(place.at, place.block, strict=True)]
    assert all(end <= size for end, size in zip(ends, leaf, strict=True)), (place, leaf)
    assert prod(place.block) == prod(place.shape), place
