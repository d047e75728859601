"""Checkpoints: whole or not there, at any moment at which the process may be killed.

    checkpoints/step_<n>/
      config.json, model.safetensors, tokenizer.json, ...   loadable by transformers as they lie
      trainer/tensors_<i>.safetensors                       masters and moments (trainer/engine.py)
      trainer/state.json                                    progress, random states, tensor index
      manifest.json                                         size and digest of every file

A checkpoint is written under a hidden name, every file is synced, the manifest last, and then the
folder is renamed. So a folder `step_<n>` whose files agree with its manifest is complete, and older
ones are removed only when a newer one is. Hidden names that a killed process left behind:
`.step_<n>.partial` (being written) and `.step_<n>.deleted` (being removed) are rubbish, which the
next save clears away; `.step_<n>.replaced` is complete and counts while `step_<n>` is missing.

The format does not depend on engine, ZeRO stage or number of processes. JSON and safetensors only.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlalign.errors import RlalignError
from rlalign.trainer.engine import TrainEngine
from rlalign.trainer.random_state import capture_random_state, restore_random_state
from rlalign.trainer.tensor_files import TensorFiles, TensorWriter

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "trainer/state.json"
_NAME = re.compile(r"(\.?)step_(\d+)(\.replaced)?")
_log = logging.getLogger(__name__)


class CheckpointError(RlalignError):
    """A checkpoint cannot be written or read; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class Torn:
    """A folder that looks like a checkpoint and is not complete."""

    path: Path
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """What lies in a checkpoints folder; `complete` is sorted by step, the newest last."""

    complete: tuple[Path, ...]
    torn: tuple[Torn, ...]


