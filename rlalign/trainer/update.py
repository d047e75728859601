"""One rollout batch to optimizer steps: credit, then minibatches of weighted token losses.

The denominators of the loss are computed once over the minibatch of ALL processes
(`algos.aggregation_weights`), so a rank's loss is a plain sum over its tokens and the gradient does
not depend on micro-batches, packing, order or the number of processes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from rlalign import algos
from rlalign.algos.metrics import Metrics
from rlalign.config import Config
from rlalign.rollout.seeds import sample_seed
from rlalign.trainer.batch import with_weights
from rlalign.trainer.coupled import rows_of_groups
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TrainEngine
from rlalign.trainer.likelihood import Likelihood
from rlalign.trainer.token_likelihood import TokenLikelihood
from rlalign.types import TrainBatch


@dataclass
class UpdateResult:
    """What the optimizer steps of one rollout batch did; `metrics` as CONVENTIONS name them."""

    metrics: dict[str, float] = field(default_factory=dict)
    optimizer_steps: int = 0
    skipped_steps: int = 0  # non-finite gradients
    empty_steps: int = 0  # no token carried gradient
    train_tokens: int = 0  # prompts and completions that went through training, all processes
    backward_s: float = 0.0
    step_s: float = 0.0


def update(
    engine: TrainEngine,
    batch: TrainBatch,
    config: Config,
    world: World,
    step: int,
    lr: float,
    likelihood: Likelihood | None = None,
) -> UpdateResult:
    """Take `num_iterations` x `num_minibatches` optimizer steps on a prepared `batch`.

    `batch` holds the rows of every process (the same on each); the forward passes are shared out.
    """
    result = UpdateResult()
    metrics: list[Metrics] = []
    norms = []
    likelihood = likelihood or TokenLikelihood()
    for iteration, rows in minibatches(batch, config, step):
        minibatch = likelihood.of_iteration(batch, iteration, config).rows(rows)
        minibatch = with_weights(minibatch, config)
        learning = rows_with_gradient(minibatch, config)
        if not learning:
            result.empty_steps += 1
            continue
        start = time.perf_counter()
        minibatch = minibatch.rows(learning)
        tokens = likelihood.accumulate(engine, minibatch, config, world, metrics)
        middle = time.perf_counter()
        outcome = engine.step(lr)
        result.train_tokens += tokens
        result.backward_s += middle - start
        result.step_s += time.perf_counter() - middle
        result.optimizer_steps += not outcome.skipped
        result.skipped_steps += outcome.skipped
        norms.append(outcome.grad_norm)
    result.metrics = reduce_metrics(metrics, world)
    if norms:
        result.metrics["optim/grad_norm"] = sum(norms) / len(norms)
    return result


def minibatches(batch: TrainBatch, config: Config, step: int) -> Iterator[tuple[int, list[int]]]:
    """The iteration and the row indices of each optimizer step; several are shuffled, keyed by
    seed, step, iteration. Rows that depend on each other stay together, those of trees, and those
    of a prompt where prompts are weighed: with rows in three steps it would count three times."""
    units = [[row] for row in range(len(batch))]
    by_prompt = batch.tree is not None or config.algo.prompt_weighting != "sample"
    if by_prompt or algos.couples_rows(config.algo):
        units = rows_of_groups(batch)
    parts = min(config.algo.num_minibatches, max(len(units), 1))
    for iteration in range(config.algo.num_iterations):
        if parts == 1:
            yield iteration, list(range(len(batch)))
            continue
        seed = sample_seed(config.seed, "minibatches", iteration, step)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(units), generator=generator)
        for part in order.tensor_split(parts):
            yield iteration, sorted(row for unit in part.tolist() for row in units[unit])


def rows_with_gradient(minibatch: TrainBatch, config: Config) -> list[int]:
    """Rows whose loss can have a gradient; the others need no forward pass.

    The shared surrogates are multiples of the advantage, so where that is 0 on each weighted token
    (and neither KL nor entropy is in the loss) the gradient is exactly 0. The denominators were
    fixed before, so leaving rows out does not touch them; where they are taken per micro-batch, or
    the algorithm brings its own loss, every row stays.
    """
    assert minibatch.weight_BT is not None and minibatch.advantage_BT is not None
    algo = config.algo
    active_BT = minibatch.weight_BT != 0
    if algos.silent_without_advantage(algo):
        active_BT = active_BT & (minibatch.advantage_BT != 0)
    return active_BT.any(dim=1).nonzero().flatten().tolist()


def reduce_metrics(parts: Sequence[Metrics], world: World) -> dict[str, float]:
    """The loss figures over micro-batches, optimizer steps and processes."""
    local = {
        name: [float(v) for v in value] if isinstance(value, tuple) else float(value)
        for name, value in algos.merge_metrics(parts).items()
    }
    gathered = world.all_gather_bytes(json.dumps(local).encode(), "metrics")
    return algos.finalize_metrics(
        algos.merge_metrics(
            {
                name: (torch.tensor(value[0]), torch.tensor(value[1]))
                if isinstance(value, list)
                else torch.tensor(value)
                for name, value in json.loads(part).items()
            }
            for part in gathered
        )
    )
