"""The rows of a CoPG batch, checked: which belong together, which are compared, how far each moved.

A row is compared with the rows of its group that come from another source. Without sources every
row is a source of its own, so all pairs of a group are compared; with two (say demonstrations and
samples) only the pairs across. Whole groups are needed, in any order and of any size.

Legend: N rows, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from rlalign.algos.errors import AlgoError
from rlalign.algos.segments import compact, group_stats, segment_sum

if TYPE_CHECKING:
    from typing import Unpack


class RowOptions(TypedDict, total=False):
    """What CoPG's functions take about the rows; either `group_id_N` or `num_generations`."""

    group_id_N: Tensor | None  # int, any labels; ragged and interleaved is normal
    num_generations: int | None  # consecutive rows that form a group
    valid_N: Tensor | None  # bool; False leaves a row (say a truncated one) out of its group
    source_id_N: Tensor | None  # int; rows of equal source are not compared
    length_normalization: str  # what divides rho: none (1), mean (length_N) or const
    length_N: Tensor | None  # tokens that were summed over, for mean
    max_completion_length: int | None  # tokens, for const
    tie_tol: float  # relative spread below which scores count as equal


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows as the formulas see them, at least float32; values are 0 where a row is not valid.

    `index_N` group 0 .. G-1, labelled `label_G`; `size_G` its valid rows; `source_N` group and
    source in one number, below `num_sources`; `peers_N` how many rows one is compared with, and
    `peers_G` their sum, twice the number of pairs; `tied_G` scores all equal; `logratio_N` in nats,
    `rho_N` and `logp_N` after length normalisation.
    """

    label_G: Tensor
    index_N: Tensor
    size_G: Tensor
    source_N: Tensor
    num_sources: int
    valid_N: Tensor
    peers_N: Tensor
    peers_G: Tensor
    tied_G: Tensor
    score_N: Tensor
    logp_N: Tensor
    logratio_N: Tensor
    rho_N: Tensor

    @property
    def num_groups(self) -> int:
        return self.label_G.numel()

    def sum_G(self, value_N: Tensor) -> Tensor:
        return segment_sum(value_N, self.index_N, self.num_groups)

    def source_sum(self, value_N: Tensor) -> Tensor:
        """Sum over the rows of the same group and source, for each row: [N]."""
        return segment_sum(value_N, self.source_N, self.num_sources)[self.source_N]

    def centred(self, value_N: Tensor) -> Tensor:
        """Each valid row minus the mean of its group: [N]."""
        mean_G = self.sum_G(value_N) / self.size_G.clamp(min=1)
        return torch.where(self.valid_N, value_N - mean_G[self.index_N], torch.zeros_like(value_N))

    def group_weights(self, weight_N: Tensor | None) -> Tensor:
        """The weight of each group: [G]."""
        weight_G = torch.ones_like(self.size_G)
        if weight_N is None:
            return weight_G
        _same_shape(self.logp_N, group_weight_N=weight_N)
        weight_N = weight_N.to(weight_G.dtype)
        weight_G[self.index_N] = weight_N
        wrong_N = (weight_G[self.index_N] != weight_N) | ~(weight_N >= 0) | ~weight_N.isfinite()
        if bool(wrong_N.any()):
            group = self.label_G[self.index_N[wrong_N][0]]
            raise AlgoError(
                f"group_weight_N of group {int(group)} differs between its rows, is negative or "
                "not finite; give every row of a group the same weight >= 0"
            )
        return weight_G

    def require_pairs(self) -> None:
        """Raise AlgoError if no group has two rows to compare."""
        if bool((self.peers_G > 0).any()) or not self.num_groups:
            return
        size = int(self.size_G[0])
        mixed = "" if size < 2 else ", all of one source; give rows of other sources, or no sources"
        raise AlgoError(
            "CoPG needs at least 2 scored completions per prompt; group "
            f"{int(self.label_G[0])} has {size}{mixed}, and no other group has a pair"
        )


def prepare(
    logp_N: Tensor, ref_logp_N: Tensor | None, score_N: Tensor, **options: Unpack[RowOptions]
) -> Rows:
    """Check and group the rows. Raises AlgoError for what the module's functions cannot use."""
    reference_N = torch.zeros_like(logp_N) if ref_logp_N is None else ref_logp_N.detach()
    valid_N = options.get("valid_N")
    valid_N = torch.ones_like(logp_N, dtype=torch.bool) if valid_N is None else valid_N.bool()
    _same_shape(logp_N, ref_logp_N=reference_N, score_N=score_N, valid_N=valid_N)
    group_id_N = _group_ids(logp_N, options)
    label_G, index_N = torch.unique(group_id_N, return_inverse=True)
    _require_finite(reference_N, score_N, valid_N, group_id_N)

    def usable(value_N: Tensor) -> Tensor:
        value_N = value_N.to(torch.promote_types(logp_N.dtype, torch.float32))
        return torch.where(valid_N, value_N, torch.zeros_like(value_N))

    score_N, policy_N, reference_N = usable(score_N.detach()), usable(logp_N), usable(reference_N)
    present_N = valid_N.to(policy_N.dtype)
    size_G = segment_sum(present_N, index_N, label_G.numel())
    source_N, num_sources = _sources(index_N, options.get("source_id_N"))
    source_size_N = segment_sum(present_N, source_N, num_sources)[source_N]
    peers_N = present_N * (size_G[index_N] - source_size_N)
    stats = group_stats(score_N, index_N, valid_N, options.get("tie_tol", 1e-8))
    tied_G = torch.zeros_like(size_G, dtype=torch.bool)
    tied_G[index_N] = stats.tied_B
    divisor = length_divisor(
        policy_N,
        options.get("length_normalization", "none"),
        options.get("length_N"),
        options.get("max_completion_length"),
    )
    return Rows(
        label_G=label_G,
        index_N=index_N,
        size_G=size_G,
        source_N=source_N,
        num_sources=num_sources,
        valid_N=valid_N,
        peers_N=peers_N,
        peers_G=segment_sum(peers_N, index_N, label_G.numel()),
        tied_G=tied_G,
        score_N=score_N,
        logp_N=policy_N / divisor,
        logratio_N=policy_N - reference_N,
        rho_N=(policy_N - reference_N) / divisor,
    )


