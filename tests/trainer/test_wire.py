"""What one process sends is what the others read, bit for bit."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlalign.trainer import wire
from rlalign.types import Group, Prompt, Sample, Scores, Tree, VersionSpan

finite = st.floats(allow_nan=False, width=64)


@st.composite
def samples(draw):
    tokens = draw(st.lists(st.integers(0, 2**31 - 1), max_size=6))
    logp = draw(st.lists(finite, min_size=len(tokens), max_size=len(tokens)))
    return Sample(
        prompt_id=draw(st.text(max_size=4)),
        index=draw(st.integers(0, 99)),
        token_ids=tuple(tokens),
        logp=tuple(logp),
        finish_reason=draw(st.sampled_from(["stop", "length", "abort"])),
        spans=(VersionSpan(len(tokens), draw(st.integers(0, 9))),),
        text=draw(st.text(max_size=8)),
        parent=draw(st.none() | st.text(max_size=3)),
        source_id=draw(st.integers(0, 3)),
        steps=tuple(range(len(tokens))) if draw(st.booleans()) else (),
    )


@given(st.lists(st.lists(samples(), max_size=3), max_size=3))
def test_groups_come_back_equal(parts):
    prompts = [Prompt(str(i), (1,), "x") for i in range(len(parts))]
    groups = [Group(p, tuple(part)) for p, part in zip(prompts, parts, strict=True)]
    scores = [
        Scores(torch.rand(len(part)), torch.rand(len(part)), {"f": torch.rand(len(part))})
        for part in parts
    ]
    back, back_scores, figures = wire.decode(wire.encode(groups, scores, {"s": 0.1}), prompts)
    assert back == groups and figures == {"s": 0.1}
    for one, other in zip(scores, back_scores, strict=True):
        assert torch.equal(one.reward_B, other.reward_B.float())
        assert torch.equal(one.by_function["f"], other.by_function["f"].float())


def test_trees_come_back_equal():
    tree = Tree(
        parent_N=torch.tensor([-1, 0, 1, 1, -1, 4]),
        depth_N=torch.tensor([0, 1, 2, 2, 0, 1]),
        tree_N=torch.tensor([0, 0, 0, 0, 1, 1]),
        group_N=torch.zeros(6, dtype=torch.int64),
        kind_N=torch.tensor([0, 1, 1, 2, 0, 1]),
        reward_N=torch.full((6,), math.nan),
        logp_N=torch.tensor([0.0, -0.1, -math.pi, -1e-9, 0.0, -math.inf]),
        num_actions_N=torch.tensor([0, 3, 2, 1, 0, 4]),
    )
    leaves = tuple(Sample("p", i, (i,), (0.0,), "stop", ()) for i in range(3))
    paths = ((1, 2), (1, 3), (5,))
    prompts = [Prompt("p", (1,), "x"), Prompt("q", (2,), "y")]
    groups = [Group(prompts[0], leaves, tree=tree, paths=paths), Group(prompts[1], leaves)]
    [one, other], _, _ = wire.decode(wire.encode(groups, [], {}), prompts)
    assert other == groups[1] and one.samples == leaves and one.paths == paths
    for name in Tree.__slots__:
        sent, came = getattr(tree, name), getattr(one.tree, name)
        assert came.dtype == sent.dtype, name
        assert torch.equal(came.nan_to_num(9), sent.nan_to_num(9)), name


def test_unscorable_rewards_and_error_counts_survive():
    scores = Scores(torch.tensor([math.nan, 1.0]), torch.tensor([0.0, 1.0]), {}, {"timeout": 1})
    _, [back], _ = wire.decode(wire.encode([], [scores], {}), [])
    assert math.isnan(back.reward_B[0]) and back.errors == {"timeout": 1}
