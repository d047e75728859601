"""What the commands do, as Python functions with the same names."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlalign import algos
from rlalign.config import Config, parse_config

RewardFunctions = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True, slots=True)
class Result:
    """What a run achieved. `summary` is the content of result.json (docs/concepts.md).

    >>> Result(path=Path("runs/grpo-mini"), summary={"steps": 80, "eval": {...}})
    """

    path: Path
    summary: Mapping[str, Any]


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file or a mapping, apply `key=value` overrides, fill in the algorithm's preset.

    Raises ConfigError (unknown key, wrong type, out of range, settings that contradict each other)
    or AlgoError (the same within `algo`).
    """
    from rlalign.rollout.flow import resolve_flow
    from rlalign.trainer.checks import check_config

    config = parse_config(source, overrides)
    shared = config.rollout.engine in ("hf", "none", "flow", "masked_diffusion")
    config.algo = algos.resolve(config.algo, engine_shares_parameters=shared)
    config.rollout.flow = resolve_flow(config.rollout.flow, config.algo.tree.compat)
    check_config(config)
    return config


def train(
    config: Config,
    *,
    resume: bool = False,
    quiet: bool = False,
    reward_functions: RewardFunctions | None = None,
) -> Result:
    """Run `config` end to end; `resume` goes on from the newest checkpoint of the newest unfinished
    run of that name.

    `reward_functions` are Python callables that `rewards.functions` refers to by their keys
    (docs/rewards.md). `quiet` leaves out the live view. Raises what the parts raise; the run
    directory stays, and `resume` continues it.

    >>> config = load_config("mine.yaml", ["rewards.functions=[{name: short}]"])
    >>> train(config, reward_functions={"short": lambda completions, **_: [...]})
    """
    from rlalign.tracking.observers import make_observers
    from rlalign.trainer.build import open_job
    from rlalign.trainer.flow_job import open_flow_job
    from rlalign.trainer.flow_loop import run_flow
    from rlalign.trainer.loop import run

    def observers(config: Config, run_dir: Any) -> Sequence[Any]:
        return make_observers(config, run_dir, live=config.tracking.live and not quiet)

    options: dict[str, Any] = {
        "resume": resume,
        "reward_functions": reward_functions,
        "make_observers": observers,
    }
    if config.rollout.engine == "flow":
        with open_flow_job(config, **options) as job:
            return Result(job.run_dir.path, run_flow(job))
    with open_job(config, **options) as job:
        return Result(job.run_dir.path, run(job))


def serve(
    model: str,
    overrides: Sequence[str] = (),
    *,
    on_ready: Callable[[str, Path], None] | None = None,
) -> None:
    """Serve rollouts of `model` to jobs until SIGINT or SIGTERM; `overrides` are options of
    `config.ServeConfig`. `on_ready` is told the URL and the file by which jobs find the server.

    Raises ConfigError for options that are wrong, EngineLost where the engine cannot start or
    cannot be brought back.
    """
    from rlalign.config import ServeConfig, parse
    from rlalign.rollout.server.serve import serve as run
    from rlalign.testtime.serving import ServedMethods

    config = parse(ServeConfig, {"model": model}, overrides)
    with contextlib.closing(ServedMethods(config.testtime)) as methods:
        run(config, on_ready, methods)


def evaluate(
    config: Config,
    *,
    checkpoint: str | Path | None = None,
    reward_functions: RewardFunctions | None = None,
) -> Mapping[str, float]:
    """Held-out figures of `config.task.eval`: pass@1 with its interval, pass@k, majority vote; of a
    flow model its rewards and their diversity.

    `checkpoint` is a model folder to evaluate in place of `config.model.path`; `reward_functions`
    as in `train`.
    """
    from rlalign.trainer.build import open_evaluation
    from rlalign.trainer.flow_job import open_flow_evaluation
    from rlalign.trainer.flow_loop import evaluate_flow

    if checkpoint is not None:
        model = dataclasses.replace(config.model, path=str(checkpoint))
        config = dataclasses.replace(config, model=model)
    if config.rollout.engine == "flow":
        with open_flow_evaluation(config, reward_functions=reward_functions) as job:
            return evaluate_flow(job)
    with open_evaluation(config, reward_functions=reward_functions) as evaluation:
        return evaluation().metrics
