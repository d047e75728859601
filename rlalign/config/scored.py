"""How completions that the data brings along are read (docs/data.md)."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.fields import option


@dataclass
class ScoredConfig:
    """Completions and scores of the data."""

    truncated: str = option(
        "mask",
        "Completions that were cut off, or are longer than rollout.max_completion_length: they "
        "leave their group (mask), or train where they fit (keep).",
        choices=("mask", "keep"),
    )
    dedup: bool = option(
        True, "Equal completions of a prompt become one, with the mean of their scores."
    )
    score_transform: str = option(  # one that is refused has its own reason: trainer/checks.py
        "none",
        "none; standardize: by mean and standard deviation of the whole data set; clip: to "
        "score_min .. score_max.",
    )
    score_min: float | None = option(None, "Lower bound of score_transform=clip.")
    score_max: float | None = option(None, "Upper bound of score_transform=clip.")
    rescore: bool = option(
        True,
        "completions=mixed: reward functions score the data's completions too, so that all "
        "rewards are one function; false: those keep the scores of the data.",
    )
    check_ref_logps: bool = option(
        True, "Compare ref_logps of the data with the reference's own on some of its completions."
    )
