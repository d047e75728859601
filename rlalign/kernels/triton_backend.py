"""The Triton backend of `linear_logprob`: launches, and two ways backward.

Forward: running statistics per row and share of the vocabulary, merged afterwards. Backward:
vocabulary-major, with a workspace of bounded size. For each range of columns [v0, v1) one kernel
writes dZ [M, v1 - v0] into it, and the library multiplies:

    dW[v0:v1] = dZ^T h      one product, written once: no fp32 copy of the head's gradient
    dH += dZ W[v0:v1]       accumulated in fp32, [M, D]

Or, fused, one kernel adds both products up; the workspace is dW[v0:v1] in fp32.

Shapes: M rows, D hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from rlalign.kernels import triton_kernels
from rlalign.kernels.partials import Partials, merge
from rlalign.kernels.tiles import INTERPRETED, Tiles, run_with_tiles
from rlalign.kernels.transform import Backward, Grads, Head, Rows, Transform, Upstream

MIN_COLUMNS = 1024  # of the workspace
MIN_RANK = 16  # depth of a matrix instruction in half precision
TMA_ALIGNMENT = 16  # bytes, of a descriptor's base and row pitch


def statistics(
    rows: Rows,
    head: Head,
    transform: Transform,
    entropy: bool,
    *,
    batch_invariant: bool = False,
    **_: Any,
) -> Partials:
    """Partials [M] over the head's columns, float32."""

    def run(tiles: Tiles) -> Partials:
        return _partials(rows, head, transform, entropy, batch_invariant, tiles)

    return run_with_tiles("forward", rows.hidden, run)


def _partials(
    rows: Rows,
    head: Head,
    transform: Transform,
    entropy: bool,
    batch_invariant: bool,
    tiles: Tiles,
) -> Partials:
    count, splits = len(rows.target), _splits(rows.hidden, head.cols, tiles, batch_invariant)
    out = rows.hidden.new_empty(splits, 4, count, dtype=torch.float32)
    if count:
        grid = (triton.cdiv(count, tiles.rows) * splits,)
        arguments = _arguments(rows, head, transform, tiles) | {
            "out": out, "SPLITS": splits, "ENTROPY": entropy,
        }  # fmt: skip
        triton_kernels.partials_kernel[grid](**arguments)
    return merge(Partials(*out.unbind(1)))


def gradients(
    rows: Rows,
    head: Head,
    transform: Transform,
    lse_M: Tensor,
    mean_M: Tensor,
    upstream: Upstream,
    needs: Grads[bool],
    *,
    workspace_bytes: int,
    how: Backward,
    **_: Any,
) -> Grads[Tensor | None]:
    """Gradients of what is per row and of the bias in float32, those of weights in their dtype
    (fused: an adapter's in float32); None where `needs` says so."""
    if not len(rows.target) or not head.cols:
        return Grads(*(x if x is None else x.zero_() for x in _empty_grads(rows, head, needs)))

    def run(tiles: Tiles) -> Grads[Tensor | None]:
        if how.filtered:  # sorted columns, which no descriptor reads
            tiles = tiles._replace(tma=False)
        arguments = _arguments(rows, head, transform, tiles) | {
            "lse": lse_M, "mean": mean_M, "grad_logp": upstream.logp,
            "grad_entropy": upstream.entropy, "grad_lse": upstream.lse, "slope": transform.slope,
            "ENTROPY": upstream.entropy is not None, "LSE": upstream.lse is not None,
        }  # fmt: skip
        if how.fused:
            return _fused(rows, head, needs, arguments, workspace_bytes, how)
        return _through_workspace(rows, head, needs, arguments, workspace_bytes)

    return run_with_tiles("fused" if how.fused else "backward", rows.hidden, run)


def _through_workspace(
    rows: Rows, head: Head, needs: Grads[bool], arguments: dict[str, Any], workspace_bytes: int
) -> Grads[Tensor | None]:
    out = _empty_grads(rows, head, needs)
    dtype = rows.hidden.dtype
    width = workspace_columns(len(rows.target) * dtype.itemsize, head.cols, workspace_bytes)
    workspace = rows.hidden.new_empty(len(rows.target), width)
    for first in range(0, head.cols, width):
        last = min(first + width, head.cols)
        triton_kernels.grad_logits_kernel[_grid(arguments, last - first)](
            **arguments, out=workspace, stride_out=width, first_col=first, last_col=last
        )
        _multiply(out, rows, head, workspace[:, : last - first], first)
    return out


