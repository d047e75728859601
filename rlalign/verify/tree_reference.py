"""Credit in trees again, as recursion over linked nodes in Python floats, sharing nothing with the
shipped code.

Plain on purpose, like reference.py. What a published rule says of "the leaves under a node" is a
list here; `cfg` is a resolved AlgoConfig, read for its settings only. Dead: without a leaf of
finite reward.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rlalign.config import AlgoConfig
from rlalign.types import POLICY, Tree


@dataclass(eq=False)
class Node:
    """A node that knows its relatives; `id` is its place in the tensors of the `Tree`."""

    id: int
    parent: Node | None
    depth: int
    tree: int
    group: int
    kind: int
    reward: float
    logp: float
    actions: int
    children: list[Node] = field(default_factory=list)

    def leaves(self) -> list[Node]:
        """The living ones at or under the node."""
        if not self.children:
            return [self] if math.isfinite(self.reward) else []
        return [leaf for child in self.children for leaf in child.leaves()]

    def living_children(self) -> list[Node]:
        return [child for child in self.children if child.leaves()]

    def above(self) -> list[Node]:
        """The ancestors, the nearest first."""
        return [] if self.parent is None else [self.parent, *self.parent.above()]

    def trains(self) -> bool:
        return self.kind == POLICY and bool(self.leaves())


def linked(tree: Tree, *, one_root: bool = False) -> list[Node]:
    """The nodes of `tree`, in its order. one_root: what lies below the roots of a group hangs
    below the first of them."""
    nodes: list[Node] = []
    first: dict[int, Node] = {}
    columns = (tree.depth_N, tree.tree_N, tree.group_N, tree.kind_N, tree.reward_N, tree.logp_N)
    rows = zip(
        tree.parent_N.tolist(),
        *(column.tolist() for column in (*columns, tree.num_actions_N)),
        strict=True,
    )
    for i, (above, *values) in enumerate(rows):
        parent = nodes[above] if above >= 0 else None
        node = Node(i, parent, *values)
        nodes.append(node)
        if parent is None:
            first.setdefault(node.group, node)
        else:
            if one_root and parent.parent is None:
                node.parent = first[node.group]
            assert node.parent is not None
            node.parent.children.append(node)
    if one_root:
        for node in nodes:
            if node.parent is None and node is not first[node.group]:
                node.reward = math.nan
    return nodes


def value(node: Node, cfg: AlgoConfig) -> float:
    """V by `algo.tree.fuse`, of a node with living leaves."""
    section = cfg.tree

    def edge(n: Node) -> float:
        return section.fuse_beta * n.logp * (n.actions if section.fuse_logp == "sum" else 1)

    def path(leaf: Node) -> float:
        return 0.0 if leaf is node else edge(leaf) + sum(edge(n) for n in leaf.above() if below(n))

    def below(n: Node) -> bool:
        return node in n.above()

    leaves = node.leaves()
    if not node.children:
        return node.reward
    if section.fuse == "leaf_mean":
        return sum(leaf.reward for leaf in leaves) / len(leaves)
    if section.fuse == "path_softmax":
        weight = [math.exp(path(leaf)) for leaf in leaves]
        return sum(w * n.reward for w, n in zip(weight, leaves, strict=True)) / sum(weight)
    children = node.living_children()
    weight = [math.exp(edge(n)) if section.fuse == "edge_softmax" else 1.0 for n in children]
    return sum(w * value(n, cfg) for w, n in zip(weight, children, strict=True)) / sum(weight)


def omega(node: Node, nodes: Iterable[Node]) -> float:
    """The probability of a walk from a random root of the group to a random living child, ..., to
    end up in the node."""
    if not node.leaves():
        return 0.0
    if node.parent is None:
        return 1 / sum(
            n.parent is None and n.group == node.group and n.leaves() != [] for n in nodes
        )
    return omega(node.parent, nodes) / len(node.parent.living_children())


def tied(values: Sequence[float], cfg: AlgoConfig) -> bool:
    """Whether there is nothing to compare."""
    largest = max((abs(v) for v in values), default=0.0)
    return len(values) < 2 or max(values) - min(values) <= cfg.reward_tie_tol * largest


def against(own: float, values: Sequence[float], pool: Sequence[float], cfg: AlgoConfig) -> float:
    """(own - mean) / sd, where `own` is one of `values`; `pool` is what scale_rewards=batch takes
    the sd of."""
    if tied(values, cfg) or statistics.stdev(values) < cfg.tree.std_floor:
        return 0.0
    if cfg.tree.baseline == "loo":
        centred = own - (math.fsum(values) - own) / (len(values) - 1)
    else:
        centred = own - math.fsum(values) / len(values)
    if cfg.scale_rewards == "none":
        return centred
    return centred / (
        statistics.stdev(values if cfg.scale_rewards == "group" else pool) + cfg.adv_eps
    )


def advantages(tree: Tree, cfg: AlgoConfig) -> list[float]:
    """Of each node's edge, by `algo.tree.advantage`; 0 for dead nodes and what is no action."""
    nodes = linked(tree, one_root=cfg.tree.scope == "prompt")
    rule = {
        "depth": _depth,
        "sibling": _sibling,
        "parent": _parent,
        "root_parent": _root_parent,
        "ancestors": _ancestors,
        "leaves": _leaves,
    }[str(cfg.tree.advantage)]
    alive = [n for n in nodes if n.leaves()]
    found = rule(alive, {n: value(n, cfg) for n in alive}, cfg)
    return [found[n] if n.trains() else 0.0 for n in nodes]


