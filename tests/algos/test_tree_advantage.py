"""Credit in trees: each rule against recursion, and by hand on trees of six leaves.

The six: a prompt with two branches of 3 and 2 tokens,

    a (3) -> l1 (1) r=1,  l2 (2) r=0,  c (2) -> l3 (1) r=1,  l4 (3) r=1
    b (2) -> l5 (4) r=0,  l6 (1) r=1
"""

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign import algos
from rlalign.algos import AlgoError
from rlalign.algos.tree_advantage import ADVANTAGES, tree_advantages
from rlalign.algos.tree_pruning import edge_weights
from rlalign.algos.tree_shape import full_tree, tree_shape
from rlalign.config import AlgoConfig
from rlalign.types import ENV, ODE, POLICY, ROOT, TrainBatch, Tree
from rlalign.verify import tree_reference as reference
from rlalign.verify.cases import config
from rlalign.verify.trees import random_forest

NAN = math.nan
ROWS = ("a", "b", "l1", "l2", "c", "l5", "l6", "l3", "l4")
TOKENS = {"a": 3, "b": 2, "l1": 1, "l2": 2, "c": 2, "l5": 4, "l6": 1, "l3": 1, "l4": 3}
PATH = {"l1": 4, "l2": 5, "l3": 6, "l4": 8, "l5": 6, "l6": 3}  # tokens from the prompt on
FORESTS = st.randoms(use_true_random=False).map(random_forest)
SCALES = {"parent": ("group", "none"), "root_parent": ("none",), "ancestors": ("batch", "none")}


def six(num_roots: int = 1, rewards=(1.0, 0.0, 0.0, 1.0, 1.0, 1.0)) -> Tree:
    """rewards of l1, l2, l5, l6, l3, l4. num_roots=2: a and b are chains of their own, forked."""
    parent = {1: [-1, 0, 0, 1, 1, 1, 2, 2, 5, 5], 2: [-1, -1, 0, 1, 2, 2, 2, 3, 3, 6, 6]}[num_roots]
    tree_id = {1: [0] * 10, 2: [0, 1, 0, 1, 0, 0, 0, 1, 1, 0, 0]}[num_roots]
    l1, l2, l5, l6, l3, l4 = rewards
    nodes = len(parent)
    return Tree(
        parent_N=torch.tensor(parent),
        depth_N=torch.tensor([0] * num_roots + [1, 1, 2, 2, 2, 2, 2, 3, 3]),
        tree_N=torch.tensor(tree_id),
        group_N=torch.full((nodes,), 5),
        kind_N=torch.tensor([ROOT] * num_roots + [POLICY] * 9),
        reward_N=torch.tensor([NAN] * (num_roots + 2) + [l1, l2, NAN, l5, l6, l3, l4]),
        logp_N=torch.zeros(nodes),
        num_actions_N=torch.tensor([0] * num_roots + list(TOKENS.values())),
    )


def of_six(name: str, num_roots: int = 1, **fields) -> dict[str, float]:
    _, advantage_N = tree_advantages(six(num_roots), config(name, **fields))
    assert advantage_N[:num_roots].tolist() == [0.0] * num_roots
    return dict(zip(ROWS, advantage_N[num_roots:].tolist(), strict=True))


def near(expected: dict) -> dict:
    return {name: pytest.approx(value, abs=1e-9) for name, value in expected.items()}


def test_spo_by_hand():
    # V(c) = 1, V(a) = (1 + 0 + 1) / 3, V(b) = 1/2, V(prompt) = (2/3 + 1/2) / 2 = 7/12
    expected = {"a": 2 / 3 - 7 / 12, "b": 1 / 2 - 7 / 12}
    expected |= {"l1": 1 - 2 / 3, "l2": 0 - 2 / 3, "c": 1 - 2 / 3, "l3": 0.0, "l4": 0.0}
    expected |= {"l5": -1 / 2, "l6": 1 / 2}
    assert of_six("spo") == near(expected)
    assert of_six("spo", num_roots=2) == near(expected)  # the roots are one prompt


