"""What the pilot samples of a shard say, which GVM and CurES share samples out by.

Legend: m prompts of the shard, B samples; float64.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class PilotStats:
    """What the pilot says of each prompt, [m] each; figures of a class without samples are 0.

    `*_norm` is the mean norm of the samples' gradients, `*_square` the mean of its square,
    `right_mean_square` the square of the norm of the right samples' mean gradient, without the bias
    of taking it over few of them (it may be negative).
    """

    num_samples_m: Tensor
    right_m: Tensor
    right_norm_m: Tensor
    right_square_m: Tensor
    right_mean_square_m: Tensor
    wrong_norm_m: Tensor
    wrong_square_m: Tensor

    @property
    def rate_m(self) -> Tensor:
        return self.right_m.double() / self.num_samples_m.clamp(min=1)

    def shrunk(self, prior: float) -> PilotStats:
        """As if each prompt had had `prior` more samples of the shard's mean accept rate, and as
        many more accepted ones of the mean norms."""
        if not prior:
            return self
        k_m, prior_k = self.right_m, prior * float(self.rate_m.mean())

        def mixed(value_m: Tensor) -> Tensor:
            mean = (k_m * value_m).sum() / k_m.sum().clamp(min=1)
            return (k_m * value_m + prior_k * mean) / (k_m + prior_k).clamp(min=1e-12)

        return dataclasses.replace(
            self,
            num_samples_m=self.num_samples_m + prior,
            right_m=k_m + prior_k,
            right_norm_m=mixed(self.right_norm_m),
            right_square_m=mixed(self.right_square_m),
            right_mean_square_m=mixed(self.right_mean_square_m),
        )

    @staticmethod
    def of_norms(
        norm_B: Tensor, right_B: Tensor, prompt_B: Tensor, num_prompts: int, mean_square_m: Tensor
    ) -> PilotStats:
        """From the norm of each sample's gradient. right_B: bool. prompt_B: int64, 0 .. m-1.
        mean_square_m: squared norm of the mean gradient over the right samples. A norm that is not
        finite counts as 0."""
        norm_B = torch.where(norm_B.isfinite(), norm_B.double(), 0.0)

        def total(value_B: Tensor, of_B: Tensor) -> Tensor:
            zero_m = torch.zeros(num_prompts, dtype=torch.float64)
            return zero_m.index_add(0, prompt_B[of_B], value_B[of_B].double())

        ones_B, wrong_B = torch.ones_like(norm_B), ~right_B
        count_m = total(ones_B, torch.ones_like(right_B))
        k_m = total(ones_B, right_B)
        right_square_m = total(norm_B**2, right_B) / k_m.clamp(min=1)
        # E |mean of k|^2 = |E g|^2 + (E|g|^2 - |E g|^2) / k
        pairs_m = (k_m * (k_m - 1)).clamp(min=1)
        unbiased_m = (k_m**2 * mean_square_m.double() - k_m * right_square_m) / pairs_m
        return PilotStats(
            count_m,
            k_m,
            total(norm_B, right_B) / k_m.clamp(min=1),
            right_square_m,
            torch.where(k_m > 1, unbiased_m, 0.0),
            total(norm_B, wrong_B) / (count_m - k_m).clamp(min=1),
            total(norm_B**2, wrong_B) / (count_m - k_m).clamp(min=1),
        )
