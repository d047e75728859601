"""`verifiers:<environment>`: the single-turn tasks of a `verifiers` (0.4 or later) environment.

The environment is an installed taskset package. Parameters: `size` (default: all, and it must be
given where a taskset is infinite) and any field of the taskset's own configuration. Each prompt
keeps the columns `verifiers_environment`, `verifiers_params` and `verifiers_data`, from which
`reward` below rebuilds the task and runs its reward functions on the completion:

    rewards.functions: [{name: "rlalign.tasks.verifiers:reward"}]

Tasks that need tools, a container or a program to run beside the model are refused.
"""

from __future__ import annotations

import asyncio
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from typing import Any

from rlalign.tasks.errors import TaskError
from rlalign.tasks.source import Source, numbered


def open_environment(name: str, params: Mapping[str, Any], split: str) -> Source:
    """Raises TaskError where verifiers or the environment is not installed, the environment refuses
    a parameter, or its tasks are more than one turn of text."""
    params = dict(params)
    size = params.pop("size", None)
    taskset = _load_taskset(name, json.dumps(params, sort_keys=True))
    if size is None and not taskset.bounded:
        raise TaskError(f"verifiers:{name} never ends: set the parameter size")
    return Source(f"verifiers:{name}", numbered(_rows(name, params, taskset, size)))


def score(environment: str, params: Mapping[str, Any], data: Mapping[str, Any], text: str) -> float:
    """The weighted sum of the task's own rewards for the answer `text`.

    `params` and `data` are the columns of the row. Raises what the environment's functions raise.
    """
    vf = _verifiers(environment)
    taskset = _load_taskset(environment, json.dumps(dict(params), sort_keys=True))
    task_type = taskset.task_type()
    task = task_type(task_type.data_type().model_validate(data), taskset.config.task)
    trace = vf.Trace(
        task=vf.TraceTask(type=task_type.__name__, data=task.data),
        agent=vf.AgentInfo(config=vf.AgentConfig()),
    )
    for message in (*_turns(task.data), {"role": "assistant", "content": text}):
        parent = len(trace.nodes) - 1 if trace.nodes else None
        sampled = message["role"] == "assistant"
        node = vf.MessageNode.model_validate(
            {"parent": parent, "message": message, "sampled": sampled}
        )
        trace.nodes.append(node)
    trace.ok = True
    trace.stop("agent_completed")
    asyncio.run(task.score(trace))
    return float(trace.reward)


def reward(
    completions: Sequence[Any],
    verifiers_environment: Sequence[str],
    verifiers_params: Sequence[Mapping[str, Any]],
    verifiers_data: Sequence[Mapping[str, Any]],
    **_: Any,
) -> list[float]:
    """The environment's own reward of each completion."""
    rows = zip(completions, verifiers_environment, verifiers_params, verifiers_data, strict=True)
    return [
        score(name, params, data, said if isinstance(said, str) else said[-1]["content"])
        for said, name, params, data in rows
    ]


def _rows(
    name: str, params: Mapping[str, Any], taskset: Any, size: int | None
) -> Iterator[dict[str, Any]]:
    for task in islice(taskset, size):
        _check_single_turn(name, task)
        data = task.data.model_dump(mode="json", exclude_none=True)
        own = {key: value for key, value in data.items() if key in ("answer", "solution")}
        yield {
            "prompt": data.get("prompt") if not task.data.system_prompt else _turns(task.data),
            **own,
            "verifiers_environment": name,
            "verifiers_params": dict(params),
            "verifiers_data": data,
        }


def _turns(data: Any) -> list[dict[str, Any]]:
    """The conversation before the model's answer."""
    fixed = data.model_dump(mode="json", include={"prompt", "system_prompt"})
    prompt = fixed["prompt"]
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
    if fixed["system_prompt"]:
        turns.insert(0, {"role": "system", "content": fixed["system_prompt"]})
    return turns


def _check_single_turn(name: str, task: Any) -> None:
    needs_runtime = [
        hook.__name__
        for hook in task.hooks("reward")
        if getattr(inspect.signature(hook).parameters.get("runtime"), "default", None)
        is inspect.Parameter.empty
    ]
    reasons = {
        "its tasks run in a container": task.NEEDS_CONTAINER or task.data.image,
        "its tasks use tools": type(task).toolsets(task.config),
        f"its rewards ({', '.join(needs_runtime)}) need a running program": needs_runtime,
    }
    for reason, holds in reasons.items():
        if holds:
            raise TaskError(
                f"verifiers:{name} is not single-turn: {reason}. Choose an environment that asks "
                "one question and reads one answer"
            )


@cache
def _load_taskset(name: str, params_json: str) -> Any:
    from pydantic import ValidationError

    _verifiers(name)
    from verifiers.v1.utils.loaders import (  # type: ignore[import-not-found]
        load_taskset,
        taskset_config_type,
    )

    try:
        config = taskset_config_type(name).model_validate({"id": name, **json.loads(params_json)})
        return load_taskset(config)
    except ModuleNotFoundError as error:
        raise TaskError(
            f"the environment {name!r} is not installed ({error}): pip install the package that "
            "provides it"
        ) from error
    except (AttributeError, TypeError, ValidationError, ValueError) as error:
        raise TaskError(f"verifiers:{name} cannot be loaded with {params_json}: {error}") from error


def _verifiers(name: str) -> Any:
    try:
        import verifiers.v1  # type: ignore[import-not-found]
    except ImportError as error:
        raise TaskError(
            f"verifiers:{name} needs verifiers 0.4 or later ({error}): pip install 'rlalign[envs]'"
        ) from error
    return verifiers.v1
