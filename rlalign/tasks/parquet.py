"""Parquet: one row a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlalign.tasks.errors import TaskError
from rlalign.tasks.source import Source, numbered, take_params


def open_parquet(path: str, params: Mapping[str, Any], split: str) -> Source:
    """Raises TaskError where pyarrow is not installed or the file is no Parquet file."""
    take_params(path, params)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise TaskError(f"{path}: reading Parquet needs pyarrow: pip install pyarrow") from error
    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{path} cannot be read as Parquet: {error}") from error
    return Source(Path(path).stem, numbered(table.to_pylist()))
