"""Monte Carlo tree search over steps of reasoning."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from r1jax.search.paths import Found, Path, Sample, Value, distinct

EXPLORE = 0.5  # times sqrt(log(parent's visits) / visits), beside values from 0 to 1


@dataclass(kw_only=True, eq=False)
class Node:
    """A path, the mean value of all that was found below it, and how it may be continued."""

    path: Path
    parent: "Node | None" = field(default=None, repr=False)
    depth: int = 0
    value: float = 0.0  # its own
    visits: int = 0
    total: float = 0.0  # of the values of its descendants and itself
    closed: bool = False  # nothing below is left to be looked at
    children: list["Node"] = field(default_factory=list)


def tree_search(
    sample: Sample,
    value: Value,
    roots: Sequence[Path],
    *,
    rounds: int,
    branch: int,
    until: str,
    explore: float = EXPLORE,
    max_depth: int | None = None,
) -> list[Found]:
    """For each problem the whole answer of the highest value in a tree grown for `rounds` rounds.

    In a round each problem's tree is walked down from the root to a node without children, always
    to the child with the highest mean value + explore * sqrt(log(visits of its parent) / its
    visits). That node gets up to `branch` children, each one step further (see `beam_search`),
    equal ones once; each child's value, from 0 to 1, goes to it and to all above it. Whole answers
    and nodes `max_depth` steps deep get no children, and what lies wholly above such nodes is not
    walked to again: a tree that has been seen whole is left alone.

    The trees grow in step: a round is one call of `sample` and one of `value` for all problems.
    Where no answer came to an end, the node of the highest value is continued to its end.

    Raises:
      ValueError: `rounds` or `branch` < 1.

    Source: UCT, Kocsis and Szepesvári (2006). R1 reports the search of such trees, guided by a
    value model and with a limit on their growth, as a failure: arXiv:2501.12948v1, section 4.2.
    """
    if rounds < 1 or branch < 1:
        raise ValueError(f"need rounds and branch >= 1, got {rounds} and {branch}")
    trees = [Node(path=root) for root in roots]
    for turn in range(rounds):
        leaves = [_walk(tree, explore) for tree in trees if not tree.closed]
        if not leaves:
            break
        paths = [leaf.path for leaf in leaves]
        groups = [distinct(g) for g in sample(paths, samples=branch, turn=turn, until=until)]
        values = iter(value([path for group in groups for path in group]))
        for leaf, group in zip(leaves, groups, strict=True):
            for path in group:
                _grow(leaf, path, next(values), max_depth)
            _close(leaf)
    return _hand_in(sample, trees, turn=rounds)


def _walk(node: Node, explore: float) -> Node:
    """The node to continue. Ties go to the earlier child."""
    while node.children:
        logarithm = math.log(node.visits)
        node = max(
            (child for child in node.children if not child.closed),
            key=lambda child: (
                child.total / child.visits + explore * math.sqrt(logarithm / child.visits)
            ),
        )
    return node


def _grow(leaf: Node, path: Path, value: float, max_depth: int | None) -> None:
    child = Node(path=path, parent=leaf, depth=leaf.depth + 1, value=value)
    child.closed = not path.open or child.depth == max_depth
    leaf.children.append(child)
    above: Node | None = child
    while above is not None:
        above.visits += 1
        above.total += value
        above = above.parent


def _close(node: Node) -> None:
    """Closes the node and those above it as far as all their children are closed."""
    above: Node | None = node
    while above is not None and all(child.closed for child in above.children):
        above.closed = True
        above = above.parent


def _below(tree: Node) -> Iterator[Node]:
    """All nodes but the root, in the order of reading: a child before those beside it."""
    waiting = tree.children[::-1]
    while waiting:
        node = waiting.pop()
        yield node
        waiting += node.children[::-1]


def _hand_in(sample: Sample, trees: Sequence[Node], *, turn: int) -> list[Found]:
    best = [_best(tree) for tree in trees]
    still = [path for path in best if path.open]
    ends = iter(sample(still, samples=1, turn=turn) if still else [])
    found = []
    for tree, path in zip(trees, best, strict=True):
        chosen = next(ends)[0] if path.open else path
        whole = [node.path for node in _below(tree) if not node.path.open]
        found.append(Found(chosen=chosen, candidates=[*whole, *([chosen] if path.open else [])]))
    return found


def _best(tree: Node) -> Path:
    """Of the answers that ended the one of the highest value; of all nodes if none did."""
    nodes = list(_below(tree))
    finished = [node for node in nodes if node.path.finished]
    return max(finished or nodes, key=lambda node: node.value).path
