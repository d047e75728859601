"""Guidance: its closed forms, what it costs, and where gradients go."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from rlalign.config.schema import GuidanceConfig
from rlalign.models.mini_flow import MiniFlow
from rlalign.rollout.flow_steps import FlowError, predict_x0
from rlalign.rollout.guidance import ClassifierGuidance, classifier_free, embedded
from rlalign.rollout.guidance import guide as configured_guide

CLASSES = {"label": torch.arange(3)}


class Net:
    """v = gain[label] (z + sigma), the last label for none; counts the rows of each call."""

    def __init__(self, *gains: float) -> None:
        self.gain = torch.tensor(gains, requires_grad=True)
        self.rows: list[int] = []

    def __call__(self, z, sigma_N, cond):
        self.rows.append(len(z))
        gain_N1 = self.gain[cond["label"]][:, None]
        return gain_N1 * z + gain_N1 * sigma_N[:, None]

    def null_condition(self, num: int):
        return {"label": torch.full((num,), len(self.gain) - 1)}


def rows(num: int = 6):
    generator = torch.Generator().manual_seed(0)
    z, sigma_N = torch.randn(num, 4, generator=generator), torch.rand(num, generator=generator)
    return z, sigma_N, {"label": torch.arange(num) % 3}


def logits(prob_NC) -> torch.Tensor:
    return torch.tensor(prob_NC).log()


def test_classifier_free_guidance_extrapolates_from_the_unconditional_velocity():
    net = Net(0.5, -1.0, 2.0, 0.1)
    z, sigma_N, cond = rows()
    v_c, v_u = net(z, sigma_N, cond), net(z, sigma_N, net.null_condition(6))
    for scale in (0.0, 0.5, 4.0):
        net.rows.clear()
        v = classifier_free(net, net.null_condition, scale)(z, sigma_N, cond)
        torch.testing.assert_close(v, v_u + scale * (v_c - v_u))
        assert net.rows == [12]  # one pass of both
    assert classifier_free(net, net.null_condition, 1.0) is net


def test_a_detached_unconditional_velocity_gets_no_gradient():
    z, sigma_N, cond = rows()
    for detached in (False, True):
        net = Net(0.5, -1.0, 2.0, 0.1)
        guide = classifier_free(net, net.null_condition, 3.0, detach_null=detached)
        v = guide(z, sigma_N, cond)
        v.sum().backward()
        assert net.gain.grad is not None
        assert (float(net.gain.grad[3]) == 0) is detached
        assert bool((net.gain.grad[:3] != 0).all())


def test_embedded_guidance_is_one_more_condition():
    seen = {}

    def network(z, sigma_N, cond):
        seen.update(cond)
        return z

    z, sigma_N, cond = rows()
    assert embedded(network, 3.5)(z, sigma_N, cond) is z
    assert seen["guidance"].tolist() == [3.5] * 6 and torch.equal(seen["label"], cond["label"])
    assert "guidance" not in cond


def guide(net: Net, prob_NC, w_max: float = 2.0, **settings) -> ClassifierGuidance:
    return ClassifierGuidance(net, lambda x0: logits(prob_NC), CLASSES, w_max, **settings)


def test_the_reference_is_the_likeliest_other_class_and_confusion_is_the_strength():
    net = Net(0.5, -1.0, 2.0, 0.1)
    prob_NC = [[0.5, 0.2, 0.3], [0.7, 0.2, 0.1], [0.4, 0.35, 0.25]]
    z, sigma_N, cond = rows(3)  # own classes 0, 1, 2
    v = guide(net, prob_NC, gamma=2.0)(z, sigma_N, cond)
    for n, (own, ref, p) in enumerate([(0, 2, 0.5), (1, 0, 0.2), (2, 0, 0.25)]):
        state = z[n] + sigma_N[n]
        v_c, v_ref = net.gain[own] * state, net.gain[ref] * state
        torch.testing.assert_close(v[n], v_c + 2.0 * (1 - p) ** 2 * (v_c - v_ref))


def test_a_sure_classifier_leaves_the_velocity_alone_to_the_bit():
    net = Net(0.5, -1.0, 2.0, 0.1)
    z, sigma_N, cond = rows(3)
    sure = torch.eye(3).tolist()
    assert torch.equal(guide(net, sure)(z, sigma_N, cond), net(z, sigma_N, cond))


def test_no_strength_is_the_identity_and_asks_nothing_more():
    net = Net(0.5, -1.0, 2.0, 0.1)

    def never(x0):
        raise AssertionError("the classifier was asked")

    z, sigma_N, cond = rows()
    v = ClassifierGuidance(net, never, CLASSES, w_max=0.0)(z, sigma_N, cond)
    assert net.rows == [6] and torch.equal(v, net(z, sigma_N, cond))


def test_two_classes_and_a_constant_strength_are_classifier_free_guidance():
    """gamma = 0 makes w_t = w_max; with two classes the reference is the other one, and the form is
    that of classifier-free guidance from it with scale 1 + w_max."""
    net = Net(0.5, -1.0, 0.1)
    z, sigma_N, _ = rows(4)
    cond = {"label": torch.tensor([0, 0, 1, 1])}
    classes = {"label": torch.arange(2)}
    guided = ClassifierGuidance(net, lambda x0: torch.zeros(4, 2), classes, w_max=3.0, gamma=0.0)(
        z, sigma_N, cond
    )
    other = {"label": 1 - cond["label"]}
    expected = classifier_free(net, lambda num: other, 4.0)(z, sigma_N, cond)
    torch.testing.assert_close(guided, expected)


def test_a_sample_that_is_clear_or_a_time_outside_the_window_is_not_guided():
    net = Net(0.5, -1.0, 2.0, 0.1)
    z, _, cond = rows(3)
    sigma_N = torch.tensor([0.1, 0.5, 0.9])
    prob_NC = [[0.6, 0.2, 0.2]] * 3
    plain = net(z, sigma_N, cond)

    def changed(**settings) -> list[bool]:
        v = guide(net, prob_NC, **settings)(z, sigma_N, cond)
        return [not torch.equal(a, b) for a, b in zip(v, plain, strict=True)]

    assert changed() == [True, True, True]
    assert changed(sigma_window=(0.3, 0.7)) == [False, True, False]
    assert changed(tau=0.5) == [False, True, True]  # of the first row p_c is 0.6


def test_the_classifier_sees_the_predicted_image_and_its_weight_is_a_constant():
    seen = []

    def classifier(x0):
        seen.append(x0)
        return torch.stack([x0.sum(1), -x0.sum(1), 0 * x0.sum(1)], dim=1)

    net = Net(0.5, -1.0, 2.0, 0.1)
    z, sigma_N, cond = rows(3)
    guided = ClassifierGuidance(net, classifier, CLASSES, 2.0)
    v = guided(z, sigma_N, cond)
    torch.testing.assert_close(seen[0], predict_x0(z, net(z, sigma_N, cond), sigma_N).detach())
    assert not seen[0].requires_grad
    (gradient,) = torch.autograd.grad(v.sum(), net.gain)
    # with the weights held at their values, v is linear in the gains
    with torch.no_grad():
        w_N, ref_N = guided.weigh(seen[0], sigma_N, cond["label"])
        state_N = (z + sigma_N[:, None]).sum(1)
    expected = torch.zeros(4)
    expected.index_add_(0, cond["label"], (1 + w_N) * state_N)
    expected.index_add_(0, ref_N, -w_N * state_N)
    torch.testing.assert_close(gradient, expected)


def test_autoguidance_takes_the_reference_from_the_weak_network():
    strong, weak = Net(0.5, -1.0, 2.0, 0.1), Net(0.3, -0.4, 0.9, 0.0)
    z, sigma_N, cond = rows(3)
    prob_NC = [[0.4, 0.5, 0.1]] * 3
    v = guide(strong, prob_NC, gamma=0.0, mode="atg", weak=weak)(z, sigma_N, cond)
    v_c = strong(z, sigma_N, cond)
    v_ref = weak(z, sigma_N, {"label": torch.tensor([1, 0, 1])})
    torch.testing.assert_close(v, v_c + 2.0 * (v_c - v_ref))
    assert strong.rows[:1] == [3] and len(strong.rows) == 2  # the second is this test's own


def test_the_sum_adds_a_classifier_free_term():
    net = Net(0.5, -1.0, 2.0, 0.1)
    z, sigma_N, cond = rows(3)
    prob_NC = [[0.4, 0.5, 0.1]] * 3
    both = guide(net, prob_NC, mode="sum", null=net.null_condition, cfg_scale=3.0)
    alone = guide(net, prob_NC)
    free = classifier_free(net, net.null_condition, 3.0)
    v = [velocity(z, sigma_N, cond) for velocity in (both, alone, free, net)]
    torch.testing.assert_close(v[0] - v[3], (v[1] - v[3]) + (v[2] - v[3]))
    silent = dataclasses.replace(both, w_max=0.0)
    torch.testing.assert_close(silent(z, sigma_N, cond), v[2])


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"w_max": -1.0}, "w_max=-1"),
        ({"gamma": float("nan")}, "gamma=nan"),
        ({"tau": 1.5}, "tau=1.5"),
        ({"sigma_window": (0.7, 0.3)}, "lower end first"),
        ({"mode": "both"}, "none of cfg, atg, sum"),
        ({"mode": "atg"}, "needs `weak`"),
        ({"mode": "sum"}, "needs `null`"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, match):
    with pytest.raises(FlowError, match=match):
        guide(Net(0.0, 0.0, 0.0, 0.0), [[1.0, 0.0, 0.0]], **settings)


def test_a_configured_guide_is_the_one_made_by_hand():
    torch.manual_seed(0)
    model = MiniFlow(("a", "b", "c"), (1, 2, 2), width=8, blocks=1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    z, sigma_N, cond = rows()
    z = z.view(-1, 1, 2, 2)
    assert configured_guide(model, GuidanceConfig()) is model
    found = configured_guide(model, GuidanceConfig(kind="cfg", scale=3.0))(z, sigma_N, cond)
    by_hand = classifier_free(model, model.null_condition, 3.0)(z, sigma_N, cond)
    torch.testing.assert_close(found, by_hand)
    with pytest.raises(FlowError, match="needs a classifier"):
        configured_guide(model, GuidanceConfig(kind="gfcg"))

    def net(x0):
        return x0.flatten(1)[:, :3]

    model.classifier = lambda: (net, CLASSES)
    config = GuidanceConfig(kind="gfcg", scale=2.0, gamma=0.5, threshold=0.9, sigma_high=0.8)
    options = {"w_max": 2.0, "gamma": 0.5, "tau": 0.9, "sigma_window": (0.0, 0.8)}
    expected = ClassifierGuidance(model, net, CLASSES, **options)(z, sigma_N, cond)
    torch.testing.assert_close(configured_guide(model, config)(z, sigma_N, cond), expected)
    assert not torch.allclose(expected, model(z, sigma_N, cond))