def _fused(
    rows: Rows,
    head: Head,
    needs: Grads[bool],
    arguments: dict[str, Any],
    workspace_bytes: int,
    how: Backward,
) -> Grads[Tensor | None]:
    """Sums in float32 by atomic additions, in the order of the day."""
    out = Grads(
        *(
            torch.zeros_like(x, dtype=torch.float32) if x is not None and need else None
            for x, need in zip(
                (rows.hidden, None, head.bias, rows.lora_hidden, head.lora_weight), needs,
                strict=True,
            )
        )
    )  # fmt: skip
    order = _column_order(rows, head) if how.filtered else None
    median = arguments["grad_logp"].abs().median() if how.filtered else None
    arguments = arguments | {
        "order": order, "threshold": None if median is None else how.filter_eps * median,
        "FILTER_HIDDEN": how.filter_hidden_grad, "FILTER_WEIGHT": how.filter_weight_grad,
        "d_hidden": out.hidden, "d_bias": out.bias, "d_lora_hidden": out.lora_hidden,
        "d_lora_weight": out.lora_weight,
    }  # fmt: skip
    d_weight = torch.zeros_like(head.weight) if needs.weight else None
    depth = head.weight.shape[1]
    width = workspace_columns(4 * depth, head.cols, workspace_bytes) if needs.weight else head.cols
    part = head.weight.new_empty(width, depth, dtype=torch.float32) if needs.weight else None
    for first in range(0, head.cols, width):
        last = min(first + width, head.cols)
        triton_kernels.fused_grad_kernel[_grid(arguments, last - first)](
            **arguments,
            first_col=first,
            last_col=last,
            d_weight=part if part is None else part.zero_(),
        )
        if d_weight is not None and part is not None:
            at = slice(first, last) if order is None else order[first:last].long()
            d_weight[at] = part[: last - first].to(d_weight.dtype)
    return out._replace(weight=d_weight)


def _column_order(rows: Rows, head: Head) -> Tensor:
    """Columns by their mean logit over the rows: what is small for one row is small for many, so
    sorted tiles are small as a whole. Before the softcap, which keeps the order."""
    mean_D = rows.hidden.mean(0, dtype=torch.float32).to(head.weight.dtype)
    mean_V = (head.weight[: head.cols] @ mean_D).float()
    if head.bias is not None:
        mean_V += head.bias[: head.cols]
    return mean_V.argsort().int()


def _grid(arguments: dict[str, Any], cols: int) -> tuple[int]:
    return (
        triton.cdiv(arguments["num_rows"], arguments["BN"]) * triton.cdiv(cols, arguments["BV"]),
    )


def _empty_grads(rows: Rows, head: Head, needs: Grads[bool]) -> Grads[Tensor | None]:
    """Zeros where products are added up, else memory that is written once (padding: zeros)."""

    def added(x: Tensor | None, need: bool) -> Tensor | None:
        return torch.zeros_like(x, dtype=torch.float32) if x is not None and need else None

    def written(x: Tensor | None, need: bool, dtype: torch.dtype | None = None) -> Tensor | None:
        if x is None or not need:
            return None
        grad = torch.empty_like(x, dtype=dtype)
        grad[head.cols :].zero_()
        return grad

    return Grads(
        hidden=added(rows.hidden, needs.hidden),
        weight=written(head.weight, needs.weight),
        bias=written(head.bias, needs.bias, torch.float32),
        lora_hidden=added(rows.lora_hidden, needs.lora_hidden),
        lora_weight=written(head.lora_weight, needs.lora_weight),
    )


def _multiply(
    out: Grads[Tensor | None], rows: Rows, head: Head, grad_MC: Tensor, first: int
) -> None:
    """Take dZ of the columns from `first` into every gradient that is wanted."""
    at = slice(first, first + grad_MC.shape[1])
    if out.weight is not None:
        torch.mm(grad_MC.T, rows.hidden, out=out.weight[at])
    if out.hidden is not None:
        _add_product(out.hidden, grad_MC, head.weight[at])
    if out.bias is not None:
        torch.sum(grad_MC, 0, dtype=torch.float32, out=out.bias[at])
    if out.lora_weight is not None and rows.lora_hidden is not None:
        torch.mm(grad_MC.T, rows.lora_hidden, out=out.lora_weight[at])
    if out.lora_hidden is not None and head.lora_weight is not None:
        _add_product(out.lora_hidden, grad_MC, head.lora_weight[at])


