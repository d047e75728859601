"""From scored denoising trees to optimizer steps.

The loss is over edges; siblings share their parent's state, so the network is called once for each
distinct parent of a kept edge, and its mean is read by all of that parent's children:

    v(z_parent) -> mean -> log p(child) -> ratio -> clipped surrogate, times the edge's share

A step of a sampler is one action, so an edge is a sequence of one token for everything that
language models share (algos.policy_loss). Every process knows the structure, rewards and shares of
all trees and the states of its own; denominators are those of all, so a process's loss is a plain
sum, and all make the same number of calls.

Legend: N nodes of all trees, E kept edges, M parents of a micro-batch, X a latent's dimensions.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlalign import algos
from rlalign.algos.branch_grpo import TreeCredit
from rlalign.algos.metrics import Metrics
from rlalign.algos.tree_pruning import edge_weights, pruned_depths
from rlalign.config import Config
from rlalign.models.flow import take_rows
from rlalign.rollout.flow import FlowPlan, FlowTrees
from rlalign.rollout.flow_steps import edge_logp, gaussian_kl, step_mean
from rlalign.rollout.seeds import sample_seed
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TrainEngine
from rlalign.trainer.update import UpdateResult, reduce_metrics
from rlalign.types import POLICY, TrainBatch, Tree


@dataclass(frozen=True, slots=True)
class FlowBatch:
    """One rollout batch as a process holds it.

    `tree` are the trees of all processes, with rewards; `own_N` the nodes of this one's among them
    (int64), in the order in which `local` has them; `rank_N` whose each node is. `cond` is a row
    for each local tree.
    """

    plan: FlowPlan
    tree: Tree
    local: FlowTrees
    own_N: Tensor
    rank_N: Tensor
    cond: Mapping[str, Tensor]


def trained_edges(batch: FlowBatch, config: Config, step: int) -> Tensor:
    """bool [N]: without the last step where the reward does not depend on its noise, and a random
    part of the steps where only such a part trains."""
    flow, tree = config.rollout.flow, batch.tree
    chosen_N = tree.kind_N == POLICY
    last = batch.plan.shape.num_steps
    if flow.drop_last_edge:
        chosen_N = chosen_N & (tree.depth_N != last)
    if flow.step_fraction < 1:
        pruned = torch.tensor(pruned_depths(config.algo, step), dtype=torch.long)
        depths = tree.depth_N[chosen_N & ~torch.isin(tree.depth_N, pruned)].unique()
        seed = sample_seed(config.seed, "step_fraction", 0, step)
        order = torch.randperm(len(depths), generator=torch.Generator().manual_seed(seed))
        part = depths[order[: math.ceil(flow.step_fraction * len(depths))]]
        chosen_N = chosen_N & torch.isin(tree.depth_N, part)
    return chosen_N


def flow_credit(batch: FlowBatch, config: Config, step: int) -> TreeCredit:
    return algos.tree_credit(
        batch.tree,
        config.algo,
        torch.ones(len(batch.tree)),
        step=step,
        max_steps=config.trainer.max_steps,
        trains_N=trained_edges(batch, config, step),
    )


def update_flow(
    engine: TrainEngine,
    batch: FlowBatch,
    credit: TreeCredit,
    config: Config,
    world: World,
    step: int,
    lr: float,
) -> UpdateResult:
    """Take `num_iterations` x `num_minibatches` optimizer steps; `train_tokens` counts states that
    went through the network, of all processes."""
    result, metrics, norms = UpdateResult(), [], []
    for keep_N in minibatches(batch.tree, credit, config, step):
        learns_N = keep_N & ((credit.advantage_N != 0) | bool(config.algo.beta))
        if not bool(learns_N.any()):
            result.empty_steps += 1
            continue
        start = time.perf_counter()
        weight_N = edge_weights(batch.tree, keep_N, config.algo, torch.ones(len(keep_N)))
        result.train_tokens += accumulate(
            engine, batch, credit.advantage_N, weight_N, learns_N, config, world, metrics
        )
        middle = time.perf_counter()
        outcome = engine.step(lr)
        result.backward_s += middle - start
        result.step_s += time.perf_counter() - middle
        result.optimizer_steps += not outcome.skipped
        result.skipped_steps += outcome.skipped
        norms.append(outcome.grad_norm)
    result.metrics = reduce_metrics(metrics, world)
    if norms:
        result.metrics["optim/grad_norm"] = sum(norms) / len(norms)
    return result


def minibatches(tree: Tree, credit: TreeCredit, config: Config, step: int) -> Iterator[Tensor]:
    """Kept edges of each optimizer step, bool [N]; several take whole groups, shuffled."""
    groups = tree.group_N.unique()
    parts = min(config.algo.num_minibatches, len(groups))
    for iteration in range(config.algo.num_iterations):
        if parts == 1:
            yield credit.keep_N
            continue
        seed = sample_seed(config.seed, "minibatches", iteration, step)
        order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(seed))
        for part in order.tensor_split(parts):
            yield credit.keep_N & torch.isin(tree.group_N, groups[part])


def accumulate(
    engine: TrainEngine,
    batch: FlowBatch,
    advantage_N: Tensor,
    weight_N: Tensor,
    learns_N: Tensor,
    config: Config,
    world: World,
    metrics: list[Metrics],
) -> int:
    """Add the gradient of the edges `learns_N`; returns the states that went through the network,
    of all processes."""
    rows = config.rollout.flow.micro_batch_rows
    parents = [
        batch.tree.parent_N[learns_N & (batch.rank_N == r)].unique() for r in range(world.size)
    ]
    calls = max(math.ceil(len(mine) / rows) for mine in parents)
    place_N = torch.full((len(batch.tree),), -1).index_copy(
        0, batch.own_N, torch.arange(len(batch.own_N))
    )
    mine = place_N[parents[world.rank]]
    edge_N = (place_N[learns_N & (batch.rank_N == world.rank)]).sort()[0]
    state_NX = torch.cat(batch.local.state_DMX)
    for part in torch.tensor_split(mine, calls):  # parents of one depth lie together
        edges = edge_N[torch.isin(batch.local.tree.parent_N[edge_N], part)]
        idle = part if len(part) else mine.new_zeros(1)
        micro = MicroBatch(idle, edges, state_NX, batch)
        engine.backward(micro.loss(engine, advantage_N, weight_N, config, metrics))
    return sum(len(found) for found in parents)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Local nodes `parent_M` (sorted; one that does not matter, where there is no edge), and the
    edges from them that train."""

    parent_M: Tensor
    edge_E: Tensor
    state_NX: Tensor
    batch: FlowBatch

    def loss(
        self,
        engine: TrainEngine,
        advantage_N: Tensor,
        weight_N: Tensor,
        config: Config,
        metrics: list[Metrics],
    ) -> Tensor:
        """Its part of the loss, with a graph through every parameter."""
        algo, reduce = config.algo, config.rollout.flow.logp_reduce
        mean_MX = self.means(engine)
        if not len(self.edge_E):
            return 0.0 * mean_MX.sum()
        device, local = mean_MX.device, self.batch.local
        at = self.batch.own_N[self.edge_E]
        row_E = torch.searchsorted(self.parent_M, local.tree.parent_N[self.edge_E]).to(device)
        std_E = self.batch.plan.table.std_T[self.step_M()][row_E]
        mean_EX, next_EX = mean_MX[row_E], self.state_NX[self.edge_E.to(device)]
        weight_E = weight_N[at].float().to(device)
        rollout_E = local.logp_N[self.edge_E].to(device)
        edges = edges_as_rows(
            advantage_N[at].float().to(device),
            weight_E,
            rollout_E,
            rollout_E if algo.num_iterations * algo.num_minibatches > 1 else None,
        )
        logp_E = edge_logp(next_EX, mean_EX, std_E, reduce)
        output = algos.policy_loss(logp_E[:, None], edges, replace(algo, beta=0.0))
        metrics.append(output.metrics)
        if not algo.beta:
            return output.loss
        with torch.no_grad():
            reference_EX = self.means(engine, reference=True)[row_E]
        kl_E = gaussian_kl(mean_EX, reference_EX, std_E, reduce)
        metrics.append({"kl": (kl_E.detach().sum(), torch.tensor(float(len(kl_E))))})
        return output.loss + algo.beta * (weight_E * kl_E).sum()

    def means(self, engine: TrainEngine, *, reference: bool = False) -> Tensor:
        """Of the steps out of `parent_M`: one call of the network each."""
        plan, device, step_M = self.batch.plan, self.state_NX.device, self.step_M()
        z_MX = self.state_NX[self.parent_M.to(device)]
        sigma_M = plan.sigma_T1.to(device, torch.float32)[step_M]
        tree_M = self.batch.local.tree.tree_N[self.parent_M].to(device)
        cond = take_rows(self.batch.cond, tree_M)
        v_MX = engine.forward(z_MX, sigma_M, cond, reference=reference)
        return step_mean(plan.table, step_M, z_MX, v_MX)

    def step_M(self) -> Tensor:
        return self.batch.local.tree.depth_N[self.parent_M].to(self.state_NX.device)


def edges_as_rows(
    advantage_E: Tensor, weight_E: Tensor, rollout_E: Tensor, old_E: Tensor | None
) -> TrainBatch:
    """Edges as sequences of one token each."""
    one_E1 = torch.ones_like(rollout_E)[:, None]
    return TrainBatch(
        sequences=((),) * len(rollout_E),
        completion_len_B=torch.ones(len(rollout_E), dtype=torch.long),
        group_id_B=torch.zeros(len(rollout_E), dtype=torch.long),
        mask_BT=one_E1,
        reward_B=torch.zeros_like(rollout_E),
        logp_rollout_BT=rollout_E[:, None],
        advantage_BT=advantage_E[:, None],
        weight_BT=weight_E[:, None],
        logp_old_BT=None if old_E is None else old_E[:, None],
    )
