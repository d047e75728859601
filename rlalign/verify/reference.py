"""The formulas again, in Python floats and loops, sharing nothing with the shipped code.

Slow and plain on purpose: each function is the published formula read aloud. Matrices are lists of
rows; `mask[i][t]` is 0 or 1; `cfg` is a resolved AlgoConfig, read for its settings only.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from rlalign.config import AlgoConfig

Row = Sequence[float]
Matrix = Sequence[Row]


@dataclass(frozen=True, slots=True)
class LossInputs:
    """Everything a loss depends on."""

    logp: Matrix
    old: Matrix
    rollout: Matrix
    ref: Matrix
    mask: Matrix
    advantage: Matrix
    weight: Matrix
    policy_weight: Matrix


def kl(x: float, estimator: str) -> tuple[float, float]:
    """Value and derivative in x = logp - logp_ref."""
    k3 = math.exp(-x) - 1 + x
    return {
        "k1": (x, 1.0),
        "k2": (x * x / 2, x),
        "k3": (k3, 1 - math.exp(-x)),
        "k3+": (k3, x),
    }[estimator]


def advantages(
    reward: Row, acc: Row, group: Sequence[int], mask: Matrix, kl_tokens: Matrix, cfg: AlgoConfig
) -> list[list[float]]:
    """Advantage of every token, for the estimators of Shao et al. 2024 (grpo), Liu et al. 2025
    (scale none), Ahmadian et al. 2024 (rloo), Hu 2025 (reinforce_plus_plus, baseline), Dong et al.
    2023 (raft) and Xiong et al. 2025 (reinforce_rej)."""
    beta = cfg.beta if cfg.kl_in == "reward" and cfg.beta else 0.0
    rows = range(len(reward))
    scorable = [math.isfinite(r) for r in reward]
    tokens = [[t for t, m in enumerate(mask[i]) if m] for i in rows]
    if cfg.adv_estimator == "reinforce_plus_plus":
        returns = {
            (i, t): reward[i] - beta * sum(kl_tokens[i][u] for u in tokens[i] if u >= t)
            for i in rows
            if scorable[i]
            for t in tokens[i]
        }
        return _spread(whitened(returns), mask)
    if cfg.adv_estimator in ("raft", "reinforce_rej"):
        judged = [i for i in rows if scorable[i] and tokens[i]]
        right = {i for i in judged if acc[i] > cfg.allocation.acceptance_threshold}
        mixed = {group[i] for i in right} & {group[i] for i in judged if i not in right}
        rej = cfg.adv_estimator == "reinforce_rej"
        counted = [i for i in judged if group[i] in mixed] if rej else right
        kept = {i: reward[i] if rej else 1.0 for i in counted}
        return _spread({(i, t): a for i, a in kept.items() for t in tokens[i]}, mask)
    shaped = [reward[i] - beta * sum(kl_tokens[i][t] for t in tokens[i]) for i in rows]
    values = [
        sequence_advantage(i, shaped, group, scorable, cfg) if scorable[i] else 0.0 for i in rows
    ]
    per_token = {(i, t): values[i] for i in rows if scorable[i] for t in tokens[i]}
    if cfg.adv_estimator == "reinforce_plus_plus_baseline":
        per_token = whitened(per_token)
    return _spread(per_token, mask)


def sequence_advantage(
    i: int, reward: Row, group: Sequence[int], scorable: Sequence[bool], cfg: AlgoConfig
) -> float:
    """Advantage of sample i from its own group (and, for scale batch, the whole batch)."""
    members = [reward[j] for j in range(len(reward)) if group[j] == group[i] and scorable[j]]
    if len(members) == 1:
        return reward[i] if cfg.singleton_advantage == "raw" else 0.0
    if max(members) == min(members):
        return 0.0
    n = len(members)
    if cfg.adv_estimator == "rloo":
        return reward[i] - (sum(members) - reward[i]) / (n - 1)
    centred = reward[i] - sum(members) / n
    if cfg.adv_estimator == "reinforce_plus_plus_baseline" or cfg.scale_rewards == "none":
        return centred
    pool = [r for r, ok in zip(reward, scorable, strict=True) if ok]
    spread = statistics.stdev(members if cfg.scale_rewards == "group" else pool)
    return centred / (spread + cfg.adv_eps)


def whitened(values: dict) -> dict:
    """(x - mean) / sqrt(variance + 1e-8), sample variance; zeros without two different values."""
    if len(values) < 2 or max(values.values()) == min(values.values()):
        return dict.fromkeys(values, 0.0)
    mean = sum(values.values()) / len(values)
    deviation = math.sqrt(statistics.variance(values.values()) + 1e-8)
    return {key: (x - mean) / deviation for key, x in values.items()}


def weights(
    mask: Matrix, group: Sequence[int], cfg: AlgoConfig, max_completion_length: int
) -> list[list[float]]:
    """Each token's share of the loss, from the definitions of the aggregation modes."""
    length = [sum(row) for row in mask]
    present = [i for i, n in enumerate(length) if n]
    groups = {group[i] for i in present}
    scale = cfg.loss_scale_factor or max_completion_length
    result = [[0.0] * len(row) for row in mask]
    for i in present:
        by_prompt = cfg.prompt_weighting == "prompt"
        peers = [j for j in present if not by_prompt or group[j] == group[i]]
        share = {
            "token-mean": 1 / sum(length[j] for j in peers),
            "token-mean-local": 1 / sum(length[j] for j in peers),
            "seq-mean-token-mean": 1 / length[i] / len(peers),
            "seq-mean-token-sum": 1 / len(peers),
            "seq-mean-token-sum-norm": 1 / len(peers) / scale,
        }[cfg.loss_agg_mode or ""]
        for t, m in enumerate(mask[i]):
            result[i][t] = m * share / (len(groups) if by_prompt else 1)
    return result


