# ruff: noqa: RUF009  (option() and section() return dataclass fields)
"""How a flow model's samples are made (docs/trees.md): sampler, branching, guidance."""

from __future__ import annotations

from dataclasses import dataclass

from rlalign.config.fields import option, section


@dataclass
class MixConfig:
    """Only the steps of a sliding window (and the splits) are stochastic, and train (MixGRPO)."""

    window_size: int = option(0, "Steps; 0: every step is stochastic.", ge=0)
    start: int = option(0, "First step of the window at the first training step.", ge=0)
    interval: int = option(25, "Training steps after which it slides.", ge=1)
    stride: int = option(1, "By how much it slides.", ge=1)
    wrap: bool = option(True, "It starts over behind the last step; else it stays there.")


@dataclass
class GuidanceConfig:
    """Guidance is part of the policy: the guided velocity is sampled, and trained."""

    kind: str = option(
        "none",
        "Classifier-free (cfg), a scalar that the network takes (embedded), or gradient-free "
        "classifier guidance (gfcg).",
        choices=("none", "cfg", "embedded", "gfcg"),
    )
    scale: float = option(1.0, "Strength w; the largest one under gfcg.", ge=0)
    gamma: float = option(1.0, "gfcg: how fast it grows with confusion.", gt=0)
    threshold: float | None = option(
        None, "gfcg: none above this probability of the class.", gt=0, le=1
    )
    sigma_low: float = option(0.0, "gfcg: none below this noise level.", ge=0, le=1)
    sigma_high: float = option(1.0, "gfcg: none above this noise level.", ge=0, le=1)


@dataclass
class ImageConfig:
    """What a pipeline of diffusers makes. Unset: as the pipeline does by default."""

    height: int | None = option(None, "Pixels.", ge=1)
    width: int | None = option(None, "Pixels.", ge=1)
    num_frames: int | None = option(None, "Of a video.", ge=1)
    max_text_tokens: int | None = option(
        None, "Of T5, padding included; what a prompt has beyond is cut off.", ge=1, le=512
    )


@dataclass
class FlowConfig:
    """The sampler of a rectified-flow model, and where its rollouts branch."""

    num_steps: int = option(20, "Steps T of the sampler.", ge=1)
    shift: float | None = option(
        None,
        "Of the time grid: more steps at high noise above 1. Unset: the grid of the pipeline; "
        "other models have none, and 1.",
        gt=0,
    )
    sde_kind: str = option(
        "flow",
        "Noise of a stochastic step: dance (constant), flow (Flow-GRPO), cps (coefficients "
        "preserved).",
        choices=("dance", "flow", "cps"),
    )
    eta: float = option(0.7, "Its strength.", gt=0)
    split_steps: list[int] = option(
        [0, 3, 6, 9], "Steps at which every sample becomes branch_factor samples."
    )
    branch_factor: list[int] = option([2], "Children at a split: one number, or one per split.")
    branch_noise: str | None = option(
        None,
        "Noise of siblings: correlated, each still standard normal; or as the published code has "
        "it, independent and scaled by branch_corr. Unset: what algo.tree.compat says.",
        choices=("correlated", "official_scaled"),
    )
    branch_corr: float | None = option(
        4.0,
        "s: siblings correlate by 1/(1+s^2), and at 0 would be equal; null: independent.",
        gt=0,
    )
    roots_per_prompt: int = option(1, "Trees of a prompt.", ge=1)
    shared_start: bool = option(False, "All trees of a step start from one noise.")
    terminal: str = option(
        "x0_pred",
        "What is rewarded: the prediction of the last call, or the last state.",
        choices=("x0_pred", "sample"),
    )
    drop_last_edge: bool | None = option(
        None,
        "The last step does not train; unset: where the reward does not depend on its noise, but "
        "not under compat=official.",
    )
    logp_reduce: str = option(
        "mean",
        "A step's log-prob per dimension or over all; algo.epsilon is relative to it.",
        choices=("mean", "sum"),
    )
    step_fraction: float = option(
        1.0, "Share of the steps that train, drawn anew each time (DanceGRPO).", gt=0, le=1
    )
    micro_batch_rows: int = option(
        1024, "States that go through the network together, in rollout and training.", ge=1
    )
    pictures: int = option(2, "Trees of a step whose images the run directory keeps.", ge=0, le=4)
    eval_samples: int = option(16, "Images of a held-out prompt at an evaluation.", ge=1)
    mix: MixConfig = section(MixConfig, "Stochastic and deterministic steps mixed.")
    guidance: GuidanceConfig = section(GuidanceConfig, "Guidance.")
    image: ImageConfig = section(ImageConfig, "Size of images and texts.")
