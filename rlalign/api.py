"""What the commands do, as Python functions with the same names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlalign import algos
from rlalign.config import Config, parse_config


@dataclass(frozen=True, slots=True)
class Result:
    """What a run achieved. `summary` is the content of result.json (docs/concepts.md).

    >>> Result(path=Path("runs/grpo-mini"), summary={"steps": 80, "eval": {...}})
    """

    path: Path
    summary: Mapping[str, Any]


def load_config(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file or a mapping, apply `key=value` overrides, fill in the algorithm's preset.

    Raises ConfigError (unknown key, wrong type, out of range) or AlgoError (fields that contradict
    each other).
    """
    config = parse_config(source, overrides)
    shared = config.rollout.engine == "hf"
    config.algo = algos.resolve(config.algo, engine_shares_parameters=shared)
    return config


def train(config: Config, *, resume: bool = False, quiet: bool = False) -> Result:
    """Run `config` end to end; `resume` goes on from the newest checkpoint of `runs_dir/name`.

    `quiet` leaves out the live view. Raises what the parts raise; the run directory stays, and
    `resume` continues it.
    """
    from rlalign.tracking.observers import make_observers
    from rlalign.trainer.build import open_job
    from rlalign.trainer.loop import run

    def observers(config: Config, run_dir: Any) -> Sequence[Any]:
        return make_observers(config, run_dir, live=config.tracking.live and not quiet)

    with open_job(config, resume=resume, make_observers=observers) as job:
        return Result(job.run_dir.path, run(job))


def evaluate(config: Config, *, checkpoint: str | Path | None = None) -> Mapping[str, float]:
    """Held-out figures of `config.task.eval`: pass@1 with its interval, pass@k, majority vote.

    `checkpoint` is a model folder to evaluate in place of `config.model.path`.
    """
    from rlalign.trainer.build import open_evaluation

    if checkpoint is not None:
        config.model.path = str(checkpoint)
    with open_evaluation(config) as evaluation:
        return evaluation().metrics
