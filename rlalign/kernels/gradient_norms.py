"""Norms of the gradients of many samples with respect to the head, without a backward pass for each
and without any [V, D] gradient.

    S_j = sum_t m_t ln pi(y_t) over the tokens of segment j,   g_j = dS_j / dW = sum_t dZ_t h_t^T
    |g_j|^2 = sum_{t,t'} (dZ_t . dZ_t') (m_t h_t . m_t' h_t')

The inner products of the rows dZ [V] come from one pass over the vocabulary, with running maxima as
in the online softmax (Milakov and Gimelshein, arXiv:1805.02867). With slope s = dz / d(h . w),
q = 1 - p(y), and P = s p without its entry at y,

    dZ = c e_y - P,   c = s(y) q
    dZ_t . dZ_t' = c_t c_t' 1[y_t = y_t'] - c_t P_t'(y_t) - c_t' P_t(y_t') + P_t . P_t'

where every term is at most of the size q_t q_t', so that a token which the policy is certain of
loses no digits (1 - 2 p + p . p would be all rounding). A segment of more than D tokens is cheaper
the other way: dZ^T h, slice by slice of the vocabulary, only its norm is kept.

Shapes: N tokens, J segments, D hidden size, V vocabulary, U rows of the input side; a block holds S
segments of T tokens with padding, C = S T; K columns of the logits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlalign.kernels import arguments
from rlalign.kernels.arguments import Lora, VocabParallel
from rlalign.kernels.partials import finish
from rlalign.kernels.segments import Segments
from rlalign.kernels.torch_backend import (
    Slice,
    capped,
    chunks,
    logits,
    slices,
    softcap_slope,
    statistics,
    tile_gradient,
    tile_shape,
    within,
)
from rlalign.kernels.transform import Head, Rows, Transform, Upstream, accumulator


class InputSide(NamedTuple):
    """The other part of the gradient of a tied weight, that of its rows as input embeddings:
    `grad` [U, D] belongs to row `row` [U] of the weight and to segment `segment` [U]; no pair of
    the two twice."""

    row: Tensor
    segment: Tensor
    grad: Tensor


@torch.no_grad()
def head_gradient_norms(
    hidden: Tensor, weight: Tensor, target: Tensor, segment: Tensor, num_segments: int, *,
    token_weight: Tensor | None = None, input_side: InputSide | None = None,
    bias: Tensor | None = None, temperature: float = 1.0, logit_scale: float = 1.0,
    softcap: float | None = None, vocab_size: int | None = None, lora: Lora | None = None,
    chunk_size: int | None = None,
) -> Tensor:  # fmt: skip
    """Frobenius norm of d(sum of token_weight * log-prob) / d(weight) over each segment's tokens:
    [J], float32 (float64 for float64 inputs); 0 for a segment without tokens.

    `hidden` [N, D], `weight` [V, D], `target` [N]; `segment` [N] int64 in any order, best on the
    CPU, where it is read; tokens of a negative one count nowhere. `token_weight` [N] is 1 where it
    is None; 1 / k for the tokens of k samples in one segment gives the norm of their mean gradient.
    `input_side`: the norm of the whole gradient of a weight that is also the input embedding.

    `bias`, `temperature`, `logit_scale`, `softcap`, `vocab_size`, `lora` and `chunk_size` are those
    of `linear_logprob`. With `lora` the norm is that of the matrix beneath the adapter. A target
    outside the vocabulary makes its segment NaN. Raises ValueError for shapes or options that do
    not fit.
    """
    shard = VocabParallel(0, len(weight))
    arguments.check(hidden, weight, target, bias, lora, shard, temperature, softcap, chunk_size)
    if segment.shape != target.shape:
        raise ValueError(f"segment has shape {tuple(segment.shape)}, target {tuple(target.shape)}")
    cols = len(weight) if vocab_size is None else min(vocab_size, len(weight))
    head = Head(weight, bias, None if lora is None else lora.weight, cols)
    inside_N = (target >= 0) & (target < cols)
    local_N = torch.where(inside_N, target, -1).long()
    rows = Rows(hidden, None if lora is None else lora.hidden, local_N)
    dtype = accumulator(hidden.dtype)
    weight_N = inside_N.to(dtype) if token_weight is None else token_weight.to(dtype)
    weight_N = torch.where(inside_N, weight_N, math.nan)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round the logits
        squared_J = _squared_norms(
            rows, weight_N, Segments.of(segment, num_segments), head,
            Transform.of(temperature, logit_scale, softcap), chunk_size or 0, input_side,
        )  # fmt: skip
    return squared_J.clamp_(min=0).sqrt_().to(dtype)


class Block(NamedTuple):
    """Segments of similar length, padded to T tokens by ones of weight 0."""

    segment_S: Tensor  # on the CPU
    rows: Rows  # C of them
    weight_ST: Tensor

    @property
    def target_ST(self) -> Tensor:
        return self.rows.target.view(self.weight_ST.shape)

    @property
    def weighted_STD(self) -> Tensor:
        """m h, in float64."""
        hidden_STD = self.rows.hidden.view(*self.weight_ST.shape, -1)
        return hidden_STD.double() * self.weight_ST[..., None]


class Running(NamedTuple):
    """Sums over the columns so far, each row's own target excepted, in units of e^max."""

    max_C: Tensor
    sum_C: Tensor  # of e^z
    product_STT: Tensor  # of s e^z of two rows; without a softcap s is left out


