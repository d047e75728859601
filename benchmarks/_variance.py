"""Variance of a gradient estimate by resampling: the same prompts and weights, samples drawn again.

The trace of the covariance of the gradient of all parameters, from R estimates of N = 8 m samples
over m prompts. `lemma` is Lemma 1 of GVM with accept rates from a reference pilot of 64 samples a
prompt, the same for every side, so that all sides estimate one thing; `trained` is the gradient
that a run takes (a prompt counts by the mean of its accepted samples), where sides of less coverage
also have less signal, so its noise is divided by the squared norm of its mean."""

from __future__ import annotations

import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable

import torch

import rlalign
from rlalign import algos
from rlalign.algos.gvm import gvm_weights
from rlalign.trainer.ahead import draw
from rlalign.trainer.allocated import Allocated, draw_counts
from rlalign.trainer.allocated import estimate as estimate_pilot
from rlalign.trainer.batch import make_train_batch, with_weights
from rlalign.trainer.build import open_job
from rlalign.trainer.collect import Collected
from rlalign.trainer.job import Job
from rlalign.trainer.sources import InOrder
from rlalign.trainer.token_likelihood import accumulate_gradient, prepare
from rlalign.trainer.update import rows_with_gradient

PROMPTS, REFERENCE = 64, 64
SHARED = [
    "algo.loss_type=gvm_raft",
    "algo.loss_agg_mode=seq-mean-token-sum",  # g is the gradient of log pi(y), a sum
    "algo.allocation.update_interval=1",
    f"trainer.prompts_per_step={PROMPTS}",
    "task.eval=null",
]


def lemma(config_path, settings: list[str], repeats: int) -> dict[str, float]:
    """Variance over uniform's at equal samples: shares from known rates and norms; from a pilot of
    8 that is drawn anew for every estimate and not counted, as published, where prompts of which it
    had nothing right get nothing (`bias`: the squared error this adds); and with `rate_prior` 1."""
    extra = ["algo.prompt_weighting=inverse_propensity", "algo.allocation.train_on_pilot=false"]
    with tempfile.TemporaryDirectory() as runs:
        place = ["name=variance", f"tracking.runs_dir={runs}"]
        config = rlalign.load_config(config_path, [*settings, *SHARED, *extra, *place])
        with open_job(config) as job:
            return _lemma(job, repeats)


def _lemma(job: Job, repeats: int) -> dict[str, float]:
    prompts = job.train_prompts.take(0, PROMPTS)

    def pilot(count: int, step: int) -> algos.PilotStats:
        return estimate_pilot(job, draw_counts(job, prompts, [count] * PROMPTS, step, Counter()))

    def shares(stats: algos.PilotStats) -> torch.Tensor:
        return algos.allocate(gvm_weights(stats.rate_m, stats.right_norm_m), 8 * PROMPTS)

    reference = pilot(REFERENCE, 10_000)
    rate_m = reference.rate_m.clamp(min=1 / REFERENCE)

    def estimate(count_m: torch.Tensor, step: int) -> torch.Tensor:
        drawn = draw_counts(job, prompts, count_m.tolist(), step, Counter())
        weight = [1 / max(n, 1) / p for n, p in zip(count_m.tolist(), rate_m.tolist(), strict=True)]
        drawn.groups = [
            dataclasses.replace(group, weight=w)
            for group, w in zip(drawn.groups, weight, strict=True)
        ]
        return gradient(job, drawn)

    sides: dict[str, Callable[[int], torch.Tensor]] = {
        "uniform": lambda _: torch.full((PROMPTS,), 8),
        "known": lambda _: shares(reference),
        "pilot": lambda r: shares(pilot(8, 20_000 + r)),
        "pilot, prior 1": lambda r: shares(pilot(8, 20_000 + r).shrunk(1)),
    }
    means, noise = {}, {}
    for name, counts in sides.items():
        found = torch.stack([estimate(counts(r), r) for r in range(repeats)])
        means[name], noise[name] = found.mean(0), spread(found)[0]
    gap = float(((means["pilot"] - means["known"]) ** 2).sum())
    bias = max(0.0, gap - (noise["pilot"] + noise["known"]) / repeats)
    result = {name: value / noise["uniform"] for name, value in noise.items() if name != "uniform"}
    return {**result, "pilot, bias": bias / noise["uniform"]}


def trained(config_path, settings: list[str], repeats: int) -> float:
    """Noise over signal, Var / |E|^2, of the gradient that a run of these settings takes, times the
    tokens of an estimate, those of the pilot included."""
    with tempfile.TemporaryDirectory() as runs:
        place = ["name=variance", f"tracking.runs_dir={runs}"]
        config = rlalign.load_config(config_path, [*SHARED, *settings, *place])
        with open_job(config) as job:
            found, tokens = [], 0
            for r in range(repeats):
                job.progress.cursor, job.progress.allocation = 0, {}
                uniform = job.config.algo.allocation.allocator == "uniform"
                drawn = draw(job, r, InOrder(job) if uniform else Allocated(job))
                found.append(gradient(job, drawn.collected))
                tokens += drawn.generated_tokens
    noise, signal = spread(torch.stack(found))
    return noise / signal * tokens / repeats


def gradient(job: Job, drawn: Collected) -> torch.Tensor:
    """Of all parameters, flat."""
    scores = drawn.all_scores()
    batch = make_train_batch(drawn.groups, scores, job.config.algo)
    batch = prepare(job.engine, batch, scores.acc_B, job.config, job.world)
    batch = with_weights(batch, job.config)
    batch = batch.rows(rows_with_gradient(batch, job.config))
    for parameter in job.policy.parameters():
        parameter.grad = None
    accumulate_gradient(job.engine, batch, job.config, job.world, [])
    grads = [p.grad.flatten() for p in job.policy.parameters() if p.grad is not None]
    return torch.cat(grads).double()


def spread(found: torch.Tensor) -> tuple[float, float]:
    """Trace of the covariance, and the squared norm of the mean without its bias."""
    mean = found.mean(0)
    variance = float(((found - mean) ** 2).sum()) / (len(found) - 1)
    return variance, float((mean**2).sum()) - variance / len(found)
