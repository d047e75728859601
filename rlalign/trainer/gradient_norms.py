"""Norms of every row's gradient with respect to one tensor, for allocations that need them: GVM
(arXiv:2505.02391, algorithm 2) and CurES.

    S_b = sum_t m_bt ln pi(y_bt)  at the sampling temperature: a sum, no mean over tokens
    lm_head        |dS_b / dW| of the head's matrix, no backward pass; where the embedding is the
                   same matrix, the part of the gradient that comes from the output side
    embed_tokens   |dS_b / dE| of the input embedding: one backward pass for all rows down to the
                   embedded tokens, then the sum over equal tokens of each row. The whole gradient,
                   output side included, where the head is the same matrix

Shapes: B rows, T completion columns, M counted completion tokens, K sets, N embedded tokens (with
padding if the model takes any), U different tokens of all rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from rlalign.errors import RlalignError
from rlalign.kernels.gradient_norms import InputSide, head_gradient_norms
from rlalign.kernels.linear_logprob import Lora, linear_logprob
from rlalign.models.pack import Pack, make_pack
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TrainEngine
from rlalign.trainer.packing import Row, load, micro_batches
from rlalign.trainer.rows import RowPlan, plan_rows, prompt_keys, rows_to_run
from rlalign.types import TrainBatch

if TYPE_CHECKING:
    from rlalign.config import Config
    from rlalign.trainer.policy import Policy

GRAD_PARAMS = ("lm_head", "embed_tokens")
HEAD_OPTIONS = ("bias", "temperature", "logit_scale", "softcap", "lora", "chunk_size")
NUM_PROBED = 4  # tokens whose embedding is compared with what the gradient is taken of


class GradientNormError(RlalignError):
    """These gradients cannot be had from this model or engine; the message names the fix."""


class GradientNorms(NamedTuple):
    """float32: the Frobenius norm of each row's gradient (0 without counted tokens), and the
    squared norm of the mean gradient of each set of rows (None unless sets were given)."""

    norm_B: Tensor
    mean_squared_K: Tensor | None


def gradient_norms(
    policy: Policy,
    batch: TrainBatch,
    temperature: float,
    grad_params: str,
    set_id_B: Tensor | None = None,
) -> GradientNorms:
    """Norms for the rows of `batch`; tokens with mask 0 do not count.

    `set_id_B` int64 in 0 .. K-1, -1 for rows of no set; the mean is over all rows of a set (lm_head
    only). Raises GradientNormError for another tensor, for sets with embed_tokens, for an embedding
    that does more than to look up and scale, and for embed_tokens under ZeRO-3.
    """
    if grad_params == "lm_head":
        return _of_head(policy, batch, temperature, set_id_B)
    if grad_params != "embed_tokens":
        raise GradientNormError(
            f"grad_params={grad_params!r} is not known; choose one of {', '.join(GRAD_PARAMS)}"
        )
    if set_id_B is not None:
        raise GradientNormError(
            "the norm of a mean gradient is there for grad_params=lm_head only: use that, or leave "
            "set_id_B out"
        )
    return GradientNorms(_of_embedding(policy, batch, temperature), None)


@torch.no_grad()
def norms_of_batch(
    engine: TrainEngine,
    batch: TrainBatch,
    config: Config,
    world: World,
    grad_params: str,
    set_id_B: Tensor | None = None,
) -> GradientNorms:
    """The same for a `batch` that every process holds whole, in micro-batches over all of them; on
    the CPU. A set stays in one micro-batch, so its rows must have the same prompt: else
    GradientNormError."""
    norm_B = torch.zeros(len(batch))
    count = 0 if set_id_B is None or not len(batch) else int(set_id_B.max()) + 1
    squared_K = torch.zeros(count)
    for rows in _micro_batches(batch, config, world, grad_params, set_id_B):
        micro = batch.rows(rows).to(world.device)
        sets = None if set_id_B is None else set_id_B[rows]
        found = engine.forward(
            micro, config.rollout.temperature, grad_params=grad_params, set_id_B=sets
        )
        norm_B[rows] = found.norm_B.cpu()
        if found.mean_squared_K is not None:
            squared_K[: len(found.mean_squared_K)] += found.mean_squared_K.cpu()
    norm_B = world.all_reduce_sum(norm_B, "gradient norms")
    if set_id_B is None:
        return GradientNorms(norm_B, None)
    return GradientNorms(norm_B, world.all_reduce_sum(squared_K, "norms of mean gradients"))


def _micro_batches(
    batch: TrainBatch, config: Config, world: World, grad_params: str, set_id_B: Tensor | None
) -> list[list[int]]:
    """This process's rows, micro-batch by micro-batch; those with the same prompt stay together
    where sets are given."""
    limit = config.trainer.micro_batch_tokens
    share_prefixes = config.trainer.packing and grad_params == "lm_head"
    order, rows = rows_to_run(batch, share_prefixes=share_prefixes)
    groups = [[at] for at in range(len(rows))]
    if set_id_B is not None:
        groups = _by_prompt(order, prompt_keys(batch), set_id_B.tolist())
        rows = [Row(load(group, rows), number, 0) for number, group in enumerate(groups)]
    parts = micro_batches(rows, limit, world.size)[world.rank]
    return [[order[at] for unit in part for at in groups[unit]] for part in parts]


def _by_prompt(order: list[int], key_B: list[int], set_id_B: list[int]) -> list[list[int]]:
    """Places in `order` of the rows of each prompt."""
    groups: dict[int, list[int]] = {}
    key_of_set: dict[int, int] = {}
    for at, i in enumerate(order):
        key, name = key_B[i], set_id_B[i]
        groups.setdefault(key, []).append(at)
        if name >= 0 and key_of_set.setdefault(name, key) != key:
            raise GradientNormError(f"set {name} has rows with different prompts: make it two sets")
    return list(groups.values())


# --- lm_head -------------------------------------------------------------------------------------


@torch.no_grad()
def _of_head(
    policy: Policy, batch: TrainBatch, temperature: float, set_id_B: Tensor | None
) -> GradientNorms:
    plan, row_M = _counted(plan_rows(batch, share_prefixes=policy.packing), batch)
    pack = make_pack(plan.sequences, plan.parents, policy.head.weight.device)
    hidden_MD = policy.hidden_states(pack, plan.places(pack))

    def norms(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> GradientNorms:
        options = {name: options[name] for name in HEAD_OPTIONS}
        norm_B = head_gradient_norms(hidden, weight, target, row_M, len(batch), **options)
        if set_id_B is None:
            return GradientNorms(norm_B, None)
        set_id = set_id_B.cpu()
        share_B = 1 / (set_id[:, None] == set_id).sum(1)
        mean_K = head_gradient_norms(
            hidden, weight, target, set_id[row_M], int(set_id.max()) + 1 if len(set_id) else 0,
            token_weight=share_B[row_M].to(hidden.device), **options,
        )  # fmt: skip
        return GradientNorms(norm_B, mean_K.square())

    return policy.head(hidden_MD, plan.target_M.to(hidden_MD.device), temperature, function=norms)


def _counted(plan: RowPlan, batch: TrainBatch) -> tuple[RowPlan, Tensor]:
    """The plan with completion tokens of mask 1 only, and the row of each: [M]."""
    at = batch.mask_BT.cpu().flatten()[plan.cell_M].nonzero()[:, 0]
    counted = {
        name: getattr(plan, name)[at] for name in ("sequence_M", "offset_M", "target_M", "cell_M")
    }
    plan = dataclasses.replace(plan, **counted)
    return plan, plan.cell_M // max(batch.mask_BT.shape[1], 1)


# --- embed_tokens --------------------------------------------------------------------------------


class Embedded:
    """What the embedding saw and gave in one forward pass: `ids` [..., N] and the leaf `output`
    [..., N, D]."""

    ids: Tensor
    output: Tensor


def _of_embedding(policy: Policy, batch: TrainBatch, temperature: float) -> Tensor:
    """[B] float32."""
    embedding, scale = _embedding(policy)
    whole = plan_rows(batch, share_prefixes=False)  # of a shared token there is one sum only
    plan, row_M = _counted(whole, batch)
    if not len(row_M):
        return torch.zeros(len(batch), device=embedding.weight.device)
    pack = make_pack(plan.sequences, plan.parents, policy.head.weight.device)
    target_M = plan.target_M.to(policy.head.weight.device)
    with torch.enable_grad(), _watched(embedding, scale) as seen:
        hidden_MD = policy.hidden_states(pack, plan.places(pack))
        logp_M = policy.head(hidden_MD, target_M, temperature, function=_logp_of_frozen)
        (grad,) = torch.autograd.grad(logp_M.sum(), seen.output)
    grad = grad.double().mul_(scale)
    if embedding.padding_idx is not None:  # a row that torch gives no gradient
        grad.masked_fill_((seen.ids == embedding.padding_idx)[..., None], 0)
    row_N = _row_of_each(whole, pack, batch, padded=not policy.packing).to(grad.device)
    side = _by_token(row_N, seen.ids.flatten(), grad.flatten(0, -2), len(embedding.weight))

    def norms(hidden: Tensor, weight: Tensor, target: Tensor, **options: Any) -> Tensor:
        options = {name: options[name] for name in HEAD_OPTIONS} | {"input_side": side}
        return head_gradient_norms(hidden, weight, target, row_M, len(batch), **options)

    if embedding.weight is policy.head.weight:
        return policy.head(hidden_MD.detach(), target_M, temperature, function=norms)
    squared_B = grad.new_zeros(len(batch))
    squared_B.index_add_(0, side.segment, side.grad.square().sum(1))
    return squared_B.sqrt_().float()


def _embedding(policy: Policy) -> tuple[nn.Embedding, float]:
    """The module that holds the embedding, and the factor that it puts on its rows."""
    module = policy.model.get_input_embeddings()
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if not isinstance(module, nn.Embedding):
        raise GradientNormError(
            f"the input embedding is {type(module).__name__}, no plain lookup: use "
            "grad_params=lm_head"
        )
    if hasattr(module.weight, "ds_id"):
        raise GradientNormError(
            "grad_params=embed_tokens needs whole parameters in a backward pass, and ZeRO-3 has "
            "them in parts: use grad_params=lm_head, or trainer.zero_stage <= 2"
        )
    return module, float(getattr(module, "embed_scale", 1.0))


@contextmanager
def _watched(embedding: nn.Embedding, scale: float) -> Iterator[Embedded]:
    """While it lasts, the embedding's output is a leaf. Raises GradientNormError where that is not
    `scale` times rows of its weight."""
    seen = Embedded()

    def watch(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.ids, seen.output = args[0], output.detach().requires_grad_()
        probe = args[0].flatten()[:NUM_PROBED]
        rows = embedding.weight.detach()[probe] * scale
        if not torch.allclose(output.detach().flatten(0, -2)[:NUM_PROBED], rows, rtol=1e-2):
            raise GradientNormError(
                f"{type(embedding).__name__} does more than to look up rows and scale them: use "
                "grad_params=lm_head"
            )
        return seen.output

    handle = embedding.register_forward_hook(watch)
    try:
        yield seen
    finally:
        handle.remove()


def _logp_of_frozen(
    hidden: Tensor, weight: Tensor, target: Tensor, *,
    bias: Tensor | None, lora: Lora | None, **options: Any,
) -> Tensor:  # fmt: skip
    """Log-probs [M] whose gradient reaches `hidden` alone: that of the head is [V, D]."""
    bias = None if bias is None else bias.detach()
    lora = None if lora is None else lora._replace(weight=lora.weight.detach())
    return linear_logprob(hidden, weight.detach(), target, bias=bias, lora=lora, **options).logp


def _row_of_each(whole: RowPlan, pack: Pack, batch: TrainBatch, *, padded: bool) -> Tensor:
    """The row of `batch` that each embedded token belongs to [N]; `whole` is the plan of all
    completion tokens, each row alone."""
    row_S = torch.empty(len(whole.sequences), dtype=torch.long)
    row_S[whole.sequence_M] = whole.cell_M // batch.mask_BT.shape[1]
    row_S = row_S[torch.tensor(pack.start).argsort()]
    if padded:
        return row_S.repeat_interleave(max(pack.lengths))
    return row_S.repeat_interleave(torch.tensor(pack.lengths))


def _by_token(row_N: Tensor, ids_N: Tensor, grad_ND: Tensor, vocab: int) -> InputSide:
    """The sums of the gradients of equal tokens within a row."""
    key_U, place_N = torch.unique(row_N * vocab + ids_N, return_inverse=True)
    grad_UD = grad_ND.new_zeros(len(key_U), grad_ND.shape[1]).index_add_(0, place_N, grad_ND)
    return InputSide(row=key_U % vocab, segment=key_U // vocab, grad=grad_UD)