class Found(NamedTuple):
    """Of a block: |g|^2, and what gives dZ at any column."""

    squared_S: Tensor  # float64
    lse_ST: Tensor
    q_ST: Tensor


def _squared_norms(
    rows: Rows,
    weight_N: Tensor,
    segments: Segments,
    head: Head,
    transform: Transform,
    chunk_size: int,
    side: InputSide | None,
) -> Tensor:
    """[J] float64."""
    tile = tile_shape(rows, head, chunk_size)
    blocks = [_block(rows, weight_N, segments, at) for at in segments.batches(tile[0])]
    short = [block for block in blocks if block.weight_ST.shape[1] <= head.weight.shape[1]]
    long = [block for block in blocks if block.weight_ST.shape[1] > head.weight.shape[1]]
    found = _by_products(short, head, transform, tile)
    found += [_by_slices(block, head, transform, tile) for block in long]
    squared_J = weight_N.new_zeros(len(segments.length_J), dtype=torch.float64)
    for block, of_block in zip(short + long, found, strict=True):
        squared_J[block.segment_S.to(squared_J.device)] = of_block.squared_S
    if side is not None and len(side.row):
        in_segments = Segments.of(side.segment, len(squared_J))
        for block, of_block in zip(short + long, found, strict=True):
            inner_S = _inner_products(block, of_block, side, in_segments, head, transform)
            squared_J[block.segment_S.to(squared_J.device)] += 2 * inner_S
        own_U = side.grad.double().square().sum(1)
        squared_J.index_add_(0, side.segment.to(squared_J.device), own_U)
    return squared_J


def _block(rows: Rows, weight_N: Tensor, segments: Segments, segment_S: Tensor) -> Block:
    index_ST, inside_ST = (x.to(weight_N.device) for x in segments.padded(segment_S))
    index_C, lora = index_ST.flatten(), rows.lora_hidden
    lora = lora if lora is None else lora[index_C]
    padded = Rows(rows.hidden[index_C], lora, rows.target[index_C])
    return Block(segment_S, padded, torch.where(inside_ST, weight_N[index_ST], 0))


# --- short segments: inner products of dZ --------------------------------------------------------


def _by_products(
    blocks: list[Block], head: Head, transform: Transform, tile: tuple[int, int]
) -> list[Found]:
    if not blocks:
        return []
    sums = [_nothing_yet(block.weight_ST) for block in blocks]
    most = max(block.weight_ST.numel() for block in blocks)
    buffer = blocks[0].weight_ST.new_empty(most * tile[1])
    for part in slices(head, tile[1], buffer.dtype):
        for block, running in zip(blocks, sums, strict=True):
            _take_in(running, block, part, transform, buffer)
    return [_combine(*each, head, transform) for each in zip(blocks, sums, strict=True)]


