"""Properties of credit in trees: the formulas in loops, and what every rule of credit must obey."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import torch
from torch import Tensor

from rlalign.algos import tree as trees
from rlalign.algos.branch_grpo import tree_credit
from rlalign.algos.tree_shape import full_tree, tree_shape
from rlalign.config import AlgoConfig
from rlalign.types import ENV, ODE, POLICY, ROOT, Tree
from rlalign.verify import tree_reference as reference
from rlalign.verify.cases import config, difference, worst
from rlalign.verify.credit import one_token
from rlalign.verify.table import per_algorithm, shared

BRANCH = "Li et al. 2025, arXiv 2509.06040"
DEFINITION = "definition"
SEEDS = range(6)
REWARDS = (0.0, 1.0, 0.98, 0.25, -0.5)
UNSCORABLE = (math.nan, math.inf)


def random_forest(draw: random.Random, *, max_depth: int = 4, dead: float = 0.15) -> Tree:
    """A few ragged trees, their nodes in any order that has parents first: leaves at all depths, a
    share `dead` of them unscorable, chains, deterministic and forced edges, labels with gaps."""
    rows: list[dict[str, float]] = []
    waiting = []
    for group in draw.sample(range(2, 99), draw.randint(1, 3)):
        for _ in range(draw.randint(1, 3)):
            label = {"parent_N": -1, "depth_N": 0, "tree_N": 3 * len(waiting), "group_N": group}
            waiting.append({**label, "kind_N": ROOT, "logp_N": 0.0, "num_actions_N": 0})
    while waiting:
        row = waiting.pop(draw.randrange(len(waiting)))
        depth = int(row["depth_N"])
        ends = depth == max_depth or (depth > 0 and draw.random() < 0.3)
        reward = draw.choice(UNSCORABLE if draw.random() < dead else REWARDS)
        row["reward_N"] = reward if ends else math.nan
        rows.append(row)
        number = 0 if ends else draw.choice((1, 2, 3))
        for _ in range(number):
            kind = draw.choice((POLICY, POLICY, POLICY, ENV, ODE if number == 1 else POLICY))
            acts = kind == POLICY
            waiting.append(
                {
                    **row,
                    "parent_N": len(rows) - 1,
                    "depth_N": depth + 1,
                    "kind_N": kind,
                    "logp_N": -2 * draw.random() if acts else 0.0,
                    "num_actions_N": draw.randint(1, 4) if kind in (POLICY, ENV) else 0,
                }
            )
    whole = ("reward_N", "logp_N")
    return Tree(
        **{
            field.name: torch.tensor(
                [row[field.name] for row in rows],
                dtype=torch.float32 if field.name in whole else torch.int64,
            )
            for field in dataclasses.fields(Tree)
        }
    )


def forests() -> list[Tree]:
    return [random_forest(random.Random(seed)) for seed in SEEDS]


def rearranged(tree: Tree, order_N: Tensor) -> Tree:
    """The tree with node `order_N[i]` at place i; parents must stay first."""
    place_N = torch.argsort(order_N)
    parent_N = tree.parent_N[order_N]
    moved = {f.name: getattr(tree, f.name)[order_N] for f in dataclasses.fields(Tree)}
    moved["parent_N"] = torch.where(parent_N < 0, parent_N, place_N[parent_N])
    return Tree(**moved)


def without_dead(tree: Tree) -> tuple[Tree, Tensor]:
    """The tree without its dead nodes, and which are left."""
    alive_N = torch.tensor([n.leaves() != [] for n in reference.linked(tree)])
    left = alive_N.nonzero()[:, 0]
    place_N = alive_N.long().cumsum(0) - 1
    parent_N = tree.parent_N[left]
    kept = {f.name: getattr(tree, f.name)[left] for f in dataclasses.fields(Tree)}
    kept["parent_N"] = torch.where(parent_N < 0, parent_N, place_N[parent_N])
    return Tree(**kept), left


def credit(tree: Tree, cfg: AlgoConfig):
    return tree_credit(tree, cfg, tree.num_actions_N)


@per_algorithm(
    "values and advantages of ragged trees = recursion in float64",
    source="the preset's own source",
    bound=1e-9,
    kind="trees",
)
def credits(name: str) -> float:
    cfg, errors = config(name), []
    for tree in forests():
        ours = credit(tree, cfg)
        nodes = reference.linked(tree)
        values = [reference.value(n, cfg) if n.leaves() else 0.0 for n in nodes]
        clipped = torch.tensor(reference.advantages(tree, cfg), dtype=torch.float64).clamp(-5, 5)
        errors += [
            difference(ours.value_N.nan_to_num(0.0), values),
            difference(ours.advantage_N, clipped),
        ]
    return worst(errors)


@per_algorithm(
    "an edge's share of the loss = its definition in loops",
    source="the preset's own source",
    bound=1e-12,
    kind="trees",
)
def shares(name: str) -> float:
    cfg, errors = config(name), []
    for tree in forests():
        ours = credit(tree, cfg)
        keep, actions = ours.keep_N.tolist(), tree.num_actions_N.tolist()
        errors.append(difference(ours.weight_N, reference.weights(tree, keep, actions, cfg)))
        total = float((ours.weight_N * tree.num_actions_N).sum())
        errors.append(abs(total - any(keep)))  # all that trains counts 1
    return worst(errors)


@per_algorithm(
    "moving nodes, relabelling trees and groups: nothing changes",
    source="a sum over a set",
    bound=1e-9,
    kind="trees",
)
def relabelling(name: str) -> float:
    cfg, errors = config(name), []
    for seed, tree in enumerate(forests()):
        generator = torch.Generator().manual_seed(seed)
        order_N = torch.argsort(tree.depth_N + torch.rand(len(tree), generator=generator))
        moved = rearranged(tree, order_N)
        moved = moved.replace(group_N=7000 - moved.group_N, tree_N=7000 - moved.tree_N)
        ours, theirs = credit(tree, cfg), credit(moved, cfg)
        errors += [
            difference(theirs.advantage_N, ours.advantage_N[order_N]),
            difference(theirs.weight_N, ours.weight_N[order_N]),
        ]
    return worst(errors)


@per_algorithm("equal leaves give exactly 0", source=DEFINITION, bound=0.0, kind="trees")
def equal_leaves(name: str) -> float:
    cfg, errors = config(name), []
    for tree, reward in itertools.product(forests(), (0.98, 0.1, 1.0, 0.0, -3.0, 1e9)):
        reward_N = torch.where(tree.reward_N.isfinite(), reward, tree.reward_N)
        errors.append(difference(credit(tree.replace(reward_N=reward_N), cfg).advantage_N, 0.0))
    return worst(errors)


@per_algorithm(
    "an unscorable leaf: as if it had not been sampled",
    source=DEFINITION,
    bound=1e-12,
    kind="trees",
)
def unscorable_leaves(name: str) -> float:
    cfg, errors = config(name), []
    for tree in forests():
        smaller, left = without_dead(tree)
        ours, theirs = credit(tree, cfg), credit(smaller, cfg)
        expected_N = torch.zeros(len(tree), dtype=torch.float64)
        for mine_N, rest in (
            (ours.advantage_N, theirs.advantage_N),
            (ours.weight_N, theirs.weight_N),
        ):
            errors.append(difference(mine_N, expected_N.index_copy(0, left, rest)))
    return worst(errors)


@shared("trees: omega of every full cut of a group adds up to 1", source=BRANCH, bound=1e-12)
def cuts() -> float:
    errors = []
    for tree in forests():
        omega_N, leaf_N = trees.sampling_weights(tree), trees.is_leaf(tree)
        for depth in range(int(tree.depth_N.max()) + 1):
            cut_N = (tree.depth_N == depth) | (leaf_N & (tree.depth_N < depth))
            for group in tree.group_N[trees.living(tree)].unique():
                total = float(omega_N[cut_N & (tree.group_N == group)].sum())
                errors.append(abs(total - 1))
    return worst(errors)


@shared("trees that never branch: bit for bit GRPO's advantages", source=BRANCH, bound=0.0)
def flat() -> float:
    group_R = torch.tensor([7, 3, 90, 3, 7, 90, 7, 11, 7, 90, 7])
    shape, errors = tree_shape(4, [], [2]), []
    for seed, preset in itertools.product(SEEDS, ("dance_grpo", "flow_grpo", "mix_grpo")):
        reward_R = torch.rand(11, generator=torch.Generator().manual_seed(seed))
        reward_R[seed] = math.nan
        tree = full_tree(group_R, shape)
        reward_N = tree.reward_N.clone()
        reward_N[shape.levels(11)[-1]] = reward_R
        cfg = config(preset)
        advantage_N = credit(tree.replace(reward_N=reward_N), cfg).advantage_N
        grpo = one_token(reward_R, group_R, config("grpo", scale_rewards=cfg.scale_rewards))
        errors += [difference(advantage_N[level], grpo) for level in shape.levels(11)[1:]]
    return worst(errors)


LEFT = (0.3, 0.6, 0.45, 0.7, 0.2, 0.55, 0.8)  # the policy: P(left) after each prefix, by length
OUTCOME = (0.125, 0.875, 0.5, 0.25, 1.0, 0.0, 0.75, 0.375)  # the reward of each of the eight paths


def prefixes() -> tuple[list[float], list[float]]:
    """Of the binary policy: the probability of reaching each prefix and its value, in heap order
    (children of i: 2i + 1, 2i + 2)."""
    reach = [1.0] * 15
    for i in range(1, 15):
        left = LEFT[(i - 1) // 2]
        reach[i] = reach[(i - 1) // 2] * (left if i % 2 else 1 - left)
    worth = [0.0] * 7 + list(OUTCOME)
    for i in reversed(range(7)):
        worth[i] = LEFT[i] * worth[2 * i + 1] + (1 - LEFT[i]) * worth[2 * i + 2]
    return reach, worth


def expected_gradient(cfg: AlgoConfig) -> tuple[Tensor, Tensor]:
    """E[sum_e u_e A_e grad log pi(e)] over all trees of the binary policy that split at steps 0
    and 2, by enumeration; and grad J. Both in the logits of `LEFT`: [7]."""
    shape = tree_shape(3, [0, 2], [2], split_last=True)
    actions_FE = torch.tensor(list(itertools.product((0, 1), repeat=shape.num_edges)))
    tree = full_tree(torch.arange(len(actions_FE)), shape, num_actions=1)
    levels = shape.levels(len(actions_FE))
    place_N = torch.zeros(len(tree), dtype=torch.int64)
    action_N, column = torch.zeros_like(place_N), 0
    for level, width in zip(levels[1:], shape.widths[1:], strict=True):
        action_N[level] = actions_FE[:, column : column + width].flatten()
        place_N[level] = 2 * place_N[tree.parent_N[level]] + 1 + action_N[level]
        column += width
    reward_N = torch.tensor([math.nan] * 7 + list(OUTCOME))[place_N]
    found = credit(tree.replace(reward_N=reward_N), cfg)

    edge_N, from_N = tree.parent_N >= 0, (place_N - 1).clamp(min=0) // 2
    left_N = torch.tensor(LEFT, dtype=torch.float64)[from_N]
    logp_N = torch.where(action_N == 0, left_N, 1 - left_N).log() * edge_N
    probability_F = torch.zeros(len(actions_FE), dtype=torch.float64)
    probability_F = probability_F.index_add(0, tree.tree_N, logp_N).exp()
    score_N = torch.where(action_N == 0, 1 - left_N, -left_N)  # d log pi / d logit
    part_N = found.weight_N * found.advantage_N * score_N * probability_F[tree.tree_N]
    # the weights are shares among all trees, each of which stands for itself here
    mean_7 = torch.zeros(7, dtype=torch.float64).index_add(0, from_N, part_N) * len(actions_FE)

    reach, worth = prefixes()
    slope = [
        reach[i] * LEFT[i] * (1 - LEFT[i]) * (worth[2 * i + 1] - worth[2 * i + 2]) for i in range(7)
    ]
    return mean_7, torch.tensor(slope, dtype=torch.float64)


def plain(weight: str) -> AlgoConfig:
    """Nothing divides the advantages."""
    return config("branch_grpo", scale_rewards="none", tree={"weight": weight, "baseline": "loo"})


@shared("trees: omega_sum and the mean of the others: E = grad J", source=BRANCH, bound=1e-12)
def unbiased() -> float:
    mean_7, slope_7 = expected_gradient(plain("omega_sum"))
    return difference(mean_7, slope_7)


@shared(
    "trees: edge_mean weighs depths by their width, depth_mean equally",
    source=BRANCH,
    bound=1e-12,
)
def weighted_depths() -> float:
    depth_7 = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    width_7 = torch.tensor([2.0, 2.0, 4.0], dtype=torch.float64)[depth_7]
    edge_7, slope_7 = expected_gradient(plain("edge_mean"))
    mean_7, _ = expected_gradient(plain("depth_mean"))
    return worst([difference(edge_7, slope_7 * width_7 / 8), difference(mean_7, slope_7 / 3)])
