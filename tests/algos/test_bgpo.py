"""BGPO's bound: below the objective everywhere, equal to it where it should be, finite throughout.

Legend: J passes of one completion.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlalign import algos
from rlalign.algos.bgpo import pass_loss, pass_ratio
from rlalign.config import AlgoConfig


def resolved(**fields) -> AlgoConfig:
    likelihood = fields.pop("likelihood", {})
    cfg = AlgoConfig(loss_type="bgpo", **fields)
    likelihood = dataclasses.replace(cfg.likelihood, **likelihood)
    return algos.resolve(dataclasses.replace(cfg, likelihood=likelihood))


def bound(d, advantage: float, cfg: AlgoConfig) -> torch.Tensor:
    d_J = torch.as_tensor(d, dtype=torch.float64)
    advantage_J = torch.full_like(d_J, advantage).detach()
    weight_J = torch.full_like(d_J, 1 / len(d_J)).detach()
    return -pass_loss(d_J, advantage_J, weight_J, cfg).loss


def objective(d, advantage: float, clip: float | None = None) -> float:
    ratio = math.exp(sum(d) / len(d))
    if clip is None:
        return ratio * advantage
    return min(ratio * advantage, min(max(ratio, 1 - clip), 1 + clip) * advantage)


changes = st.lists(st.floats(-15, 15), min_size=1, max_size=8)
advantages = st.floats(-5, 5)


@settings(deadline=None, max_examples=500)
@given(changes, advantages, st.sampled_from(["bound", "quadratic"]), st.sampled_from([None, 0.2]))
def test_the_bound_is_one(d, advantage, surrogate, clip):
    cfg = resolved(
        policy_loss="ppo_clip" if clip else "unclipped", likelihood={"surrogate": surrogate}
    )
    ours = float(bound(d, advantage, cfg))
    assert ours <= objective(d, advantage, clip) + 1e-9 * max(1.0, abs(ours))


@settings(deadline=None, max_examples=200)
@given(changes, advantages)
def test_the_quadratic_bound_is_below_jensens(d, advantage):
    jensen = float(bound(d, advantage, resolved(policy_loss="unclipped")))
    quadratic = resolved(policy_loss="unclipped", likelihood={"surrogate": "quadratic"})
    assert float(bound(d, advantage, quadratic)) <= jensen + 1e-9 * max(1.0, abs(jensen))


@given(st.floats(-15, 15), st.floats(-5, -0.01))
def test_one_pass_of_a_bad_completion_has_the_objective_itself(change, advantage):
    ours = float(bound([change], advantage, resolved(policy_loss="unclipped")))
    assert ours == pytest.approx(objective([change], advantage), rel=1e-9)


def test_the_dual_clip_breaks_the_bound():
    """Which is why it is off: a pass far up is cut, and the mean of the others stays too high."""
    cfg = resolved(delta=3.0)
    d = [4.0, 0.0]
    assert float(bound(d, -1.0, cfg)) > objective(d, -1.0, 0.2)
    assert float(bound(d, -1.0, resolved())) <= objective(d, -1.0, 0.2)


def test_a_change_that_would_overflow_has_a_finite_gradient():
    for advantage in (1.0, -1.0):
        d_J = torch.tensor([800.0, -800.0, 0.5], requires_grad=True)
        advantage_J = torch.full((3,), advantage)
        loss = pass_loss(
            d_J, advantage_J, torch.ones(3) / 3, resolved(policy_loss="unclipped")
        ).loss
        (slope_J,) = torch.autograd.grad(loss, d_J)
        assert bool(loss.isfinite()) and bool(slope_J.isfinite().all())
        assert float(slope_J[2]) == pytest.approx(
            -advantage / 3 * (1 if advantage > 0 else math.e**0.5)
        )


def test_a_linear_ratio_may_be_negative():
    """1 + d, never through a logarithm."""
    ratio_J = pass_ratio(torch.tensor([-3.0]), torch.tensor([1.0]), resolved())
    assert ratio_J.tolist() == [-2.0]
    metrics = pass_loss(torch.tensor([-3.0]), torch.ones(1), torch.ones(1), resolved()).metrics
    assert algos.finalize_metrics(metrics)["elbo/negative_ratio"] == 1.0


def test_clips_are_counted_on_their_side():
    d_J, advantage_J = torch.tensor([0.5, -0.5, 0.5, -0.5]), torch.tensor([1.0, 1.0, -1.0, -1.0])
    metrics = algos.finalize_metrics(pass_loss(d_J, advantage_J, torch.ones(4), resolved()).metrics)
    assert metrics["clip_ratio/high"] == 0.25 and metrics["clip_ratio/low"] == 0.25
    assert metrics["elbo/change"] == 0.5 and metrics["elbo/change/max"] == 0.5


def test_which_form_is_trained():
    assert algos.pass_loss(resolved()) is pass_loss
    assert algos.pass_loss(resolved(likelihood={"surrogate": "exact"})) is None
    assert algos.pass_loss(algos.resolve(AlgoConfig(loss_type="grpo"))) is None
