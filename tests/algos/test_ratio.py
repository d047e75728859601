"""Ratios by hand, and how each level shares its gradient among tokens."""

import math

import pytest
import torch

from rlalign.algos import AlgoError
from rlalign.algos.ratio import policy_ratio

OLD_BT = torch.tensor([[-1.0, -1.0, 0.0]])
INSIDE_BT = torch.tensor([[True, True, False]])


def ratio_and_gradient(level: str):
    logp_BT = torch.tensor([[-0.8, -0.6, 0.0]], requires_grad=True)
    ratio = policy_ratio(logp_BT, OLD_BT, INSIDE_BT, level)
    (gradient_BT,) = torch.autograd.grad(ratio.sum(), logp_BT)
    return ratio.detach()[0].tolist(), gradient_BT[0].tolist()


@pytest.mark.parametrize(
    ("level", "ratio", "gradient"),
    [
        ("token", [math.exp(0.2), math.exp(0.4), 1], [math.exp(0.2), math.exp(0.4), 0]),
        ("sequence", [math.exp(0.3)], [math.exp(0.3) / 2, math.exp(0.3) / 2, 0]),
        ("sequence_sum", [math.exp(0.6)], [math.exp(0.6), math.exp(0.6), 0]),
    ],
)
def test_levels_by_hand(level, ratio, gradient):
    assert ratio_and_gradient(level) == (
        pytest.approx(ratio, rel=1e-6),
        pytest.approx(gradient, rel=1e-6),
    )


def test_sequence_token_has_the_sequences_value_and_each_tokens_own_gradient():
    ratio, gradient = ratio_and_gradient("sequence_token")
    assert ratio[:2] == pytest.approx([math.exp(0.3)] * 2, rel=1e-6)
    assert gradient[:2] == pytest.approx([math.exp(0.3)] * 2, rel=1e-6)


def test_a_row_without_tokens_has_ratio_one():
    nothing_BT = torch.zeros(1, 3, dtype=torch.bool)
    for level in ("sequence", "sequence_sum"):
        assert policy_ratio(torch.ones(1, 3), OLD_BT, nothing_BT, level).tolist() == [[1.0]]


def test_an_unknown_level_is_named():
    with pytest.raises(AlgoError, match="'turn'"):
        policy_ratio(OLD_BT, OLD_BT, INSIDE_BT, "turn")
