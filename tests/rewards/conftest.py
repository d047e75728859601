"""Groups, configurations and a module of user functions, as a user would write them."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest

from rlalign.config.schema import AlgoConfig, RewardsConfig, RewardSpec
from rlalign.rewards import Scorer, build_scorer
from rlalign.types import Group, Prompt, Sample, VersionSpan


def make_groups(*rows: tuple[Any, Any, list[str]], columns: dict[str, list[Any]] | None = None):
    """Each row: prompt, answer, completions. One token id per character."""
    groups = []
    for i, (source, answer, texts) in enumerate(rows):
        own = {name: values[i] for name, values in (columns or {}).items()}
        prompt = Prompt(f"test/{i}", (1, 2), source, answer, own)
        samples = tuple(
            Sample(
                prompt.id,
                j,
                tuple(map(ord, text)),
                (0.0,) * len(text),
                "stop",
                (VersionSpan(len(text), 0),),
                text=text,
            )
            for j, text in enumerate(texts)
        )
        groups.append(Group(prompt, samples))
    return groups


@pytest.fixture
def scorer() -> Iterator[Callable[..., Scorer]]:
    """Build scorers from reward specs; all are closed, and must leave no process behind."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    built: list[Scorer] = []

    def build(
        *specs: RewardSpec, functions: Any = None, algo: AlgoConfig | None = None, **options: Any
    ) -> Scorer:
        cfg = RewardsConfig(functions=list(specs), **{"max_error_rate": 1.0, **options})
        built.append(build_scorer(cfg, algo or AlgoConfig(), 100, functions=functions))
        return built[-1]

    yield build
    for one in built:
        one.close()
    after = {child.pid for child in psutil.Process().children(recursive=True)}
    assert after <= before


_counter = itertools.count()


@pytest.fixture
def module(tmp_path, monkeypatch) -> Callable[[str], str]:
    """Write a user's module and return its name."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> str:
        name = f"user_rewards_{os.getpid()}_{next(_counter)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def run_bounded(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60)