def _depth(alive: list[Node], v: dict[Node, float], cfg: AlgoConfig) -> dict[Node, float]:
    def at(n: Node, depth: int) -> bool:
        early = cfg.tree.carry_leaves and not n.children and n.depth < depth
        return n.depth == depth or early

    def same(n: Node, m: Node) -> bool:
        return n.group == m.group if cfg.tree.scope == "prompt" else n.tree == m.tree

    found = {}
    for n in alive:
        pool = [m for m in alive if at(m, n.depth)]
        found[n] = against(v[n], [v[m] for m in pool if same(n, m)], [v[m] for m in pool], cfg)
    return found


def _sibling(alive: list[Node], v: dict[Node, float], cfg: AlgoConfig) -> dict[Node, float]:
    pool = [v[n] for n in alive if n.parent]
    return {
        n: against(v[n], [v[m] for m in n.parent.living_children()], pool, cfg) if n.parent else 0.0
        for n in alive
    }


def _parent(alive: list[Node], v: dict[Node, float], cfg: AlgoConfig) -> dict[Node, float]:
    found = {}
    for n in alive:
        siblings = [v[m] for m in n.parent.living_children()] if n.parent else []
        found[n] = 0.0
        if n.parent and not tied(siblings, cfg):
            spread = statistics.pstdev(siblings) + 1e-8
            found[n] = v[n] - v[n.parent]
            found[n] /= spread if cfg.scale_rewards == "group" else 1.0
    return found


def _root_parent(alive: list[Node], v: dict[Node, float], cfg: AlgoConfig) -> dict[Node, float]:
    reward = {n: n.reward for n in alive}
    of_group = {
        n: [m.reward for m in alive if not m.children and m.group == n.group] for n in alive
    }
    for n in alive:
        if not n.children and len(of_group[n]) > 1:
            n.reward -= (sum(of_group[n]) - reward[n]) / (len(of_group[n]) - 1)
        elif not n.children:
            n.reward = 0.0
    centred = {n: value(n, cfg) for n in alive}
    for n in alive:
        n.reward = reward[n]
    own = {}
    for n in alive:
        own[n] = 0.0
        if n.parent and not tied(of_group[n], cfg):
            both = 2 * centred[n] - centred[n.above()[-1]] - centred[n.parent]
            own[n] = both / math.sqrt(len(n.leaves()))
    tokens = [own[n] for leaf in alive if not leaf.children for n in _spelled(leaf)]
    mean = sum(tokens) / max(len(tokens), 1)
    return {n: a - mean for n, a in own.items()}


def _spelled(leaf: Node) -> list[Node]:
    """The node of each trained token of a leaf, read as a sequence of its own."""
    return [n for n in [leaf, *leaf.above()] if n.trains() for _ in range(n.actions)]


def _ancestors(alive: list[Node], v: dict[Node, float], cfg: AlgoConfig) -> dict[Node, float]:
    own = {}
    for leaf in alive:
        if not leaf.children:
            group = [m.reward for m in alive if not m.children and m.group == leaf.group]
            means = [
                leaf.reward - sum(m.reward for m in above.leaves()) / len(above.leaves())
                for above in leaf.above()
                if len(above.leaves()) > 1 or above.parent is None
            ]
            own[leaf] = 0.0 if tied(group, cfg) or not means else sum(means) / len(means)
    if cfg.scale_rewards != "none":
        tokens = [a for leaf, a in own.items() for _ in _spelled(leaf)]
        spread = statistics.stdev(tokens) if len(tokens) > 1 else 0.0
        for leaf, a in own.items():
            silent = spread < cfg.tree.std_floor
            own[leaf] = 0.0 if silent else (a - sum(tokens) / len(tokens)) / (spread + cfg.adv_eps)
    return {n: statistics.fmean(own[leaf] for leaf in n.leaves()) for n in alive}


def _leaves(alive: list[Node], v: dict[Node, float], cfg: AlgoConfig) -> dict[Node, float]:
    leaves = [n for n in alive if not n.children]
    pool, own = [n.reward for n in leaves], {}
    for n in leaves:
        prompt = [m.reward for m in leaves if m.group == n.group]
        tree = [m.reward for m in leaves if m.tree == n.tree]
        own[n] = against(n.reward, prompt, pool, cfg) + against(n.reward, tree, pool, cfg)
    return {n: statistics.fmean(own[leaf] for leaf in n.leaves()) for n in alive}


def weights(
    tree: Tree, keep: Sequence[bool], actions: Sequence[int], cfg: AlgoConfig
) -> list[float]:
    """Each action's share of the loss, by `algo.tree.weight`."""
    nodes = linked(tree)
    kept = [n for n in nodes if keep[n.id] and actions[n.id]]
    groups, found = {n.group for n in kept}, [0.0] * len(nodes)
    for n in kept:
        if cfg.tree.weight == "depth_mean":
            depths = {m.depth for m in kept if m.group == n.group}
            level = [m for m in kept if m.group == n.group and m.depth == n.depth]
            share = omega(n, nodes) / sum(omega(m, nodes) * actions[m.id] for m in level)
            found[n.id] = share / len(depths) / len(groups)
        elif cfg.tree.weight == "omega_sum":
            found[n.id] = omega(n, nodes) / len(groups)
        elif cfg.tree.weight == "edge_mean":
            found[n.id] = 1 / len(kept) / actions[n.id]
        elif cfg.tree.weight == "token_mean":
            found[n.id] = 1 / sum(actions[m.id] for m in kept)
        elif cfg.tree.weight == "leaf_count":
            found[n.id] = len(n.leaves()) / sum(len(m.leaves()) * actions[m.id] for m in kept)
    return found
