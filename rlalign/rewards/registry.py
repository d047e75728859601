"""The built-in rewards, and how a `RewardSpec` becomes something that runs."""

from __future__ import annotations

import difflib
import inspect
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from rlalign.config.schema import RewardsConfig, RewardSpec
from rlalign.rewards.call import Call, Takes, bind, resolve
from rlalign.rewards.inprocess import InProcess
from rlalign.rewards.verdict import RewardError, Verdict
from rlalign.rewards.worker import Target, WorkerPool

MAX_WORKERS = 4  # of a built-in that does not say
DEADLINE_SHARE = 0.95  # of rewards.timeout_s, for rewards that keep the deadline themselves


class Runner(Protocol):
    """Runs one reward function with a deadline."""

    name: str

    def inspect(self) -> Takes:
        """What the function takes, without loading models."""
        ...

    def start(self) -> Takes:
        """Make ready to score."""
        ...

    def score(self, call: Call, timeout_s: float) -> list[Verdict]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Builtin:
    """A ready-made reward: a factory, and where its reward runs.

    `rowwise_timeout_s` puts it into killable workers, with that deadline for each row.
    `may_hang` names params that put it there too, with the whole call's time for a row.
    `correctness` makes it the accuracy when no function is marked.
    """

    path: str
    summary: str
    rowwise_timeout_s: float | None = None
    max_memory_bytes: int | None = None
    num_workers: int | None = 1
    correctness: bool = False
    may_hang: tuple[str, ...] = ()


BUILTINS: Mapping[str, Builtin] = {
    "exact_match": Builtin(
        "rlalign.rewards.text:exact_match",
        "answer equals the `answer` column",
        correctness=True,
        may_hang=("pattern",),
    ),
    "math": Builtin(
        "rlalign.rewards.mathematics:math",
        "answer equals the `answer` column as mathematics",
        rowwise_timeout_s=5.0,
        max_memory_bytes=4 << 30,
        num_workers=None,
        correctness=True,
    ),
    "python_tests": Builtin(
        "rlalign.rewards.python_tests:python_tests",
        "share of tests that the code passes, sandboxed",
        correctness=True,
    ),
    "reasoning_gym": Builtin(
        "rlalign.tasks.reasoning_gym:reward",
        "the verifier of a `reasoning_gym:<task>`",
        rowwise_timeout_s=30.0,
        correctness=True,
    ),
    "verifiers": Builtin(
        "rlalign.tasks.verifiers:reward",
        "the rewards of a `verifiers:<environment>`",
        rowwise_timeout_s=30.0,
    ),
    "format": Builtin(
        "rlalign.rewards.text:format", "think-then-answer, or a pattern", rowwise_timeout_s=5.0
    ),
    "regex": Builtin(
        "rlalign.rewards.text:regex", "a pattern, full or anywhere", rowwise_timeout_s=5.0
    ),
    "length": Builtin("rlalign.rewards.text:length", "penalty outside a range of lengths"),
    "repetition": Builtin("rlalign.rewards.text:repetition", "penalty for repeated n-grams"),
    "reward_model": Builtin("rlalign.rewards.reward_model:reward_model", "HF sequence classifier"),
    "llm_judge": Builtin("rlalign.rewards.judge:llm_judge", "score by a chat model"),
    "http": Builtin("rlalign.rewards.remote:http", "scores by a service of your own"),
    "digits_class_probability": Builtin(
        "rlalign.rewards.images:digits_class_probability",
        "probability of the digit in the `answer` column, for images of mini:digits",
        correctness=True,
    ),
    "digits_judge": Builtin(
        "rlalign.rewards.images:digits_judge", "whether a held-out judge reads the `answer` digit"
    ),
    "symmetry": Builtin("rlalign.rewards.images:symmetry", "left-right symmetry of an image"),
    "ink": Builtin("rlalign.rewards.images:ink", "brightness of an image"),
    "clip_score": Builtin(
        "rlalign.rewards.image_scorers:clip_score", "CLIP or PickScore agreement of image and text"
    ),
    "aesthetic": Builtin(
        "rlalign.rewards.image_scorers:aesthetic", "a linear head on CLIP's image embedding"
    ),
}

