"""Properties of ratios and surrogates: values, gradients, and where gradients vanish."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from rlalign import algos
from rlalign.config import AlgoConfig
from rlalign.types import TrainBatch
from rlalign.verify import reference
from rlalign.verify.cases import (
    config,
    credited,
    difference,
    loss_inputs,
    make_case,
    value_and_gradient,
    worst,
)
from rlalign.verify.table import shared

PPO = "Schulman et al. 2017, arXiv 1707.06347"
CISPO = "MiniMax 2025, arXiv 2506.13585"
GSPO = "Zheng et al. 2025, arXiv 2507.18071"
LEVELS = ("token", "sequence", "sequence_token", "sequence_sum")
SURROGATES = ("ppo_clip", "cispo", "reinforce")
RATIOS = (0.05, 0.5, 0.79, 0.81, 1.0, 1.19, 1.27, 1.29, 2.9, 3.1, 8.0)


def no_correction(**fields) -> AlgoConfig:
    return config(mismatch={"rollout_is": "none"}, beta=0.0, **fields)


def single_tokens(ratios: Tensor, advantage: Tensor, old_logp: float = -2.0) -> TrainBatch:
    """One-token rows with the given policy ratios; the total loss is the sum over rows."""
    old_BT = torch.full_like(ratios, old_logp)[:, None]
    return TrainBatch(
        sequences=((0,),) * len(ratios),
        completion_len_B=torch.ones(len(ratios), dtype=torch.long),
        group_id_B=torch.zeros(len(ratios), dtype=torch.long),
        mask_BT=torch.ones_like(old_BT),
        reward_B=torch.zeros_like(ratios),
        logp_rollout_BT=old_BT,
        logp_old_BT=old_BT,
        advantage_BT=advantage[:, None],
        weight_BT=torch.ones_like(old_BT),
    )


def on_grid(cfg: AlgoConfig) -> list[tuple[float, float, float, float]]:
    """(ratio, advantage, loss, gradient in logp) for RATIOS x {-2, 0, 0.5}."""
    rows = []
    for rho, a in itertools.product(RATIOS, (-2.0, 0.0, 0.5)):
        ratio, advantage = torch.tensor([[rho], [a]], dtype=torch.float64)
        batch = single_tokens(ratio, advantage)
        assert batch.logp_old_BT is not None
        logp_BT = batch.logp_old_BT + ratio.log()[:, None]
        loss, gradient_BT = value_and_gradient(logp_BT, batch, cfg)
        rows.append((rho, a, float(loss), float(gradient_BT)))
    return rows


@shared("ppo_clip: gradient -A rho, or 0 exactly where the clip says so", source=PPO, bound=1e-9)
def ppo_support() -> float:
    errors = []
    for high, delta in ((None, None), (0.28, None), (0.28, 3.0)):
        cfg = no_correction(epsilon=0.2, epsilon_high=high, delta=delta)
        top, dual = 1 + (high or 0.2), delta or math.inf
        for rho, a, _, slope in on_grid(cfg):
            silent = (a > 0 and rho > top) or (a < 0 and (rho < 0.8 or rho > dual))
            errors.append(abs(slope - (0.0 if silent else -a * rho)))
    return worst(errors)


@shared(
    "dual clip = TRL's cap of the ratio in the unclipped branch",
    source="TRL, GRPOConfig.delta; Ye et al. 2020, arXiv 1912.09729",
    bound=1e-12,
)
def dual_clip() -> float:
    errors = []
    for delta in (1.3, 3.0, 6.0):
        cfg = no_correction(epsilon=0.2, epsilon_high=0.28, delta=delta)
        for rho, a, loss, _ in on_grid(cfg):
            clipped = min(max(rho, 0.8), 1.28)
            errors.append(abs(loss + min(min(rho, delta) * a, clipped * a)))
    return worst(errors)


@shared("cispo: gradient -clip(rho) A, never 0 for A != 0", source=CISPO, bound=1e-9)
def cispo_support() -> float:
    errors = []
    for epsilon, high in ((None, 4.0), (0.2, 0.28)):
        cfg = no_correction(policy_loss="cispo", epsilon=epsilon, epsilon_high=high)
        low = 0.0 if epsilon is None else 1 - epsilon
        for rho, a, _, slope in on_grid(cfg):
            errors.append(abs(slope + min(max(rho, low), 1 + high) * a))
            errors.append(float(a != 0 and slope == 0))
    return worst(errors)


@shared(
    "rho = 1: ppo_clip, dual clip, cispo, reinforce and every level agree",
    source="all give -A grad logp",
    bound=1e-12,
)
def on_policy() -> float:
    case = make_case()
    expected_BT: Tensor | None = None
    errors = []
    variants = [{"policy_loss": s} for s in SURROGATES]
    variants += [{"delta": 3.0}]
    # A sum over the tokens of a sequence carries no 1/|y|, so that level is compared on its own.
    variants += [{"importance_sampling_level": level} for level in LEVELS[:3]]
    for variant in variants:
        cfg = no_correction(loss_agg_mode="seq-mean-token-mean", **variant)
        batch = credited(case, cfg).replace(logp_old_BT=None)
        _, gradient_BT = value_and_gradient(case.logp_BT, batch, cfg)
        expected_BT = gradient_BT if expected_BT is None else expected_BT
        errors.append(difference(gradient_BT, expected_BT))
    return worst(errors)


@shared(
    "rho = 1: rloo's token form = TRL's sequence_sum form",
    source="Ahmadian et al. 2024, arXiv 2402.14740; TRL RLOOTrainer",
    bound=1e-12,
)
def rloo_forms() -> float:
    case = make_case()
    ours = no_correction(loss_type="rloo")
    trl = no_correction(
        loss_type="rloo",
        importance_sampling_level="sequence_sum",
        loss_agg_mode="seq-mean-token-mean",
    )
    gradients = [
        value_and_gradient(case.logp_BT, credited(case, cfg).replace(logp_old_BT=None), cfg)[1]
        for cfg in (ours, trl)
    ]
    return difference(*gradients)


@shared(
    "off-policy inside the clip: gspo's gradient is s_i A/|y_i| per token, not the token one",
    source=GSPO,
    bound=1e-12,
)
def sequence_gradient() -> float:
    case = make_case(gap=0.1)
    cfg = no_correction(importance_sampling_level="sequence", epsilon=0.9, epsilon_high=9.0)
    batch = credited(case, cfg)
    _, gradient_BT = value_and_gradient(case.logp_BT, batch, cfg)
    _, token_BT = value_and_gradient(
        case.logp_BT, batch, dataclasses.replace(cfg, importance_sampling_level="token")
    )
    assert batch.advantage_BT is not None and batch.logp_old_BT is not None
    expected = torch.zeros_like(gradient_BT)
    num_sequences = int((batch.mask_BT.sum(1) > 0).sum())
    for i, row in enumerate(batch.mask_BT):
        tokens = row.nonzero().flatten().tolist()
        gaps = [float(case.logp_BT[i, t] - batch.logp_old_BT[i, t]) for t in tokens]
        for t in tokens:
            s = math.exp(sum(gaps) / len(tokens))
            expected[i, t] = -s * float(batch.advantage_BT[i, t]) / len(tokens) / num_sequences
    same_as_token = difference(gradient_BT, token_BT) < 1e-4
    return worst([difference(gradient_BT, expected), float(same_as_token)])


@shared("a log-ratio of any size: finite loss and gradient", source="clamp before exp", bound=0.0)
def extreme_ratios() -> float:
    bad = 0
    for level, name, jump in itertools.product(LEVELS, SURROGATES, (-1e4, -90.0, 90.0, 1e4)):
        cfg = no_correction(importance_sampling_level=level, policy_loss=name, delta=None)
        case = make_case()
        batch = credited(case, cfg)
        assert batch.logp_old_BT is not None
        loss, gradient_BT = value_and_gradient(batch.logp_old_BT.float() + jump, batch, cfg)
        bad += not (loss.isfinite() and gradient_BT.isfinite().all())
    return float(bad)


@shared(
    "every level x surrogate x correction x KL = float64 loops, value and gradient",
    source="verify/reference.py",
    bound=1e-8,
)
def grid() -> float:
    errors = []
    corrections = [("none", "truncate")]
    corrections += [(k, m) for k in ("token", "sequence") for m in ("truncate", "mask")]
    corrections += [("sequence_geomean", "mask"), ("seq_mask_tis", "truncate")]
    corrections += [("seq_mask_tis", "mask")]
    estimators = itertools.cycle(("k1", "k2", "k3", "k3+"))
    for level, name, (is_level, mode) in itertools.product(LEVELS, SURROGATES, corrections):
        estimator = next(estimators)
        cfg = config(
            importance_sampling_level=level,
            policy_loss=name,
            delta=3.0 if name == "ppo_clip" else None,
            beta=0.2,
            kl_estimator=estimator,
            use_bias_correction_kl=estimator in ("k1", "k3"),
            mismatch={
                "rollout_is": is_level,
                "rollout_is_mode": mode,
                "rollout_is_min": 0.7,
                "rollout_is_max": 1.3,
            },
        )
        case = make_case(seed=len(errors))
        batch = credited(case, cfg)
        loss, gradient_BT = value_and_gradient(case.logp_BT, batch, cfg)
        expected, expected_BT = reference.loss_and_gradient(
            loss_inputs(case.logp_BT, batch, cfg), cfg
        )
        errors.append(max(difference(loss, expected), difference(gradient_BT, expected_BT)))
    return worst(errors)


def softmax_case(cfg: AlgoConfig) -> tuple[Tensor, TrainBatch, Callable[[Tensor], Tensor]]:
    """A random policy of 4 rows, 3 tokens and a vocabulary of 5: its logits, the batch, and the
    map from logits to the log-probs of the sampled tokens."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    token_BT = torch.randint(0, 5, (4, 3), generator=generator)

    def logp(z: Tensor) -> Tensor:
        return torch.log_softmax(z, -1).gather(-1, token_BT[..., None])[..., 0]

    drift = 0.2 * torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
    old_BT = logp(logits + drift)
    batch = TrainBatch(
        sequences=((0,) * 3,) * 4,
        completion_len_B=torch.full((4,), 3),
        group_id_B=torch.tensor([0, 1, 0, 1]),
        mask_BT=torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]], dtype=torch.float64),
        reward_B=torch.zeros(4),
        logp_rollout_BT=old_BT,
        logp_old_BT=old_BT,
        logp_ref_BT=logp(logits - drift),
        advantage_BT=torch.tensor([[1.0], [-0.7], [-1.0], [0.4]], dtype=torch.float64).expand(4, 3),
    )
    weight_BT = algos.aggregation_weights(
        batch.mask_BT, batch.group_id_B, cfg, max_completion_length=3
    )
    return logits, batch.replace(weight_BT=weight_BT), logp


