"""Held-out evaluation: pass@1, pass@k, majority vote, each with an interval.

With n samples of a prompt, c of them right: pass@1 = c/n, pass@k = 1 - C(n-c, k)/C(n, k) (unbiased,
Chen et al. 2021, arXiv 2107.03374, eq. 1). Intervals are 95 % normal-theory intervals over prompts,
which is where the randomness of a benchmark of fixed prompts lies; for one greedy sample Wilson's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from rlalign.config import Config
from rlalign.rewards import Scorer
from rlalign.rollout.engine import RolloutEngine, SamplingParams
from rlalign.rollout.masked_diffusion import MaskedDiffusionEngine
from rlalign.trainer.collect import make_requests, roll_out
from rlalign.trainer.distributed import World
from rlalign.types import Group, Prompt

EVAL_STEP = -1  # keys evaluation seeds apart from those of training steps
Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class EvalResult:
    """Rates in [0, 1]; `ci95` is the half-width of the interval of pass@1."""

    num_prompts: int
    num_samples: int
    num_unscorable: int
    metrics: dict[str, float]


def run_evaluation(
    rollout: RolloutEngine,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    config: Config,
    world: World,
) -> EvalResult:
    """Sample `trainer.eval_samples` completions a prompt and grade them: greedy with one, else at
    the rollout temperature, keyed by the seed."""
    samples = config.trainer.eval_samples
    params = SamplingParams(
        max_completion_length=config.rollout.max_completion_length,
        temperature=0.0 if samples == 1 else config.rollout.temperature,
    )
    requests = make_requests(prompts, [samples] * len(prompts), config.seed, EVAL_STEP, Counter())
    own_steps = isinstance(rollout, MaskedDiffusionEngine)
    with rollout.evaluation() if own_steps else nullcontext():
        collected = roll_out(rollout, scorer, prompts, requests, params, world)
    return summarize(collected.groups, collected.all_scores().acc_B)


def summarize(groups: Sequence[Group], acc_B: torch.Tensor, threshold: float = 0.5) -> EvalResult:
    """Rates over prompts. `acc_B` has one entry a sample, NaN where it could not be scored.

    An unscorable sample is left out of its prompt's n; a prompt without any scorable sample is left
    out whole. The share of such samples is `unscorable` among the figures, where there are any.
    """
    pass1, majority, curves = [], [], []
    at = 0
    for group in groups:
        acc = acc_B[at : at + len(group.samples)].tolist()
        at += len(group.samples)
        judged = zip(group.samples, acc, strict=True)
        scored = [(s.text, a > threshold) for s, a in judged if not math.isnan(a)]
        if not scored:
            continue
        right = sum(ok for _, ok in scored)
        pass1.append(right / len(scored))
        majority.append(_majority(scored))
        curves.append({k: pass_at_k(len(scored), right, k) for k in _powers(len(scored))})
    unscorable = int(torch.isnan(acc_B).sum())
    metrics = {"unscorable": unscorable / len(acc_B)} if unscorable else {}
    if not pass1:
        return EvalResult(len(groups), len(acc_B), unscorable, metrics)
    metrics |= {"pass@1": sum(pass1) / len(pass1), "ci95": half_width(pass1)}
    for k in sorted(set.intersection(*(set(curve) for curve in curves)) - {1}):
        metrics[f"pass@{k}"] = sum(curve[k] for curve in curves) / len(curves)
    if max(len(curve) for curve in curves) > 1:
        metrics["majority"] = sum(majority) / len(majority)
    return EvalResult(len(groups), len(acc_B), unscorable, metrics)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that k of n samples, c of which are right, hold a right one."""
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def half_width(rates: Sequence[float]) -> float:
    """Half-width of the 95 % interval of the mean rate; Wilson's if all rates are 0 or 1."""
    n, mean = len(rates), sum(rates) / len(rates)
    if all(rate in (0.0, 1.0) for rate in rates):
        spread = mean * (1 - mean) / n + Z95**2 / (4 * n**2)
        return Z95 * math.sqrt(spread) / (1 + Z95**2 / n)
    variance = sum((rate - mean) ** 2 for rate in rates) / max(n - 1, 1)
    return Z95 * math.sqrt(variance / n)


def _majority(scored: Sequence[tuple[str, bool]]) -> float:
    """Is the commonest text right? Votes go by the answer, which is what follows the last tag."""
    votes = Counter(final_answer(text) for text, _ in scored)
    top = max(votes.values())
    winners = [answer for answer, count in votes.items() if count == top]
    verdict = {final_answer(text): ok for text, ok in scored}
    return sum(verdict[answer] for answer in winners) / len(winners)


def final_answer(text: str) -> str:
    """What majority voting compares: the content of the last <answer> tag, else the last line."""
    if "<answer>" in text:
        return text.rsplit("<answer>", 1)[1].split("</answer>")[0].strip()
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def _powers(n: int) -> list[int]:
    return [2**i for i in range(n.bit_length()) if 2**i <= n]
