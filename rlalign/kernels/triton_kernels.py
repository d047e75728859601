"""The Triton kernels of `linear_logprob`: a tile of logits lives in registers, in fp32, and nowhere
else.

All kernels compute tiles of z = c(factor * (h . w + b)) / T, [rows, columns] = [BN, BV], and differ
in what they do with one. `partials_kernel` walks over its share of the vocabulary and keeps
running statistics of each row (the online softmax of Milakov and Gimelshein, arXiv:1805.02867):

    m' = max(m, max z),  S' = e^(m - m') S + sum e^(z - m'),
    U' = e^(m - m') (U + (m - m') S) + sum e^(z - m') (z - m')

`grad_logits_kernel` turns one tile into dL/d(h . w + b) and stores it; the matrix products with it
are left to the library. `fused_grad_kernel` multiplies it at once and adds the products to the
gradients, unless the tile is too small to matter (arXiv:2411.09009).

Tiles are read through tensor descriptors (TMA) or, with TMA false, through pointers. Grids have one
dimension; row offsets are 64-bit. UPCAST is for the interpreter, which multiplies bfloat16 as if
they were integers.
"""

# pyright: reportOperatorIssue=false, reportOptionalOperand=false, reportArgumentType=false
# (the types of Triton's language are those of its compiler, not of Python)
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

LOWEST = tl.constexpr(-1e30)  # stands for -inf where a probability of 0 multiplies it


@triton.jit
def _dot_tile(
    hidden, weight, row0, col0, cols, num_rows, num_cols, width, stride_h, stride_w,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr,
    PROMOTE: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h . w in fp32; 0 beyond the last row and column. `cols` are the tile's rows of the head: from
    `col0` on where they are read through a descriptor.

    Matrix units cut off low bits at each addition to their accumulator, so with PROMOTE > 0 it is
    emptied into a sum of its own every that many steps.
    """
    acc = tl.zeros([BN, BV], dtype=tl.float32)
    part = tl.zeros([BN, BV], dtype=tl.float32)
    rows = (row0 + tl.arange(0, BN)).to(tl.int64)
    cols = cols.to(tl.int64)
    depth = tl.arange(0, BD)
    for d in range(0, width, BD):
        if TMA:
            h = hidden.load([row0, d])
            w = weight.load([col0, d]).T
        else:
            h_ok = (rows[:, None] < num_rows) & (depth[None, :] < width - d)
            w_ok = (cols[None, :] < num_cols) & (depth[:, None] < width - d)
            h_at = hidden + rows[:, None] * stride_h + (depth + d)[None, :]
            w_at = weight + cols[None, :] * stride_w + (depth + d)[:, None]
            h = tl.load(h_at, mask=h_ok, other=0.0)
            w = tl.load(w_at, mask=w_ok, other=0.0)
        if UPCAST:
            h, w = h.to(tl.float32), w.to(tl.float32)
        if PROMOTE > 0:
            part = tl.dot(h, w, part, input_precision=PRECISION)
            if (d // BD) % PROMOTE == PROMOTE - 1:
                acc += part
                part = tl.zeros([BN, BV], dtype=tl.float32)
        else:
            acc = tl.dot(h, w, acc, input_precision=PRECISION)
    if PROMOTE > 0:
        acc += part
    return acc


@triton.jit
def _add_lora_tile(
    acc, lora_hidden, lora_weight, row0, cols, num_rows, num_cols, rank,
    BN: tl.constexpr, BR: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc + (low-rank part of h) . (low-rank part of w): one more step of depth, BR >= rank."""
    rows = (row0 + tl.arange(0, BN)).to(tl.int64)
    cols = cols.to(tl.int64)
    depth = tl.arange(0, BR)
    h_ok = (rows[:, None] < num_rows) & (depth[None, :] < rank)
    w_ok = (cols[None, :] < num_cols) & (depth[:, None] < rank)
    h = tl.load(lora_hidden + rows[:, None] * rank + depth[None, :], mask=h_ok, other=0.0)
    w = tl.load(lora_weight + cols[None, :] * rank + depth[:, None], mask=w_ok, other=0.0)
    if UPCAST:
        h, w = h.to(tl.float32), w.to(tl.float32)
    return tl.dot(h, w, acc, input_precision=PRECISION)


@triton.jit
def _tanh(x, INTERPRETED: tl.constexpr):
    if INTERPRETED:  # which has no libdevice: the series near 0, where the other form cancels
        y = x * x
        series = 1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835))))
        return tl.where(y < 0.04, x * series, 2 * tl.sigmoid(2 * x) - 1)
    return libdevice.tanh(x)


