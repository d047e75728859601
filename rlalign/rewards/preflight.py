"""Whether the rewards of a configuration can run, asked before a run starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlalign.config.schema import RewardsConfig
from rlalign.rewards.registry import make_runners
from rlalign.rewards.scorer import accuracy_index, check_columns


def check(
    cfg: RewardsConfig,
    columns: Iterable[str] | None = None,
    *,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    images: bool = False,
) -> None:
    """Raise RewardError, with cause and fix, for a reward that cannot be imported, built or fed.

    `columns` are the data's, `answer` included; None skips that check. `images` as in
    `build_scorer`. Workers are started and stopped again; models are not loaded, services not
    called, and nothing is written.
    """
    accuracy_index(cfg)
    runners = make_runners(cfg, functions, images=images)
    names = None if columns is None else list(columns)
    try:
        with ThreadPoolExecutor(len(runners), "reward-check") as threads:
            accepted = list(threads.map(lambda runner: runner.inspect(), runners))
        for runner, takes in zip(runners, accepted, strict=True):
            if names is not None:
                check_columns(runner.name, takes, names)
    finally:
        for runner in runners:
            runner.close()
