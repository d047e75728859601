"""Images of a flow model by the deterministic sampler, and what those of `mini:digits` are worth.

The noise is keyed by prompt and image alone, so that two models, or one before and after training,
are compared on the same starts.

Legend: P prompts, M images of each, X the latent's own dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.config.schema import FlowConfig
from rlalign.models.flow import FlowModel, take_rows
from rlalign.rollout.flow import sample_ode
from rlalign.rollout.guidance import Velocity
from rlalign.types import Prompt


@dataclass(frozen=True, slots=True)
class DigitsReport:
    """>>> DigitsReport(class_probability=0.52, judge_accuracy=0.53, pixel_std=0.38)

    The first two are shares of the images, 0 to 1, by the reward's classifier and by the judge
    that training never sees. `pixel_std` is the diversity: the std of each latent pixel, in
    [-1, 1], over the images of one prompt, averaged over pixels and prompts.
    """

    class_probability: float
    judge_accuracy: float
    pixel_std: float


@torch.no_grad()
def ode_latents(
    model: FlowModel,
    prompts: Sequence[Prompt],
    num_images: int,
    *,
    velocity: Velocity | None = None,
    num_steps: int = 20,
    shift: float = 1.0,
    seed: int = 0,
    max_rows: int = 1024,
) -> Tensor:
    """x0 of `num_images` of each prompt: float32 [P, M, *latent_shape] on the model's device.

    `velocity` is the model or guidance around it; at most `max_rows` rows go through it at a time.
    """
    network, cond = velocity or model, model.condition(prompts)
    trees = [(prompt.id, image) for prompt in prompts for image in range(num_images)]
    prompt_N = torch.arange(len(prompts), device=model.device).repeat_interleave(num_images)
    x0_NX = sample_ode(
        lambda z_NX, sigma_N, row_N: network(z_NX, sigma_N, take_rows(cond, prompt_N[row_N])),
        trees,
        model.latent_shape,
        FlowConfig(num_steps=num_steps, shift=shift, micro_batch_rows=max_rows),
        seed=seed,
        iteration=0,
        device=model.device,
    )
    return x0_NX.unflatten(0, (len(prompts), num_images))


def evaluate_digits(
    model: FlowModel,
    prompts: Sequence[Prompt],
    num_images: int = 100,
    *,
    velocity: Velocity | None = None,
    num_steps: int = 20,
    shift: float = 1.0,
    seed: int = 0,
) -> DigitsReport:
    """How a model of `mini:digits` draws `prompts`, whose answers are the digits: `num_images` of
    each by the ODE, from noise keyed by `seed`. Raises ModelError without scikit-learn."""
    from rlalign.models.digit_images import judge_labels, load_classifier

    x0_PMX = ode_latents(
        model,
        prompts,
        num_images,
        velocity=velocity,
        num_steps=num_steps,
        shift=shift,
        seed=seed,
    )
    x0_PMX = x0_PMX.clamp(-1, 1).cpu()
    image_NCHW = model.decode(x0_PMX.flatten(0, 1))
    digit_N = torch.tensor([int(p.answer) for p in prompts]).repeat_interleave(num_images)
    prob_NC = load_classifier()(image_NCHW).softmax(1)
    return DigitsReport(
        class_probability=float(prob_NC.gather(1, digit_N[:, None]).mean()),
        judge_accuracy=float((judge_labels(image_NCHW) == digit_N).float().mean()),
        pixel_std=float(x0_PMX.std(1).mean()),
    )
