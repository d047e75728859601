"""The policy ratio at the level an algorithm asks for.

With d_it = logp_it - logp_old_it on the tokens inside the mask m:

    token           rho_it = exp(d_it)                                              [B, T]
    sequence        s_i = exp(sum_t m d / sum_t m)          GSPO, arXiv 2507.18071  [B, 1]
    sequence_token  log s_it = sg[log s_i] + logp_it - sg[logp_it]   GSPO-token     [B, T]
    sequence_sum    exp(sum_t m d)                                                  [B, 1]

sg is stop-gradient. `sequence_sum` is how TRL's RLOO trainer defines its ratio; it is not
normalised by length, so off-policy it leaves any clip range almost at once.
"""

from __future__ import annotations

from torch import Tensor

from rlalign.algos.errors import AlgoError
from rlalign.algos.kl import MAX_LOG_RATIO

PER_SEQUENCE = ("sequence", "sequence_sum")  # levels whose ratio is [B, 1]


def policy_ratio(logp_BT: Tensor, logp_old_BT: Tensor, inside_BT: Tensor, level: str) -> Tensor:
    """The ratio with its gradient: [B, T], or [B, 1] for the levels in PER_SEQUENCE.

    Both log-probs must be finite (zero, say) outside `inside_BT` (bool): mask first, exponentiate
    after. The log-ratio is clamped to [-20, 20] before exp. Raises AlgoError for an unknown level.
    """
    difference_BT = (logp_BT - logp_old_BT.detach()) * inside_BT
    if level == "token":
        return difference_BT.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    total_B1 = difference_BT.sum(1, keepdim=True)
    if level == "sequence_sum":
        return total_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    mean_B1 = total_B1 / inside_BT.sum(1, keepdim=True).clamp(min=1)
    mean_B1 = mean_B1.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if level == "sequence":
        return mean_B1.exp()
    if level == "sequence_token":
        return (mean_B1.detach() + logp_BT - logp_BT.detach()).exp()
    raise AlgoError(
        f"algo.importance_sampling_level={level!r} is none of token, sequence, sequence_token, "
        "sequence_sum; pass the config through rlalign.algos.resolve first"
    )
