"""All strengths of the grid in one pass over the vocabulary, on a GPU: see alpha_search.py.

    at each strength a:  m' = max(m, max x),  S' = e^(m - m') S + sum e^(x - m'),
                         U' = e^(m - m') U + sum e^(x - m') D,    x = M + a D
    log sum_v e^(M + aD) = m + log S,  E_{P_a}[D] = U / S

A program holds the three numbers of some strengths of one row, in fp32, over its share of the
vocabulary; nothing of the size of the vocabulary is written.

Shapes: B rows, V vocabulary, N strengths, P shares.
"""

# pyright: reportOperatorIssue=false, reportArgumentType=false
# (the types of Triton's language are those of its compiler, not of Python)
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

COLUMNS = 256  # of a tile
STRENGTHS = 32  # of a tile: the usual grid and strength 0
SHARE = 4096  # columns that are worth a program of their own


def tilt_grid(large_BV: Tensor, delta_BV: Tensor, grid_N: Tensor) -> Tensor:
    """log sum_v e^(M + aD) and E_{P_a}[D] at strength 0 and those of the grid: float32
    [2, B, 1 + N]."""
    large_BV, delta_BV = large_BV.float().contiguous(), delta_BV.float().contiguous()
    alpha_N = torch.cat([grid_N.new_zeros(1), grid_N]).float()
    (rows, vocab), count = large_BV.shape, len(alpha_N)
    shares = triton.cdiv(vocab, SHARE)
    out = large_BV.new_empty(3, shares, rows, count)
    grid = (rows, shares, triton.cdiv(count, STRENGTHS))
    tilt_kernel[grid](
        large_BV, delta_BV, alpha_N, out, rows, vocab, count,
        SHARE=SHARE, BV=COLUMNS, BA=STRENGTHS,
    )  # fmt: skip
    top_PBN, sum_PBN, moment_PBN = out
    top_BN = top_PBN.amax(0)
    scale_PBN = (top_PBN - top_BN).exp()  # a row has a token: its maximum is finite
    total_BN = (scale_PBN * sum_PBN).sum(0)
    return torch.stack([top_BN + total_BN.log(), (scale_PBN * moment_PBN).sum(0) / total_BN])


@triton.jit
def tilt_kernel(
    large, delta, alpha, out, num_rows, vocab, count,
    SHARE: tl.constexpr, BV: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """out[:, share, row, strength] = m, S and U."""
    row, share = tl.program_id(0), tl.program_id(1)
    which = tl.program_id(2) * BA + tl.arange(0, BA)
    a = tl.load(alpha + which, mask=which < count, other=0.0)
    start = row.to(tl.int64) * vocab
    m = tl.full([BA], -float("inf"), dtype=tl.float32)
    s = tl.zeros([BA], dtype=tl.float32)
    u = tl.zeros([BA], dtype=tl.float32)
    begin = share * SHARE
    for col0 in range(begin, min(begin + SHARE, vocab), BV):
        cols = col0 + tl.arange(0, BV)
        logit = tl.load(large + start + cols, mask=cols < vocab, other=-float("inf"))
        d = tl.load(delta + start + cols, mask=cols < vocab, other=0.0)
        x = logit[None, :] + a[:, None] * d[None, :]
        top = tl.maximum(m, tl.max(x, 1))
        base = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp(x - base[:, None])
        shrink = tl.exp(m - base)
        s = shrink * s + tl.sum(p, 1)
        u = shrink * u + tl.sum(p * d[None, :], 1)
        m = top
    line = (share.to(tl.int64) * num_rows + row) * count + which
    size = tl.num_programs(1).to(tl.int64) * num_rows * count
    tl.store(out + line, m, mask=which < count)
    tl.store(out + size + line, s, mask=which < count)
    tl.store(out + 2 * size + line, u, mask=which < count)
