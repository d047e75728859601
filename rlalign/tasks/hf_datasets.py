"""Hugging Face data sets: a hub id (`owner/name`), or a folder written by `save_to_disk`.

Parameters: `subset` (hub only), `split` (default "train" for training, "test" for evaluation).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from rlalign.hub import cached_only, hub_problem
from rlalign.tasks.errors import TaskError
from rlalign.tasks.source import Source, numbered, take_params

DEFAULT_SPLIT = {"train": "train", "eval": "test"}


def open_folder(path: str, params: Mapping[str, Any], split: str) -> Source:
    """Raises TaskError for a folder that `save_to_disk` did not write, or without that split."""
    datasets = _datasets(path)
    chosen = take_params(path, params, split=DEFAULT_SPLIT[split])
    try:
        found = datasets.load_from_disk(path)
    except (FileNotFoundError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise TaskError(
            f"{path} is not a data set folder ({error}). Write one with Dataset.save_to_disk, or "
            "name a *.jsonl or *.parquet file"
        ) from error
    label = Path(path).name
    if isinstance(found, datasets.DatasetDict):
        if chosen["split"] not in found:
            raise TaskError(
                f"{path} has no split {chosen['split']!r} but {', '.join(found)}: set "
                f"{'task.params' if split == 'train' else 'task.eval_params'}.split"
            )
        found, label = found[chosen["split"]], f"{label}:{chosen['split']}"
    elif "split" in params:
        raise TaskError(f"{path} holds one data set without splits: drop the split parameter")
    return Source(label, numbered(found))


def open_hub(name: str, params: Mapping[str, Any], split: str) -> Source:
    """From the hub, or from its cache where the hub is out of reach.

    Raises TaskError for an unknown data set, subset or split, and within seconds where the hub is
    out of reach and the cache does not hold the data.
    """
    datasets = _datasets(name)
    chosen = take_params(name, params, split=DEFAULT_SPLIT[split], subset=None)
    problem = hub_problem()
    try:
        with cached_only() if problem else nullcontext():
            found = datasets.load_dataset(name, chosen["subset"], split=chosen["split"])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        remedy = (
            f"{problem}, and it is not in the cache: fetch it where there is a network, or name a "
            "local file or folder"
            if problem
            else "check the id, task.params.subset and task.params.split"
        )
        raise TaskError(f"data set {name!r} cannot be loaded: {error}. {remedy}") from error
    return Source(f"{name}:{chosen['split']}", numbered(found))


def _datasets(spec: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise TaskError(
            f"{spec}: this needs Hugging Face datasets: pip install datasets"
        ) from error
    return datasets
