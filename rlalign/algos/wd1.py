"""wd1: weighted log-likelihood, without a ratio and without another policy's log-probs.

    A_i = R_i - mean_g R,   w+ = softmax_g(A),   w- = softmax_g(-A)
    loss = 1/G sum_g sum_{i in g} -(w+_i - w-_i) sum_t logp_t

with logp as in diffu_grpo.py. Completions above the group's mean are pulled up and those below it
pushed down, at any distance from the policy that sampled: nothing holds a step back but the
learning rate. Here n (w+ - w-) is the advantage in a group of n; one of equal rewards has 0.
Tang et al. 2025, arXiv 2507.08838, where a device's batch is one group.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlalign.algos.base import Algorithm
from rlalign.algos.segments import compact, group_stats, segment_sum

if TYPE_CHECKING:
    from rlalign.config.schema import AlgoConfig


def credit(
    reward_B: Tensor,
    acc_B: Tensor,
    group_id_B: Tensor,
    mask_BT: Tensor,
    cfg: AlgoConfig,
    *,
    kl_BT: Tensor | None = None,
) -> Tensor:
    """n (w+ - w-) on every token inside the mask: [B, T]; 0 for rewards that are not finite, which
    enter no group."""
    valid_B = reward_B.isfinite()
    reward64_B = torch.where(valid_B, reward_B.detach().double(), 0.0)
    stats = group_stats(reward64_B, group_id_B, valid_B, cfg.reward_tie_tol)
    centred_B = torch.where(valid_B, reward64_B - stats.mean_B, -torch.inf)
    up_B = _softmax(centred_B, group_id_B)
    down_B = _softmax(torch.where(valid_B, -centred_B, -torch.inf), group_id_B)
    advantage_B = torch.where(stats.tied_B, 0.0, stats.count_B * (up_B - down_B))
    dtype = torch.promote_types(reward_B.dtype, torch.float32)
    return torch.where(mask_BT.bool(), advantage_B[:, None], 0.0).to(dtype)


def _softmax(value_B: Tensor, group_id_B: Tensor) -> Tensor:
    """Within each group; 0 for -inf."""
    index_B, num_groups = compact(group_id_B)
    lowest = torch.finfo(value_B.dtype).min
    largest_G = value_B.new_full((num_groups,), lowest)
    largest_G = largest_G.scatter_reduce(0, index_B, value_B.clamp(min=lowest), "amax")
    raised_B = (value_B - largest_G[index_B]).exp()
    return raised_B / segment_sum(raised_B, index_B, num_groups)[index_B].clamp(min=1)


ALGORITHM = Algorithm(
    name="wd1",
    summary="Diffusion language models: weighted likelihood, no ratio, no reference.",
    source="Tang et al. 2025, arXiv 2507.08838",
    defaults={
        "adv_estimator": "grpo",  # its centred rewards; the credit is wd1's own
        "scale_rewards": "none",
        "importance_sampling_level": "token",
        "policy_loss": "reinforce",
        "loss_agg_mode": "seq-mean-token-sum",
        "beta": 0.0,
    },
    paper_settings={
        "num_generations": 6,
        "num_iterations": 12,
        "model.lora.rank": 128,
        "trainer.optim.learning_rate": 3e-6,
        "rollout.diffusion.eos_policy": "masked",
        "rollout.temperature": 0.9,
    },
    fixed=("adv_estimator", "scale_rewards"),
    likelihood={
        "estimator": "all_masked",
        "num_mc_samples": 1,
        "prompt_mask_prob": 0.15,
        "fresh_masks": True,
    },
    credit=credit,
)
