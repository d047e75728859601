"""Finding, binding and calling a reward function: the same code in the worker and in process.

A reward function is `f(prompts, completions, **columns) -> list[float | None]`, plain or async. It
receives only the keyword arguments it can take. Nothing heavy is imported here.
"""

from __future__ import annotations

import asyncio
import difflib
import functools
import importlib
import inspect
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rlalign.rewards.verdict import RewardError, Verdict, VerdictKind, read_output

GIVEN = ("prompts", "completions", "completion_ids")  # what every call offers besides columns
ANSWER_ALIASES = ("answer", "solution", "ground_truth")  # names of one column, as users write it
TRACEBACK_CHARS = 2000


@dataclass(frozen=True, slots=True)
class Call:
    """One batch as a reward function sees it: equal-length lists, one entry per completion.

    >>> Call(["2+2="], ["4"], [[7, 1]], {"answer": ["4"]}, prompt_ids=["mini/0"])
    """

    prompts: list[Any]
    completions: list[Any]
    completion_ids: list[list[int]]
    columns: Mapping[str, list[Any]] = field(default_factory=dict)
    prompt_ids: list[str] = field(default_factory=list)  # for messages, not for functions

    def __len__(self) -> int:
        return len(self.completions)

    def rows(self, index: Sequence[int]) -> Call:
        def take(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in index]

        return Call(
            prompts=take(self.prompts),
            completions=take(self.completions),
            completion_ids=take(self.completion_ids),
            columns={name: take(values) for name, values in self.columns.items()},
            prompt_ids=take(self.prompt_ids) if self.prompt_ids else [],
        )

    def arguments(self, takes: Takes) -> dict[str, Any]:
        """The keyword arguments for a function that takes `takes`."""
        offered = dict(self.columns)
        for alias in ANSWER_ALIASES:
            if "answer" in self.columns and alias in takes.named:
                offered.setdefault(alias, self.columns["answer"])
        offered |= {
            "prompts": self.prompts,
            "completions": self.completions,
            "completion_ids": self.completion_ids,
        }
        if takes.anything:
            return offered
        return {name: value for name, value in offered.items() if name in takes.named}


@dataclass(frozen=True, slots=True)
class Takes:
    """The keyword arguments that a function accepts (`named`, or `anything`) and must have."""

    named: frozenset[str]
    required: tuple[str, ...]
    anything: bool

    def missing_from(self, columns: Sequence[str]) -> list[str]:
        """Required columns that the data does not have."""
        present = set(columns) | set(GIVEN)
        if "answer" in present:
            present |= set(ANSWER_ALIASES)
        return [name for name in self.required if name not in present]


def takes(function: Callable[..., Any]) -> Takes:
    """What a function accepts, from its signature and its `required_columns` attribute."""
    parameters = inspect.signature(function).parameters.values()
    keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [p for p in parameters if p.kind in keyword]
    required = [p.name for p in named if p.default is p.empty]
    required += getattr(function, "required_columns", ())
    anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return Takes(frozenset(p.name for p in named), tuple(dict.fromkeys(required)), anything)


def resolve(path: str) -> Any:
    """The object at `package.module:name`; RewardError names the nearest name."""
    module_name, _, attribute = path.partition(":")
    try:
        target: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise RewardError(
            f"reward {path!r}: no module named {error.name!r}; it must be importable from the "
            "working directory or installed (form: package.module:function)"
        ) from error
    for part in attribute.split("."):
        if not hasattr(target, part):
            public = [name for name in dir(target) if not name.startswith("_")]
            near = difflib.get_close_matches(part, public, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else "check the spelling"
            raise RewardError(f"reward {path!r}: {module_name} has no {part!r}; {hint}")
        target = getattr(target, part)
    return target


def bind(target: Any, params: Mapping[str, Any], *, name: str) -> Callable[..., Any]:
    """The reward function that a named object stands for.

    An object that takes `completions` is the reward itself, and `params` are passed along with each
    call; any other is a factory, called once with `params`.
    """
    if not callable(target):
        raise RewardError(f"reward {name!r} is {type(target).__name__}, not a function")
    signature = inspect.signature(target)
    if "completions" in signature.parameters:
        check_params(signature, params, name=name, partial=True)
        return functools.partial(target, **params) if params else target
    check_params(signature, params, name=name)
    function = target(**params)
    if not callable(function):
        raise RewardError(
            f"reward {name!r} takes no `completions`, so it was called as a factory, but it "
            f"returned {type(function).__name__}; write def {name.rpartition(':')[2]}"
            "(prompts, completions, **columns) -> list[float | None], or return such a function"
        )
    return function


def check_params(
    signature: inspect.Signature, params: Mapping[str, Any], *, name: str, partial: bool = False
) -> None:
    """RewardError when `params` do not fit, with the nearest names."""
    try:
        (signature.bind_partial if partial else signature.bind)(**params)
    except TypeError as error:
        names = [p for p in signature.parameters if p not in GIVEN]
        unknown = [p for p in params if p not in names]
        near = [n for p in unknown for n in difflib.get_close_matches(p, names, n=1)]
        hint = f"did you mean {', '.join(near)}? " if near else ""
        allowed = ", ".join(names) or "none"
        raise RewardError(
            f"reward {name!r}, params {dict(params)!r}: {error}; {hint}it takes: {allowed}"
        ) from error


def invoke(
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    num_rows: int,
    runner: asyncio.Runner,
) -> list[Verdict]:
    """Call a function, plain or async, and read what it returns. Whatever it raises is a verdict
    for every row: MemoryError oom, TimeoutError timeout, anything else crash."""
    try:
        output = function(**arguments)
        if inspect.isawaitable(output):
            output = runner.run(_await(output))
    except MemoryError as error:
        return [Verdict(VerdictKind.OOM, detail=f"MemoryError: {error}")] * num_rows
    except TimeoutError as error:
        return [Verdict(VerdictKind.TIMEOUT, detail=str(error) or "TimeoutError")] * num_rows
    except Exception:  # the user's code may raise anything; here it becomes typed, never a score
        return [Verdict(VerdictKind.CRASH, detail=traceback_tail())] * num_rows
    return read_output(output, num_rows)


async def _await(awaitable: Any) -> Any:
    return await awaitable


def traceback_tail() -> str:
    """The end of the traceback being handled: where it was raised and what it said."""
    return traceback.format_exc()[-TRACEBACK_CHARS:].strip()