def test_spo_scaled_by_the_spread_of_siblings_by_hand():
    # population: sd(2/3, 1/2) = 1/12, sd(1, 0, 1) = sqrt(2)/3, sd(0, 1) = 1/2
    third = math.sqrt(2) / 3
    expected = {"a": (1 / 12) / (1 / 12 + 1e-8), "b": -(1 / 12) / (1 / 12 + 1e-8)}
    expected |= {"l1": (1 / 3) / (third + 1e-8), "l2": (-2 / 3) / (third + 1e-8)}
    expected |= {"c": (1 / 3) / (third + 1e-8), "l3": 0.0, "l4": 0.0}
    expected |= {"l5": -0.5 / (0.5 + 1e-8), "l6": 0.5 / (0.5 + 1e-8)}
    assert of_six("spo", scale_rewards="group") == near(expected)


@pytest.mark.parametrize("num_roots", [1, 2])
def test_tree_rl_by_hand(num_roots):
    # leave one out: 1 - 3/5 = 0.4 and 0 - 4/5 = -0.8, which add up to 0 = V(prompt);
    # V(a) = (0.4 - 0.8 + 0.4 + 0.4) / 4 = 0.1, V(c) = 0.4, V(b) = (-0.8 + 0.4) / 2 = -0.2
    own = {"a": (0.1 + 0.1) / 2, "b": (-0.2 - 0.2) / math.sqrt(2)}
    own |= {"l1": 0.4 + (0.4 - 0.1), "l2": -0.8 + (-0.8 - 0.1), "c": (0.4 + 0.3) / math.sqrt(2)}
    own |= {"l3": 0.4 + 0.0, "l4": 0.4 + 0.0, "l5": -0.8 + (-0.8 + 0.2), "l6": 0.4 + (0.4 + 0.2)}
    total = 4 * 3 * own["a"] + 2 * 2 * own["b"] + 2 * 2 * own["c"]  # leaves x tokens
    total += 1 * own["l1"] + 2 * own["l2"] + 1 * own["l3"] + 3 * own["l4"]
    total += 4 * own["l5"] + 1 * own["l6"]
    mean = total / (4 + 5 + 6 + 8 + 6 + 3)
    assert of_six("tree_rl", num_roots) == near({name: a - mean for name, a in own.items()})


@pytest.mark.parametrize("num_roots", [1, 2])
def test_tree_po_by_hand(num_roots):
    # means: prompt 4/6, a 3/4, c 1, b 1/2
    leaf = {"l1": ((1 - 2 / 3) + (1 - 3 / 4)) / 2, "l2": ((0 - 2 / 3) + (0 - 3 / 4)) / 2}
    leaf |= {"l3": ((1 - 2 / 3) + (1 - 3 / 4) + (1 - 1)) / 3}
    leaf |= {"l4": ((1 - 2 / 3) + (1 - 3 / 4) + (1 - 1)) / 3}
    leaf |= {"l5": ((0 - 2 / 3) + (0 - 1 / 2)) / 2, "l6": ((1 - 2 / 3) + (1 - 1 / 2)) / 2}
    tokens = [leaf[name] for name, length in PATH.items() for _ in range(length)]
    mean, spread = sum(tokens) / 32, statistics.stdev(tokens)
    white = {name: (a - mean) / (spread + 1e-6) for name, a in leaf.items()}
    shared = {"a": (white["l1"] + white["l2"] + white["l3"] + white["l4"]) / 4}
    shared |= {"b": (white["l5"] + white["l6"]) / 2, "c": (white["l3"] + white["l4"]) / 2}
    assert of_six("tree_po", num_roots) == near(white | shared)


