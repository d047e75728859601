"""What is learned: pure functions of small tensors, one algorithm a file.

An algorithm is a choice of credit (which advantage for which token) and loss (which scalar), most
often a preset over the shared pieces. docs/algorithms.md is the overview.
"""

from rlalign.algos.acceptance import accepted
from rlalign.algos.aggregate import aggregation_weights, attach_weights, depends_on_split
from rlalign.algos.allocate import allocate
from rlalign.algos.allocator import (
    Allocator,
    Shares,
    make_allocator,
    needs_mean_gradients,
    pilot_weight,
)
from rlalign.algos.base import Algorithm
from rlalign.algos.branch_grpo import TreeCredit, explained_variance, tree_credit
from rlalign.algos.elbo import (
    combine,
    estimate_metrics,
    num_passes,
    pass_estimates,
    policy_weight,
    ratio_divisor,
    row_advantage,
)
from rlalign.algos.errors import AlgoError, AlgoWarning
from rlalign.algos.kl import estimate_kl, reward_kl
from rlalign.algos.loss import LossOutput
from rlalign.algos.masking import draw_masks
from rlalign.algos.metrics import finalize_metrics, merge_metrics
from rlalign.algos.mismatch import rollout_weights
from rlalign.algos.pilot import PilotStats
from rlalign.algos.registry import (
    compute_advantages,
    couples_rows,
    estimate_loss,
    expansion,
    get,
    has_kl,
    has_sequence_ratio,
    likelihood_preset,
    names,
    needs_old_estimates,
    needs_old_logp,
    needs_reference,
    needs_rollout_weights,
    pass_loss,
    policy_loss,
    resolve,
    silent_without_advantage,
    slopes_need_values,
)
from rlalign.algos.sampling import DynamicSampler, SamplingExhausted, Selection, has_signal
from rlalign.algos.shaping import (
    gradient_mask,
    normalize_then_sum,
    overlong_penalty,
    reward_metrics,
)
from rlalign.algos.tree_pruning import edge_weights

__all__ = [
    "AlgoError",
    "AlgoWarning",
    "Algorithm",
    "Allocator",
    "DynamicSampler",
    "LossOutput",
    "PilotStats",
    "SamplingExhausted",
    "Selection",
    "Shares",
    "TreeCredit",
    "accepted",
    "aggregation_weights",
    "allocate",
    "attach_weights",
    "combine",
    "compute_advantages",
    "couples_rows",
    "depends_on_split",
    "draw_masks",
    "edge_weights",
    "estimate_kl",
    "estimate_loss",
    "estimate_metrics",
    "expansion",
    "explained_variance",
    "finalize_metrics",
    "get",
    "gradient_mask",
    "has_kl",
    "has_sequence_ratio",
    "has_signal",
    "likelihood_preset",
    "make_allocator",
    "merge_metrics",
    "names",
    "needs_mean_gradients",
    "needs_old_estimates",
    "needs_old_logp",
    "needs_reference",
    "needs_rollout_weights",
    "normalize_then_sum",
    "num_passes",
    "overlong_penalty",
    "pass_estimates",
    "pass_loss",
    "pilot_weight",
    "policy_loss",
    "policy_weight",
    "ratio_divisor",
    "resolve",
    "reward_kl",
    "reward_metrics",
    "rollout_weights",
    "row_advantage",
    "silent_without_advantage",
    "slopes_need_values",
    "tree_credit",
]