@triton.jit
def _logits_tile(
    hidden, weight, bias, lora_hidden, lora_weight, row0, col0, cols, num_rows, num_cols,
    width, rank, stride_h, stride_w, factor, softcap, inv_temperature,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PROMOTE: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """z [BN, BV], and with a softcap tanh(u / softcap); before any column is left out."""
    dot = _dot_tile(
        hidden, weight, row0, col0, cols, num_rows, num_cols, width, stride_h, stride_w,
        BN, BV, BD, PROMOTE, TMA, UPCAST, PRECISION,
    )  # fmt: skip
    if BR > 0:
        dot = _add_lora_tile(
            dot, lora_hidden, lora_weight, row0, cols, num_rows, num_cols, rank,
            BN, BR, UPCAST, PRECISION,
        )  # fmt: skip
    u = dot
    if HAS_BIAS:
        u += tl.load(bias + cols, mask=cols < num_cols, other=0.0).to(tl.float32)[None, :]
    u *= factor
    t = u
    if SOFTCAP:
        t = _tanh(u / softcap, INTERPRETED)
        u = t * (softcap * inv_temperature)
    return u, t


@triton.jit
def _take_in(z, m, s, u, ENTROPY: tl.constexpr):
    """The running statistics with one more tile; a row may be -inf throughout."""
    top = tl.maximum(m, tl.max(z, 1))
    base = tl.where(top == -float("inf"), 0.0, top)
    shifted = z - base[:, None]
    p = tl.exp(shifted)
    shrink = tl.exp(m - base)
    if ENTROPY:
        u = shrink * (u + tl.where(s > 0, (m - base) * s, 0.0))
        u += tl.sum(p * tl.maximum(shifted, LOWEST), 1)
    return top, shrink * s + tl.sum(p, 1), u


@triton.jit
def _place(blocks, parts, GROUP: tl.constexpr):
    """The block of rows and the part of the columns of this program. Programs that run together
    share few rows and few columns: GROUP blocks of rows, all parts."""
    pid = tl.program_id(0)
    first = pid // (GROUP * parts) * GROUP
    size = min(blocks - first, GROUP)
    within = pid % (GROUP * parts)
    return first + within % size, within // size


@triton.jit
def partials_kernel(
    hidden, weight, bias, lora_hidden, lora_weight, target, out,
    num_rows, num_cols, width, rank, stride_h, stride_w, factor, softcap, inv_temperature,
    SPLITS: tl.constexpr, GROUP: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    ENTROPY: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PROMOTE: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out[split, :, row] = m, S, U and the target's logit (0 where it lies elsewhere)."""
    block, split = _place(tl.cdiv(num_rows, BN), SPLITS, GROUP)
    row0 = block * BN
    tiles = tl.cdiv(tl.cdiv(num_cols, BV), SPLITS)
    begin = split * tiles * BV
    end = min(begin + tiles * BV, num_cols)

    rows = row0 + tl.arange(0, BN)
    y = tl.load(target + rows, mask=rows < num_rows, other=-1)
    m = tl.full([BN], -float("inf"), dtype=tl.float32)
    s = tl.zeros([BN], dtype=tl.float32)
    u = tl.zeros([BN], dtype=tl.float32)
    chosen = tl.zeros([BN], dtype=tl.float32)
    for col0 in range(begin, end, BV):
        cols = col0 + tl.arange(0, BV)
        z, _ = _logits_tile(
            hidden, weight, bias, lora_hidden, lora_weight, row0, col0, cols, num_rows, num_cols,
            width, rank, stride_h, stride_w, factor, softcap, inv_temperature,
            BN, BV, BD, BR, HAS_BIAS, SOFTCAP, PROMOTE, TMA, UPCAST, PRECISION, INTERPRETED,
        )  # fmt: skip
        if tl.max(((y >= col0) & (y < col0 + BV)).to(tl.int32), 0) > 0:
            chosen += tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), 1)
        if col0 + BV > num_cols:
            z = tl.where(cols[None, :] < num_cols, z, -float("inf"))
        m, s, u = _take_in(z, m, s, u, ENTROPY)
    line = split.to(tl.int64) * 4
    ok = rows < num_rows
    tl.store(out + line * num_rows + rows, m, mask=ok)
    tl.store(out + (line + 1) * num_rows + rows, s, mask=ok)
    tl.store(out + (line + 2) * num_rows + rows, u, mask=ok)
    tl.store(out + (line + 3) * num_rows + rows, chosen, mask=ok)


