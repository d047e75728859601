"""Options of the test-time methods on language models (rlalign/testtime)."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.fields import option


@dataclass
class SearchConfig:
    """What every method has: length, seed and budgets."""

    max_new_tokens: int = option(
        1024, "Longest answer in tokens; what the model's context leaves, if that is less.", ge=1
    )
    seed: int = option(0, "Keys everything that is drawn.", ge=0, le=2**31 - 1)
    max_tokens: int = option(
        0,
        "Budget of generated tokens for one prompt, a self-reward's included; the best so far is "
        "returned when it is used up. 0: none.",
        ge=0,
    )
    max_wall_s: float = option(
        0.0, "Budget of seconds for one prompt, looked at between rounds. 0: none.", ge=0.0
    )


@dataclass
class BestOfConfig(SearchConfig):
    """Best-of-N: independent samples, of which the reward chooses one."""

    num_samples: int = option(8, "N.", ge=1)
    temperature: float = option(1.0, "Of the samples; 0 makes them all the same.", ge=0.0)
    top_p: float = option(1.0, "Mass of the likeliest tokens that are kept.", gt=0.0, le=1.0)
    top_k: int = option(0, "Number of the likeliest tokens that are kept; 0: all.", ge=0)


@dataclass
class FusionConfig(SearchConfig):
    """Dynamic logit fusion. `alpha_min` = `alpha_max` fixes the strength: 1 is proxy-tuning, 0 the
    large model alone."""

    alpha_min: float = option(0.0, "Least strength of an expert that is tried.", ge=0.0)
    alpha_max: float = option(2.0, "Greatest one.", ge=0.0)
    alpha_step: float = option(0.1, "Distance of those between.", gt=0.0)
    alpha_refine: bool = option(False, "Try ten times as many strengths between the same ends.")
    joint: bool = option(False, "Two experts act at once, each with a strength of its own.")
    delta_bound: float = option(
        30.0,
        "Log-ratio of a token that one of expert and small base rules out and the other does not.",
        gt=0.0,
    )
    temperature: float = option(0.0, "Of the fused distribution; 0: its likeliest token.", ge=0.0)
    top_p: float = option(1.0, "Mass of the likeliest tokens that are kept.", gt=0.0, le=1.0)
    speculate: int = option(
        0, "Tokens that the first expert writes ahead, for the others to check at once.", ge=0
    )