def length_divisor(
    value_N: Tensor,
    length_normalization: str,
    length_N: Tensor | None,
    max_completion_length: int | None,
) -> Tensor | float:
    """What a log-ratio is divided by: 1, its length in tokens, or the limit on that length.

    mean changes the optimum to pi_ref exp(|y| (R / beta + c)); const is beta / const.
    """
    if length_normalization == "none":
        return 1.0
    if length_normalization == "const":
        if not max_completion_length or max_completion_length < 0:
            raise AlgoError(
                "algo.copg.length_normalization=const divides by max_completion_length="
                f"{max_completion_length}; give the limit in tokens"
            )
        return float(max_completion_length)
    if length_normalization != "mean":
        raise AlgoError(
            f"algo.copg.length_normalization={length_normalization!r} is none of none, mean, const"
        )
    if length_N is None:
        raise AlgoError(
            "algo.copg.length_normalization=mean divides sums of log-probs by length_N, which is "
            "missing; give the number of tokens that were summed, the same for both models"
        )
    _same_shape(value_N, length_N=length_N)
    return length_N.to(value_N.dtype).clamp(min=1)


def _sources(index_N: Tensor, source_id_N: Tensor | None) -> tuple[Tensor, int]:
    if source_id_N is None:
        return torch.arange(len(index_N), device=index_N.device), len(index_N)
    _same_shape(index_N, source_id_N=source_id_N)
    source_N, num_sources = compact(source_id_N)
    return compact(index_N * num_sources + source_N)


def _group_ids(logp_N: Tensor, options: RowOptions) -> Tensor:
    group_id_N, size = options.get("group_id_N"), options.get("num_generations")
    if (group_id_N is None) == (size is None):
        raise AlgoError("give either group_id_N or num_generations, which say what is compared")
    if group_id_N is not None:
        _same_shape(logp_N, group_id_N=group_id_N)
        return group_id_N
    assert size is not None
    if size < 1 or len(logp_N) % size:
        raise AlgoError(
            f"algo.num_generations={size} does not divide the number of rows {len(logp_N)}; pass "
            "group_id_N for ragged groups"
        )
    return torch.arange(len(logp_N), device=logp_N.device) // size


def _same_shape(expected_N: Tensor, **tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.shape != expected_N.shape or tensor.dim() != 1:
            raise AlgoError(
                f"{name} has shape {tuple(tensor.shape)}, the log-probs {tuple(expected_N.shape)}; "
                "all are [N], one value for each completion"
            )


def _require_finite(
    reference_N: Tensor, score_N: Tensor, valid_N: Tensor, group_id_N: Tensor
) -> None:
    bad_N = valid_N & ~score_N.isfinite()
    if bool(bad_N.any()):
        group = group_id_N[bad_N][0]
        raise AlgoError(
            f"scores must be finite; found {int((bad_N & (group_id_N == group)).sum())} non-finite "
            f"in group {int(group)}; score them, or leave those completions out with valid_N"
        )
    bad_N = valid_N & ~reference_N.isfinite()
    if bool(bad_N.any()):
        row = int(bad_N.nonzero()[0])
        group = group_id_N[row]
        raise AlgoError(
            f"pi_ref assigns {float(reference_N[row])} to completion "
            f"{int((group_id_N[:row] == group).sum())} of group {int(group)} (row {row}); support "
            "assumption violated (wrong tokenizer or banned tokens)"
        )
