"""CoPG's own settings (rlalign/algos/copg.py)."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.fields import option


@dataclass
class CopgConfig:
    """How scored completions of a prompt are compared (loss_type=copg)."""

    loss_type: str = option(
        "square",
        "The square of differences, or a surrogate with its gradient, which also takes beta=0.",
        choices=("square", "surrogate"),
    )
    scale: str = option(
        "rloo",
        "Of a prompt's loss: half the mean over its pairs, their sum, or k s^2 (Command A).",
        choices=("rloo", "pair", "command_a"),
    )
    length_normalization: str = option(
        "none",
        "What divides the log-ratio: 1, the completion's tokens, or max_completion_length.",
        choices=("none", "mean", "const"),
    )
    skip_tied_groups: bool = option(
        False, "Prompts whose scores are all equal teach nothing, not even the KL."
    )
    compare_sources: bool = option(
        False, "Only completions of different sources are compared (data against samples)."
    )
    microbatch_mode: str = option(
        "group_in_microbatch",
        "Whole prompts in a micro-batch; or two_pass: one more forward pass, any split.",
        choices=("group_in_microbatch", "two_pass"),
    )
