"""BranchGRPO as a whole: settings, what is refused, and the gradient that it estimates."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign import algos
from rlalign.algos import AlgoError
from rlalign.algos.branch_grpo import explained_variance, tree_credit
from rlalign.algos.tree import fuse, is_leaf
from rlalign.algos.tree_shape import full_tree, tree_shape
from rlalign.config import AlgoConfig
from rlalign.types import Tree
from rlalign.verify import tree_reference as reference
from rlalign.verify.cases import config
from rlalign.verify.trees import random_forest

FORESTS = st.randoms(use_true_random=False).map(random_forest)


def ones(tree: Tree) -> torch.Tensor:
    return torch.ones(len(tree), dtype=torch.int64)


@pytest.mark.parametrize(
    ("compat", "fuse_", "weight"),
    [
        ("rlalign", "child_mean", "depth_mean"),
        ("paper", "path_softmax", "edge_mean"),
        ("official", "leaf_mean", "edge_mean"),
    ],
)
def test_three_accounts_of_branch_grpo(compat, fuse_, weight):
    cfg = config("branch_grpo", tree={"compat": compat})
    assert (cfg.tree.fuse, cfg.tree.weight) == (fuse_, weight)
    assert (cfg.tree.advantage, cfg.tree.scope) == ("depth", "tree")
    own = config("branch_grpo", tree={"compat": compat, "weight": "omega_sum", "fuse": "leaf_mean"})
    assert (own.tree.fuse, own.tree.weight) == ("leaf_mean", "omega_sum")  # what is set, stays
    assert algos.resolve(cfg) == cfg
    other = config("spo", tree={"compat": compat})
    assert (other.tree.fuse, other.tree.weight) == ("child_mean", "token_mean")


def test_flat_methods_for_flow_models_are_trees_compared_over_the_prompt():
    for name in ("dance_grpo", "flow_grpo", "mix_grpo"):
        section = config(name).tree
        found = (section.advantage, section.scope, section.weight, section.fuse)
        assert found == ("depth", "prompt", "edge_mean", "child_mean")


def test_what_a_tree_preset_expands_to_is_printed():
    printed = dict(algos.expansion("tree_rl"))
    assert printed["tree.advantage"] == "root_parent" and printed["tree.scope"] == "prompt"
    assert not any(key.startswith("tree.") for key in dict(algos.expansion("grpo")))


def test_any_preset_gives_credit_in_trees_when_told_to():
    cfg = algos.resolve(AlgoConfig(loss_type="grpo", adv_estimator="tree"))
    assert (cfg.loss_agg_mode, cfg.scale_rewards) == ("token-mean", "group")
    assert cfg.tree.advantage == "depth"


WINDOW = {"size": 4, "start": 10, "direction": "later", "stop": 20, "interval": 30}


@pytest.mark.parametrize(
    ("fields", "tree", "says"),
    [
        ({"importance_sampling_level": "sequence"}, {}, "no sequences"),
        ({"loss_agg_mode": "seq-mean-token-mean"}, {}, "algo.tree.weight says"),
        ({"prompt_weighting": "prompt"}, {}, "prompt_weighting=prompt have no effect"),
        ({"normalize_advantages": True}, {}, "normalize_advantages=True"),
        ({"singleton_advantage": "raw"}, {}, "singleton_advantage=raw"),
        ({"kl_in": "reward"}, {}, "use kl_in=loss"),
        ({"scale_rewards": "batch"}, {"advantage": "parent"}, "scale_rewards=batch is nothing"),
        ({"scale_rewards": "group"}, {"advantage": "root_parent"}, "scale_rewards=group is"),
        ({"scale_rewards": "group"}, {"advantage": "ancestors"}, "ancestors batch or none"),
        ({}, {"advantage": "parent", "baseline": "loo"}, "baseline=loo has no effect"),
        ({}, {"advantage": "sibling", "carry_leaves": True}, "use advantage=depth"),
        ({}, {"depth_prune": {**WINDOW, "start": 18}}, "reach beyond stop=20"),
        ({}, {"depth_prune": {**WINDOW, "direction": "earlier"}}, "lies before stop=20"),
    ],
)
def test_combinations_without_sense_are_refused_with_the_reason(fields, tree, says):
    cfg = AlgoConfig(loss_type="branch_grpo", **fields)
    tree = dict(tree)
    if "depth_prune" in tree:
        window = dataclasses.replace(cfg.tree.depth_prune, **tree.pop("depth_prune"))
        tree["depth_prune"] = window
    with pytest.raises(AlgoError, match=says):
        algos.resolve(dataclasses.replace(cfg, tree=dataclasses.replace(cfg.tree, **tree)))


def test_an_allocator_does_not_shape_trees():
    cfg = AlgoConfig(loss_type="branch_grpo")
    section = dataclasses.replace(cfg.allocation, allocator="gvm")
    with pytest.raises(AlgoError, match="is the shape of its trees"):
        algos.resolve(dataclasses.replace(cfg, allocation=section))


def test_settings_of_trees_are_nobody_elses_business():
    flat = AlgoConfig(loss_type="grpo", kl_in="reward", prompt_weighting="prompt", beta=0.0)
    carried = dataclasses.replace(flat.tree, carry_leaves=True, advantage="sibling")
    algos.resolve(dataclasses.replace(flat, tree=carried))


VOCABULARY, STEPS = 3, 4
TABULAR = tree_shape(STEPS, [0, 2], [2])


def policy(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs [prefix, action] of all prefixes shorter than STEPS, and the rewards [path]."""
    prefixes = sum(VOCABULARY**length for length in range(STEPS))
    logits = torch.randn(prefixes, VOCABULARY, generator=generator, dtype=torch.float64)
    rewards = torch.randint(0, 9, (VOCABULARY**STEPS,), generator=generator) / 8
    return logits.log_softmax(1), rewards