def _nothing_yet(weight_ST: Tensor) -> Running:
    zeros_C = torch.zeros_like(weight_ST.flatten())
    product_STT = weight_ST.new_zeros(*weight_ST.shape, weight_ST.shape[1])
    return Running(torch.full_like(zeros_C, -math.inf), zeros_C, product_STT)


def _take_in(
    running: Running, block: Block, part: Slice, transform: Transform, buffer: Tensor
) -> None:
    shape = block.weight_ST.shape
    z_CK = logits(block.rows, part, transform, slice(0, shape.numel()), buffer)
    slope_CK = None if transform.softcap is None else softcap_slope(z_CK, transform)
    safe_C, inside_C = within(block.rows.target - part.cols.start, z_CK)
    own_C = z_CK.gather(1, safe_C[:, None])[:, 0]
    z_CK.scatter_(1, safe_C[:, None], torch.where(inside_C, -math.inf, own_C)[:, None])
    max_C = torch.maximum(running.max_C, z_CK.amax(1))
    base_C = max_C.masked_fill(max_C == -math.inf, 0)
    shrink_C = (running.max_C - base_C).exp_()
    exp_CK = z_CK.sub_(base_C[:, None]).exp_()
    running.max_C.copy_(max_C)
    running.sum_C.mul_(shrink_C).add_(exp_CK.sum(1))
    exp_STK = (exp_CK if slope_CK is None else exp_CK.mul_(slope_CK)).unflatten(0, shape)
    shrink_ST = shrink_C.view(shape)
    running.product_STT.mul_(shrink_ST[:, :, None]).mul_(shrink_ST[:, None, :])
    running.product_STT.baddbmm_(exp_STK, exp_STK.transpose(1, 2))


def _combine(block: Block, running: Running, head: Head, transform: Transform) -> Found:
    target_ST, shape = block.target_ST, block.weight_ST.shape
    z_STT = _logits_at(block, target_ST, head, transform)
    max_ST = running.max_C.view(shape)
    rest_ST = max_ST + running.sum_C.log().view(shape)  # lse of all but the target
    lse_ST = _finite(torch.logaddexp(z_STT.diagonal(dim1=1, dim2=2), rest_ST))
    q_ST = (rest_ST - lse_ST).exp()
    grad_STT = _gradient_at(z_STT, target_ST, block, lse_ST, q_ST, transform)
    c_ST = grad_STT.diagonal(dim1=1, dim2=2)
    scale_ST = (max_ST - lse_ST).exp() * (1.0 if transform.softcap else transform.slope)
    crossed_STT = grad_STT * c_ST[:, None, :]  # c_t' dZ_t(y_t')
    same_STT = target_ST[:, :, None] == target_ST[:, None, :]
    both_STT = torch.where(same_STT, c_ST[:, :, None] * c_ST[:, None, :], 0)
    products_STT = running.product_STT * scale_ST[:, :, None] * scale_ST[:, None, :]
    products_STT += crossed_STT + crossed_STT.transpose(1, 2) - both_STT
    hidden_STD = block.weighted_STD
    squared_S = (products_STT * (hidden_STD @ hidden_STD.transpose(1, 2))).sum((1, 2))
    return Found(squared_S, lse_ST, q_ST)


# --- long segments: dZ^T h, slice by slice -------------------------------------------------------


