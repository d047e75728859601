"""Properties of the advantage estimators and of group statistics."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from rlalign import algos
from rlalign.config import AlgoConfig
from rlalign.verify import reference
from rlalign.verify.cases import config, difference, make_case, worst
from rlalign.verify.table import shared

GRPO = "Shao et al. 2024, arXiv 2402.03300"


def one_token(reward: list[float] | Tensor, group: list[int] | Tensor, cfg: AlgoConfig) -> Tensor:
    """Advantages of one-token completions: [B]."""
    reward_B = torch.as_tensor(reward, dtype=torch.float64)
    mask_BT = torch.ones(len(reward_B), 1, dtype=torch.float64)
    return algos.compute_advantages(
        reward_B, reward_B, torch.as_tensor(group), mask_BT, cfg, kl_BT=torch.zeros_like(mask_BT)
    )[:, 0]


@shared("grpo: sum A = 0 and sum A^2 = n - 1 in every group", source=GRPO, bound=1e-9)
def moments() -> float:
    case = make_case()
    group_id_B, reward_B = case.batch.group_id_B, case.batch.reward_B.clone()
    reward_B[8] = 0.25
    advantage_B = one_token(reward_B, group_id_B, config(adv_eps=0.0))
    errors = []
    for label in group_id_B.unique():
        members = advantage_B[group_id_B == label]
        tied = reward_B[group_id_B == label].unique().numel() == 1
        expected = 0.0 if tied else len(members) - 1
        errors += [abs(float(members.sum())), abs(float((members**2).sum()) - expected)]
    return worst(errors)


@shared(
    "grpo, k of n correct: A = sqrt((n-1)/n (1-p)/p), -sqrt((n-1)/n p/(1-p))",
    source="algebra; n=8, k=1 gives 2.474874 and -0.353553",
    bound=1e-6,
)
def binary_rewards() -> float:
    cfg, errors = config(adv_eps=0.0), []
    for n in range(2, 17):
        for k in range(1, n):
            p, scale = k / n, math.sqrt((n - 1) / n)
            advantage_B = one_token([1.0] * k + [0.0] * (n - k), [5] * n, cfg)
            errors.append(abs(float(advantage_B[0]) - scale * math.sqrt((1 - p) / p)))
            errors.append(abs(float(advantage_B[-1]) + scale * math.sqrt(p / (1 - p))))
    golden_B = one_token([1.0] + [0.0] * 7, [0] * 8, cfg)
    errors += [abs(float(golden_B[0]) - 2.474874), abs(float(golden_B[7]) + 0.353553)]
    return worst(errors)


@shared(
    "rloo = n/(n-1) x (grpo with scale none)",
    source="Ahmadian et al. 2024, arXiv 2402.14740",
    bound=1e-12,
)
def leave_one_out() -> float:
    case, errors = make_case(), []
    group_id_B, reward_B = case.batch.group_id_B, case.batch.reward_B.nan_to_num(0.25)
    rloo_B = one_token(reward_B, group_id_B, config("rloo"))
    centred_B = one_token(reward_B, group_id_B, config(scale_rewards="none"))
    for i, label in enumerate(group_id_B.tolist()):
        n = int((group_id_B == label).sum())
        factor = n / (n - 1) if n > 1 else 0.0
        errors.append(abs(float(rloo_B[i]) - factor * float(centred_B[i])))
    return worst(errors)


@shared("grpo: R -> a R + b with a > 0 changes nothing", source="algebra", bound=1e-9)
def affine() -> float:
    case = make_case()
    group_id_B, reward_B = case.batch.group_id_B, case.batch.reward_B
    cfg = config(adv_eps=0.0)
    before_B = one_token(reward_B, group_id_B, cfg)
    pairs = itertools.product((0.1, 1.0, 30.0), (-7.0, 0.0, 2.5))
    return worst(
        difference(one_token(a * reward_B + b, group_id_B, cfg), before_B) for a, b in pairs
    )


@shared("twelve float32 copies of 0.98: exactly 0", source="definition", bound=0.0)
def ties_in_float32() -> float:
    reward_B = torch.full((12,), 0.98)
    mask_BT, group_id_B = torch.ones(12, 1), torch.zeros(12, dtype=torch.long)
    errors = []
    for adv_eps in (1e-4, 1e-6, 1e-9, 0.0):
        for scale in ("group", "batch", "none"):
            cfg = config(adv_eps=adv_eps, scale_rewards=scale)
            advantage_BT = algos.compute_advantages(reward_B, reward_B, group_id_B, mask_BT, cfg)
            errors.append(difference(advantage_BT, 0.0))
    return worst(errors)


@shared(
    "without the tie guard the same twelve give |A| of 0.15 and 0.95",
    source="float32 rounding of the mean; adv_eps 1e-6 and 1e-9",
    bound=0.01,
)
def ties_without_guard() -> float:
    value = torch.tensor(0.98)
    total = torch.zeros(())
    for _ in range(12):
        total = total + value
    centred = value - total / 12
    deviation = torch.sqrt(12 * centred**2 / 11)
    return worst(
        abs(float((centred / (deviation + eps)).abs()) - expected)
        for eps, expected in ((1e-6, 0.15), (1e-9, 0.95))
    )


@shared("group of one: 0, or its raw reward", source="definition; raw as in verl", bound=0.0)
def singletons() -> float:
    errors = []
    for estimator in ("grpo", "rloo"):
        for mode, expected in (("zero", 0.0), ("raw", 0.7)):
            cfg = config(adv_estimator=estimator, singleton_advantage=mode)
            advantage_B = one_token([0.7, 1.0, 0.0], [4, 9, 9], cfg)
            errors.append(abs(float(advantage_B[0]) - expected))
            # A group left with one scorable member is a group of one.
            advantage_B = one_token([0.7, math.nan, 1.0, 0.0], [4, 4, 9, 9], cfg)
            errors.append(abs(float(advantage_B[0]) - expected))
    return worst(errors)


@shared("every estimator and scale = float64 loops", source="verify/reference.py", bound=1e-9)
def grid() -> float:
    errors = []
    for estimator, scale, mode, kl_in in itertools.product(
        ("grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline"),
        ("group", "batch", "none"),
        ("zero", "raw"),
        ("loss", "reward"),
    ):
        if estimator != "grpo" and scale != "none":
            continue
        cfg = config(
            adv_estimator=estimator,
            scale_rewards=scale,
            singleton_advantage=mode,
            kl_in=kl_in,
            beta=0.3,
        )
        for seed in range(2):
            case = make_case(seed)
            b = case.batch
            ours_BT = algos.compute_advantages(
                b.reward_B, case.acc_B, b.group_id_B, b.mask_BT, cfg, kl_BT=case.kl_BT
            )
            theirs = reference.advantages(
                b.reward_B.tolist(),
                case.acc_B.tolist(),
                b.group_id_B.tolist(),
                b.mask_BT.tolist(),
                case.kl_BT.tolist(),
                cfg,
            )
            errors.append(difference(ours_BT, theirs))
    return worst(errors)


@shared(
    "normalize_advantages whitens the per-sequence values",
    source="TRL, RLOOConfig.normalize_advantages",
    bound=1e-9,
)
def normalized() -> float:
    reward, group = [1.0, 0.0, 0.0, 0.3, 0.9, 0.1, math.nan], [1, 1, 1, 2, 2, 2, 2]
    cfg = config("rloo", normalize_advantages=True)
    scorable = [math.isfinite(r) for r in reward]
    raw = {
        i: reference.sequence_advantage(i, reward, group, scorable, cfg)
        for i in range(len(reward))
        if scorable[i]
    }
    expected = reference.whitened(raw)
    ours = one_token(reward, group, cfg).tolist()
    return worst([abs(ours[i] - expected.get(i, 0.0)) for i in range(len(reward))])


@shared("whitening one token, or equal values: zeros", source="definition", bound=0.0)
def nothing_to_whiten() -> float:
    cfg = config("reinforce_plus_plus", beta=0.0)
    group_id_B = torch.tensor([0, 1])
    one_BT = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    reward_B = torch.tensor([0.98, 0.5], dtype=torch.float64)
    single_BT = algos.compute_advantages(reward_B, reward_B, group_id_B, one_BT, cfg)
    equal_B = torch.full((2,), 0.98, dtype=torch.float64)
    equal_BT = algos.compute_advantages(equal_B, equal_B, group_id_B, torch.ones_like(one_BT), cfg)
    return worst([difference(single_BT, 0.0), difference(equal_BT, 0.0)])


@shared(
    "a truncated row stays in the statistics and loses its mask",
    source="mask_truncated_completions",
    bound=1e-12,
)
def truncated() -> float:
    cfg = config(overlong={"mask_truncated_completions": True})
    reward_B = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    group_id_B = torch.zeros(4, dtype=torch.long)
    cut_B = torch.tensor([False, True, False, False])
    mask_BT = algos.gradient_mask(torch.ones(4, 2, dtype=torch.float64), reward_B, cut_B, cfg)
    ours_BT = algos.compute_advantages(reward_B, reward_B, group_id_B, mask_BT, cfg)
    deviation = math.sqrt(4 * 0.25 / 3) + cfg.adv_eps
    expected = [
        [a / deviation * (not cut)] * 2
        for a, cut in zip((0.5, -0.5, -0.5, 0.5), cut_B.tolist(), strict=True)
    ]
    return difference(ours_BT, expected)
