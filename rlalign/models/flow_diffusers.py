"""Flow models that are pipelines of diffusers: Stable Diffusion 3, FLUX, Wan.

The transformer alone is the policy. Text encoders and VAE stand around it, frozen and outside the
module tree, so no engine casts, partitions or saves them, and copies of a model share them.

The scheduler is asked for its grid and never to take a step: `step` counts its own calls and rounds
to the network's dtype. Where `rollout.flow.shift` is set the grid is the sampler's own; unset, it
is the one on which the pipeline itself samples T steps:

    SD3Flow    set_timesteps(T), shifted as the scheduler's config says (by 3 for SD 3.5); its last
               step is much shorter than that of the sampler's grid
    FluxFlow   1, (T-1)/T, ..., 1/T, shifted by e^mu, mu growing with the size of the image (or as
               the config says, where it shifts all sizes alike)
    WanFlow    set_timesteps(T) of an Euler scheduler with the pipeline's shift: the pipeline's own
               looks back at earlier steps, so its states are no Markov chain

Legend: N rows, P prompts, X the latent's own dimensions, C channels, F frames, L tokens, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from rlalign.config.schema import ImageConfig, ModelConfig
from rlalign.models.errors import ModelError
from rlalign.models.flow import Condition, FlowModel
from rlalign.models.lora import attach_lora
from rlalign.models.pipeline import (
    frozen_parts,
    load_pipeline,
    num_tokens,
    pipeline_grid,
    read_index,
    save_pipeline,
)
from rlalign.types import Prompt

TIME_SCALE = 1000  # networks that take a time step, not sigma
PATCH = 2  # latent pixels a side that are one token: so in all three


class PipelineFlow(FlowModel):
    """What the families share. A family says how a text becomes a condition and how the transformer
    is called.

    `folder` is the one that `pipeline` was loaded from: `save_pretrained` takes the frozen parts
    from there.
    """

    text_tokens: ClassVar[int]  # of the pipeline, where `max_text_tokens` is unset

    def __init__(self, pipeline: Any, folder: Path, image: ImageConfig) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.pipeline, self.folder = pipeline, folder
        self.max_text_tokens = image.max_text_tokens or self.text_tokens
        self.latent_shape = self.shape_of(image)
        self._null: dict[str, Tensor] = {}
        for part in frozen_parts(pipeline):
            part.requires_grad_(False).eval()

    def encode(self, text: str) -> dict[str, Tensor]:
        """The condition of one text: one row."""
        raise NotImplementedError

    def velocity(self, z_NX: Tensor, sigma_N: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """v of the transformer. `z_NX` and `cond` come in its dtype, `sigma_N` in float32."""
        raise NotImplementedError

    @torch.no_grad()
    def condition(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """Every text is encoded once, by itself: a row depends on its own text alone.

        Raises ModelError for a prompt that is no string.
        """
        if not prompts:
            return self.null_condition(0)
        texts = [_text(prompt) for prompt in prompts]
        number = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        encoded = [self.encode(text) for text in number]
        row_P = torch.tensor([number[text] for text in texts], device=self.device)
        return {name: torch.cat([one[name] for one in encoded])[row_P] for name in encoded[0]}

    @torch.no_grad()
    def null_condition(self, num: int) -> dict[str, Tensor]:
        """That of the empty text."""
        self._null = self._null or self.encode("")
        return {name: one.expand(num, *one.shape[1:]) for name, one in self._null.items()}

    def forward(self, z_NX: Tensor, sigma_N: Tensor, cond: Condition) -> Tensor:
        dtype = self.transformer.dtype
        inputs = {name: value.to(dtype) for name, value in cond.items()}
        return self.velocity(z_NX.to(dtype), sigma_N.float(), inputs).float()

    @torch.no_grad()
    def decode(self, x0_NX: Tensor) -> Tensor:
        """Through the VAE, one sample at a time: it takes more memory than the network. Videos are
        [N, F, C, H, W]."""
        dtype = self.pipeline.vae.dtype
        pixels = torch.cat([self.pixels(x0_1X.to(dtype)) for x0_1X in x0_NX.split(1)])
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def pixels(self, x0_NX: Tensor) -> Tensor:
        """What the VAE gives, about -1 to 1."""
        vae = self.pipeline.vae
        x0_NX = x0_NX / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        return vae.decode(x0_NX, return_dict=False)[0]

    def time_grid(self, num_steps: int, shift: float | None = None) -> Tensor | None:
        """The pipeline's own grid, float64 [num_steps + 1]; None where `shift` is set."""
        if shift is not None:
            return None
        tokens, sigmas = num_tokens(self.latent_shape, PATCH), self.unshifted(num_steps)
        return pipeline_grid(self.pipeline.scheduler, num_steps, num_tokens=tokens, sigmas=sigmas)

    def unshifted(self, num_steps: int) -> list[float] | None:
        """The grid that the pipeline gives its scheduler; None: the scheduler has its own."""
        return None

    def prepare(self, config: ModelConfig, seed: int) -> None:
        if config.lora.rank:
            attach_lora(self.transformer, config.lora, seed)
        if config.gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()

    def frozen_copy(self) -> FlowModel:
        return copy.deepcopy(self, {id(self.pipeline): self.pipeline}).requires_grad_(False)

    def config_dict(self) -> dict[str, Any]:
        """What model_index.json holds."""
        return read_index(self.folder)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `load_flow_model` and diffusers read (`pipeline.save_pipeline`)."""
        save_pipeline(self.pipeline, self.transformer, self.folder, Path(folder))

    def shape_of(self, image: ImageConfig) -> tuple[int, ...]:
        """The latent's shape. Raises ModelError for an image that is none of this pipeline's."""
        if image.num_frames not in (None, 1):
            raise ModelError(
                f"rollout.flow.image.num_frames={image.num_frames}: "
                f"{type(self.pipeline).__name__} makes images, not videos; leave it out"
            )
        scale = self.pipeline.vae_scale_factor
        side = self.pipeline.default_sample_size * scale
        return (self.channels, *self.sides(image, scale, (side, side)))

    @property
    def channels(self) -> int:
        return self.transformer.config.in_channels

    def sides(self, image: ImageConfig, scale: int, default: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the latent, whose pixels are `scale` of the image's."""
        height, width = image.height or default[0], image.width or default[1]
        step = scale * PATCH
        for name, side in (("height", height), ("width", width)):
            if side % step:
                raise ModelError(
                    f"rollout.flow.image.{name}={side}: {type(self.pipeline).__name__} makes "
                    f"multiples of {step} pixels; take {max(side // step, 1) * step}"
                )
        return height // scale, width // scale


