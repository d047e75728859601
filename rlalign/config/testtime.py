# ruff: noqa: RUF009  (option() and section() return dataclass fields)
"""Options of the test-time methods on language models (rlalign/testtime)."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.fields import option, section


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
class VerifierConfig:
    """LatentSeek's self-reward: four roles of the model judge an answer."""

    judge: str = option(
        "text",
        "How a role gives its verdict: at the end of a text of its own; logprob: at once, by the "
        "likelier of the words True and False; both: by text, and how often the other agrees is "
        "counted.",
        choices=("text", "logprob", "both"),
    )
    cascade: bool = option(
        False,
        "Ask the heavier roles first, and the others only while the answer may still be accepted. "
        "Exact for acceptance; the reward of a refused answer lacks what was not asked.",
    )
    max_new_tokens: int = option(4096, "Longest text of a role in tokens.", ge=1)
    temperature: float = option(0.0, "Of the roles' texts.", ge=0.0)
    role_weights: list[float] = option(
        [2.0, 2.0, 1.0, 1.0],
        "Weights of calculation_check, answer_completeness, answer_correct, understanding_check.",
    )
    format_weight: float = option(
        0.0, "Weight of the rule that format_pattern is found in the answer; 0: no rule.", ge=0.0
    )
    format_pattern: str = option(r"\\boxed\{.+\}", "Regular expression of that rule.")


@dataclass
class LatentSeekConfig(SearchConfig):
    """LatentSeek: policy gradient on the hidden states that begin a greedy answer."""

    rho: float = option(0.2, "Share of the answer's tokens that is optimised.", gt=0.0, le=1.0)
    max_latent_len: int = option(300, "Most tokens that are optimised.", ge=1)
    start_index: int = option(0, "First token that is optimised; those before it stay.", ge=0)
    max_steps: int = option(10, "Steps at most; 0 is greedy decoding.", ge=0)
    tau: float = option(-0.2, "An answer whose reward is above this is accepted.")
    lr: float = option(0.03, "Size of a step.", gt=0.0)
    optimizer: str = option("adam", "How a gradient becomes a step.", choices=("adam", "sgd"))
    grad_clip: float = option(0.0, "Largest norm of a gradient; 0: no bound.", ge=0.0)
    dtype: str = option(
        "float32",
        "Of latents, gradients and moments; in bfloat16 small steps vanish.",
        choices=("float32", "bfloat16", "float64"),
    )
    select: str = option(
        "best",
        "Which answer is returned: the earliest of the highest reward, or the last one (as "
        "published).",
        choices=("best", "last"),
    )
    tokens: str = option(
        "argmax",
        "How moved latents become tokens; categorical draws them.",
        choices=("argmax", "categorical"),
    )
    proposal: str = option(
        "gradient",
        "Where latents move; random_signs is the control that keeps all but the gradient.",
        choices=("gradient", "random_signs"),
    )
    template: str = option(
        "none",
        "How the question is put: as it is given; boxed: steps, and the answer in a box; json: an "
        "object with thought process and final answer.",
        choices=("none", "boxed", "json"),
    )
    memo: bool = option(
        True, "Remember the answer and reward of a prefix; off repeats the work, for tests."
    )
    compat: str = option(
        "fixed",
        "official: prefixes go on behind an end token, the last answer is returned, latents are "
        "bfloat16, the format rule is outside the reward's range, and verdicts are read from "
        "question and reply.",
        choices=("fixed", "official"),
    )
    verifier: VerifierConfig = section(VerifierConfig, "The self-reward, where no other is given.")


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


@dataclass
class RolloutConfig:
    """What follows a leaf of RAIN's tree when its text is scored."""

    boundary: str = option(
        ",.?:;\n", "Characters that end the continuation; empty: only the end of the answer does."
    )
    temperature: float = option(1.0, "Of the continuation.", ge=0.0)
    turn_marker: str = option(
        "", "Text that opens another user's turn and so ends the answer; empty: none."
    )


@dataclass
class JudgeConfig:
    """RAIN's self-evaluation: the model is asked a question about its own reply."""

    question: str = option(
        "harmless",
        "What is asked of a reply: whether it is harmless, truthful, or of positive tone.",
        choices=("harmless", "truthful", "positive"),
    )
    how: str = option(
        "hard",
        "hard: the likelier letter counts, in every order of the options; soft: values weighted by "
        "the letters' probabilities.",
        choices=("hard", "soft"),
    )


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
    rollout: RolloutConfig = section(RolloutConfig, "The continuation of a leaf.")
    judge: JudgeConfig = section(JudgeConfig, "The self-evaluation, where no reward is given.")
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
