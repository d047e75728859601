"""Who watches a run: the live view, TensorBoard, W&B. The loop calls each on the main process."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rlalign.config import Config
from rlalign.errors import RlalignError
from rlalign.tracking.rundir import RunDir


class TrackingError(RlalignError):
    """A logger cannot be started; the message says which and how."""


class Observer(Protocol):
    """`figures` are named as in docs/metrics.md; `rows` are the step's samples."""

    def stage(self, text: str) -> None: ...

    def step(self, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None: ...

    def finish(self, result: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def make_observers(config: Config, run_dir: RunDir, *, live: bool) -> list[Observer]:
    observers: list[Observer] = []
    if config.tracking.tensorboard:
        observers.append(TensorBoardObserver(run_dir))
    if config.tracking.wandb != "disabled":
        observers.append(WandbObserver(config, run_dir))
    if live:  # last: it takes over the terminal, which a logger that cannot start would not free
        from rlalign.tracking.live import LiveView, PlainView

        view = LiveView if sys.stdout.isatty() else PlainView
        observers.append(view(run_dir.path.name, config.trainer.max_steps))
    return observers


class TensorBoardObserver:
    """Event files in the run directory: `tensorboard --logdir runs`."""

    def __init__(self, run_dir: RunDir) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir.path / "tensorboard"))

    def stage(self, text: str) -> None:
        pass

    def step(self, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        for name, value in figures.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(figures["step"]))
        self._writer.flush()

    def finish(self, result: Mapping[str, Any]) -> None:
        task = result["config"]["task"]["eval"]
        for moment, step in (("before", 0), ("after", result["steps"])):
            for name, value in result["eval"][moment].items():
                self._writer.add_scalar(f"eval/{task}/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandbObserver:
    """Weights & Biases; `offline` writes beside the run and needs no account."""

    def __init__(self, config: Config, run_dir: RunDir) -> None:
        import dataclasses

        import wandb

        settings = wandb.Settings(init_timeout=60, silent=True)
        try:
            self._run = wandb.init(
                project=config.tracking.wandb_project,
                name=run_dir.path.name,
                id=f"{run_dir.path.name}-{run_dir.read_manifest()['id']}",
                resume="allow",
                dir=str(run_dir.path),
                mode=config.tracking.wandb,  # type: ignore[arg-type]
                config=dataclasses.asdict(config),
                settings=settings,
            )
        except wandb.Error as error:
            raise TrackingError(
                f"W&B did not start within 60 s: {error}. Log in with `wandb login`, or use "
                "tracking.wandb=offline."
            ) from error

    def stage(self, text: str) -> None:
        pass

    def step(self, figures: Mapping[str, float], rows: Sequence[Mapping[str, Any]]) -> None:
        self._run.log({k: v for k, v in figures.items() if k != "step"}, step=int(figures["step"]))

    def finish(self, result: Mapping[str, Any]) -> None:
        task = result["config"]["task"]["eval"]
        for moment in ("before", "after"):
            for name, value in result["eval"][moment].items():
                self._run.summary[f"eval/{task}/{name}/{moment}"] = value

    def close(self) -> None:
        self._run.finish()
