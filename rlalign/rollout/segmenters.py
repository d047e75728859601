"""Where a tree of tokens branches: what to draw next, given how far it has grown.

    fixed       after every `segment_length` tokens each branch splits into `branch_factor` ones,
                until it ends, or the tree has `max_leaves`          SPO (arXiv 2505.23564),
                                                                     TreePO (2508.17445)
    surprisal   num_trees whole chains, then num_rounds times: at the num_forks least likely tokens
                of the tree, fork_width continuations each           TreeRL's EPTree (2506.11902)

The number of children of `fixed` depends on nothing that comes after the split, which an unbiased
estimate needs. `surprisal` forks where a sampled token was found to be unlikely, with that token
for one of the children: it selects on the outcome, so a value at a fork is biased towards it, as
published. With `fallback` a tree that lacks leaves, since some ended early, draws as many further
ones from earlier splits, chosen at random (TreePO): the more branches end early, the more of them.

A tree is a function of its own tokens and seeds, whatever grows beside it.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from rlalign.config.schema import TokenTreeConfig
from rlalign.rollout.seeds import segment_seed
from rlalign.types import FINISH_LENGTH, Prompt, Sample

FALLBACK = (-1,)  # no segment's name: of the choice where to draw again


@dataclass(eq=False, slots=True)
class Node:
    """Tokens between two splits, or from one to an end; a root has none.

    `name` is that of the segment it was drawn in, of which it begins at token `start`.
    """

    parent: Node | None
    name: tuple[int, ...] = ()
    start: int = 0
    tokens: tuple[int, ...] = ()
    logp: tuple[float, ...] = ()
    versions: tuple[int, ...] = ()  # policy version of each token
    finish_reason: str = FINISH_LENGTH  # of a leaf
    end: int = 0  # tokens of the completion up to here
    children: list[Node] = field(default_factory=list)

    def cut(self, at: int) -> Node:
        """The node before token `at` of the segment; this one begins there from now on."""
        assert self.parent is not None
        size = at - self.start
        if size == 0:
            return self.parent
        head = Node(
            self.parent, self.name, self.start,
            self.tokens[:size], self.logp[:size], self.versions[:size],
            end=self.end - len(self.tokens) + size, children=[self],
        )  # fmt: skip
        siblings = self.parent.children
        siblings[siblings.index(self)] = head
        self.parent, self.start = head, at
        self.tokens, self.logp = self.tokens[size:], self.logp[size:]
        self.versions = self.versions[size:]
        return head


class Draw(NamedTuple):
    """Children of `node` that are wanted, by the names of their segments."""

    node: Node
    names: list[tuple[int, ...]]
    limit: int  # tokens of each


@dataclass(eq=False, slots=True)
class GrowingTree:
    """Tree `number` of a prompt; a completion has at most `limit` tokens."""

    prompt: Prompt
    number: int
    limit: int
    seed: int
    step: int
    root: Node = field(default_factory=lambda: Node(None))
    rounds: int = 0  # of forking

    def nodes(self) -> Iterator[Node]:
        """Parents before children, each child followed by all that is below it."""
        stack = [self.root]
        while stack:
            node = stack.pop()
            yield node
            stack += reversed(node.children)

    def leaves(self) -> list[Node]:
        return [node for node in self.nodes() if not node.children]

    def prefix(self, node: Node) -> tuple[int, ...]:
        """The prompt, and what was drawn up to the end of `node`."""
        parts = []
        while node.parent is not None:
            parts.append(node.tokens)
            node = node.parent
        return self.prompt.token_ids + tuple(t for part in reversed(parts) for t in part)

    def seed_of(self, name: tuple[int, ...]) -> int:
        return segment_seed(self.seed, self.prompt.id, self.number, name, self.step)

    def grow(self, draw: Draw, samples: list[Sample]) -> None:
        """Attach what came of `draw`."""
        for name, sample in zip(draw.names, samples, strict=True):
            versions = [v.version for v in sample.spans for _ in range(v.num_tokens)]
            child = Node(
                draw.node, name, 0, sample.token_ids, sample.logp, tuple(versions),
                sample.finish_reason, draw.node.end + len(sample.token_ids),
            )  # fmt: skip
            draw.node.children.append(child)


def fixed(tree: GrowingTree, cfg: TokenTreeConfig) -> list[Draw]:
    """The next segment of each branch that goes on. Once nothing can split any more, it is all that
    is left of the completion."""
    leaves = tree.leaves()
    growing = [
        leaf for leaf in leaves if leaf.finish_reason == FINISH_LENGTH and leaf.end < tree.limit
    ]
    if not growing:
        return _reopened(tree, cfg) if cfg.fallback else []
    depth = len(growing[0].name)
    ended = len(leaves) - len(growing)
    counts = _shared_out(len(growing), _factor(cfg, depth), cfg.max_leaves - ended)
    full = ended + sum(counts) >= cfg.max_leaves
    whole = full or all(_factor(cfg, later) == 1 for later in range(depth + 1, cfg.max_depth))
    draws = []
    for node, count in zip(growing, counts, strict=True):
        left = tree.limit - node.end
        names = [(*node.name, child) for child in range(count)]
        length = left if whole else min(_segment_length(tree, node, cfg), left)
        draws.append(Draw(node, names, length))
    return draws


def surprisal(tree: GrowingTree, cfg: TokenTreeConfig) -> list[Draw]:
    """A chain, then continuations before its least likely tokens, and those of what was drawn
    since. A token that has alternatives already is not replaced again."""
    if not tree.root.children:
        return [Draw(tree.root, [(0,)], tree.limit)]
    if tree.rounds == cfg.num_rounds:
        return []
    tree.rounds += 1
    places = [
        (logp, node, node.start + i)
        for node in tree.nodes()
        for i, logp in enumerate(node.logp)
        if i > 0 or (node.parent is not None and len(node.parent.children) == 1)
    ]
    places.sort(key=lambda place: place[0])
    room = cfg.max_leaves - len(tree.leaves())
    forks = []
    for _, node, at in places[: cfg.num_forks]:
        width = min(cfg.fork_width, room)
        room -= width
        forks += [(node, at, width)] if width else []
    draws = []
    for node, at, width in sorted(forks, key=lambda fork: fork[1]):
        parent = node.cut(at)  # what is cut off is before the places that are still to come
        names = [(*node.name, at, child) for child in range(width)]
        draws.append(Draw(parent, names, tree.limit - parent.end))
    return draws


SEGMENTERS: Mapping[str, Callable[[GrowingTree, TokenTreeConfig], list[Draw]]] = {
    "fixed": fixed,
    "surprisal": surprisal,
}


def _segment_length(tree: GrowingTree, node: Node, cfg: TokenTreeConfig) -> int:
    """Up to the place near `segment_length` tokens on at which the cache holds all but one token
    of the beginning: the last is computed again, for its prediction, and with it its whole block.
    """
    if not cfg.align:
        return cfg.segment_length
    here = len(tree.prompt.token_ids) + node.end
    blocks = max(round((here + cfg.segment_length - 1) / cfg.align), (here - 1) // cfg.align + 1)
    return blocks * cfg.align + 1 - here


def _factor(cfg: TokenTreeConfig, depth: int) -> int:
    """Children of a node at `depth`."""
    return cfg.branch_factor[min(depth, len(cfg.branch_factor) - 1)]


def _shared_out(nodes: int, factor: int, leaves: int) -> list[int]:
    """Children of each node, at least 1 and at most `factor`, in turn while there is room."""
    extra = max(min(nodes * factor, leaves) - nodes, 0)
    return [1 + extra // nodes + (i < extra % nodes) for i in range(nodes)]


def _reopened(tree: GrowingTree, cfg: TokenTreeConfig) -> list[Draw]:
    wanted = math.prod(_factor(cfg, depth) for depth in range(cfg.max_depth))
    missing = min(wanted, cfg.max_leaves) - len(tree.leaves())
    inner = [node for node in tree.nodes() if node.children]
    chosen = random.Random(tree.seed_of(FALLBACK)).choices(range(len(inner)), k=max(missing, 0))
    draws = []
    for i, count in sorted(Counter(chosen).items()):
        node = inner[i]
        first = len(node.children)
        names = [(*node.name, first + child) for child in range(count)]
        draws.append(Draw(node, names, tree.limit - node.end))
    return draws