def test_tree_grpo_by_hand():
    # of the prompt: mean 4/6, sd sqrt((4 x (1/3)^2 + 2 x (2/3)^2) / 5); tree 0 has l1 .. l4, of
    # mean 3/4 and sd sqrt((3 x (1/4)^2 + (3/4)^2) / 3); tree 1 has l5, l6
    prompt = math.sqrt((4 / 9 + 8 / 9) / 5) + 1e-6
    first = math.sqrt((3 / 16 + 9 / 16) / 3) + 1e-6
    second = math.sqrt(1 / 4 + 1 / 4) + 1e-6
    good, bad = (1 - 2 / 3) / prompt, (0 - 2 / 3) / prompt
    leaf = {"l1": good + (1 / 4) / first, "l2": bad + (-3 / 4) / first}
    leaf |= {"l3": good + (1 / 4) / first, "l4": good + (1 / 4) / first}
    leaf |= {"l5": bad + (-1 / 2) / second, "l6": good + (1 / 2) / second}
    shared = {"a": (leaf["l1"] + leaf["l2"] + leaf["l3"] + leaf["l4"]) / 4}
    shared |= {"b": (leaf["l5"] + leaf["l6"]) / 2, "c": (leaf["l3"] + leaf["l4"]) / 2}
    assert of_six("tree_grpo", num_roots=2) == near(leaf | shared)


def test_branch_grpo_by_hand():
    # depth 1: 2/3 and 1/2, whose z-scores are +-1/sqrt(2) whatever the gap; depth 2: 1, 0, 1, 0, 1;
    # depth 3: both 1
    spread = math.sqrt((3 * 0.4**2 + 2 * 0.6**2) / 4) + 1e-6
    good, bad = 0.4 / spread, -0.6 / spread
    first = (1 / 12) / (math.sqrt(2) / 12 + 1e-6)
    expected = {"a": first, "b": -first, "l1": good, "l2": bad, "c": good, "l5": bad, "l6": good}
    assert of_six("branch_grpo") == near(expected | {"l3": 0.0, "l4": 0.0})


def test_carried_leaves_join_deeper_depths_by_hand():
    tree = six(rewards=(1.0, 0.0, 0.0, 1.0, 0.0, 1.0))
    cfg = config("branch_grpo", scale_rewards="none", tree={"carry_leaves": True})
    _, advantage_N = tree_advantages(tree, cfg)
    # depth 3: l3 = 0 and l4 = 1, and l1, l2, l5, l6 from above
    assert advantage_N[8:].tolist() == pytest.approx([0 - 3 / 6, 1 - 3 / 6])
    alone = config("branch_grpo", scale_rewards="none")
    assert tree_advantages(tree, alone)[1][8:].tolist() == pytest.approx([-0.5, 0.5])
    skewed = six(rewards=(1.0, 1.0, 1.0, 1.0, 0.0, 1.0))
    assert tree_advantages(skewed, cfg)[1][8:].tolist() == pytest.approx([0 - 5 / 6, 1 - 5 / 6])


@settings(deadline=None, max_examples=100)
@given(FORESTS, st.data())
def test_every_rule_is_what_recursion_gives(tree, data):
    rule = data.draw(st.sampled_from(sorted(ADVANTAGES)))
    scale = data.draw(st.sampled_from(SCALES.get(rule, ("group", "batch", "none"))))
    compares = rule in ("depth", "sibling", "leaves")
    section = {
        "advantage": rule,
        "scope": data.draw(st.sampled_from(("tree", "prompt"))),
        "fuse": data.draw(st.sampled_from(("child_mean", "leaf_mean", "path_softmax"))),
        "baseline": data.draw(st.sampled_from(("mean", "loo"))) if compares else "mean",
        "carry_leaves": rule == "depth" and data.draw(st.booleans()),
    }
    cfg = config("branch_grpo", scale_rewards=scale, tree=section)
    _, advantage_N = tree_advantages(tree, cfg)
    expected = torch.tensor(reference.advantages(tree, cfg), dtype=torch.float64)
    torch.testing.assert_close(advantage_N, expected, rtol=1e-9, atol=1e-9)
    silent_N = ~torch.isin(tree.kind_N, torch.tensor([POLICY]))
    assert advantage_N[silent_N].abs().sum() == 0


