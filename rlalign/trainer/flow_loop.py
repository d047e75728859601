"""The loop of a flow run: prompts, trees, reward, credit, loss, step.

The trainer samples its own network, so nothing is published: a new version is there at once.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from rlalign.models.flow import take_rows
from rlalign.rollout.flow import sample_ode
from rlalign.trainer import record
from rlalign.trainer.evaluate import EVAL_STEP, half_width
from rlalign.trainer.flow_job import FlowJob, roll_out
from rlalign.trainer.flow_record import flow_metrics, leaf_rows, picture_rows
from rlalign.trainer.flow_update import flow_credit, update_flow
from rlalign.trainer.loop import check_skipped, count_skipped, due, result
from rlalign.trainer.schedule import lr_schedule


def run_flow(job: FlowJob) -> dict[str, Any]:
    """Train from `job.progress` to `max_steps`; returns (and writes) the content of result.json."""
    config, progress = job.config, job.progress
    start = time.perf_counter() - progress.wall_s
    if job.eval_prompts and not progress.eval_before:
        progress.eval_before = evaluate_flow(job)
    while progress.step < config.trainer.max_steps:
        figures, rows, trees = flow_step(job)
        progress.step += 1
        progress.eval_after = {}  # of an earlier end of this run
        progress.wall_s = time.perf_counter() - start
        if due(progress.step, config.trainer.eval_every, config.trainer.max_steps):
            held_out = evaluate_flow(job)
            figures |= {f"eval/{config.task.eval}/{name}": v for name, v in held_out.items()}
        job.record_step({"step": progress.step, **figures}, rows, trees)
        check_skipped(job)
        if due(progress.step, config.trainer.checkpoint_every, config.trainer.max_steps):
            job.save_checkpoint()
    if job.eval_prompts and not progress.eval_after:
        progress.eval_after = evaluate_flow(job)
    progress.wall_s = time.perf_counter() - start
    job.save_checkpoint()
    return job.finish(result(job))


def flow_step(job: FlowJob) -> record.StepRecord:
    """One rollout batch and its optimizer steps."""
    config, progress = job.config, job.progress
    step, began = progress.step, time.perf_counter()
    rollout = roll_out(job, step)
    progress.cursor += len(rollout.prompts)
    middle = time.perf_counter()
    credit = flow_credit(rollout.batch, config, step)
    lr = lr_schedule(step, config.trainer.optim, config.trainer.max_steps)
    credited = time.perf_counter()
    updated = update_flow(job.engine, rollout.batch, credit, config, job.world, step, lr)
    count_skipped(progress, updated)
    if updated.optimizer_steps:
        progress.version += 1
    shape, trees = rollout.batch.plan.shape, len(rollout.batch.tree.tree_N.unique())
    calls = trees * shape.num_calls
    progress.rollout_tokens += calls
    progress.train_tokens += updated.train_tokens
    times_s = {
        "rollout": rollout.rollout_s,
        "reward": rollout.reward_s,
        "logp": credited - middle,
        "backward": updated.backward_s,
        "step": updated.step_s,
        "total": time.perf_counter() - began,
    }
    figures = flow_metrics(rollout, credit, config.algo)
    leaves = trees * shape.num_leaves
    figures |= {
        "tree/calls_per_leaf/rollout": calls / leaves,
        "tree/calls_per_leaf/train": updated.train_tokens / leaves,
    }
    figures |= record.update_metrics(updated, lr, progress.version, 0)
    figures |= record.time_metrics(times_s, calls, updated.train_tokens)
    figures |= record.memory_metrics()
    rows = leaf_rows(step + 1, rollout, credit)
    return record.StepRecord(figures, rows, picture_rows(step + 1, rollout, credit))


def evaluate_flow(job: FlowJob) -> dict[str, float]:
    """Figures of deterministic samples of the held-out prompts, with fixed noise: mean `reward`
    with the half-width of its 95 % interval over prompts, each reward function's mean, and
    `diversity`, the mean over prompts of the pixels' standard deviation among a prompt's images."""
    config, flow = job.config, job.config.rollout.flow
    prompts = list(job.eval_prompts or ())
    job.stage(f"evaluation on {len(prompts)} held-out prompts")
    mine = prompts[job.world.rank :: job.world.size]
    totals = torch.zeros(1 + len(config.rewards.functions), dtype=torch.float64)
    by_prompt = torch.zeros(len(prompts), dtype=torch.float64)
    with job.engine.full_parameters(), job.world.agreed("evaluation"), torch.no_grad():
        for i, prompt in enumerate(mine):
            images, scores = _samples(job, [prompt] * flow.eval_samples)
            by_prompt[job.world.rank + i * job.world.size] = scores.reward_B.double().nanmean()
            totals[0] += images.double().std(0, correction=0).mean()
            for k, value_B in enumerate(scores.by_function.values()):
                totals[1 + k] += value_B.double().nanmean()
    by_prompt = job.world.all_reduce_sum(by_prompt, "evaluation")
    totals = job.world.all_reduce_sum(totals, "evaluation")
    means = (totals / max(len(prompts), 1)).tolist()
    rates = by_prompt.tolist()
    figures = {"reward": sum(rates) / max(len(rates), 1), "ci95": half_width(rates)}
    names = [spec.name for spec in config.rewards.functions]
    figures |= {f"rewards/{name}": mean for name, mean in zip(names, means[1:], strict=True)}
    return figures | {"diversity": means[0]}


def _samples(job: FlowJob, prompts: list) -> tuple[Tensor, Any]:
    flow = job.config.rollout.flow
    cond = job.policy.condition(prompts)

    def velocity(z_MX: Tensor, sigma_M: Tensor, tree_M: Tensor) -> Tensor:
        return job.policy(z_MX, sigma_M, take_rows(cond, tree_M))

    x0_NX = sample_ode(
        velocity,
        [(prompt.id, i) for i, prompt in enumerate(prompts)],
        job.policy.latent_shape,
        flow,
        seed=job.config.seed,
        iteration=EVAL_STEP,
        device=job.world.device,
        sigma_T1=job.policy.time_grid(flow),
    )
    images = job.policy.decode(x0_NX)
    return images, job.scorer.score_images(
        prompts, images, torch.zeros(len(prompts), dtype=torch.long)
    )
