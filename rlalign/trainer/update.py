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
from typing import TYPE_CHECKING

import torch

from rlalign import algos
from rlalign.algos.copg import entropy_metric
from rlalign.algos.metrics import Metrics
from rlalign.config import Config
from rlalign.rollout.seeds import sample_seed
from rlalign.trainer import token_trees
from rlalign.trainer.batch import bare_batch
from rlalign.trainer.coupled import groups_as_rows, rows_of_groups, slopes
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TrainEngine
from rlalign.trainer.likelihood import Likelihood
from rlalign.trainer.packing import micro_batches
from rlalign.trainer.rows import rows_to_run
from rlalign.types import Group, TrainBatch

if TYPE_CHECKING:
    from rlalign.trainer.reference_cache import ReferenceLogps


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


class TokenLikelihood:
    """The `Likelihood` of language models: exact, a forward pass for all tokens of a row."""

    def prepare(
        self,
        engine: TrainEngine,
        batch: TrainBatch,
        groups: Sequence[Group],
        acc_B: torch.Tensor,
        config: Config,
        world: World,
        step: int,
        reference: ReferenceLogps | None = None,
    ) -> TrainBatch:
        return prepare(engine, batch, acc_B, config, world, reference, step)

    def of_iteration(self, batch: TrainBatch, iteration: int, config: Config) -> TrainBatch:
        return batch

    def accumulate(
        self,
        engine: TrainEngine,
        minibatch: TrainBatch,
        config: Config,
        world: World,
        metrics: list[Metrics],
    ) -> int:
        accumulate_gradient(engine, minibatch, config, world, metrics)
        return sum(len(sequence) for sequence in minibatch.sequences)

    def sequence_logp(self, engine: TrainEngine, sequence: Sequence[int]) -> torch.Tensor:
        return sequence_logp(engine, sequence)


def prepare(
    engine: TrainEngine,
    batch: TrainBatch,
    acc_B: torch.Tensor,
    config: Config,
    world: World,
    reference: ReferenceLogps | None = None,
    step: int = 0,
) -> TrainBatch:
    """Attach old and reference log-probs where the algorithm needs them, then the advantages.

    `reference` holds the reference log-probs of all that can come; None: a model computes them.
    `step`, from 0, decides what of a tree is pruned.
    """
    algo = config.algo
    batch = add_log_probs(engine, batch, config, world, reference)
    if algos.needs_rollout_weights(algo):
        assert batch.logp_old_BT is not None
        weight_BT = algos.rollout_weights(
            batch.logp_old_BT, batch.logp_rollout_BT, batch.mask_BT, algo
        )
        batch = batch.replace(rollout_is_weight_BT=weight_BT)
    if algo.adv_estimator == "tree":
        return token_trees.with_credit(batch, config, step)
    kl_BT = None
    if algos.needs_reference(algo) and algo.kl_in == "reward":
        assert batch.logp_old_BT is not None and batch.logp_ref_BT is not None
        kl_BT = algos.reward_kl(batch.logp_old_BT, batch.logp_ref_BT, batch.mask_BT, algo)
    advantage_BT = algos.compute_advantages(
        batch.reward_B, acc_B, batch.group_id_B, batch.mask_BT, algo, kl_BT=kl_BT
    )
    return batch.replace(advantage_BT=advantage_BT)


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


def with_weights(minibatch: TrainBatch, config: Config, share: float = 1.0) -> TrainBatch:
    """Attach each token's part of the loss over this minibatch of all processes, times `share`."""
    if minibatch.tree is not None:
        return token_trees.with_weights(minibatch, config.algo)
    return algos.attach_weights(
        minibatch,
        config.algo,
        max_completion_length=config.rollout.max_completion_length,
        share=share,
    )


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