def grown(seed: int, groups=(3, 3, 8)) -> Tree:
    """Trees of the default schedule with random leaves."""
    shape = tree_shape(20, [0, 3, 6, 9], [2])
    tree = full_tree(torch.tensor(groups), shape)
    generator = torch.Generator().manual_seed(seed)
    leaves = shape.levels(len(groups))[-1]
    reward_N = tree.reward_N.clone()
    reward_N[leaves] = torch.rand(leaves.stop - leaves.start, generator=generator)
    return tree.replace(reward_N=reward_N)


@pytest.mark.parametrize("scope", ["tree", "prompt"])
def test_depths_have_mean_zero_and_variance_one_and_chains_one_advantage(scope):
    tree = grown(0)
    cfg = config("branch_grpo", adv_eps=0.0, tree={"scope": scope})
    _, advantage_N = tree_advantages(tree, cfg)
    of_N = tree.group_N if scope == "prompt" else tree.tree_N
    for depth in range(1, 21):
        for label in of_N.unique():
            level = advantage_N[(tree.depth_N == depth) & (of_N == label)]
            assert float(level.sum()) == pytest.approx(0, abs=1e-9)
            assert float((level**2).sum()) == pytest.approx(len(level) - 1)
    chain_N = torch.isin(tree.depth_N, torch.tensor([2, 3, 5, 6, 8, 9, *range(11, 21)]))
    assert torch.equal(advantage_N[chain_N], advantage_N[tree.parent_N[chain_N]])


def test_two_nodes_differ_by_the_square_root_of_two_whatever_the_gap():
    tree = grown(1, groups=(0,))
    _, advantage_N = tree_advantages(tree, config("branch_grpo", adv_eps=0.0))
    at_one = advantage_N[tree.depth_N == 1].sort().values
    assert at_one.tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)])


def test_behind_the_last_split_they_are_the_z_scores_of_grpo():
    tree = grown(2, groups=(4, 4))
    cfg, leaf_N = config("branch_grpo", tree={"scope": "prompt"}), tree.depth_N == 20
    _, advantage_N = tree_advantages(tree, cfg)
    reward_B = tree.reward_N[leaf_N]
    grpo_BT = algos.compute_advantages(
        reward_B, reward_B, tree.group_N[leaf_N], torch.ones(32, 1), config("grpo")
    )
    for depth in range(10, 21):
        assert torch.equal(advantage_N[tree.depth_N == depth].float(), grpo_BT[:, 0])


@pytest.mark.parametrize("name", [n for n in algos.names() if config(n).adv_estimator == "tree"])
def test_rewards_on_another_scale_give_the_same_advantages(name):
    exact = grown(3)
    exact = exact.replace(reward_N=(exact.reward_N * 64).round() / 64)
    tree = exact.replace(reward_N=4 * exact.reward_N - 8)
    cfg = config(name, adv_eps=0.0)
    _, before_N = tree_advantages(exact, cfg)
    _, after_N = tree_advantages(tree, cfg)
    factor = 4 if cfg.scale_rewards == "none" else 1
    torch.testing.assert_close(after_N, factor * before_N, rtol=1e-7, atol=1e-9)


def test_a_tree_without_branches_has_nothing_to_compare():
    tree = full_tree(torch.tensor([0, 0]), tree_shape(3, [], [2]))
    tree = tree.replace(reward_N=tree.reward_N.index_fill(0, torch.tensor([6]), 1.0))
    tree = tree.replace(reward_N=tree.reward_N.index_fill(0, torch.tensor([7]), 0.0))
    for rule in ("depth", "sibling", "parent"):
        scale = "none" if rule == "parent" else "group"
        cfg = config("branch_grpo", scale_rewards=scale, tree={"advantage": rule})
        assert tree_advantages(tree, cfg)[1].abs().sum() == 0
    cfg = config("branch_grpo", tree={"scope": "prompt"})
    expected = [1, -1] * 3  # each of the two chains, at its three steps
    edge_N = tree.depth_N > 0
    assert tree_advantages(tree, cfg)[1][edge_N].sign().tolist() == expected


