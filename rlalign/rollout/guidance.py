"""Guidance: velocities made of two, callable like the model they wrap.

    cfg      v = v_u + w (v_c - v_u)                     classifier-free (arXiv 2207.12598)
    embedded the network reads the scale itself          FLUX.1-dev
    gfcg     v = v_c + w_t (v_c - v_ref),  v_ref = v(z, c_ref)          arXiv 2411.15393
             p = softmax(classifier(x0_hat)),  c_ref = argmax_{k != c} p_k,
             w_t = w_max (1 - p_c)^gamma;  0 where p_c > tau or sigma is outside the window

gfcg is gradient-free classifier guidance: a frozen classifier only says with which class the
sample is confused, and how much; its gradient is never taken. The paper's own schedule is not
public in full: this one is ours. Guidance defines the policy: where it is on in the rollout it must
be the same in training, and w_t is a constant there.

Legend: N rows, X the latent's own dimensions, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.config.schema import GuidanceConfig
from rlalign.models.flow import Condition, FlowModel, take_rows
from rlalign.rollout.flow_steps import FlowError, predict_x0

Velocity = Callable[[Tensor, Tensor, Condition], Tensor]  # (z_NX, sigma_N, cond) -> v_NX
NullCondition = Callable[[int], Condition]


def guide(model: FlowModel, config: GuidanceConfig) -> Velocity:
    """The velocity of `model`, guided as a run is configured.

    Raises FlowError for kind gfcg with a model that brings no classifier along.
    """
    if config.kind == "cfg":
        return classifier_free(model, model.null_condition, config.scale)
    if config.kind == "embedded":
        return embedded(model, config.scale)
    if config.kind == "none":
        return model
    found = model.classifier()
    if found is None:
        raise FlowError(
            f"rollout.flow.guidance.kind={config.kind} needs a classifier, and this "
            f"{type(model).__name__} has none: give it a `classifier`, make a "
            "ClassifierGuidance of your own (rlalign.rollout.guidance), or use kind=cfg"
        )
    return ClassifierGuidance(
        model,
        *found,
        w_max=config.scale,
        gamma=config.gamma,
        tau=1.0 if config.threshold is None else config.threshold,
        sigma_window=(config.sigma_low, config.sigma_high),
    )


def classifier_free(
    velocity: Velocity, null: NullCondition, scale: float, *, detach_null: bool = False
) -> Velocity:
    """v_u + scale (v_c - v_u), both from one batch of 2 N rows; `scale` 1 is no guidance.

    `null` is the model's `null_condition`. `detach_null` takes v_u without gradient, in a pass of
    its own (Flow-GRPO trains so).
    """

    def guided(z_NX: Tensor, sigma_N: Tensor, cond: Condition) -> Tensor:
        none = null(len(z_NX))
        if detach_null:
            v_c = velocity(z_NX, sigma_N, cond)
            with torch.no_grad():
                v_u = velocity(z_NX, sigma_N, none)
        else:
            both = {name: torch.cat([value, none[name]]) for name, value in cond.items()}
            v_2NX = velocity(torch.cat([z_NX, z_NX]), torch.cat([sigma_N, sigma_N]), both)
            v_c, v_u = v_2NX.chunk(2)
        return v_u + scale * (v_c - v_u)

    return velocity if scale == 1 else guided


def embedded(velocity: Velocity, scale: float) -> Velocity:
    """The condition `guidance`, float32 [N] of `scale`, beside the others: for networks that were
    distilled to read it."""

    def guided(z_NX: Tensor, sigma_N: Tensor, cond: Condition) -> Tensor:
        return velocity(z_NX, sigma_N, {**cond, "guidance": torch.full_like(sigma_N, scale)})

    return guided


def label_of(cond: Condition) -> Tensor:
    return cond["label"]


@dataclass(frozen=True)
class ClassifierGuidance:
    """Gradient-free classifier guidance of `velocity`; see the module's head for the formula.

    `classifier` maps x0_hat, [N, X], to logits [N, C]; what it reads is up to it: pixels
    (`lambda x0: net(model.decode(x0))`), or latents. `classes` is the condition of each of the C
    classes, in the classifier's order (`model.condition(prompts)`), and `class_of` finds a row's
    own class in its condition. Two passes of the network a step, one after the other, and one of
    the classifier.

    mode: cfg takes v_ref in the place that the unconditional velocity has in classifier-free
    guidance; atg takes it from `weak`, a weaker network (autoguidance); sum adds a classifier-free
    term (cfg_scale - 1) (v_c - v_u), a third pass, with `null` the model's null_condition.
    """

    velocity: Velocity
    classifier: Callable[[Tensor], Tensor]
    classes: Condition
    w_max: float
    gamma: float = 1.0
    tau: float = 1.0
    sigma_window: tuple[float, float] = (0.0, 1.0)
    mode: str = "cfg"
    weak: Velocity | None = None
    null: NullCondition | None = None
    cfg_scale: float = 1.0
    class_of: Callable[[Condition], Tensor] = label_of

    def __post_init__(self) -> None:
        low, high = self.sigma_window
        if not 0 <= self.w_max < math.inf or not 0 <= self.gamma < math.inf:
            raise FlowError(f"gfcg w_max={self.w_max}, gamma={self.gamma}: both are >= 0, finite")
        if not 0 <= self.tau <= 1 or not 0 <= low <= high <= 1:
            raise FlowError(
                f"gfcg tau={self.tau}, sigma_window={self.sigma_window}: both within [0, 1], and "
                "the window's lower end first"
            )
        needs = {"cfg": (), "atg": ("weak",), "sum": ("null",)}
        if self.mode not in needs:
            raise FlowError(f"gfcg mode={self.mode!r} is none of {', '.join(needs)}")
        missing = [name for name in needs[self.mode] if getattr(self, name) is None]
        if missing:
            raise FlowError(f"gfcg mode={self.mode} needs `{missing[0]}`")

    def __call__(self, z_NX: Tensor, sigma_N: Tensor, cond: Condition) -> Tensor:
        v_c = self.velocity(z_NX, sigma_N, cond)
        guided = v_c
        if self.w_max > 0:
            with torch.no_grad():
                x0_NX = predict_x0(z_NX, v_c, sigma_N)
                w_N, ref_N = self.weigh(x0_NX, sigma_N, self.class_of(cond))
            reference = self.weak if self.mode == "atg" and self.weak else self.velocity
            v_ref = reference(z_NX, sigma_N, {**cond, **take_rows(self.classes, ref_N)})
            guided = v_c + w_N.reshape(-1, *[1] * (z_NX.ndim - 1)) * (v_c - v_ref)
        if self.mode == "sum" and self.null:
            v_u = self.velocity(z_NX, sigma_N, self.null(len(z_NX)))
            guided = guided + (self.cfg_scale - 1) * (v_c - v_u)
        return guided

    def weigh(self, x0_NX: Tensor, sigma_N: Tensor, class_N: Tensor) -> tuple[Tensor, Tensor]:
        """The strength w_t, float32 [N], and the reference class c_ref, int64 [N], of each row."""
        prob_NC = self.classifier(x0_NX).float().softmax(1)
        own_N1 = class_N[:, None]
        p_N = prob_NC.gather(1, own_N1)[:, 0]
        ref_N = prob_NC.scatter(1, own_N1, -1.0).argmax(1)
        low, high = self.sigma_window
        on_N = (p_N <= self.tau) & (sigma_N >= low) & (sigma_N <= high)
        return torch.where(on_N, self.w_max * (1 - p_N) ** self.gamma, 0.0), ref_N
