"""Properties of the KL estimators, by exhaustive enumeration of a 6-way softmax.

With every outcome enumerated, an "expected gradient" is a plain sum and needs no sampling.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlalign.algos import estimate_kl
from rlalign.verify import reference
from rlalign.verify.cases import difference, worst
from rlalign.verify.table import shared

SCHULMAN = "Schulman 2020, Approximating KL divergence"

# Found by a search for one-decimal logits with KL(policy, reference) = 0.594 and E[k2] = 0.712.
TOY_POLICY = (-0.7, -0.2, -1.6, 1.8, 0.2, 1.1)
TOY_REFERENCE = (-0.4, -1.4, -0.6, 0.1, 1.4, 1.0)


def toy() -> tuple[Tensor, Tensor]:
    """Logits of policy and reference, float64 [6]."""
    return torch.tensor(TOY_POLICY).double(), torch.tensor(TOY_REFERENCE).double()


def divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


def gradient_of(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    leaf = logits.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(leaf), leaf)
    return gradient


def estimator_gradient(estimator: str, corrected: bool = False, shift: float = 0.0) -> Tensor:
    """Expected gradient of the estimator as a loss, with outcomes drawn from the policy, or, for
    `shift` > 0, from an older policy that differs from it, with the ratio multiplied in."""
    policy, ref = toy()
    drift = shift * torch.linspace(-1, 1, 6, dtype=torch.float64)
    old_logp = torch.log_softmax(policy + drift, 0)

    def expected(logits: Tensor) -> Tensor:
        logp = torch.log_softmax(logits, 0)
        kl = estimate_kl(logp, torch.log_softmax(ref, 0), estimator)
        if corrected:
            kl = torch.exp(logp - old_logp) * kl
        return (old_logp.exp() * kl).sum()

    return gradient_of(expected, policy)


def reverse_kl_gradient() -> Tensor:
    policy, ref = toy()
    return gradient_of(lambda z: divergence(torch.softmax(z, 0), torch.softmax(ref, 0)), policy)


def expectation(estimator: str) -> float:
    policy, ref = toy()
    logp, logp_ref = torch.log_softmax(policy, 0), torch.log_softmax(ref, 0)
    return float((logp.exp() * estimate_kl(logp, logp_ref, estimator)).sum())


def exact_kl() -> float:
    policy, ref = toy()
    return float(divergence(torch.softmax(policy, 0), torch.softmax(ref, 0)))


@shared("each estimator and its slope = float64 loops", source=SCHULMAN, bound=1e-10)
def values() -> float:
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    errors = []
    for name in ("k1", "k2", "k3", "k3+"):
        leaf = x.clone().requires_grad_(True)
        value = estimate_kl(leaf, torch.zeros_like(x), name)
        (slope,) = torch.autograd.grad(value.sum(), leaf)
        expected = [reference.kl(float(v), name) for v in x]
        errors.append(difference(value.detach(), [v for v, _ in expected]))
        errors.append(difference(slope, [s for _, s in expected]))
    return worst(errors)


@shared("k3 >= 0, and 0 only at x = 0", source="e^-x >= 1 - x", bound=0.0)
def nonnegative() -> float:
    small = torch.logspace(-30, 0, 20001)
    x = torch.cat([torch.linspace(-60, 60, 4001), small, -small])
    value = estimate_kl(x, torch.zeros_like(x), "k3")
    # Far below float32 resolution x^2/2 rounds to 0, but never below.
    wrong_zero = (value == 0) & (x.abs() > 1e-3)
    at_zero = estimate_kl(torch.zeros(1), torch.zeros(1), "k3").abs()
    return float((-value).clamp(min=0).max() + wrong_zero.sum() + at_zero.sum())


@shared("E[k1] = E[k3] = KL(policy, reference)", source=SCHULMAN, bound=1e-12)
def unbiased() -> float:
    return worst(abs(expectation(name) - exact_kl()) for name in ("k1", "k3", "k3+"))


@shared("E[k2] is not the KL: 0.712 against 0.594 on the toy", source=SCHULMAN, bound=5e-4)
def k2_is_biased() -> float:
    return worst([abs(expectation("k2") - 0.712), abs(exact_kl() - 0.594)])


@shared("k1 as a loss: expected gradient 0", source="E[grad logp] = 0", bound=1e-12)
def k1_gradient() -> float:
    return difference(estimator_gradient("k1"), 0.0)


@shared("k2 as a loss: gradient of KL(policy, reference)", source="enumeration", bound=1e-12)
def k2_gradient() -> float:
    return difference(estimator_gradient("k2"), reverse_kl_gradient())


@shared("k3+ as a loss: k3's value, k2's gradient", source="straight-through", bound=1e-12)
def straight_through() -> float:
    return difference(estimator_gradient("k3+"), reverse_kl_gradient())


@shared("k3 as a loss: gradient of KL(reference, policy)", source="enumeration", bound=1e-12)
def k3_gradient() -> float:
    policy, ref = toy()
    forward = gradient_of(lambda z: divergence(torch.softmax(ref, 0), torch.softmax(z, 0)), policy)
    return difference(estimator_gradient("k3"), forward)


@shared(
    "ratio x k3 (and x k1): gradient of KL(policy, reference), also off-policy",
    source="enumeration",
    bound=1e-12,
)
def corrected_gradient() -> float:
    return worst(
        difference(estimator_gradient(name, True, shift), reverse_kl_gradient())
        for name in ("k1", "k3")
        for shift in (0.0, 0.7)
    )