def accumulate_gradient(
    engine: TrainEngine, minibatch: TrainBatch, config: Config, world: World, metrics: list[Metrics]
) -> None:
    """Forward and backward over this process's micro-batches; adds each one's figures to
    `metrics`."""
    local = algos.depends_on_split(config.algo)
    slope_BT = None
    if algos.couples_rows(config.algo) and config.algo.copg.microbatch_mode == "two_pass":
        logp_BT = batch_logp(engine, minibatch, config, world)
        slope_BT, figures = slopes(logp_BT, minibatch, config)
        metrics.append(figures)
    parts = my_micro_batches(minibatch, config, world, whole_groups=slope_BT is None)
    for rows in parts:
        micro = minibatch.rows(rows).to(world.device)
        if local:
            micro = with_weights(micro, config, share=1 / (len(parts) * world.size))
        output = engine.forward(micro, config.rollout.temperature, entropy=True)
        if slope_BT is not None:
            width = micro.mask_BT.shape[1]
            metrics.append(entropy_metric(output.entropy_BT, micro))
            engine.backward((slope_BT[rows][:, :width].to(world.device) * output.logp_BT).sum())
            continue
        loss = algos.policy_loss(output.logp_BT, micro, config.algo, entropy_BT=output.entropy_BT)
        engine.backward(loss.loss)
        metrics.append(loss.metrics)


def my_micro_batches(
    batch: TrainBatch, config: Config, world: World, *, whole_groups: bool = False
) -> list[list[int]]:
    """This process's micro-batches; every process gets the same number of them. With `whole_groups`
    rows that depend on each other are in one of them."""
    order, rows = rows_to_run(batch, share_prefixes=config.trainer.packing)
    limit = config.trainer.micro_batch_tokens
    groups = [[at] for at in range(len(rows))]
    if whole_groups and algos.couples_rows(config.algo):
        place = {row: at for at, row in enumerate(order)}
        groups = [sorted(place[row] for row in group) for group in rows_of_groups(batch)]
        rows = groups_as_rows(rows, groups, limit)
    mine = micro_batches(rows, limit, world.size)[world.rank]
    return [[order[at] for unit in part for at in groups[unit]] for part in mine]


def add_log_probs(
    engine: TrainEngine,
    batch: TrainBatch,
    config: Config,
    world: World,
    reference: ReferenceLogps | None = None,
) -> TrainBatch:
    """Attach logp_old and logp_ref where the algorithm needs them before the first step."""
    if config.algo.mismatch.bypass_mode:
        batch = batch.replace(logp_old_BT=batch.logp_rollout_BT)
    if algos.needs_old_logp(config.algo) and batch.logp_old_BT is None:
        batch = batch.replace(logp_old_BT=batch_logp(engine, batch, config, world))
    if algos.needs_reference(config.algo) and reference is not None:
        batch = batch.replace(logp_ref_BT=reference.of(batch))
    elif algos.needs_reference(config.algo):
        logp_BT = batch_logp(engine, batch, config, world, reference=True)
        batch = batch.replace(logp_ref_BT=logp_BT)
    return batch


@torch.no_grad()
def batch_logp(
    engine: TrainEngine, batch: TrainBatch, config: Config, world: World, *, reference: bool = False
) -> torch.Tensor:
    """Log-probs of a whole batch by the policy, or by the reference model: float32 [B, T], 0 beyond
    a completion. The forward passes are shared out, the result is on every process."""
    logp_BT = torch.zeros(batch.mask_BT.shape)
    for rows in my_micro_batches(batch, config, world):
        micro = batch.rows(rows).to(world.device)
        output = engine.forward(
            micro, config.rollout.temperature, entropy=False, reference=reference
        )
        logp_BT[rows, : micro.mask_BT.shape[1]] = output.logp_BT.cpu()
    return world.all_reduce_sum(logp_BT, "logp_ref" if reference else "logp_old")


@torch.no_grad()
def sequence_logp(engine: TrainEngine, sequence: Sequence[int]) -> torch.Tensor:
    """The trainer's log-probs of tokens 1 onwards of `sequence`, temperature 1: float32 [len-1]."""
    batch = bare_batch([tuple(sequence)], [len(sequence) - 1])
    output = engine.forward(batch.to(engine.world.device), 1.0, entropy=False)
    return output.logp_BT[0].cpu()


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
