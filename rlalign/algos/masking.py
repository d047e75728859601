"""Which tokens are masked when a diffusion language model's log-probs are estimated.

Such a model gives log p(token | what is not masked), and no log-prob of a completion y; the bound

    B(y) = E_l E_S [ L/l sum_{i in S} log p(y_i | y without S) ],  l uniform on 1..L, S of l tokens

stands for it: the mean, over all orders in which y could be written down token by token, of the
log-prob of writing it so (LLaDA, arXiv 2502.09992; BGPO, arXiv 2510.11683). With n passes:

    bernoulli    t ~ U(eps, 1), each token masked with t, weight 1/t: variance grows with ln 1/eps
    count        l ~ U{1..L}, l of the tokens masked, weight L/l
    count_strat  the same, the n counts spread evenly over 1..L from a random start
    count_anti   pairs: the first l of a random order, and the last L + 1 - l of it
    coupled      pairs: l ~ U{0..L} tokens, and all others, weights (L + 1)/l and (L + 1)/(L - l)

all have the mean B. Estimators of other things, for methods that use them: log-probs with all
masked (all_masked: d1, arXiv 2504.12216), those averaged with a pair of complements (complement:
DiffuCoder, arXiv 2506.20639), masks as a sampler that goes block by block may see them, each pass
with the mean of what it masks (block_noise: SPG, arXiv 2510.09541), and the masks that the sampler
really saw (trace: TraceRL, arXiv 2509.06949), for which the sum is the log-prob of its choices of
tokens.

Everything is a function of a row's seed, on the CPU, so all processes draw the same masks.

Legend: B rows, J passes, T tokens of a completion, P of a prompt, L scored ones of a completion.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlalign.algos.errors import AlgoError
from rlalign.types import Masks

if TYPE_CHECKING:
    from rlalign.config.schema import LikelihoodConfig

COMPLEMENT_TIMES = (0.2, 0.8)
NEVER = torch.iinfo(torch.int64).max  # the step of a token that the model did not decide


class RowMasks(NamedTuple):
    """Of one row, over the tokens that are scored: bool and float32 [J, L]."""

    hidden_JL: Tensor
    weight_JL: Tensor


def draw_masks(
    valid_BT: Tensor,
    prompt_len_B: Sequence[int],
    seed_B: Sequence[int],
    cfg: LikelihoodConfig,
    *,
    block_BT: Tensor | None = None,
    step_BT: Tensor | None = None,
    always_hidden_BT: Tensor | None = None,
) -> Masks:
    """Masks of every row: `valid_BT` (bool) are the tokens that may be masked and scored.

    `block_BT`, for `block_noise` and `trace`, is the number of each token's block (None: they are
    one). `always_hidden_BT` are masked in every pass and not scored. `step_BT` is the sampler's
    step of each token, which `trace` needs; one with -1 came from elsewhere, is masked and not
    scored. A row without a valid token has no pass with a weight.
    Raises AlgoError for an estimator that lacks something or cannot take that number of passes.
    """
    rows = []
    generators = [torch.Generator().manual_seed(seed) for seed in seed_B]
    if block_BT is None:
        block_BT = torch.zeros(valid_BT.shape, dtype=torch.int64)
    for b, generator in enumerate(generators):
        step_L = None if step_BT is None else step_BT[b, valid_BT[b]]
        rows.append(_row(block_BT[b, valid_BT[b]], step_L, generator, cfg))
    passes = max((len(row.weight_JL) for row in rows), default=0)
    hidden_BJT = torch.zeros(len(rows), passes, valid_BT.shape[1], dtype=torch.bool)
    weight_BJT = torch.zeros(hidden_BJT.shape)
    for b, row in enumerate(rows):
        hidden_BJT[b, : len(row.hidden_JL), valid_BT[b]] = row.hidden_JL
        weight_BJT[b, : len(row.weight_JL), valid_BT[b]] = row.weight_JL
    if always_hidden_BT is not None:
        hidden_BJT |= always_hidden_BT[:, None]
    prompt_BJP = _hidden_prompts(prompt_len_B, passes, generators, cfg.prompt_mask_prob or 0.0)
    return Masks(hidden_BJT, weight_BJT, prompt_BJP)


def _row(
    block_L: Tensor, step_L: Tensor | None, generator: torch.Generator, cfg: LikelihoodConfig
) -> RowMasks:
    length = len(block_L)
    if cfg.estimator == "trace":
        if step_L is None:
            raise AlgoError(
                "algo.likelihood.estimator=trace needs the step that decided each token, which "
                "samples of rollout.engine=masked_diffusion have and those of the data have not"
            )
        return _trace(step_L, block_L, cfg.shrink)
    draw = ESTIMATORS.get(cfg.estimator or "")
    by_block = cfg.estimator == "block_noise"
    if not (draw or by_block) or cfg.num_mc_samples is None:
        raise AlgoError(
            f"algo.likelihood.estimator={cfg.estimator!r}, num_mc_samples={cfg.num_mc_samples}: "
            "pass the config through rlalign.algos.resolve first"
        )
    if cfg.estimator in PAIRED and cfg.num_mc_samples % 2:
        raise AlgoError(
            f"algo.likelihood.num_mc_samples={cfg.num_mc_samples} with estimator={cfg.estimator}, "
            "whose masks come in pairs: use an even number"
        )
    if not length:
        return RowMasks(torch.zeros(0, 0, dtype=torch.bool), torch.zeros(0, 0))
    if draw is None:
        noise = cfg.prompt_mask_prob or 0.0
        return _block_noise(block_L, cfg.num_mc_samples, generator, noise)
    return draw(length, cfg.num_mc_samples, generator, cfg)


def _bernoulli(length: int, n: int, g: torch.Generator, cfg: LikelihoodConfig) -> RowMasks:
    time_J1 = cfg.min_time + (1 - cfg.min_time) * torch.rand(n, 1, generator=g)
    hidden_JL = torch.rand(n, length, generator=g) < time_J1
    return RowMasks(hidden_JL, hidden_JL / (n * time_J1))


def _count(length: int, n: int, g: torch.Generator, cfg: LikelihoodConfig) -> RowMasks:
    return _of_counts(torch.randint(1, length + 1, (n,), generator=g), length, g)


def _count_strat(length: int, n: int, g: torch.Generator, cfg: LikelihoodConfig) -> RowMasks:
    # Whole numbers only: rounded to the nearest, a spacing of one half would favour even counts.
    first = int(torch.randint(0, length, (1,), generator=g))
    count_J = (first + torch.arange(n) * length // n) % length + 1
    return _of_counts(count_J, length, g)


def _count_anti(length: int, n: int, g: torch.Generator, cfg: LikelihoodConfig) -> RowMasks:
    count_H1 = torch.randint(1, length + 1, (n // 2, 1), generator=g)
    rank_HL = _ranks(n // 2, length, g)
    hidden_JL = torch.cat([rank_HL < count_H1, rank_HL >= count_H1 - 1])
    count_J1 = torch.cat([count_H1, length + 1 - count_H1])
    return RowMasks(hidden_JL, hidden_JL * (length / (n * count_J1)))


def _coupled(length: int, n: int, g: torch.Generator, cfg: LikelihoodConfig) -> RowMasks:
    count_H1 = torch.randint(0, length + 1, (n // 2, 1), generator=g)
    first_HL = _ranks(n // 2, length, g) < count_H1
    hidden_JL = torch.cat([first_HL, ~first_HL])
    count_J1 = torch.cat([count_H1, length - count_H1]).clamp(min=1)
    return RowMasks(hidden_JL, hidden_JL * ((length + 1) / (n * count_J1)))


def _all_masked(length: int, n: int, g: torch.Generator, cfg: LikelihoodConfig) -> RowMasks:
    return RowMasks(torch.ones(1, length, dtype=torch.bool), torch.ones(1, length))


def _complement(length: int, n: int, g: torch.Generator, cfg: LikelihoodConfig) -> RowMasks:
    low, high = COMPLEMENT_TIMES
    time_H1 = low + (high - low) * torch.rand(n // 2, 1, generator=g)
    first_HL = torch.rand(n // 2, length, generator=g) < time_H1
    hidden_JL = torch.cat([torch.ones(1, length, dtype=torch.bool), first_HL, ~first_HL])
    factor_J1 = torch.cat([torch.ones(1, 1), 1 / (n // 2 * time_H1), 1 / (n // 2 * (1 - time_H1))])
    return RowMasks(hidden_JL, hidden_JL * (0.5 * factor_J1))


def _block_noise(block_L: Tensor, n: int, g: torch.Generator, noise: float) -> RowMasks:
    """One block is partly masked, later ones wholly, a share `noise` of the tokens before it, too;
    as few passes as possible choose the same block."""
    label_K = block_L.unique()
    order_K = label_K[torch.randperm(len(label_K), generator=g)]
    chosen_J1 = order_K[torch.arange(n) % len(order_K)][:, None]
    inside_JL = block_L == chosen_J1
    size_J1 = inside_JL.sum(1, keepdim=True)
    u_J1 = torch.rand(n, 1, dtype=torch.float64, generator=g)
    count_J1 = (u_J1 * size_J1).long() + 1  # uniform on 1..size
    place_JL = torch.rand(n, len(block_L), dtype=torch.float64, generator=g)
    rank_JL = place_JL.masked_fill(~inside_JL, 2.0).argsort(1).argsort(1)  # the block's come first
    noisy_JL = (block_L < chosen_J1) & (torch.rand(n, len(block_L), generator=g) < noise)
    hidden_JL = (rank_JL < count_J1) | (block_L > chosen_J1) | noisy_JL
    return RowMasks(hidden_JL, hidden_JL / (n * hidden_JL.sum(1, keepdim=True)))


def _trace(step_L: Tensor, block_L: Tensor, shrink: int) -> RowMasks:
    """A pass for each step of the sampler, `shrink` steps of a block taken as one: it sees what was
    decided before."""
    merged_L = step_L.masked_fill(step_L < 0, NEVER)
    decided_L = step_L >= 0
    for block in block_L.unique():
        inside_L = decided_L & (block_L == block)
        if bool(inside_L.any()):
            since_L = step_L[inside_L] - step_L[inside_L].min()
            merged_L[inside_L] -= since_L % shrink
    step_J1 = merged_L[decided_L].unique()[:, None]
    return RowMasks(merged_L >= step_J1, (merged_L == step_J1).float())


def _of_counts(count_J: Tensor, length: int, g: torch.Generator) -> RowMasks:
    hidden_JL = _ranks(len(count_J), length, g) < count_J[:, None]
    return RowMasks(hidden_JL, hidden_JL * (length / (len(count_J) * count_J[:, None])))


def _ranks(num: int, length: int, g: torch.Generator) -> Tensor:
    """`num` random orders: the place of each token in it."""
    return torch.rand(num, length, dtype=torch.float64, generator=g).argsort(1).argsort(1)


def _hidden_prompts(
    prompt_len_B: Sequence[int], passes: int, generators: Sequence[torch.Generator], prob: float
) -> Tensor | None:
    if not prob:
        return None
    hidden_BJP = torch.zeros(
        len(prompt_len_B), passes, max(prompt_len_B, default=0), dtype=torch.bool
    )
    for b, (length, generator) in enumerate(zip(prompt_len_B, generators, strict=True)):
        hidden_BJP[b, :, :length] = torch.rand(passes, length, generator=generator) < prob
    return hidden_BJP


Draw = Callable[[int, int, torch.Generator, "LikelihoodConfig"], RowMasks]
ESTIMATORS: Mapping[str, Draw] = {
    "bernoulli": _bernoulli,
    "count": _count,
    "count_strat": _count_strat,
    "count_anti": _count_anti,
    "coupled": _coupled,
    "all_masked": _all_masked,
    "complement": _complement,
}
PAIRED = ("count_anti", "coupled", "complement")