def save(
    folder: Path,
    step: int,
    *,
    engine: TrainEngine,
    state: Mapping[str, Any],
    save_model: Callable[[Path], None],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` and keep the newest `keep`; every process calls this.

    `state` is anything JSON can hold. `save_model` writes model and tokenizer into the folder it is
    given; it runs on the main process only, so parameters must be whole there
    (`engine.full_parameters`). A checkpoint of the same step is replaced, a torn one moved aside.
    """
    world = engine.world
    name = f"checkpoint of step {step}"
    mine = json.dumps(capture_random_state()).encode()
    random_states = [json.loads(part) for part in world.all_gather_bytes(mine, name)]
    record = {"format": FORMAT, "step": step, "num_updates": engine.num_updates}
    record |= {"state": dict(state), "random_states": random_states}
    tensors = engine.export_state()
    with world.agreed(name):
        try:
            if world.is_main:
                _write(folder, step, tensors, record, save_model, keep)
        except OSError as error:
            raise CheckpointError(
                f"the {name} could not be written to {folder}: {error}. Older checkpoints are as "
                "they were; make room or mend the disk, and go on with --resume."
            ) from error
        finally:
            for _ in tensors:  # the export is collective: every process takes part to its end
                pass
    return folder / f"step_{step}"


def _write(
    folder: Path,
    step: int,
    tensors: Iterable[tuple[str, torch.Tensor]],
    record: dict[str, Any],
    save_model: Callable[[Path], None],
    keep: int,
) -> None:
    _clear_leftovers(folder)
    partial = folder / f".step_{step}.partial"
    (partial / "trainer").mkdir(parents=True)
    writer = TensorWriter(partial / "trainer")
    for key, tensor in tensors:
        writer.add(key, tensor)
    record["tensors"] = writer.close()
    (partial / STATE).write_text(json.dumps(record))
    save_model(partial)
    _seal(partial, step)
    _put_in_place(partial, folder / f"step_{step}")
    for path in find(folder).complete[:-keep]:
        _remove(path)


def load(path: Path, *, engine: TrainEngine) -> dict[str, Any]:
    """Restore engine and random states from a checkpoint and return its `state`.

    Raises CheckpointError when a file's digest is wrong, EngineStateError when the checkpoint is of
    another model. With another number of processes than when it was written, those without a saved
    random state go on with their own.
    """
    world = engine.world
    with world.agreed(f"verification of {path.name}"):
        if world.is_main:
            verify(path)
    record = json.loads((path / STATE).read_text())
    engine.load_state(TensorFiles(path / "trainer", record["tensors"]), record["num_updates"])
    if world.rank < len(record["random_states"]):
        restore_random_state(record["random_states"][world.rank])
    return record["state"]


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in `folder`, or None. Torn ones are reported in the log and
    left where they are."""
    found = find(folder)
    for torn in found.torn:
        _log.warning("ignoring the checkpoint %s: %s", torn.path, torn.reason)
    return found.complete[-1] if found.complete else None


def find(folder: Path) -> Found:
    """Every checkpoint in `folder`, judged by manifest and file sizes."""
    complete: dict[int, Path] = {}
    torn = []
    if not folder.is_dir():
        return Found((), ())
    for path in sorted(folder.iterdir()):  # `.step_3.replaced` comes before `step_3`, which wins
        match = _NAME.fullmatch(path.name)
        if match is None or bool(match[1]) != bool(match[3]):
            continue
        reason = _why_torn(path)
        if reason is None:
            complete[int(match[2])] = path
        else:
            torn.append(Torn(path, reason))
    return Found(tuple(complete[step] for step in sorted(complete)), tuple(torn))


def verify(path: Path) -> None:
    """Compare every file with its digest in the manifest. Raises CheckpointError."""
    reason = _why_torn(path)
    if reason is not None:
        raise CheckpointError(f"{path} is not a complete checkpoint: {reason}. Use an older one.")
    for name, entry in _manifest_files(path).items():
        found = _digest(path / name)
        if found != entry["sha256"]:
            raise CheckpointError(
                f"{path / name} was changed after it was written: its SHA-256 is {found[:16]}..., "
                f"the manifest says {entry['sha256'][:16]}.... Use an older checkpoint."
            )


def _why_torn(path: Path) -> str | None:
    """What keeps the folder from being complete; None when it is."""
    try:
        files = _manifest_files(path)
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    for name, entry in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["size"]:
            return f"{name} has {file.stat().st_size} bytes, expected {entry['size']}"
    return None


def _manifest_files(path: Path) -> dict[str, dict[str, Any]]:
    manifest = json.loads((path / MANIFEST).read_text())
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"not a manifest of format {FORMAT}")
    return manifest["files"]


def _seal(partial: Path, step: int) -> None:
    """Sync every file to disk, then write the manifest of them all."""
    files = {}
    for file in sorted(file for file in partial.rglob("*") if file.is_file()):
        _sync(file)
        name = file.relative_to(partial).as_posix()
        files[name] = {"size": file.stat().st_size, "sha256": _digest(file)}
    for inner in (p for p in partial.rglob("*") if p.is_dir()):
        _sync(inner)
    manifest = {"format": FORMAT, "step": step, "files": files}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    _sync(partial / MANIFEST)
    _sync(partial)


def _put_in_place(partial: Path, final: Path) -> None:
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        complete = _why_torn(final) is None
        final.rename(replaced if complete else _free_name(final.with_name(f"{final.name}.torn")))
    partial.rename(final)
    _sync(final.parent)
    if replaced.exists():
        _remove(replaced)


def _clear_leftovers(folder: Path) -> None:
    """Put back a checkpoint whose replacement was killed; remove what was half written or
    removed."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(folder.glob(".step_*")):
        name = path.name[1:].rpartition(".")[0]
        if path.name.endswith((".partial", ".deleted")):
            shutil.rmtree(path)
        elif path.name.endswith(".replaced") and not (folder / name).exists():
            path.rename(folder / name)
        elif path.name.endswith(".replaced") and _why_torn(folder / name) is None:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a folder so that a kill on the way leaves no half of it under its own name."""
    doomed = path.with_name(f".{path.name.lstrip('.').partition('.')[0]}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _free_name(path: Path) -> Path:
    number, free = 2, path
    while free.exists():
        free = path.with_name(f"{path.name}-{number}")
        number += 1
    return free


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
