"""Rollouts of a flow model: trees of denoising steps, a whole level of all trees at a time.

    z_0 ~ N(0, I), one a tree
    for each step i:  v = velocity(z_i)                                   one call a node
                      a stochastic step:     K_i children z' = mean + std xi each, and log p(z')
                      a deterministic step:  one child z' = z + (sigma' - sigma) v
    rewarded is the x0 that the last call predicts, or the last state

States, parents and children of all trees lie in the order of `tree_shape.full_tree`, so the
children of a level are `repeat_interleave` of it. Siblings share their parent's call: a tree with
splits at 0, 3, 6 and 9 of 20 steps makes 16 images with 203 calls in place of 320.

Legend: R trees, N nodes of all of them, M rows of one level, K children, X a latent's dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rlalign.algos.tree_shape import TreeShape, full_tree, tree_shape
from rlalign.config.schema import FlowConfig
from rlalign.rollout.flow_noise import TreeKey, edge_noise, initial_noise
from rlalign.rollout.flow_steps import (
    StepTable,
    edge_logp,
    predict_x0,
    sde_step,
    step_mean,
    step_table,
    time_grid,
)
from rlalign.types import Tree

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # z_MX, sigma_M, tree of each row -> v_MX


@dataclass(frozen=True, slots=True)
class FlowPlan:
    """What the trees of one training step look like, and the numbers of each of their steps."""

    shape: TreeShape
    sigma_T1: Tensor  # float64
    table: StepTable  # float32
    ode_steps: frozenset[int]

    def to(self, device: torch.device) -> FlowPlan:
        return FlowPlan(self.shape, self.sigma_T1, self.table.to(device), self.ode_steps)


@dataclass(frozen=True, slots=True)
class FlowTrees:
    """Rollouts of R trees. `tree` has log-probs and no rewards yet.

    `state_DMX[d]` are the states of depth d as they are stored, in the tree's order; `logp_N` the
    log-prob of each edge as `logp_reduce` says (0 where it has none); `final_LX` what is rewarded,
    leaf by leaf; `preview_DMX[d]` the x0 predicted at the nodes of depth d < T of the first trees.
    """

    tree: Tree
    state_DMX: list[Tensor]
    logp_N: Tensor
    final_LX: Tensor
    preview_DMX: list[Tensor]
    num_calls: int  # states that went through the network


def resolve_flow(cfg: FlowConfig, compat: str) -> FlowConfig:
    """`cfg` with what it leaves open as `algo.tree.compat` says."""
    noise = "official_scaled" if compat == "official" else "correlated"
    drops = compat == "rlalign" and cfg.terminal == "x0_pred"
    return replace(
        cfg,
        branch_noise=cfg.branch_noise or noise,
        drop_last_edge=drops if cfg.drop_last_edge is None else cfg.drop_last_edge,
    )


def make_plan(cfg: FlowConfig, step: int, sigma_T1: Tensor | None = None) -> FlowPlan:
    """The plan of training step `step` (from 0): only the mix window depends on it.

    sigma_T1: the time grid of a model that has its own. Raises AlgoError for splits that are out of
    range, twice there, or have no noise, FlowError for a sampler that is none.
    """
    grid_T1 = time_grid(cfg.num_steps, cfg.shift or 1.0) if sigma_T1 is None else sigma_T1
    keeps_noise = cfg.terminal == "sample"
    shape = tree_shape(cfg.num_steps, cfg.split_steps, cfg.branch_factor, split_last=keeps_noise)
    chosen = sde_steps(cfg, step)
    table = step_table(grid_T1, cfg.sde_kind, cfg.eta, sde_steps=chosen)
    ode_steps = frozenset((table.std_T == 0).nonzero()[:, 0].tolist())
    full_tree(
        torch.zeros(1, dtype=torch.long), shape, ode_steps=ode_steps
    )  # refuses what cannot be
    return FlowPlan(shape, grid_T1, table, ode_steps)


def sde_steps(cfg: FlowConfig, step: int) -> list[int]:
    """Stochastic steps in training step `step`: all, or the splits and the mix window."""
    if not cfg.mix.window_size:
        return list(range(cfg.num_steps))
    silent = cfg.terminal == "x0_pred" or cfg.sde_kind == "cps"  # the last step has no noise of use
    end = max(cfg.num_steps - silent, 1)
    start = cfg.mix.start + cfg.mix.stride * (step // cfg.mix.interval)
    start = start % end if cfg.mix.wrap else min(start, max(end - cfg.mix.window_size, 0))
    window = range(start, min(start + cfg.mix.window_size, end))
    return sorted({*cfg.split_steps, *window})


@torch.no_grad()
def grow(
    plan: FlowPlan,
    velocity: Velocity,
    keys: Sequence[TreeKey],
    group_R: Tensor,
    latent_shape: Sequence[int],
    cfg: FlowConfig,
    *,
    seed: int,
    iteration: int,
    num_previews: int = 0,
) -> FlowTrees:
    """Grow one tree for each key (prompt id, number), of prompt occurrence `group_R`.

    velocity: called with at most `micro_batch_rows` states at a time, their sigma (float32) and
    which tree they belong to. Noise is keyed by (seed, iteration, key, step), so neither the order
    of the trees nor the size of a call changes a sample.
    """
    device, num_trees, widths = plan.table.a_T.device, len(keys), plan.shape.widths
    z_MX = initial_noise(seed, iteration, keys, latent_shape, shared=cfg.shared_start).to(device)
    states, previews, logps = [z_MX], [], [torch.zeros(num_trees)]
    predicted_MX = z_MX
    for i, factor in enumerate(plan.shape.factors):
        tree_M = torch.arange(num_trees, device=device).repeat_interleave(widths[i])
        sigma_M = torch.full((len(z_MX),), float(plan.sigma_T1[i]), device=device)
        v_MX = in_chunks(velocity, cfg.micro_batch_rows, z_MX, sigma_M, tree_M)
        predicted_MX = predict_x0(z_MX, v_MX, sigma_M)
        previews.append(predicted_MX[: num_previews * widths[i]].cpu())
        mean_MX = step_mean(plan.table, torch.full_like(tree_M, i), z_MX, v_MX)
        z_MX = mean_MX
        logp_M = torch.zeros(len(z_MX))
        if i not in plan.ode_steps:
            noise = _noise(cfg, seed, iteration, i, keys, widths[i], latent_shape, factor)
            z_MX, logp_M = _random_step(mean_MX, plan.table.std_T[i], noise.to(device), factor, cfg)
        states.append(z_MX)
        logps.append(logp_M)
    tree = full_tree(
        group_R, plan.shape, ode_steps=plan.ode_steps, num_actions=math.prod(latent_shape)
    )
    logp_N = torch.cat(logps)
    final_LX = z_MX
    if cfg.terminal == "x0_pred":
        final_LX = predicted_MX.repeat_interleave(plan.shape.factors[-1], 0)
    per_action_N = logp_N / (tree.num_actions_N.clamp(min=1) if cfg.logp_reduce == "sum" else 1)
    calls = num_trees * plan.shape.num_calls
    return FlowTrees(tree.replace(logp_N=per_action_N), states, logp_N, final_LX, previews, calls)


@torch.no_grad()
def sample_ode(
    velocity: Velocity,
    keys: Sequence[TreeKey],
    latent_shape: Sequence[int],
    cfg: FlowConfig,
    *,
    seed: int,
    iteration: int,
    device: torch.device | str = "cpu",
    sigma_T1: Tensor | None = None,
) -> Tensor:
    """x0 of one deterministic sample for each key: [len(keys), X]."""
    grid_T1 = time_grid(cfg.num_steps, cfg.shift or 1.0) if sigma_T1 is None else sigma_T1
    table = step_table(grid_T1, "ode", 0.0).to(device)
    z_MX = initial_noise(seed, iteration, keys, latent_shape).to(device)
    row_M = torch.arange(len(keys), device=device)
    for i in range(cfg.num_steps):
        sigma_M = torch.full((len(keys),), float(grid_T1[i]), device=device)
        v_MX = in_chunks(velocity, cfg.micro_batch_rows, z_MX, sigma_M, row_M)
        z_MX = step_mean(table, torch.full_like(row_M, i), z_MX, v_MX)
    return z_MX


def in_chunks(function: Callable[..., Tensor], size: int, *rows: Tensor) -> Tensor:
    """`function` of `rows`, at most `size` of them at a time."""
    parts = zip(*(value.split(size) for value in rows), strict=True)
    return torch.cat([function(*part) for part in parts])


def _noise(
    cfg: FlowConfig,
    seed: int,
    iteration: int,
    step: int,
    keys: Sequence[TreeKey],
    width: int,
    latent_shape: Sequence[int],
    factor: int,
) -> Tensor:
    """Of every edge out of a level, in the order of its children: [M * K, X]."""
    noise = edge_noise(
        seed,
        iteration,
        step,
        keys,
        width,
        latent_shape,
        branch_factor=factor,
        corr=math.inf if cfg.branch_corr is None else cfg.branch_corr,
        mode=cfg.branch_noise or "correlated",
    )
    return noise.flatten(0, 2)


def _random_step(
    mean_MX: Tensor, std: Tensor, noise_CX: Tensor, factor: int, cfg: FlowConfig
) -> tuple[Tensor, Tensor]:
    """Children and the log-probs of the edges to them (on the CPU), as they are stored."""
    mean_CX = mean_MX.repeat_interleave(factor, 0)
    std_C = std.expand(len(mean_CX))
    child_CX = sde_step(mean_CX, std_C, noise_CX)
    return child_CX, edge_logp(child_CX, mean_CX, std_C, cfg.logp_reduce).cpu()
