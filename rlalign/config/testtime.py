# ruff: noqa: RUF009  (option() and section() return dataclass fields)
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
class RainConfig(SearchConfig):
    """RAIN: a tree of short token sets, grown from what is committed and judged by the model
    itself or by a reward."""

    compat: str = option(
        "fixed",
        "Rules where paper and published code differ: the paper's or corrected ones, or those of "
        "the code.",
        choices=("fixed", "official"),
    )
    max_searches: int = option(
        50, "T: visits of the root, inherited ones included, that end a set; 0: greedy.", ge=0
    )
    min_fresh: int = option(
        15,
        "Searches that a set may always take; 0 commits at once where inherited visits pass.",
        ge=0,
    )
    min_visits: int = option(6, "T_m: a set is accepted with more visits than these.", ge=0)
    value_threshold: float = option(
        0.8, "V: a set is accepted with a mean value above it.", ge=-1.0, le=1.0
    )
    c_puct: float = option(2.0, "c: weight of exploration.", ge=0.0)
    gamma_sim: float = option(0.2, "γ: weight of a score lent to a similar sibling.", ge=0.0)
    sim_threshold: float = option(0.95, "θ: cosine from which siblings are similar.", le=1.0)
    num_candidates: int = option(10, "q: children of a node at first, at most.", ge=1, le=20)
    num_attempts: int = option(
        0, "Sequences sampled for the children of a node; 0: one less than q.", ge=0
    )
    set_lengths: list[int] = option(
        [1, 2, 4, 10], "Tokens of a set by its depth; the last for all that is deeper."
    )
    candidate_top_k: int = option(15, "Tokens that a candidate is drawn from.", ge=1, le=20)
    candidate_temperature: float = option(1.0, "τ_c of the candidates.", gt=0.0)
    root_mix: float = option(
        0.25, "Uniform share of the priors of the root's children.", ge=0.0, le=1.0
    )
    max_children: int = option(
        20, "Children of a node with those added later; 0: none are.", ge=0, le=20
    )
    variance_factor: float = option(
        0.03, "Variance of the children's embeddings, per token, below which one is added.", ge=0.0
    )
    value_limit: float = option(
        0.0, "A child is added only where all are worth less.", ge=-1.0, le=1.0
    )
    boundary: str = option(
        ",.?:;\n", "Characters that end the continuation that is scored; empty: the end does."
    )
    rollout_temperature: float = option(1.0, "Of that continuation.", ge=0.0)
    turn_marker: str = option(
        "", "Text that opens another user's turn and so ends the answer; empty: none."
    )
    embedder: str = option(
        "ngrams", "Embeddings: `ngrams`, `none`, or the folder or name of a sentence encoder."
    )
    score_range: list[float] = option(
        [-1.0, 1.0], "Scores that mean the values -1 and 1; what is outside is clipped."
    )
    max_total_searches: int = option(0, "Budget of searches for one prompt; 0: none.", ge=0)
    on_fail: str = option(
        "commit",
        "Where no child is accepted: take the most visited, end with no answer, or begin anew "
        "with other draws (twice at most).",
        choices=("commit", "refuse", "restart"),
    )
    leaf_parallel: int = option(
        1, "Leaves of a tree looked at together; above 1 the tree differs.", ge=1
    )
    trace_nodes: int = option(2000, "Nodes of the tree kept for the report; 0: none.", ge=0)
