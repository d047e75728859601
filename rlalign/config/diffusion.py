# ruff: noqa: RUF009  (option() and section() return dataclass fields)
"""How a masked-diffusion language model's completions are made (docs/diffusion_models.md)."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.fields import option


@dataclass
class DiffusionConfig:
    """The sampler: which masked positions are decided at a step, and with which tokens."""

    steps: int | None = option(
        None, "Steps of the whole completion; unset: one for each of its tokens.", ge=1
    )
    eval_steps: int | None = option(None, "The same at evaluations; unset: as steps.", ge=1)
    block_size: int | None = option(
        None,
        "Tokens of a block; blocks are filled from left to right. Unset: the model's blocks where "
        "it has some, else the whole completion is one.",
        ge=1,
    )
    order: str = option(
        "low_confidence",
        "Which positions are decided first: surest token (low_confidence), any (random); or by "
        "Dream's schedule: surest after temperature and top_p (maskgit_plus), largest lead over "
        "the second token (topk_margin), least entropy (entropy), any at random times (origin).",
        choices=("low_confidence", "random", "maskgit_plus", "topk_margin", "entropy", "origin"),
    )
    alg_temp: float = option(
        0.0,
        "Dream's orders draw positions by softmax(confidence / alg_temp); 0 is off.",
        ge=0,
    )
    threshold: float | None = option(
        None,
        "Every position at least so sure is decided at once; those that `steps` asks for always.",
        gt=0,
        le=1,
    )
    factor: float | None = option(
        None,
        "f: the r surest positions are decided at once while the r-th is 1 - f/(r+1) sure.",
        gt=0,
    )
    cache: str = option(
        "none",
        "Keys and values kept while a block is filled: none, those before it (prefix), or also "
        "those behind it (dual). Exact for models with blocks, else an approximation.",
        choices=("none", "prefix", "dual"),
    )
    cfg_scale: float = option(
        0.0, "Classifier-free guidance against a masked prompt; 0 is off.", ge=0
    )
    edit_threshold: float | None = option(
        None,
        "A decided token of the block yields to another one that is surer than this.",
        gt=0,
        le=1,
    )
    suppress_ids: list[int] = option([], "Tokens that are never sampled.")
    eos_confidence: bool = option(
        True, "End tokens compete by their confidence; false: they are decided last."
    )
    eos_early_stop: bool = option(
        False, "After a block with an end token the rest is filled with it, without the model."
    )
    eos_policy: str | None = option(
        None,
        "What is behind the first end token: part of the completion (all), cut off (drop), read "
        "but not trained (visible), or masked and not trained (masked). Unset: drop.",
        choices=("all", "drop", "visible", "masked"),
    )
