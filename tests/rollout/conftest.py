"""A small model in a folder, and its tokenizer, for tests that serve it."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rlalign.models.random import write_random_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return write_random_model(path, hidden=64, heads=2, kv_heads=1, max_positions=128)


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)
