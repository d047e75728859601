"""A run as one self-contained HTML page: curves, time split, and every sample with its reward.

The page (report.html beside this file) draws itself from one JSON object; it loads nothing from
anywhere, so it can be mailed or opened from a disk.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlalign.tracking.rundir import RunDir, RunDirError, write_atomic

TEMPLATE = Path(__file__).with_name("report.html")
MAX_SAMPLES = 20_000  # keeps the page near 10 MB; whole steps are left out, evenly


def write_report(run: str | Path, max_samples: int = MAX_SAMPLES) -> Path:
    """Write `report.html` into run directory `run` and return its path.

    Works on a run that is still going. Raises RunDirError where there is no run.
    """
    run_dir = RunDir(Path(run))
    if not run_dir.config.is_file():
        raise RunDirError(f"{run_dir.path} holds no config.yaml: not a run directory")
    page = TEMPLATE.read_text().replace("__DATA__", _embed(collect_data(run_dir, max_samples)))
    write_atomic(run_dir.report, page)
    return run_dir.report


def collect_data(run_dir: RunDir, max_samples: int) -> dict[str, Any]:
    """What the page shows. `omitted_steps` counts the steps whose samples did not fit."""
    files = sorted(run_dir.rollouts.glob("step_*.jsonl"))
    chosen, omitted = _thin(files, max_samples)
    samples = [json.loads(line) for file in chosen for line in file.read_text().splitlines()]
    return {
        "name": run_dir.path.name,
        "config": run_dir.config.read_text(),
        "manifest": _read_json(run_dir.manifest),
        "result": _read_json(run_dir.result),
        "metrics": run_dir.read_metrics(),
        "samples": samples,
        "omitted_steps": omitted,
    }


def _thin(files: Sequence[Path], max_samples: int) -> tuple[list[Path], int]:
    """Steps spread evenly over the run whose samples number at most about `max_samples`."""
    if not files:
        return [], 0
    per_step = max(1, sum(1 for _ in files[0].open()))
    keep = max(1, max_samples // per_step)
    if keep >= len(files):
        return list(files), 0
    last = len(files) - 1
    indices = sorted({round(i * last / max(keep - 1, 1)) for i in range(keep)})
    return [files[i] for i in indices], len(files) - len(indices)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text()) if path.is_file() else None


def _embed(data: Any) -> str:
    """JSON that is safe inside a <script> element whatever the samples contain."""
    text = json.dumps(data, allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
