"""The likeliest fillings of a few columns, by a beam over the model's own conditionals.

    chain         log p(x_1) + log p(x_2 | x_1) + ...      a forward pass a column
    independent   log p(x_1) + log p(x_2) + ...            one forward pass in all

Legend: C fillings, L columns, V vocabulary, T columns of the canvas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlalign.testtime.session import Search, Session


def beam(
    session: Session,
    ids_T: Tensor,
    columns: Sequence[int],
    width: int,
    keep: int,
    joint: str = "chain",
) -> Search[tuple[Tensor, Tensor]]:
    """At most `keep` fillings, int64 [C, L], and their log-probs, float32 [C], the likeliest first.

    `columns` are masked, the rest of `ids_T` is as it is; `width` fillings are kept on the way.
    """
    blank_T = ids_T.clone()
    blank_T[list(columns)] = session.mask_id
    found_CL = torch.zeros(1, 0, dtype=torch.int64, device=ids_T.device)
    total_C = torch.zeros(1, device=ids_T.device)
    all_LV = (yield from session.read(blank_T[None], columns))[0] if joint != "chain" else None
    for i, column in enumerate(columns):
        if all_LV is None:
            rows_CT = blank_T.repeat(len(found_CL), 1)
            rows_CT[:, list(columns[:i])] = found_CL
            logp_CV = (yield from session.read(rows_CT, [column]))[:, 0]
        else:
            logp_CV = all_LV[i : i + 1].expand(len(found_CL), -1)
        sum_CV = total_C[:, None] + logp_CV
        best = sum_CV.flatten().argsort(descending=True, stable=True)
        best = best[: keep if i == len(columns) - 1 else width]
        best = best[sum_CV.flatten()[best] > -torch.inf]
        row, token = best // sum_CV.shape[1], best % sum_CV.shape[1]
        found_CL = torch.cat([found_CL[row], token[:, None]], 1)
        total_C = sum_CV.flatten()[best]
    return found_CL, total_C
