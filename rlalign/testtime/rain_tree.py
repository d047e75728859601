"""RAIN's tree: nodes, selection, backup, and when a node gets another child. Nothing here talks to
a model.

    select    argmax_i  q_i + c p_i sqrt(sum_j n_j) / (1 + n_i)          j: the siblings and i
    backup    n += 1,  q += (v - q) / n          on the path, leaf to root
              similar siblings x, s = cos(e_y, e_x) >= theta:  w = gamma s,
              n_x += w,  q_x += w (v - q_x) / n_x

Li et al., RAIN, ICLR 2024 (arXiv 2309.07124), Eqs. 1 and 2. `official` rules are those of the
published code: a child that was never visited counts as -1 instead of 0, c on a scale of [0, 1],
the parent's own n under the root, ties to the first.

Shapes: P nodes of a path, K children, D dimensions of an embedding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Vector = np.ndarray  # [D]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A set of tokens and its probability among what it was drawn from. `ends`: the answer ends
    with it."""

    tokens: tuple[int, ...]
    p: float
    ends: bool = False


@dataclass(slots=True, eq=False)
class Node:
    """A set of tokens after those of its ancestors.

    `visits` are searches that passed it; `n` adds what similar siblings lent; `q` in [-1, 1] is the
    mean value. `reserve`: candidates for later. `rollout`: what followed when it was scored.
    """

    id: int
    candidate: Candidate
    prior: float
    parent: Node | None
    depth: int
    n: float = 0.0
    visits: int = 0
    q: float = 0.0
    embedding: Vector | None = None
    children: list[Node] = field(default_factory=list)
    reserve: list[Candidate] = field(default_factory=list)
    rollout: tuple[int, ...] = ()
    num_rollouts: int = 0
    num_draws: int = 0
    committed: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.candidate.tokens


class Tree:
    """The tree of one answer. `root` is the last node committed; its first root, the query, has no
    tokens. `limit` bounds the nodes that are remembered for the report."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: list[Node] = []
        self.num_nodes = 0
        self.root = self._new(Candidate((), 1.0), 1.0, None)
        self.committed: tuple[int, ...] = ()
        self.commits: list[dict[str, Any]] = []
        self._mark(self.root)

    def expand(
        self, node: Node, candidates: Sequence[Candidate], reserve: Sequence[Candidate], mix: float
    ) -> None:
        """Give `node` its children, with priors that add up to 1."""
        total = sum(candidate.p for candidate in candidates)
        node.children = [
            self._new(candidate, candidate.p / total, node) for candidate in candidates
        ]
        node.reserve = list(reserve)
        if node is self.root:
            mix_priors(node.children, mix)

    def add(self, node: Node, candidate: Candidate) -> None:
        """One more child; the priors of the others stay."""
        total = candidate.p + sum(child.candidate.p for child in node.children)
        node.children.append(self._new(candidate, candidate.p / total, node))

    def commit(self, node: Node, mix: float, **facts: Any) -> None:
        """Make a child of the root the root: it keeps its subtree, its siblings are let go."""
        for sibling in self.root.children:
            if sibling is not node:
                forget(sibling)
        self.root.children = [node]
        self.root = node
        self.committed += node.tokens
        self.commits.append({"node": node.id, **facts})
        self._mark(node)
        mix_priors(node.children, mix)

    def nodes(self) -> list[Node]:
        """Those kept for the report, in the order in which they were made."""
        return self._kept

    def _new(self, candidate: Candidate, prior: float, parent: Node | None) -> Node:
        depth = 0 if parent is None else parent.depth + 1
        node = Node(self.num_nodes, candidate, prior, parent, depth)
        self.num_nodes += 1
        if len(self._kept) < self._limit:
            self._kept.append(node)
        return node

    def _mark(self, node: Node) -> None:
        node.committed = True
        if self._limit and node.id >= self._limit:
            self._kept.append(node)


def mix_priors(children: Sequence[Node], share: float) -> None:
    """p <- (1 - share) p + share / K."""
    for child in children:
        child.prior = (1 - share) * child.prior + share / len(children)


def forget(node: Node) -> None:
    """Let go of what only a search needs, of a node and all below it."""
    stack = [node]
    while stack:
        node = stack.pop()
        stack += node.children
        node.embedding, node.children, node.reserve, node.rollout = None, [], [], ()


def select(parent: Node, c: float, *, official: bool) -> Node:
    """The child to go down to; of equals the likeliest (official: the first)."""
    children = parent.children
    if official:
        spread = math.sqrt(parent.n)
        return max(children, key=lambda x: normalised(x) + c * x.prior * spread / (1 + x.n))
    spread = math.sqrt(sum(child.n for child in children))
    return max(children, key=lambda x: (x.q + c * x.prior * spread / (1 + x.n), x.prior))


def normalised(node: Node) -> float:
    """q on [0, 1], 0 for what was never visited. The published code divides by a running range that
    begins at [-1, 1]; no value leaves it, so it never widens."""
    return (node.q + 1) / (2 + 1e-5) if node.n else 0.0


def best_child(node: Node, *, official: bool) -> Node:
    """The one to commit: that with the most visits n, then q, then prior (official: the first of
    equals)."""
    if official:
        return max(node.children, key=lambda child: (child.n, child.q))
    return max(node.children, key=lambda child: (child.n, child.q, child.prior))


def backup(
    path: Sequence[Node],
    value: float,
    embeddings: Sequence[Vector | None],
    *,
    gamma: float,
    threshold: float,
) -> None:
    """Enter the value of the leaf of a path (the root first) into its nodes. `embeddings` are those
    of the path's nodes but the root; None: there is none."""
    vectors = [None, *embeddings]
    for node, vector in zip(reversed(path), reversed(vectors), strict=True):
        node.n += 1
        node.visits += 1
        if vector is not None and node.parent is not None:
            absorb(node, vector)
            for sibling in node.parent.children:
                if sibling is not node:
                    lend_similar(node, sibling, value, gamma, threshold)
        node.q += (value - node.q) / node.n


