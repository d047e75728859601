"""The likelihood of diffusion language models: estimated over masks, one forward pass at a time.

Every (completion, mask) is a pass of its own, so micro-batches are cut over both, memory is that of
one micro-batch whatever the number of masks, and the gradient depends on no cut (algos/elbo.py).
Masks follow from the sample and the step, so old, current and reference log-probs are taken under
the same ones, on every process.

Legend: B rows, J passes, T completion columns, R passes of one micro-batch, M tokens they score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlalign import algos
from rlalign.algos.metrics import Metrics
from rlalign.config import AlgoConfig, Config
from rlalign.models.masked_diffusion import Canvas
from rlalign.rollout.seeds import mask_seed
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TrainEngine
from rlalign.trainer.masked_policy import MaskedPolicy, Passes, make_passes
from rlalign.trainer.packing import Row, micro_batches
from rlalign.types import Group, Masks, TrainBatch

Pair = tuple[int, int]  # row and pass

AFTER_THE_END = ("visible", "masked")  # eos policies under which what follows does not train


class ElboLikelihood:
    """`Likelihood` of a `MaskedPolicy`. `eos_ids` end a completion."""

    def __init__(self, policy: MaskedPolicy, eos_ids: frozenset[int]) -> None:
        self.policy, self.eos_ids = policy, eos_ids

    def prepare(
        self,
        engine: TrainEngine,
        batch: TrainBatch,
        groups: Sequence[Group],
        acc_B: Tensor,
        config: Config,
        world: World,
        step: int,
        reference: object = None,
    ) -> TrainBatch:
        """Advantages first: completions without one are not put through the model at all."""
        algo, eos_policy = config.algo, config.rollout.diffusion.eos_policy
        ended_BT = after_the_end(batch, self.eos_ids)
        if eos_policy in AFTER_THE_END:
            batch = batch.replace(mask_BT=batch.mask_BT * ~ended_BT)
        advantage_BT = algos.compute_advantages(
            batch.reward_B, acc_B, batch.group_id_B, batch.mask_BT, algo
        )
        batch = batch.replace(advantage_BT=advantage_BT)
        hidden_BT = ended_BT if eos_policy == "masked" else None
        block_BT = blocks(batch, config, self.policy.lm.block_size)
        masks = draw(batch, groups, config, step, hidden_BT, block_BT)
        batch = batch.replace(masks=masks)
        if algos.needs_old_estimates(algo):
            old_BJT = self.logp(engine, learning(batch, algo), config, world)
            batch = batch.replace(logp_old_BJT=old_BJT)
        if algos.needs_reference(algo):
            reference_BJT = self.logp(engine, batch, config, world, reference=True)
            batch = batch.replace(logp_ref_BJT=reference_BJT)
        return batch

    def of_iteration(self, batch: TrainBatch, iteration: int, config: Config) -> TrainBatch:
        """With the passes of that iteration, where each has its own, and the estimates that their
        log-probs are compared with."""
        assert batch.masks is not None
        likelihood, count = config.algo.likelihood, batch.masks.weight_BJT.shape[1]
        share = count // config.algo.num_iterations if likelihood.fresh_masks else count
        start = iteration * share if likelihood.fresh_masks else 0

        def part(logp_BJT: Tensor | None) -> Tensor | None:
            return None if logp_BJT is None else logp_BJT[:, start : start + share]

        masks = batch.masks.passes(start, start + share)
        old_BJT, reference_BJT = part(batch.logp_old_BJT), part(batch.logp_ref_BJT)
        close_BJT = old_BJT if likelihood.kl_to == "old" else reference_BJT
        close_BT = None if close_BJT is None else algos.combine(close_BJT, masks)
        return batch.replace(
            masks=masks, logp_old_BJT=old_BJT, logp_ref_BJT=reference_BJT, logp_ref_BT=close_BT
        )

    def accumulate(
        self,
        engine: TrainEngine,
        minibatch: TrainBatch,
        config: Config,
        world: World,
        metrics: list[Metrics],
    ) -> int:
        """Forward and backward of every pass that scores something, each process its share."""
        assert minibatch.masks is not None
        algo = config.algo
        if minibatch.logp_old_BJT is None and not algos.has_kl(algo):
            algo = replace(algo, beta=0.0)  # the policy is the one that sampled: no KL, no slope
        limit = config.rollout.max_completion_length
        pass_loss, slope_BJT = algos.pass_loss(algo), None
        if pass_loss is None:
            now_BJT = torch.zeros(minibatch.masks.weight_BJT.shape)
            if algos.slopes_need_values(minibatch, algo):
                now_BJT = self.logp(engine, minibatch, config, world)
            slope_BJT = slopes(now_BJT, minibatch, algo, limit)
        found = Found(minibatch, whole=pass_loss is None)
        pairs, mine = plan_passes(minibatch, config, world)
        for part in mine or [[]]:  # bernoulli may mask nothing at all, and a step still follows
            passes = self._passes(minibatch, part or pairs[:1] or [(0, 0)], world)
            logp_M = engine.forward(passes, temperature(config))
            if not part:
                engine.backward(0.0 * logp_M.sum())  # collectives need every process
                continue
            if slope_BJT is not None:
                slope_M = slope_BJT.flatten()[passes.cell_M].to(world.device)
                engine.backward((slope_M * logp_M).sum())
            else:
                assert pass_loss is not None
                change_R, advantage_R, weight_R = changes(
                    logp_M, passes, part, minibatch, algo, limit
                )
                loss = pass_loss(change_R, advantage_R, weight_R, algo)
                engine.backward(loss.loss)
                metrics.append(loss.metrics)
            found.add(logp_M, passes)
        metrics += found.figures(algo, limit, world)
        return sum(len(minibatch.sequences[row]) for row, _ in pairs)

    @torch.no_grad()
    def logp(
        self,
        engine: TrainEngine,
        batch: TrainBatch,
        config: Config,
        world: World,
        *,
        reference: bool = False,
    ) -> Tensor:
        """Log-probs of a whole batch under its masks, by the policy or by the reference model:
        float32 [B, J, T], 0 where nothing is scored; on every process."""
        assert batch.masks is not None
        logp_BJT = torch.zeros(batch.masks.weight_BJT.shape)
        pairs, mine = plan_passes(batch, config, world)
        for part in mine:
            passes = self._passes(batch, part or pairs[:1], world)
            logp_M = engine.forward(passes, temperature(config), reference=reference)
            if part:
                logp_BJT.view(-1)[passes.cell_M] = logp_M.float().cpu()
        return world.all_reduce_sum(logp_BJT, "logp_ref" if reference else "logp_old")

    @torch.no_grad()
    def sequence_logp(self, engine: TrainEngine, sequence: Sequence[int]) -> Tensor:
        """Of each token 1 onwards given all the others, as the rollout engine scores: [len - 1]."""
        ids_T, device = torch.tensor(list(sequence)), engine.world.device
        column_M = torch.arange(1, len(ids_T))
        row_M = column_M - 1
        ids_MT = ids_T.repeat(len(column_M), 1)
        ids_MT[row_M, column_M] = self.policy.lm.mask_id
        passes = Passes(Canvas(ids_MT), row_M, column_M, ids_T[1:], row_M).to(device)
        return engine.forward(passes, 1.0).cpu()

    def _passes(self, batch: TrainBatch, pairs: Sequence[Pair], world: World) -> Passes:
        row_R, pass_R = torch.tensor(pairs).T
        return make_passes(batch, row_R, pass_R, self.policy.lm.mask_id).to(world.device)


class Found:
    """Log-probs of a minibatch as they come, for its figures: of single passes their sums, or
    `whole`, where the figures are those of a loss of all log-probs."""

    def __init__(self, batch: TrainBatch, *, whole: bool) -> None:
        assert batch.masks is not None
        self.batch, self.masks = batch, batch.masks
        shape = batch.masks.weight_BJT.shape
        self.sum_BJ = torch.zeros(shape[:2])
        self.logp_BJT = torch.zeros(shape) if whole else None

    def add(self, logp_M: Tensor, passes: Passes) -> None:
        found_M, width = logp_M.detach().float().cpu(), self.masks.weight_BJT.shape[2]
        weight_M = self.masks.weight_BJT.flatten()[passes.cell_M]
        self.sum_BJ.view(-1).index_add_(0, passes.cell_M // width, weight_M * found_M)
        if self.logp_BJT is not None:
            self.logp_BJT.view(-1)[passes.cell_M] = found_M

    def figures(self, algo: AlgoConfig, limit: int, world: World) -> list[Metrics]:
        sum_BJ = world.all_reduce_sum(self.sum_BJ, "estimates")
        pass_BJ = sum_BJ * algos.num_passes(self.masks)[:, None]
        found = [algos.estimate_metrics(pass_BJ, self.batch, algo.likelihood.estimator)]
        if self.logp_BJT is not None:
            logp_BJT = world.all_reduce_sum(self.logp_BJT, "log-probs")
            found.append(algos.estimate_loss(logp_BJT, self.batch, algo, limit).metrics)
        return found


def after_the_end(batch: TrainBatch, eos_ids: frozenset[int]) -> Tensor:
    """Tokens behind the first end token of their completion: bool [B, T]."""
    ended_BT = torch.zeros(batch.mask_BT.shape, dtype=torch.bool)
    for b, length in enumerate(batch.completion_len_B.tolist()):
        completion = batch.sequences[b][len(batch.sequences[b]) - length :]
        end = next((i for i, token in enumerate(completion) if token in eos_ids), length)
        ended_BT[b, end + 1 : length] = True
    return ended_BT


def blocks(batch: TrainBatch, config: Config, model_blocks: int) -> Tensor | None:
    """The number of the sampler's block that each token is in: int64 [B, T]. Those of a model with
    blocks of its own begin with the prompt. None: a completion is one."""
    size = model_blocks or config.rollout.diffusion.block_size
    if not size:
        return None
    column_BT = torch.arange(batch.mask_BT.shape[1]).expand(batch.mask_BT.shape)
    if model_blocks:
        length_B = torch.tensor([len(sequence) for sequence in batch.sequences])
        column_BT = column_BT + (length_B - batch.completion_len_B)[:, None]
    return column_BT // size


def draw(
    batch: TrainBatch,
    groups: Sequence[Group],
    config: Config,
    step: int,
    hidden_BT: Tensor | None = None,
    block_BT: Tensor | None = None,
) -> Masks:
    """Masks of every row, keyed by its sample and the step; those of all iterations one after the
    other, where each has its own."""
    likelihood = config.algo.likelihood
    names = [(g.prompt.id, sample.index) for g in groups for sample in g.samples]
    prompt_B = [
        len(row) - n
        for row, n in zip(batch.sequences, batch.completion_len_B.tolist(), strict=True)
    ]
    rounds = config.algo.num_iterations if likelihood.fresh_masks else 1
    drawn = [
        algos.draw_masks(
            batch.mask_BT.bool(),
            prompt_B,
            [mask_seed(config.seed, name, index, step, k) for name, index in names],
            likelihood,
            block_BT=block_BT,
            step_BT=batch.step_BT,
            always_hidden_BT=hidden_BT,
        )
        for k in range(rounds)
    ]
    prompts = [masks.prompt_hidden_BJP for masks in drawn if masks.prompt_hidden_BJP is not None]
    return Masks(
        torch.cat([masks.hidden_BJT for masks in drawn], 1),
        torch.cat([masks.weight_BJT for masks in drawn], 1),
        torch.cat(prompts, 1) if prompts else None,
    )


def learning(batch: TrainBatch, algo: AlgoConfig) -> TrainBatch:
    """The batch without the passes of rows that teach nothing."""
    assert batch.masks is not None and batch.advantage_BT is not None
    if not algos.silent_without_advantage(algo):
        return batch
    learns_B = (batch.advantage_BT != 0).any(1)
    weight_BJT = batch.masks.weight_BJT * learns_B[:, None, None]
    return batch.replace(masks=replace(batch.masks, weight_BJT=weight_BJT))


def plan_passes(
    batch: TrainBatch, config: Config, world: World
) -> tuple[list[Pair], list[list[Pair]]]:
    """Every (row, pass) of the batch that scores a token, and this process's share of them by
    micro-batch; the same number of micro-batches on every process."""
    assert batch.masks is not None
    pairs = (batch.masks.weight_BJT != 0).any(2).nonzero().tolist()
    pairs = sorted(map(tuple, pairs), key=lambda pair: -len(batch.sequences[pair[0]]))
    rows = [Row(len(batch.sequences[row]), i, 0) for i, (row, _) in enumerate(pairs)]
    plan = micro_batches(rows, config.trainer.micro_batch_tokens, world.size)[world.rank]
    return pairs, [[pairs[i] for i in part] for part in plan]


def slopes(
    logp_BJT: Tensor, batch: TrainBatch, algo: AlgoConfig, max_completion_length: int
) -> Tensor:
    """Derivative of the loss in each log-prob: [B, J, T]."""
    leaf_BJT = logp_BJT.detach().clone().requires_grad_()
    with torch.enable_grad():
        output = algos.estimate_loss(leaf_BJT, batch, algo, max_completion_length)
        (slope_BJT,) = torch.autograd.grad(output.loss, leaf_BJT)
    return slope_BJT


def changes(
    logp_M: Tensor,
    passes: Passes,
    pairs: Sequence[Pair],
    batch: TrainBatch,
    algo: AlgoConfig,
    max_completion_length: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pass: d (algos/bgpo.py), with graph, its advantage and its share of the loss."""
    assert batch.masks is not None
    row_R = torch.tensor([row for row, _ in pairs])
    weight_M = batch.masks.weight_BJT.flatten()[passes.cell_M]
    count_R = algos.num_passes(batch.masks)[row_R].float()
    old_M = logp_M.detach()
    if batch.logp_old_BJT is not None:
        old_M = batch.logp_old_BJT.flatten()[passes.cell_M].to(logp_M.device)
    divisor_R = algos.ratio_divisor(batch, algo, max_completion_length)[row_R]
    factor_M = weight_M * (count_R / divisor_R)[passes.row_M.cpu()]
    change_R = logp_M.new_zeros(len(pairs)).index_add(
        0, passes.row_M, factor_M.to(logp_M.device) * (logp_M - old_M)
    )
    advantage_R = algos.row_advantage(batch)[row_R].to(logp_M.device)
    share_R = (algos.policy_weight(batch)[row_R] / count_R).to(logp_M.device)
    return change_R, advantage_R, share_R


def temperature(config: Config) -> float:
    """Only the sampler's own masks have the sampler's own log-probs."""
    return config.rollout.temperature if config.algo.likelihood.estimator == "trace" else 1.0
