"""What one step leaves behind: the metrics record and the sample table. Names: docs/metrics.md."""

from __future__ import annotations

import itertools
import resource
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from rlalign import algos
from rlalign.config import AlgoConfig
from rlalign.trainer.record_trees import places_in_trees
from rlalign.trainer.update import UpdateResult
from rlalign.types import FINISH_LENGTH, Group, Scores, TrainBatch


class StepRecord(NamedTuple):
    """What a step leaves in the run directory."""

    figures: dict[str, float]
    rows: list[dict[str, Any]]  # one a sample
    trees: list[dict[str, Any]]  # of the first ones, where there are any


def sample_metrics(
    groups: Sequence[Group], scores: Scores, batch: TrainBatch, algo: AlgoConfig
) -> dict[str, float]:
    """Reward and length figures of the samples of one step; unscorable samples are left out."""
    samples = [sample for group in groups for sample in group.samples]
    lengths = [len(sample.token_ids) for sample in samples]
    clipped = [sample.finish_reason == FINISH_LENGTH for sample in samples]
    metrics = (
        {"reward": float("nan")}
        | algos.finalize_metrics(algos.reward_metrics(batch.reward_B, batch.group_id_B, algo))
        | {
            "completions/mean_length": _mean(lengths),
            "completions/max_length": float(max(lengths, default=0)),
            "completions/clipped_ratio": _mean(clipped),
        }
    )
    steps = [sample.steps for sample in samples if sample.steps]
    if steps:
        metrics["completions/tokens_per_step"] = _mean([len(s) / len(set(s)) for s in steps])
    for name, value_B in scores.by_function.items():
        known = value_B[torch.isfinite(value_B)]
        if len(known):
            metrics[f"rewards/{name}/mean"] = float(known.mean())
    for kind, count in scores.errors.items():
        metrics[f"rewards/errors/{kind}"] = float(count)
    return metrics


def update_metrics(result: UpdateResult, lr: float, version: int, lag: int) -> dict[str, float]:
    return {
        **result.metrics,
        "optim/lr": lr,
        "optim/skipped_steps": float(result.skipped_steps),
        "optim/empty_steps": float(result.empty_steps),
        "policy/version": float(version),
        "policy/lag_max": float(lag),
    }


def time_metrics(times_s: dict[str, float], rollout_tokens: int, train_tokens: int) -> dict:
    """`time/*_s` and the two rates; `times_s` holds the stages that there were and `total`."""
    metrics = {f"time/{name}_s": value for name, value in times_s.items()}
    training_s = times_s["logp"] + times_s["backward"] + times_s["step"]
    if "rollout" in times_s:
        metrics["perf/rollout_tokens_per_s"] = rollout_tokens / max(times_s["rollout"], 1e-9)
    metrics["perf/train_tokens_per_s"] = train_tokens / max(training_s, 1e-9)
    return metrics


def memory_metrics() -> dict[str, float]:
    """Peak memory of this process so far, bytes."""
    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"memory/rss_bytes": float(peak_rss_bytes()), "memory/gpu_bytes": float(gpu)}


def peak_rss_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts KiB


def sample_rows(
    step: int, groups: Sequence[Group], scores: Scores, batch: TrainBatch
) -> Iterator[dict[str, Any]]:
    """One row a sample for the rollouts file, a leaf with its place in the tree; advantage is the
    mean over the sample's tokens."""
    assert batch.advantage_BT is not None
    count_B = batch.completion_len_B.clamp(min=1)
    advantage_B = (batch.advantage_BT.sum(dim=1) / count_B).tolist()
    places = places_in_trees(groups) if batch.tree is not None else itertools.repeat({})
    rows = ((group, sample) for group in groups for sample in group.samples)
    for i, ((group, sample), place) in enumerate(zip(rows, places, strict=False)):
        yield {
            "step": step,
            "prompt_id": sample.prompt_id,
            "index": sample.index,
            "prompt": group.prompt.source,
            "answer": group.prompt.answer,
            "completion": sample.text,
            "num_tokens": len(sample.token_ids),
            "finish_reason": sample.finish_reason,
            "source_id": sample.source_id,
            "versions": sorted({span.version for span in sample.spans}),
            "reward": _json_number(scores.reward_B[i]),
            "acc": _json_number(scores.acc_B[i]),
            "rewards": {n: _json_number(v_B[i]) for n, v_B in scores.by_function.items()},
            "advantage": advantage_B[i],
            **({"steps": list(sample.steps)} if sample.steps else {}),
            **place,
        }


def _json_number(value: torch.Tensor) -> float | None:
    return float(value) if torch.isfinite(value) else None


def _mean(values: Sequence[float | bool]) -> float:
    return sum(values) / len(values) if values else 0.0
