"""What is built here once and kept: folders in the cache, put in place by one rename.

A folder is built in a temporary one beside it, so it is never half there; of several builders one
works and the others wait. They are kept in `$RLALIGN_CACHE` (default `~/.cache/rlalign`).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TimeElapsedColumn
from rich.progress import Progress as RichProgress

from rlalign.models.errors import ModelError

LOCK_TIMEOUT_S = 900.0
START_FILE = "start.json"

Progress = Callable[[str, int, int], None]  # (stage, steps done, steps in all)


def default_cache_dir() -> Path:
    return Path(os.environ.get("RLALIGN_CACHE") or "~/.cache/rlalign").expanduser()


def build_once(name: str, write: Callable[[Path], None], cache_dir: Path | None = None) -> Path:
    """The folder `models/<name>` of the cache: as it is there, or made now by `write(folder)`.

    `name` must tell all that decides the content. Raises ModelError when another builder does not
    finish within 15 minutes, or the cache cannot be written.
    """
    root = (cache_dir or default_cache_dir()) / "models"
    folder = root / name
    if folder.is_dir():
        return folder
    with _locked(root, name):
        if not folder.is_dir():
            for leftover in root.glob(f".{name}.*.tmp"):  # of a builder that was killed
                shutil.rmtree(leftover)
            scratch = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=root))
            with torch.enable_grad():  # whoever asks first may be sampling
                write(scratch)
            os.replace(scratch, folder)
    return folder


def write_start(folder: Path, task: str, seed: int, **facts: Any) -> None:
    """`start.json`: what was built, and `facts` about how good a start it is."""
    start = {"task": task, "seed": seed, **facts, "torch": torch.__version__}
    (folder / START_FILE).write_text(json.dumps(start, indent=2) + "\n")


def digest_of(content: Any) -> str:
    """12 hex digits over a value that JSON can write."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


@contextmanager
def one_thread() -> Iterator[None]:
    """One CPU thread: sums in one order, so equal seeds give equal weights."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def reporting(name: str, progress: Progress | None) -> Iterator[Progress]:
    """The caller's own progress function, or a line on stderr that names the stage."""
    if progress is not None:
        yield progress
        return
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with RichProgress(*columns, console=Console(stderr=True)) as bars:
        rows: dict[str, TaskID] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in rows:
                rows[stage] = bars.add_task(f"building {name} (once): {stage}", total=total)
            bars.update(rows[stage], completed=done)

        yield show


@contextmanager
def _locked(root: Path, name: str) -> Iterator[None]:
    """One builder of a folder at a time; a builder that dies frees the lock."""
    lock = FileLock(root / f".{name}.lock", timeout=LOCK_TIMEOUT_S)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise ModelError(
            f"waited {LOCK_TIMEOUT_S:.0f} s for another process to build {name} in {root}; end it "
            "if it hangs, or set RLALIGN_CACHE to another folder"
        ) from error
    except OSError as error:
        raise ModelError(
            f"the model cache {root} cannot be written ({error}): set RLALIGN_CACHE to a folder "
            "that can"
        ) from error
    try:
        yield
    finally:
        lock.release()
