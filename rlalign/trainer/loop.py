"""The loop: prompts, rollout, reward, credit, loss, step, publish.

prompts -> allocate -> rollout -> reward -> credit -> loss -> optimizer step -> publish weights
   ^                                                                               |
   +------------------------- policy version v+1 <---------------------------------+
"""

from __future__ import annotations

import functools
import logging
import time
from contextlib import closing
from typing import Any

from rlalign.errors import RlalignError
from rlalign.rollout.engine import WeightsLost
from rlalign.tracking.rundir import package_versions
from rlalign.trainer import record
from rlalign.trainer.ahead import MAX_RESENDS, RolloutsAhead
from rlalign.trainer.batch import check_versions, make_train_batch, oldest_version
from rlalign.trainer.evaluate import EvalResult, run_evaluation
from rlalign.trainer.job import Job, Progress, Run
from rlalign.trainer.publish import check_engine, publish
from rlalign.trainer.record_trees import token_trees_record
from rlalign.trainer.schedule import lr_schedule
from rlalign.trainer.update import UpdateResult, update

log = logging.getLogger(__name__)


class TrainingStopped(RlalignError):
    """The run cannot usefully go on; the message says why and what to change."""


def run(job: Job) -> dict[str, Any]:
    """Train from `job.progress` to `max_steps`; returns (and writes) the content of result.json."""
    config, progress = job.config, job.progress
    start = time.perf_counter() - progress.wall_s
    if job.samples_policy:
        publish_weights(job, progress.version)
    if job.eval_prompts and not progress.eval_before:
        progress.eval_before = evaluate(job).metrics
    again = functools.partial(publish_again, job)
    with closing(RolloutsAhead(job, again)) as rollouts:
        while progress.step < config.trainer.max_steps:
            figures, rows, trees = train_step(job, rollouts)
            progress.step += 1
            progress.eval_after = {}  # of an earlier end of this run
            progress.wall_s = time.perf_counter() - start
            if due(progress.step, config.trainer.eval_every, config.trainer.max_steps):
                rollouts.settle()
                held_out = evaluate(job).metrics
                figures |= {f"eval/{config.task.eval}/{name}": v for name, v in held_out.items()}
            job.record_step({"step": progress.step, **figures}, rows, trees)
            check_skipped(job)
            if due(progress.step, config.trainer.checkpoint_every, config.trainer.max_steps):
                job.save_checkpoint()
    if job.eval_prompts and not progress.eval_after:
        progress.eval_after = evaluate(job).metrics
    progress.wall_s = time.perf_counter() - start
    job.save_checkpoint()
    return job.finish(result(job))


def due(step: int, every: int, last: int) -> bool:
    """The last step is never due: what comes after the loop covers it."""
    return every > 0 and step % every == 0 and step != last


def train_step(job: Job, rollouts: RolloutsAhead) -> record.StepRecord:
    """One rollout batch and its optimizer steps."""
    config, progress = job.config, job.progress
    step = progress.step
    began, waited_s = time.perf_counter(), rollouts.waited_s
    drawn = rollouts.take()
    collected = drawn.collected
    groups, scores = collected.groups, collected.all_scores()
    oldest = max(0, progress.version - config.rollout.max_lag)
    check_versions(groups, set(range(oldest, progress.version + 1)))
    progress.cursor, progress.carried = drawn.cursor, drawn.carried
    progress.allocation = drawn.allocation
    progress.rollout_tokens += drawn.generated_tokens

    marks = [time.perf_counter()]
    batch = make_train_batch(groups, scores, config.algo)
    batch = job.likelihood.prepare(
        job.engine, batch, groups, scores.acc_B, config, job.world, step, job.reference
    )
    marks.append(time.perf_counter())

    lr = lr_schedule(step, config.trainer.optim, config.trainer.max_steps)
    updated = update(job.engine, batch, config, job.world, step, lr, job.likelihood)
    count_skipped(progress, updated)
    marks.append(time.perf_counter())

    figures = record.sample_metrics(groups, scores, batch, config.algo)
    lag = progress.version - oldest_version(groups, progress.version)
    figures |= record.update_metrics(updated, lr, progress.version, lag)
    rollouts.before_update()
    marks.append(time.perf_counter())
    if updated.optimizer_steps:
        progress.version += 1
    if updated.optimizer_steps and job.samples_policy:
        figures["sampling/check_logp_diff"] = publish_weights(job, progress.version)
    marks.append(time.perf_counter())
    progress.train_tokens += updated.train_tokens
    times_s = {
        "rollout": collected.rollout_s,
        "reward": collected.reward_s,
        "logp": marks[1] - marks[0],
        "backward": updated.backward_s,
        "step": updated.step_s,
        "sync": marks[4] - marks[3],
        "total": marks[4] - began,
    }
    if not job.samples_policy:
        times_s = {name: times_s[name] for name in ("logp", "backward", "step", "total")}
    if config.rollout.max_lag:
        times_s["wait"] = rollouts.waited_s - waited_s
    if config.rollout.oversample > 1:
        figures["sampling/carried_groups"] = float(len(drawn.carried))
    figures |= record.time_metrics(times_s, collected.generated_tokens, updated.train_tokens)
    of_trees, trees = token_trees_record(step, batch, groups, config, job.tokenizer.decode)
    figures |= record.memory_metrics() | drawn.figures | of_trees
    rows = list(record.sample_rows(step + 1, groups, scores, batch))
    return record.StepRecord(figures, rows, trees)