def _by_slices(block: Block, head: Head, transform: Transform, tile: tuple[int, int]) -> Found:
    (count, width), shape, rows = block.weight_ST.shape, block.weight_ST.shape, block.rows
    dtype = block.weight_ST.dtype
    parts = statistics(rows, head, transform, False, chunk_size=tile[0])
    whole = finish(parts, rows.target >= 0)
    possible_C = whole.lse != -math.inf  # else there is no distribution to move
    weight_C = torch.where(possible_C, block.weight_ST.flatten(), 0)
    lse_C = _finite(whole.lse)
    # several segments fit into one chunk together
    size = max(tile[0], 1) if count == 1 else count * width
    buffer = weight_C.new_empty(min(size, len(lse_C)) * tile[1])
    squared_S = weight_C.new_zeros(count, dtype=torch.float64)
    for part in slices(head, tile[1], dtype):
        sum_SKD = weight_C.new_zeros(count, len(part.weight), rows.hidden.shape[1])
        for at in chunks(rows, size):
            z_CK = logits(rows, part, transform, at, buffer)
            local_C, upstream = (
                rows.target[at] - part.cols.start,
                Upstream(weight_C[at], None, None),
            )
            grad_CK = tile_gradient(z_CK, local_C, transform, lse_C[at], whole.mean[at], upstream)
            grad_SkK, hidden_SkD = (
                x.view(count, -1, x.shape[1]) for x in (grad_CK, rows.hidden[at].to(dtype))
            )
            sum_SKD.baddbmm_(grad_SkK.transpose(1, 2), hidden_SkD)
        squared_S += torch.linalg.vector_norm(sum_SKD, dim=(1, 2), dtype=torch.float64).square()
    q_C = torch.where(possible_C, -torch.expm1(whole.logp), 0)
    return Found(squared_S, lse_C.view(shape), q_C.view(shape))


# --- a few columns -------------------------------------------------------------------------------


def _inner_products(
    block: Block,
    found: Found,
    side: InputSide,
    in_segments: Segments,
    head: Head,
    transform: Transform,
) -> Tensor:
    """<g, G> [S] float64 with G the input side: sum_{t,u} dZ_t(row u) (m_t h_t . G_u)."""
    index_SK, inside_SK = (x.to(side.row.device) for x in in_segments.padded(block.segment_S))
    row_SK = side.row[index_SK]
    inside_SK = inside_SK & (row_SK < head.cols)  # padding of the vocabulary has no output side
    side_SKD = torch.where(inside_SK[..., None], side.grad[index_SK].double(), 0)
    z_STK = _logits_at(block, row_SK, head, transform)
    grad_STK = _gradient_at(z_STK, row_SK, block, found.lse_ST, found.q_ST, transform)
    return (grad_STK * (block.weighted_STD @ side_SKD.transpose(1, 2))).sum((1, 2))


def _logits_at(block: Block, column_SK: Tensor, head: Head, transform: Transform) -> Tensor:
    """z [S, T, K] of each segment's own columns; any of them for a column of -1."""
    dtype, shape, at_SK = block.weight_ST.dtype, block.weight_ST.shape, column_SK.clamp(min=0)

    def product(rows: Tensor, weight: Tensor) -> Tensor:
        rows_STD = rows.to(dtype).view(*shape, -1)
        return rows_STD @ weight[at_SK].to(dtype).transpose(1, 2)

    u_STK = product(block.rows.hidden, head.weight)
    if block.rows.lora_hidden is not None and head.lora_weight is not None:
        u_STK += product(block.rows.lora_hidden, head.lora_weight)
    if head.bias is not None:
        u_STK += head.bias[at_SK].to(dtype)[:, None, :]
    return capped(u_STK.mul_(transform.factor), transform)


def _gradient_at(
    z_STK: Tensor,
    column_SK: Tensor,
    block: Block,
    lse_ST: Tensor,
    q_ST: Tensor,
    transform: Transform,
) -> Tensor:
    """dZ [S, T, K] at each segment's own columns: c at a token's target, -s p elsewhere."""
    own_STK = column_SK[:, None, :] == block.target_ST[:, :, None]
    grad_STK = torch.where(own_STK, q_ST[..., None], -(z_STK - lse_ST[..., None]).exp())
    slope = transform.slope if transform.softcap is None else softcap_slope(z_STK, transform)
    return grad_STK * slope


def _finite(lse: Tensor) -> Tensor:
    """A row without any possible token has lse -inf; with 0 its probabilities are 0, not NaN."""
    return lse.masked_fill(lse == -math.inf, 0)