_RUNNER_PARAMS = ("timeout_s", "num_workers", "max_memory_bytes")  # of built-ins in workers


def make_runners(
    cfg: RewardsConfig,
    functions: Mapping[str, Callable[..., Any]] | None = None,
    *,
    images: bool = False,
) -> list[Runner]:
    """One runner per reward, not started; RewardError for a name or params that do not fit.

    Rewards of `images` run in this process even when named by an import path: what travels to a
    worker is JSON.
    """
    if not cfg.functions:
        raise RewardError(
            "rewards.functions is empty; name at least one, e.g. functions: [{name: exact_match}]"
        )
    names = unique_names(cfg.functions)
    given = dict(functions or {})
    if images:
        given |= {s.name: resolve(s.name) for s in cfg.functions if ":" in s.name}
    return [
        _make_runner(name, spec, cfg.timeout_s, given)
        for name, spec in zip(names, cfg.functions, strict=True)
    ]


def unique_names(specs: Sequence[RewardSpec]) -> list[str]:
    """What metrics call each reward: the function's own name, numbered where it occurs again."""
    seen: Counter[str] = Counter()
    names = []
    for spec in specs:
        name = spec.name.rpartition(":")[2]
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names


def is_correctness(spec: RewardSpec) -> bool:
    return spec.name in BUILTINS and BUILTINS[spec.name].correctness


def _make_runner(
    name: str, spec: RewardSpec, timeout_s: float, functions: Mapping[str, Callable[..., Any]]
) -> Runner:
    if spec.name in functions:
        return InProcess(name, bind(functions[spec.name], spec.params, name=spec.name))
    if ":" in spec.name:
        return WorkerPool(Target(name, spec.name, spec.params))
    if spec.name not in BUILTINS:
        near = difflib.get_close_matches(spec.name, [*BUILTINS, *functions], n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise RewardError(
            f"no built-in reward is called {spec.name!r}; {hint}Built-ins: {', '.join(BUILTINS)}. "
            "Your own function is named package.module:function"
        )
    return _make_builtin(name, BUILTINS[spec.name], dict(spec.params), timeout_s)


def _make_builtin(name: str, builtin: Builtin, params: dict[str, Any], timeout_s: float) -> Runner:
    factory = resolve(builtin.path)
    signature = inspect.signature(factory)
    row_timeout_s = builtin.rowwise_timeout_s
    if row_timeout_s is None and set(builtin.may_hang) & set(params):
        row_timeout_s = timeout_s  # a pattern of the user's own may backtrack for ever
    if row_timeout_s is None:
        if "deadline_s" in signature.parameters:
            params.setdefault("deadline_s", DEADLINE_SHARE * timeout_s)
        return InProcess(name, bind(factory, params, name=name))
    driving = {key: params.pop(key) for key in _RUNNER_PARAMS if key in params}
    row_timeout_s = float(driving.get("timeout_s", row_timeout_s))
    if "timeout_s" in signature.parameters:  # keeps the deadline itself; the kill is the backstop
        params["timeout_s"] = row_timeout_s
        row_timeout_s += 1.0
    bind(factory, params, name=name)  # a bad value is an error here, before a process exists
    workers = driving.get("num_workers", builtin.num_workers)
    return WorkerPool(
        Target(
            name,
            builtin.path,
            params,
            rowwise=True,
            num_workers=workers or min(MAX_WORKERS, os.cpu_count() or 1),
            row_timeout_s=row_timeout_s,
            max_memory_bytes=driving.get("max_memory_bytes", builtin.max_memory_bytes),
        )
    )