@shared(
    "3 tokens, vocabulary of 5: autograd = sum_t dl/dlogp_t (onehot - softmax)",
    source="gradient of a log-softmax",
    bound=1e-9,
)
def through_softmax() -> float:
    errors = []
    for level, name in itertools.product(LEVELS, SURROGATES):
        cfg = config(importance_sampling_level=level, policy_loss=name, beta=0.1)
        logits, batch, logp = softmax_case(cfg)
        leaf = logits.clone().requires_grad_(True)
        (ours,) = torch.autograd.grad(algos.policy_loss(logp(leaf), batch, cfg).loss, leaf)
        _, in_logp = reference.loss_and_gradient(loss_inputs(logp(logits), batch, cfg), cfg)
        for i, t, v in itertools.product(range(4), range(3), range(5)):
            row = [math.exp(float(z)) for z in logits[i, t]]
            chosen = math.isclose(
                float(logp(logits)[i, t]), math.log(row[v] / sum(row)), rel_tol=1e-12
            )
            expected = in_logp[i][t] * (float(chosen) - row[v] / sum(row))
            errors.append(abs(float(ours[i, t, v]) - expected))
    return worst(errors)


@shared(
    "3 tokens, vocabulary of 5: autograd = finite differences",
    source="definition of the derivative; losses without stop-gradient",
    bound=1e-5,
)
def finite_differences() -> float:
    errors = []
    for level, name in itertools.product(("token", "sequence", "sequence_sum"), SURROGATES):
        if name == "cispo":
            continue
        cfg = config(importance_sampling_level=level, policy_loss=name, beta=0.1)
        logits, batch, logp = softmax_case(cfg)
        leaf = logits.clone().requires_grad_(True)
        (ours,) = torch.autograd.grad(algos.policy_loss(logp(leaf), batch, cfg).loss, leaf)
        step = 1e-6
        for index in itertools.product(range(4), range(3), range(5)):
            bump = torch.zeros_like(logits)
            bump[index] = step
            ends = [
                reference.loss_and_gradient(loss_inputs(logp(z), batch, cfg), cfg)[0]
                for z in (logits + bump, logits - bump)
            ]
            errors.append(abs(float(ours[index]) - (ends[0] - ends[1]) / (2 * step)))
    return worst(errors)


@shared("epsilon_high unset = epsilon", source="definition", bound=0.0)
def symmetric_clip() -> float:
    case = make_case()
    one, other = no_correction(epsilon=0.1), no_correction(epsilon=0.1, epsilon_high=0.1)
    batch = credited(case, one)
    return difference(
        value_and_gradient(case.logp_BT, batch, one)[1],
        value_and_gradient(case.logp_BT, batch, other)[1],
    )


@shared(
    "raising epsilon_high never silences a token with A > 0",
    source="Yu et al. 2025, arXiv 2503.14476 (clip-higher)",
    bound=0.0,
)
def clip_higher() -> float:
    case = make_case(gap=0.5)
    batch = credited(case, no_correction())
    assert batch.advantage_BT is not None
    positive_BT = (batch.advantage_BT > 0) & (batch.mask_BT > 0)
    lost, before = 0, -1
    for high in (0.0, 0.1, 0.2, 0.28, 0.5, 1.0, 4.0):
        cfg = no_correction(epsilon=0.2, epsilon_high=high)
        _, gradient_BT = value_and_gradient(case.logp_BT, batch, cfg)
        support = int(((gradient_BT != 0) & positive_BT).sum())
        lost, before = lost + max(before - support, 0), support
    return float(lost)