def ratio(d: Row, tokens: Sequence[int], t: int, level: str) -> float:
    """The policy ratio of token t in a sequence with log-ratios d."""
    total = sum(d[u] for u in tokens)
    exponent = {
        "token": d[t],
        "sequence": total / len(tokens),
        "sequence_token": total / len(tokens),
        "sequence_sum": total,
    }[level]
    return math.exp(exponent)


def surrogate(rho: float, a: float, logp: float, cfg: AlgoConfig) -> tuple[float, float, float]:
    """Loss, its derivative in rho (clip regions have none), and its derivative in logp."""
    if cfg.policy_loss == "reinforce":
        return -a * logp, 0.0, -a
    high = 1 + (cfg.epsilon_high or 0.0)
    if cfg.policy_loss == "cispo":
        low = 0.0 if cfg.epsilon is None else 1 - cfg.epsilon
        capped = min(max(rho, low), high)
        return -capped * a * logp, 0.0, -capped * a
    low = 1 - (cfg.epsilon or 0.0)
    if a >= 0:
        return -a * min(rho, high), (0.0 if rho > high else -a), 0.0
    dual = math.inf if cfg.delta is None else cfg.delta
    bounded = min(max(rho, low), dual)
    return -a * bounded, (0.0 if rho < low or rho > dual else -a), 0.0


def mismatch_weights(inputs: LossInputs, cfg: AlgoConfig) -> list[list[float]]:
    """The engine/trainer weight of every token, without batch normalisation."""
    m = cfg.mismatch
    level = m.rollout_is

    def bounded(w: float) -> float:
        if m.rollout_is_mode == "mask":
            return w if m.rollout_is_min <= w <= m.rollout_is_max else 0.0
        return min(max(w, m.rollout_is_min), m.rollout_is_max)

    result = []
    for old, rollout, mask in zip(inputs.old, inputs.rollout, inputs.mask, strict=True):
        gap = [o - r if k else 0.0 for o, r, k in zip(old, rollout, mask, strict=True)]
        geomean = math.exp(sum(gap) / max(sum(mask), 1))
        kept = m.rollout_is_min <= geomean <= m.rollout_is_max
        row = []
        for g in gap:
            if level == "none":
                row.append(1.0)
            elif level == "token":
                row.append(bounded(math.exp(g)))
            elif level == "sequence":
                row.append(bounded(math.exp(sum(gap))))
            elif level == "sequence_geomean":
                row.append(geomean if kept else 0.0)
            else:
                row.append(bounded(math.exp(g)) if kept else 0.0)
        result.append(row)
    return result


def loss_and_gradient(inputs: LossInputs, cfg: AlgoConfig) -> tuple[float, list[list[float]]]:
    """The loss and its derivative in every logp, in closed form."""
    total, gradient = 0.0, [[0.0] * len(row) for row in inputs.logp]
    correction = mismatch_weights(inputs, cfg)
    level = cfg.importance_sampling_level or ""
    beta = cfg.beta if cfg.kl_in == "loss" and cfg.beta else 0.0
    for i, row in enumerate(inputs.logp):
        tokens = [t for t, m in enumerate(inputs.mask[i]) if m]
        d = [new - old for new, old in zip(row, inputs.old[i], strict=True)]
        for t in tokens:
            w, q = inputs.policy_weight[i][t], correction[i][t]
            rho = ratio(d, tokens, t, level)
            value, in_rho, in_logp = surrogate(rho, inputs.advantage[i][t], row[t], cfg)
            total += w * q * value
            gradient[i][t] += w * q * in_logp
            for u, slope in _ratio_slopes(level, tokens, t):
                gradient[i][u] += w * q * in_rho * rho * slope
            if beta:
                k, slope = kl(row[t] - inputs.ref[i][t], cfg.kl_estimator or "")
                if cfg.use_bias_correction_kl:
                    k, slope = math.exp(d[t]) * k, math.exp(d[t]) * (k + slope)
                total += inputs.weight[i][t] * beta * k
                gradient[i][t] += inputs.weight[i][t] * beta * slope
    return total, gradient


def _ratio_slopes(level: str, tokens: Sequence[int], t: int) -> list[tuple[int, float]]:
    """d log(ratio of token t) / d logp of token u, for the u where it is not 0."""
    if level in ("token", "sequence_token"):
        return [(t, 1.0)]
    return [(u, 1 / len(tokens) if level == "sequence" else 1.0) for u in tokens]


def copg(
    rho: Row, score: Row, group: Sequence[int], beta: float, scale: str
) -> tuple[float, list[float]]:
    """CoPG's loss, a mean over groups of sums over pairs, and its derivative in every log-prob
    (Flet-Berliac et al. 2024; `command_a` is the group form of arXiv 2504.00698)."""
    total, gradient = 0.0, [0.0] * len(rho)
    regularised = [r - beta * x for r, x in zip(score, rho, strict=True)]
    labels = set(group)
    for label in labels:
        rows = [i for i, g in enumerate(group) if g == label]
        for i, j in itertools.combinations(rows, 2):
            k = len(rows)
            factor = {"pair": 1.0, "rloo": 1 / (k * (k - 1)), "command_a": 2 * beta / (k - 1)}
            weight = factor[scale] / len(labels)
            gap = regularised[i] - regularised[j]
            total += weight * gap**2 / (2 * beta)
            gradient[i] -= weight * gap
            gradient[j] += weight * gap
    return total, gradient


def _spread(values: dict, mask: Matrix) -> list[list[float]]:
    return [[values.get((i, t), 0.0) for t in range(len(row))] for i, row in enumerate(mask)]