@pytest.mark.parametrize("name", [n for n in algos.names() if config(n).adv_estimator == "tree"])
@pytest.mark.parametrize("living", [(), (1,), (1, 1)])
def test_with_one_leaf_left_or_none_nothing_trains(name, living):
    """Two are compared, except in trees of their own."""
    rewards = torch.full((6,), NAN)
    rewards[torch.tensor([0, 3])[: len(living)]] = torch.tensor([1.0, 0.0])[: len(living)]
    value_N, advantage_N = tree_advantages(six(rewards=rewards.tolist()), config(name))
    assert bool((advantage_N != 0).any()) == (len(living) == 2)
    assert advantage_N.isfinite().all()
    assert (advantage_N[~value_N.isfinite()] == 0).all()


@settings(deadline=None, max_examples=40)
@given(FORESTS)
def test_deterministic_and_forced_edges_carry_values_and_no_advantage(tree):
    value_N, advantage_N = tree_advantages(tree, config("branch_grpo"))
    fixed_N = (tree.kind_N == ODE) | (tree.kind_N == ENV)
    assert (advantage_N[fixed_N] == 0).all()
    only_N = tree.kind_N == ODE
    parent_N = value_N[tree.parent_N[only_N]]
    torch.testing.assert_close(value_N[only_N], parent_N, equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_trees_that_never_branch_are_grpo_to_the_bit_loss_and_gradient_too(scale):
    generator = torch.Generator().manual_seed(5)
    group_R, steps = torch.tensor([7, 3, 90, 3, 7, 90, 7, 11, 7, 90, 7]), 6
    reward_R = torch.rand(11, generator=generator)
    reward_R[8] = NAN
    shape = tree_shape(steps, [], [2])
    tree, levels = full_tree(group_R, shape), shape.levels(11)
    reward_N = tree.reward_N.clone()
    reward_N[levels[-1]] = reward_R
    tree = tree.replace(reward_N=reward_N)
    logp_BT = -torch.rand(11, steps, generator=generator)
    old_BT = logp_BT + 0.3 * torch.randn(11, steps, generator=generator)

    cfg = config("grpo", scale_rewards=scale, loss_agg_mode="token-mean", beta=0.0)
    mask_BT = (~reward_R.isnan()).float()[:, None].expand(11, steps)
    batch = TrainBatch(
        sequences=((0,) * steps,) * 11,
        completion_len_B=torch.full((11,), steps),
        group_id_B=group_R,
        mask_BT=mask_BT,
        reward_B=reward_R,
        logp_rollout_BT=old_BT,
        logp_old_BT=old_BT,
    )
    advantage_BT = algos.compute_advantages(reward_R, reward_R, group_R, mask_BT, cfg)
    flat = batch.replace(advantage_BT=advantage_BT)
    flat = algos.attach_weights(flat, cfg, max_completion_length=steps)

    flow = config("mix_grpo", scale_rewards=scale, epsilon=0.2)
    value_N, advantage_N = tree_advantages(tree, flow)
    ones_N = torch.ones(len(tree), dtype=torch.int64)
    keep_N = value_N.isfinite() & (tree.kind_N == POLICY)
    weight_N = edge_weights(tree, keep_N, flow, ones_N)

    def by_row(value_N):
        return torch.stack([value_N[level] for level in levels[1:]], dim=1).float()

    branched = batch.replace(advantage_BT=by_row(advantage_N), weight_BT=by_row(weight_N))
    assert torch.equal(branched.advantage_BT, advantage_BT)
    assert torch.equal(branched.weight_BT, flat.weight_BT)
    losses, slopes = [], []
    for each, settings_ in ((flat, cfg), (branched, flow)):
        leaf_BT = logp_BT.clone().requires_grad_(True)
        loss = algos.policy_loss(leaf_BT, each, settings_).loss
        losses.append(loss.detach())
        slopes.append(torch.autograd.grad(loss, leaf_BT)[0])
    assert torch.equal(losses[0], losses[1]) and torch.equal(slopes[0], slopes[1])


def test_an_unresolved_config_is_refused():
    with pytest.raises(AlgoError, match=r"rlalign\.algos\.resolve first"):
        tree_advantages(six(), AlgoConfig(loss_type="branch_grpo"))
