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
class MajorityConfig(BestOfConfig):
    """Self-consistency: independent samples, of which those with the commonest answer win."""

    extract: str = option(
        "auto",
        "Where the answer of a sample stands: tag, boxed, json:KEY, number, line, pattern:REGEX "
        "(group 1), or auto, the first of them that finds one.",
    )
    weight: str = option(
        "reward",
        "What a vote counts where there is a reward: the reward, at least 0 (reward), or exp of it "
        "(exp). Without a reward it counts 1.",
        choices=("reward", "exp"),
    )