def true_gradient(logp: torch.Tensor, rewards: torch.Tensor) -> torch.Tensor:
    """d J / d logits by enumeration: [prefix, action]."""
    logits = logp.clone().requires_grad_(True)
    reach, first = torch.ones(1, dtype=torch.float64), 0
    for length in range(STEPS):
        number = VOCABULARY**length
        level = logits[first : first + number].log_softmax(1)
        reach = (reach[:, None] * level.exp()).flatten()
        first += number
    (slope,) = torch.autograd.grad((reach * rewards).sum(), logits)
    return slope


def sampled(logp: torch.Tensor, rewards: torch.Tensor, trees_: int, generator: torch.Generator):
    """Many trees of the policy, and the prefix and action of each edge."""
    tree = full_tree(torch.arange(trees_), TABULAR)
    path_N, action_N = torch.zeros(len(tree), dtype=torch.int64), ones(tree)
    prefix_N, first = torch.zeros_like(path_N), 0
    for length, level in enumerate(TABULAR.levels(trees_)[1:]):
        parent = tree.parent_N[level]
        prefix_N[level] = first + path_N[parent]
        action = torch.multinomial(logp[prefix_N[level]].exp(), 1, generator=generator)[:, 0]
        action_N[level], path_N[level] = action, VOCABULARY * path_N[parent] + action
        first += VOCABULARY**length
    reward_N = torch.where(is_leaf(tree), rewards[path_N], torch.nan)
    return tree.replace(reward_N=reward_N.float()), prefix_N, action_N


def estimated(weight: str, trees_: int = 40_000, baseline: str = "loo") -> dict[str, torch.Tensor]:
    """The estimate and the truth, as vectors."""
    generator = torch.Generator().manual_seed(0)
    logp, rewards = policy(generator)
    tree, prefix_N, action_N = sampled(logp, rewards, trees_, generator)
    section = {"weight": weight, "baseline": baseline}
    cfg = config("branch_grpo", scale_rewards="none", tree=section)
    credit = tree_credit(tree, cfg, ones(tree))
    share_N = (credit.weight_N * credit.advantage_N)[:, None]
    score = torch.nn.functional.one_hot(action_N, VOCABULARY) - logp[prefix_N].exp()
    estimate = torch.zeros_like(logp).index_add(0, prefix_N, share_N * score)
    return {"estimate": estimate.flatten(), "truth": true_gradient(logp, rewards).flatten()}


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def depth_of_prefixes() -> torch.Tensor:
    return torch.cat(
        [torch.full((VOCABULARY**length * VOCABULARY,), length) for length in range(STEPS)]
    )


def test_the_policy_gradient_is_estimated_without_bias():
    found = estimated("omega_sum")
    assert cosine(found["estimate"], found["truth"]) > 0.999
    scale = float(found["estimate"] @ found["truth"] / (found["truth"] @ found["truth"]))
    assert scale == pytest.approx(1, abs=0.01)


def test_the_mean_as_a_baseline_only_rescales_a_depth():
    """By 1 - 1/W_d, since a node is one of those whose mean is taken off."""
    found = estimated("omega_sum", baseline="mean")
    width = torch.tensor(TABULAR.widths[1:], dtype=torch.float64)[depth_of_prefixes()]
    assert cosine(found["estimate"], found["truth"] * (1 - 1 / width)) > 0.999


def test_a_mean_over_edges_is_another_objective():
    found, width = estimated("edge_mean"), torch.tensor(TABULAR.widths[1:]).double()
    reweighted = found["truth"] * width[depth_of_prefixes()] / TABULAR.num_edges
    assert cosine(found["estimate"], reweighted) > 0.999
    assert cosine(found["estimate"], found["truth"]) < 0.99
    torch.testing.assert_close(found["estimate"].norm(), reweighted.norm(), rtol=0.02, atol=0)