class SD3Flow(PipelineFlow):
    """Stable Diffusion 3 and 3.5. Condition: `text` [N, L, D] (CLIP, T5), `pooled` [N, D]."""

    text_tokens = 256

    def encode(self, text: str) -> dict[str, Tensor]:
        text_1LD, _, pooled_1D, _ = self.pipeline.encode_prompt(
            text,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_text_tokens,
        )
        return {"text": text_1LD, "pooled": pooled_1D}

    def velocity(self, z_NX: Tensor, sigma_N: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.transformer(
            hidden_states=z_NX,
            timestep=TIME_SCALE * sigma_N,
            encoder_hidden_states=cond["text"],
            pooled_projections=cond["pooled"],
            return_dict=False,
        )[0]


class FluxFlow(PipelineFlow):
    """FLUX.1. Condition: `text` [N, L, D] (T5), `pooled` [N, D] (CLIP) and, for a network that was
    distilled from guidance, its strength `guidance` [N]: without it 1, which is none."""

    text_tokens = 512

    @property
    def channels(self) -> int:
        return self.transformer.config.in_channels // PATCH**2

    def unshifted(self, num_steps: int) -> list[float]:
        return [1 - i / num_steps for i in range(num_steps)]

    def encode(self, text: str) -> dict[str, Tensor]:
        text_1LD, pooled_1D, _ = self.pipeline.encode_prompt(
            text, device=self.device, max_sequence_length=self.max_text_tokens
        )
        return {"text": text_1LD, "pooled": pooled_1D}

    def velocity(self, z_NX: Tensor, sigma_N: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        rows, columns = (side // PATCH for side in z_NX.shape[2:])
        axes = [torch.arange(size, device=z_NX.device) for size in (1, rows, columns)]
        v_NLD = self.transformer(
            hidden_states=F.pixel_unshuffle(z_NX, PATCH).flatten(2).mT,  # a patch: (C, 2, 2)
            timestep=sigma_N,
            guidance=self._guidance(sigma_N, cond),
            pooled_projections=cond["pooled"],
            encoder_hidden_states=cond["text"],
            txt_ids=sigma_N.new_zeros(cond["text"].shape[1], len(axes)),
            img_ids=torch.cartesian_prod(*axes).float(),
            return_dict=False,
        )[0]
        return F.pixel_shuffle(v_NLD.mT.unflatten(2, (rows, columns)), PATCH)

    def _guidance(self, sigma_N: Tensor, cond: Mapping[str, Tensor]) -> Tensor | None:
        if self.transformer.config.guidance_embeds:
            return cond.get("guidance", torch.ones_like(sigma_N))
        if "guidance" in cond:
            raise ModelError(
                "rollout.flow.guidance.kind=embedded: this network takes no guidance scalar "
                "(guidance_embeds in its config.json): use kind=none or cfg"
            )
        return None


class WanFlow(PipelineFlow):
    """Wan 2.1, text to video. Condition: `text` [N, L, D] (T5, zeros behind its end)."""

    text_tokens = 512
    default_size, default_frames = (480, 832), 81

    def shape_of(self, image: ImageConfig) -> tuple[int, ...]:
        if self.pipeline.config.boundary_ratio is not None:
            raise ModelError(
                f"{self.folder}: a pipeline of two networks that take turns (Wan 2.2, "
                "boundary_ratio) is not trained; use one with a single transformer"
            )
        frames = image.num_frames or self.default_frames
        step = self.pipeline.vae_scale_factor_temporal
        if (frames - 1) % step:
            raise ModelError(
                f"rollout.flow.image.num_frames={frames}: {type(self.pipeline).__name__} makes 1 "
                f"frame and multiples of {step} more; take {frames // step * step + 1}"
            )
        sides = self.sides(image, self.pipeline.vae_scale_factor_spatial, self.default_size)
        return (self.channels, (frames - 1) // step + 1, *sides)

    def encode(self, text: str) -> dict[str, Tensor]:
        text_1LD, _ = self.pipeline.encode_prompt(
            text,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_text_tokens,
            device=self.device,
        )
        return {"text": text_1LD}

    def velocity(self, z_NX: Tensor, sigma_N: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        return self.transformer(
            hidden_states=z_NX,
            timestep=TIME_SCALE * sigma_N,
            encoder_hidden_states=cond["text"],
            return_dict=False,
        )[0]

    def pixels(self, x0_NX: Tensor) -> Tensor:
        vae = self.pipeline.vae
        mean, std = (
            x0_NX.new_tensor(values).view(-1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode(x0_NX * std + mean, return_dict=False)[0].transpose(1, 2)


# Which flow a pipeline is, by the class that its model_index.json names.
PIPELINES: dict[str, type[PipelineFlow]] = {
    "StableDiffusion3Pipeline": SD3Flow,
    "FluxPipeline": FluxFlow,
    "WanPipeline": WanFlow,
}


def load_pipeline_flow(
    folder: Path,
    image: ImageConfig | None = None,
    device: torch.device | str = "cpu",
    dtype: str = "float32",
) -> PipelineFlow:
    """The flow of the pipeline in `folder`, in evaluation mode. Raises ModelError where it is of no
    class in `PIPELINES`, cannot be loaded, or does not make such an `image`."""
    name = read_index(folder).get("_class_name")
    if name not in PIPELINES:
        raise ModelError(
            f"{folder} holds a {name}, which is none of {', '.join(PIPELINES)}: docs/flow_models.md"
            " says how to add one"
        )
    pipeline = load_pipeline(folder, name, device, dtype)
    return PIPELINES[name](pipeline, folder, image or ImageConfig()).eval()


def _text(prompt: Prompt) -> str:
    if not isinstance(prompt.source, str):
        raise ModelError(
            f"prompt {prompt.id!r} is a list of chat messages; pipelines read plain text: make it "
            "a string"
        )
    return prompt.source