def publish_weights(job: Job, version: int) -> float:
    """Hand the current weights to the engine and compare both sides; returns the largest
    difference of the check sequence's log-probs, nats. Again for an engine that died over it."""
    job.stage(f"publishing policy version {version}")
    for _ in range(MAX_RESENDS):
        try:
            return _publish_once(job, version)
        except WeightsLost as error:
            log.warning("%s", error)
    raise WeightsLost(f"the engine lost version {version} {MAX_RESENDS} times in a row")


def _publish_once(job: Job, version: int) -> float:
    with job.engine.full_parameters():
        publish(job.rollout, job.rollout_weights(), version)
    logp = job.likelihood.sequence_logp(job.engine, job.check_sequence)
    with job.sampling():
        return check_engine(
            job.rollout, job.check_sequence, logp, job.config.rollout.logp_tolerance
        )


def publish_again(job: Job) -> None:
    """Where the engine lost the weights, or was not sent them yet."""
    publish_weights(job, job.progress.version)


def evaluate(job: Job) -> EvalResult:
    """Figures of the current policy on the held-out prompts."""
    prompts = list(job.eval_prompts or ())
    if not job.samples_policy:  # else the engine holds them since the last update
        publish_again(job)
    job.stage(f"evaluation on {len(prompts)} held-out prompts")
    with job.sampling():
        try:
            return run_evaluation(job.rollout, job.scorer, prompts, job.config, job.world)
        except WeightsLost as error:
            log.warning("%s", error)
            publish_again(job)
            return run_evaluation(job.rollout, job.scorer, prompts, job.config, job.world)


def count_skipped(progress: Progress, updated: UpdateResult) -> None:
    """Optimizer steps with a non-finite gradient: in all, and since the last one that was taken."""
    progress.skipped_steps += updated.skipped_steps
    if updated.optimizer_steps:
        progress.skipped_in_a_row = 0
    else:
        progress.skipped_in_a_row += updated.skipped_steps


def check_skipped(job: Run) -> None:
    """Stop when non-finite gradients come one after the other: the weights are then frozen."""
    progress, limit = job.progress, job.config.trainer.max_skipped_steps
    if progress.skipped_in_a_row >= limit:
        raise TrainingStopped(
            f"{progress.skipped_in_a_row} optimizer steps in a row had a non-finite gradient "
            f"(trainer.max_skipped_steps = {limit}); none of them changed the weights. Lower "
            "trainer.optim.learning_rate, or use model.dtype=float32."
        )


def result(job: Run) -> dict[str, Any]:
    """The content of result.json."""
    progress, memory = job.progress, record.memory_metrics()
    return {
        "config": job.config_dict,
        "seed": job.config.seed,
        "steps": progress.step,
        "eval": {"before": progress.eval_before, "after": progress.eval_after},
        "wall_s": progress.wall_s,
        "generated_tokens": progress.rollout_tokens,
        "train_tokens": progress.train_tokens,
        "skipped_steps": progress.skipped_steps,
        "peak_rss_bytes": int(memory["memory/rss_bytes"]),
        "peak_gpu_bytes": int(memory["memory/gpu_bytes"]),
        "versions": package_versions(),
    }