def workspace_columns(bytes_each: int, cols: int, workspace_bytes: int) -> int:
    """Columns that are worked on at once: what fits, in steps of 256, at least MIN_COLUMNS."""
    fitting = workspace_bytes // bytes_each // 256 * 256
    return min(max(fitting, MIN_COLUMNS), cols)


def _arguments(rows: Rows, head: Head, transform: Transform, tiles: Tiles) -> dict[str, Any]:
    """What all kernels take, by name."""
    hidden, weight, softcap = _readable(rows.hidden), _readable(head.weight), transform.softcap
    lora_hidden, lora_weight, rank = rows.lora_hidden, head.lora_weight, 0
    if lora_hidden is not None and lora_weight is not None:
        lora_hidden, lora_weight = lora_hidden.contiguous(), lora_weight.contiguous()
        rank = lora_hidden.shape[1]
    tma = tiles.tma and _describable(hidden) and _describable(weight)
    return {
        "hidden": _described(hidden, tiles.rows, tiles.depth) if tma else hidden,
        "weight": _described(weight, tiles.cols, tiles.depth) if tma else weight,
        "bias": head.bias, "lora_hidden": lora_hidden, "lora_weight": lora_weight,
        "target": rows.target, "num_rows": len(hidden), "num_cols": head.cols,
        "width": hidden.shape[1], "rank": rank,
        "stride_h": hidden.stride(0), "stride_w": weight.stride(0),
        "factor": transform.factor, "softcap": softcap or 1.0,
        "inv_temperature": 1 / transform.temperature,
        "GROUP": tiles.group, "BN": tiles.rows, "BV": tiles.cols, "BD": tiles.depth,
        "PROMOTE": tiles.promote,
        "BR": max(MIN_RANK, triton.next_power_of_2(rank)) if rank else 0,
        "HAS_BIAS": head.bias is not None, "SOFTCAP": softcap is not None, "TMA": tma,
        "UPCAST": INTERPRETED and hidden.dtype == torch.bfloat16,
        "PRECISION": _precision(), "INTERPRETED": INTERPRETED,
        "num_warps": tiles.warps, "num_stages": tiles.stages, "enable_fp_fusion": True,
    }  # fmt: skip


def _described(matrix: Tensor, rows: int, cols: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, cols])


def _readable(matrix: Tensor) -> Tensor:
    """`matrix` with neighbours of a row side by side in memory."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _describable(matrix: Tensor) -> bool:
    """Whether the copy engine can read `matrix`."""
    pitch = matrix.stride(0) * matrix.element_size()
    return matrix.data_ptr() % TMA_ALIGNMENT == 0 and pitch % TMA_ALIGNMENT == 0


def _precision() -> str:
    """Of float32 products: exact unless torch was told that tf32 will do."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def _splits(hidden_MD: Tensor, cols: int, tiles: Tiles, batch_invariant: bool) -> int:
    """Parts of the vocabulary: two programs for every multiprocessor, and at least 8 tiles in each.

    `batch_invariant`: the same for any number of rows, so that a row's sums are too.
    """
    processors = 4
    if hidden_MD.is_cuda:
        processors = torch.cuda.get_device_properties(hidden_MD.device).multi_processor_count
    most = max(1, triton.cdiv(cols, 8 * tiles.cols))
    blocks = 1 if batch_invariant else triton.cdiv(len(hidden_MD), tiles.rows)
    splits = 1
    while blocks * splits < 2 * processors and splits < most:
        splits *= 2
    return min(splits, most)


def _add_product(total_MD: Tensor, grad_MC: Tensor, weight_CD: Tensor) -> None:
    """total += grad @ weight, in total's float32 whatever the dtype of the factors."""
    if grad_MC.dtype == total_MD.dtype:
        total_MD.addmm_(grad_MC, weight_CD)
    elif grad_MC.is_cuda:
        torch.addmm(total_MD, grad_MC, weight_CD, out_dtype=total_MD.dtype, out=total_MD)
    else:
        total_MD.addmm_(grad_MC.to(total_MD.dtype), weight_CD.to(total_MD.dtype))