def test_a_mean_over_depths_is_the_policy_gradient_up_to_the_number_of_depths():
    found = estimated("depth_mean")
    assert cosine(found["estimate"], found["truth"]) > 0.999
    torch.testing.assert_close(
        found["estimate"].norm(), found["truth"].norm() / STEPS, rtol=0.02, atol=0
    )


def with_rewards(shape, groups, rewards) -> Tree:
    tree = full_tree(torch.tensor(groups), shape)
    reward_N = tree.reward_N.clone()
    reward_N[shape.levels(len(groups))[-1]] = torch.tensor(rewards)
    return tree.replace(reward_N=reward_N)


def test_advantages_are_clipped_in_the_loss_only_where_a_bound_is_set():
    shape = tree_shape(1, [0], [40], split_last=True)
    tree = with_rewards(shape, [0], [1.0] + [0.0] * 39)
    z = (1 - 1 / 40) / math.sqrt((1 - 1 / 40) ** 2 / 39 + 39 * (1 / 40) ** 2 / 39)
    assert z > 5
    for bound, expected in ((5.0, 5.0), (2.0, 2.0), (0.0, z)):
        cfg = config("branch_grpo", adv_eps=0.0, tree={"advantage_clip": bound})
        assert float(tree_credit(tree, cfg, ones(tree)).advantage_N[1]) == pytest.approx(expected)


def test_spo_leaves_out_what_has_no_advantage():
    shape = tree_shape(3, [0, 2], [2], split_last=True)
    tree = with_rewards(shape, [0, 8], [1.0, 0.0, 0.0, 0.0] + [1.0] * 4)
    # of the first tree: both halves and the two leaves that differ; chains and the second: nothing
    differ = [False, True, True, False, False, True, True, False, False]
    place_N = tree.tree_N == 0
    credit = tree_credit(tree, config("spo"), 3 * ones(tree))
    assert credit.keep_N[place_N].tolist() == differ
    assert not bool(credit.keep_N[~place_N].any())
    assert credit.weight_N[credit.keep_N].tolist() == pytest.approx([1 / 12] * 4)
    counted = tree_credit(tree, config("spo", tree={"drop_zero": False}), 3 * ones(tree))
    assert counted.weight_N[tree.depth_N > 0].tolist() == pytest.approx([1 / 48] * 16)


def test_which_split_decides_is_seen_in_the_explained_variance():
    shape = tree_shape(4, [0, 2], [2])
    first = with_rewards(shape, [0], [1.0, 1.0, 0.0, 0.0])
    second = with_rewards(shape, [0], [1.0, 0.0, 1.0, 0.0])
    both = with_rewards(shape, [0], [1.0, 0.0, 0.0, 0.0])  # 3/16 in all, 1/16 between the halves
    equal = with_rewards(shape, [0, 0], [0.98] * 8)
    assert list(explained_variance(first, fuse(first)).values()) == [0, 1, 1, 1, 1]
    assert list(explained_variance(second, fuse(second)).values()) == [0, 0, 0, 1, 1]
    assert list(explained_variance(both, fuse(both)).values()) == pytest.approx(
        [0, 1 / 3, 1 / 3, 1, 1]
    )
    assert set(explained_variance(equal, fuse(equal)).values()) == {0.0}
    apart = with_rewards(shape, [0, 0], [1.0] * 4 + [0.0] * 4)  # two trees of one prompt
    assert list(explained_variance(apart, fuse(apart)).values()) == [1, 1, 1, 1, 1]


@settings(deadline=None, max_examples=40)
@given(FORESTS)
def test_the_explained_variance_grows_with_depth_up_to_all_of_it(tree):
    shares = list(explained_variance(tree, fuse(tree)).values())
    nodes = reference.linked(tree)
    leaves = [n for n in nodes if not n.children and n.leaves()]
    means = {
        group: sum(n.reward for n in leaves if n.group == group)
        / sum(n.group == group for n in leaves)
        for group in {n.group for n in leaves}
    }
    varies = any(abs(n.reward - means[n.group]) > 1e-6 for n in leaves)
    assert shares[-1] == pytest.approx(1.0 if varies else 0.0)
    assert all(b >= a - 1e-12 for a, b in itertools.pairwise(shares))
    if varies:
        whole = sum((n.reward - means[n.group]) ** 2 for n in leaves)
        at_one = [n for n in nodes if n.leaves() and n.depth == 1]
        early = [n for n in leaves if n.depth < 1]
        of_cut = sum((n.reward - means[n.group]) ** 2 for n in early)
        for n in at_one:
            own = [leaf.reward - means[n.group] for leaf in n.leaves()]
            of_cut += sum(own) ** 2 / len(own)
        assert shares[1] == pytest.approx(of_cut / whole)
