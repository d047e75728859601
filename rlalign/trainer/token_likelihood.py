"""The `Likelihood` of language models: exact, a forward pass for all tokens of a row."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlalign import algos
from rlalign.algos.copg import entropy_metric
from rlalign.algos.metrics import Metrics
from rlalign.config import Config
from rlalign.trainer import token_trees
from rlalign.trainer.batch import bare_batch, with_weights
from rlalign.trainer.coupled import groups_as_rows, rows_of_groups, slopes
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TrainEngine
from rlalign.trainer.likelihood import Reference
from rlalign.trainer.packing import micro_batches
from rlalign.trainer.rows import rows_to_run
from rlalign.types import Group, TrainBatch


class TokenLikelihood:
    """Its methods are the functions below."""

    def prepare(
        self,
        engine: TrainEngine,
        batch: TrainBatch,
        groups: Sequence[Group],
        acc_B: torch.Tensor,
        config: Config,
        world: World,
        step: int,
        reference: Reference | None = None,
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
    reference: Reference | None = None,
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
    reference: Reference | None = None,
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