@triton.jit
def _grad_tile(
    z, t, rows, cols, num_rows, target, lse, mean, grad_logp, grad_entropy, grad_lse, slope,
    ENTROPY: tl.constexpr, LSE: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """dL/d(h . w + b) of a tile, and how large dL/dz may be: inf at targets and where it is NaN."""
    ok = rows < num_rows
    y = tl.load(target + rows, mask=ok, other=-1)
    g = tl.load(grad_logp + rows, mask=ok, other=0.0)
    p = tl.exp(z - tl.load(lse + rows, mask=ok, other=0.0)[:, None])
    weight_of_p = -g
    most = tl.abs(g)
    if LSE:
        dl = tl.load(grad_lse + rows, mask=ok, other=0.0)
        weight_of_p += dl
        most += tl.abs(dl)
    grad = p * weight_of_p[:, None]
    if ENTROPY:
        e = tl.load(grad_entropy + rows, mask=ok, other=0.0)
        offset = z - tl.load(mean + rows, mask=ok, other=0.0)[:, None]
        grad -= p * tl.maximum(offset, LOWEST) * e[:, None]
    is_target = cols[None, :] == y[:, None]
    grad = tl.where(is_target, grad + g[:, None], grad) * slope
    if SOFTCAP:
        grad *= 1 - t * t
    most = p * most[:, None]
    return grad, tl.where(is_target | (most != most), float("inf"), most)


@triton.jit
def grad_logits_kernel(
    hidden, weight, bias, lora_hidden, lora_weight, target,
    lse, mean, grad_logp, grad_entropy, grad_lse, out,
    num_rows, num_cols, width, rank, stride_h, stride_w, factor, softcap, inv_temperature,
    slope, stride_out, first_col, last_col,
    GROUP: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    ENTROPY: tl.constexpr, LSE: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    PROMOTE: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """out[row, v - first_col] = slope * dL/dz of columns [first_col, last_col), in out's dtype."""
    block, tile = _place(tl.cdiv(num_rows, BN), tl.cdiv(last_col - first_col, BV), GROUP)
    row0, col0 = block * BN, first_col + tile * BV
    rows = row0 + tl.arange(0, BN)
    cols = col0 + tl.arange(0, BV)
    z, t = _logits_tile(
        hidden, weight, bias, lora_hidden, lora_weight, row0, col0, cols, num_rows, num_cols,
        width, rank, stride_h, stride_w, factor, softcap, inv_temperature,
        BN, BV, BD, BR, HAS_BIAS, SOFTCAP, PROMOTE, TMA, UPCAST, PRECISION, INTERPRETED,
    )  # fmt: skip
    grad, _ = _grad_tile(
        z, t, rows, cols, num_rows, target, lse, mean, grad_logp, grad_entropy, grad_lse, slope,
        ENTROPY, LSE, SOFTCAP,
    )  # fmt: skip
    at = out + rows.to(tl.int64)[:, None] * stride_out + (cols - first_col)[None, :]
    ok = (rows < num_rows)[:, None] & (cols < last_col)[None, :]
    tl.store(at, grad.to(out.dtype.element_ty), mask=ok)


@triton.jit
def fused_grad_kernel(
    hidden, weight, bias, lora_hidden, lora_weight, target,
    lse, mean, grad_logp, grad_entropy, grad_lse, order, threshold,
    d_hidden, d_weight, d_bias, d_lora_hidden, d_lora_weight,
    num_rows, num_cols, width, rank, stride_h, stride_w, factor, softcap, inv_temperature,
    slope, first_col, last_col,
    GROUP: tl.constexpr,
    BN: tl.constexpr, BV: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr,
    ENTROPY: tl.constexpr, LSE: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr,
    FILTER_HIDDEN: tl.constexpr, FILTER_WEIGHT: tl.constexpr,
    PROMOTE: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
):  # fmt: skip
    """d_x += the part of it that columns [first_col, last_col) make, float32; each may be None.

    `d_weight` has rows for these columns only. With `order` they are positions in it: columns, most
    alike first. Where a tile of dL/dz is below `threshold`, what is filtered does without it.
    """
    block, tile = _place(tl.cdiv(num_rows, BN), tl.cdiv(last_col - first_col, BV), GROUP)
    row0, col0 = block * BN, first_col + tile * BV
    rows = row0 + tl.arange(0, BN)
    places = col0 + tl.arange(0, BV)
    cols = places
    if order is not None:
        cols = tl.load(order + places, mask=places < last_col, other=num_cols)
    z, t = _logits_tile(
        hidden, weight, bias, lora_hidden, lora_weight, row0, col0, cols, num_rows, num_cols,
        width, rank, stride_h, stride_w, factor, softcap, inv_temperature,
        BN, BV, BD, BR, HAS_BIAS, SOFTCAP, PROMOTE, TMA, UPCAST, PRECISION, INTERPRETED,
    )  # fmt: skip
    grad, most = _grad_tile(
        z, t, rows, cols, num_rows, target, lse, mean, grad_logp, grad_entropy, grad_lse, slope,
        ENTROPY, LSE, SOFTCAP,
    )  # fmt: skip
    ok = (rows < num_rows)[:, None] & (places < last_col)[None, :]
    grad = tl.where(ok, grad, 0.0)
    hidden_too = True
    weight_too = True
    if FILTER_HIDDEN or FILTER_WEIGHT:
        matters = tl.max(tl.max(tl.where(ok, most, 0.0), 1), 0) >= tl.load(threshold)
        if FILTER_HIDDEN:
            hidden_too = matters
        if FILTER_WEIGHT:
            weight_too = matters
    if hidden_too:
        _add_to_rows(
            grad, weight, lora_weight, d_hidden, d_lora_hidden, col0, cols, num_cols,
            rows, num_rows, width, rank, stride_w, BD, BR, TMA, UPCAST, PRECISION,
        )  # fmt: skip
    if weight_too:
        _add_to_head(
            grad, hidden, lora_hidden, d_weight, d_bias, d_lora_weight, row0, rows, num_rows,
            places, cols, num_cols, first_col, last_col, width, rank, stride_h,
            BD, BR, TMA, UPCAST, PRECISION,
        )  # fmt: skip


@triton.jit
def _add_to_rows(
    grad, weight, lora_weight, d_hidden, d_lora_hidden, col0, cols, num_cols,
    rows, num_rows, width, rank, stride_w,
    BD: tl.constexpr, BR: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    if d_hidden is not None:
        _add_product(
            grad, weight, d_hidden, col0, cols, num_cols, rows, num_rows, width, stride_w,
            BD, TMA, UPCAST, PRECISION,
        )  # fmt: skip
    if d_lora_hidden is not None:
        _add_product(
            grad, lora_weight, d_lora_hidden, col0, cols, num_cols, rows, num_rows, rank, rank,
            BR, False, UPCAST, PRECISION,
        )  # fmt: skip


@triton.jit
def _add_to_head(
    grad, hidden, lora_hidden, d_weight, d_bias, d_lora_weight, row0, rows, num_rows,
    places, cols, num_cols, first_col, last_col, width, rank, stride_h,
    BD: tl.constexpr, BR: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    if d_weight is not None:
        _add_product(
            grad.T, hidden, d_weight, row0, rows, num_rows, places - first_col,
            last_col - first_col, width, stride_h, BD, TMA, UPCAST, PRECISION,
        )  # fmt: skip
    if d_lora_weight is not None:
        _add_product(
            grad.T, lora_hidden, d_lora_weight, row0, rows, num_rows, cols, num_cols,
            rank, rank, BR, False, UPCAST, PRECISION,
        )  # fmt: skip
    if d_bias is not None:
        tl.atomic_add(d_bias + cols, tl.sum(grad, 0), mask=places < last_col, sem="relaxed")


@triton.jit
def _add_product(
    grad, factor, total, first, inner, num_inner, outer, num_outer, width, stride,
    BD: tl.constexpr, TMA: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """total[outer] += grad [outer, inner] @ factor[inner], a [., width] matrix, by atomic
    additions; `inner` are its rows from `first` on where it is read through a descriptor."""
    inner_at = inner.to(tl.int64)[:, None] * stride
    outer_at = outer.to(tl.int64)[:, None] * width
    depth = tl.arange(0, BD)
    for d in range(0, width, BD):
        if TMA:
            x = factor.load([first, d])
        else:
            ok = (inner < num_inner)[:, None] & (depth < width - d)[None, :]
            x = tl.load(factor + inner_at + (depth + d)[None, :], mask=ok, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
        product = tl.dot(grad.to(x.dtype), x, input_precision=PRECISION)
        ok = (outer < num_outer)[:, None] & (depth < width - d)[None, :]
        tl.atomic_add(total + outer_at + (depth + d)[None, :], product, mask=ok, sem="relaxed")
