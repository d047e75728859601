"""A small model in a folder, and its tokenizer, for tests that serve it; and a server whose engine
is a fake."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlalign.models.random import write_random_model
from tests.rollout.fake_engine import World


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return write_random_model(path, hidden=64, heads=2, kv_heads=1, max_positions=128)


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's own client of the module's `server`."""
    openai = pytest.importorskip("openai")
    key = server.tokens["generate"]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(folder: Path) -> str:
    """The name of what the module's server serves."""
    return str(folder)


@pytest.fixture
def run(tmp_path: Path, monkeypatch):
    """Runs a scenario against a server of its own; one that hangs is a failure."""

    def scenario(story: Callable[[World], Awaitable[None]], **options: Any) -> None:
        async def play() -> None:
            async with asyncio.timeout(15), World(tmp_path, monkeypatch, **options).running() as w:
                await story(w)

        asyncio.run(play())

    return scenario
