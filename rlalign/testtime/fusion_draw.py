"""One round of logit fusion: how strongly experts act at each place, and what is written there.

A draft d, drawn from the first expert's distribution E, stands with probability min(1, F(d) / E(d))
under the fused distribution F; in its place comes else a token drawn from max(0, F - E)
(Leviathan et al., https://arxiv.org/abs/2211.17192, theorem 1). So tokens are distributed as F
says, however good the drafts; at temperature 0 a draft stands where it is F's likeliest token.

Shapes: B rows, K = D + 1 places: D drafted tokens and the one after them, V vocabulary, T experts;
N = B K.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlalign.config.testtime import FusionConfig
from rlalign.kernels.alpha_search import Choice, Move, fuse, measure, search
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.sampling import keep_likeliest, sample, uniform

AS_GIVEN = SamplingParams(1)  # temperature and top-p have been applied


class Places(NamedTuple):
    """`stands_BD`: whether a draft stands; `token_BK`: what is written if it does not, or after the
    drafts. `alpha_BK` is the strength of expert `expert_BK`, the stronger of two (-1: none);
    `odd_BK` the model whose logits are not finite (-1: none)."""

    stands_BD: list[list[bool]]
    token_BK: list[list[int]]
    alpha_BK: list[list[float]]
    expert_BK: list[list[int]]
    odd_BK: list[list[int]]
    bounded_BK: list[list[int]]


def fuse_and_draw(
    logits: Tensor,
    drafts_BD: Sequence[Sequence[int]],
    seeds_B3: Tensor,
    step_B: Tensor,
    cfg: FusionConfig,
    strengths: Sequence[float],
) -> Places:
    """From the logits [models, B, K, V] of the large model, the small base and the experts. `step`
    is the number of tokens before the first place; seeds are those of tokens, of drafts and of
    whether these stand."""
    _, rows, places, _ = logits.shape
    large_NV, *others = logits.flatten(1, 2)
    moves = [measure(others[0], expert_NV, cfg.delta_bound) for expert_NV in others[1:]]
    choice = _choose(large_NV, moves, strengths, cfg.joint)
    fused_NV = fuse(large_NV, moves, choice.alpha_BT)

    place_K = torch.arange(places, device=logits.device)
    step_N = (step_B[:, None] + place_K).flatten()
    seeds_3N = seeds_B3.T.repeat_interleave(places, 1)
    if places == 1:
        params = SamplingParams(1, cfg.temperature, cfg.top_p)
        token_N, _ = sample(fused_NV, seeds_3N[0], step_N, params)
        stands_N = torch.zeros_like(token_N, dtype=torch.bool)
    else:
        draft_N = torch.tensor([[*draft, 0] for draft in drafts_BD], device=logits.device).flatten()
        is_draft_N = (place_K < places - 1).repeat(rows)
        stands_N, token_N = verify(fused_NV, others[1], draft_N, is_draft_N, seeds_3N, step_N, cfg)

    alpha_N, expert_N = _acting(choice)
    odd_N = _odd(logits.flatten(1, 2), choice)
    bounded_N = sum((move.bounded_B for move in moves), torch.zeros_like(token_N))
    columns = (token_N, alpha_N, expert_N, odd_N, bounded_N)
    token, alpha, expert, odd, bounded = (x.view(rows, places).tolist() for x in columns)
    stands = stands_N.view(rows, places)[:, :-1].tolist()
    return Places(stands, token, alpha, expert, odd, bounded)


def verify(
    fused_NV: Tensor,
    expert_NV: Tensor,
    draft_N: Tensor,
    is_draft_N: Tensor,
    seeds_3N: Tensor,
    step_N: Tensor,
    cfg: FusionConfig,
) -> tuple[Tensor, Tensor]:
    """Whether each draft stands, and the token otherwise; where there is no draft, the token."""
    if cfg.temperature == 0:
        token_N = fused_NV.argmax(-1)
        return (token_N == draft_N) & is_draft_N, token_N
    fused_NV, expert_NV = (
        keep_likeliest(x.float() / cfg.temperature, 0, cfg.top_p).softmax(-1)
        for x in (fused_NV, expert_NV)
    )
    at = draft_N[:, None]
    ratio_N = (fused_NV.gather(-1, at) / expert_NV.gather(-1, at))[:, 0]
    stands_N = (uniform(seeds_3N[2], step_N) < ratio_N) & is_draft_N
    rest_NV = torch.where(is_draft_N[:, None], (fused_NV - expert_NV).clamp(min=0), fused_NV)
    token_N, _ = sample(rest_NV.log(), seeds_3N[0], step_N, AS_GIVEN)
    return stands_N, token_N


def _choose(
    large_NV: Tensor, moves: Sequence[Move], strengths: Sequence[float], joint: bool
) -> Choice:
    if moves:
        return search(large_NV, moves, strengths, joint=joint)
    none_N = large_NV.new_zeros(len(large_NV))
    return Choice(none_N.new_empty(len(none_N), 0), none_N, large_NV.amax(-1).isfinite())


def _acting(choice: Choice) -> tuple[Tensor, Tensor]:
    """The strength of the expert that acts most, and which it is."""
    nobody_N1 = choice.alpha_BT.new_zeros(len(choice.alpha_BT), 1)
    alpha_N, index_N = torch.cat([nobody_N1, choice.alpha_BT], -1).max(-1)
    return alpha_N, torch.where(alpha_N > 0, index_N - 1, -1)


def _odd(logits: Tensor, choice: Choice) -> Tensor:
    """The first model whose logits [models, N, V] of a place are not finite at their largest."""
    if bool(choice.finite_B.all()):
        return torch.full_like(choice.finite_B, -1, dtype=torch.long)
    wrong_MN = ~logits.amax(-1).isfinite()
    return torch.where(choice.finite_B, -1, wrong_MN.int().argmax(0))