def absorb(node: Node, vector: Vector) -> None:
    """Take a vector into the mean over the node's visits."""
    if node.embedding is None:
        node.embedding = vector.copy()
    else:
        node.embedding += (vector - node.embedding) / node.visits


def lend_similar(node: Node, sibling: Node, value: float, gamma: float, threshold: float) -> None:
    """What `node` was found to be worth is, in part, what a similar sibling is worth."""
    if node.embedding is None or sibling.embedding is None or gamma == 0:
        return
    similarity = cosine(node.embedding, sibling.embedding)
    if similarity >= threshold and similarity > 0:
        weight = gamma * similarity
        sibling.n += weight
        sibling.q += weight / sibling.n * (value - sibling.q)


def cosine(a: Vector, b: Vector) -> float:
    """In [-1, 1]; 0 where one of them is zero."""
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / size if size else 0.0


def wants_child(node: Node, most: int, factor: float, value_limit: float) -> bool:
    """Whether all children were seen, all are alike and none is good: there should be another.

    Alike: the norm of the unbiased variance of their embeddings is below `factor` a token of the
    first child's set."""
    children = node.children
    if not 2 <= len(children) < most or max(child.q for child in children) >= value_limit:
        return False
    seen = [child.embedding for child in children if child.embedding is not None]
    if len(seen) < len(children):
        return False
    variance_D = np.stack(seen).var(axis=0, ddof=1)
    return float(np.linalg.norm(variance_D)) < factor * len(children[0].tokens)


def lend(path: Sequence[Node]) -> list[tuple[Node, float, float]]:
    """Virtual loss: count a path as visited and lost until its value is known. Returns what to give
    to `restore`, last lent first."""
    before = [(node, node.n, node.q) for node in path]
    for node in path:
        node.n += 1
        node.q += (-1 - node.q) / node.n
    return before


def restore(before: Sequence[tuple[Node, float, float]]) -> None:
    for node, n, q in before:
        node.n, node.q = n, q


def make_trace(tree: Tree, tokenizer: Any) -> dict[str, Any]:
    """The tree as JSON, for a page; nothing where no node is kept."""
    kept = tree.nodes()
    if not kept:
        return {}
    texts = tokenizer.batch_decode(
        [list(node.tokens) for node in kept],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    nodes = [
        {
            "id": node.id, "parent": -1 if node.parent is None else node.parent.id, "text": text,
            "n": node.n, "visits": node.visits, "q": node.q, "p": node.prior, "depth": node.depth,
            "committed": node.committed, "terminal": node.candidate.ends,
        }
        for node, text in zip(kept, texts, strict=True)
    ]  # fmt: skip
    dropped = tree.num_nodes - len(kept)
    return {"method": "rain", "commits": tree.commits, "nodes": nodes, "dropped": dropped}
