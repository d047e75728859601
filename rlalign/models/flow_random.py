"""Random miniature pipelines of diffusers as complete folders: for tests and dry runs.

They are of the very classes of Stable Diffusion 3, FLUX.1-dev and Wan 2.1, with scale factors of
their own, so what works on them read every size from a config.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers import CLIPTextConfig, T5Config, UMT5Config
from transformers.utils import logging

from rlalign.models.errors import ModelError
from rlalign.models.pipeline import import_diffusers
from rlalign.models.tokenizer import EOS, build_tokenizer

TEXT_LENGTH = 24  # tokens of a text: bytes, and the end
TEXT_WIDTH, CLIP_WIDTH = 32, 16
LATENT_CHANNELS = 4
WEIGHT_STD = 0.1  # wider than usual: a network that hardly reads its inputs hides errors


def write_random_pipeline(path: str | Path, family: str = "sd3", *, seed: int = 0) -> Path:
    """Write a pipeline of `family` (sd3, flux or wan) of at most 200,000 parameters (float32
    safetensors) to `path`: images of any multiple of 16 pixels up to 32, videos of 2 n + 1 frames.

    The weights depend on `seed` and `family` only; the global generator is left as it was. Raises
    ModelError for another family.
    """
    if family not in FAMILIES:
        raise ModelError(f"family {family!r} is none of {', '.join(FAMILIES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = FAMILIES[family]()
        for component in pipeline.components.values():
            if isinstance(component, nn.Module):
                _randomize(component)
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        pipeline.save_pretrained(path)
    finally:
        if shown:
            logging.enable_progress_bar()
    return Path(path)


def _sd3() -> Any:
    diffusers = import_diffusers()
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * CLIP_WIDTH,
        pos_embed_max_size=12,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(diffusers),
        text_encoder=_clip(projected=True),
        tokenizer=_tokenizer(),
        text_encoder_2=_clip(projected=True),
        tokenizer_2=_tokenizer(),
        text_encoder_3=_t5(),
        tokenizer_3=_tokenizer(),
    )


def _flux() -> Any:
    diffusers = import_diffusers()
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * LATENT_CHANNELS,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=CLIP_WIDTH,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    return diffusers.FluxPipeline(
        transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=64
        ),
        vae=_vae(diffusers),
        text_encoder=_clip(projected=False),
        tokenizer=_tokenizer(),
        text_encoder_2=_t5(),
        tokenizer_2=_tokenizer(),
    )


def _wan() -> Any:
    diffusers = import_diffusers()
    transformer = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        rope_max_seq_len=64,
    )
    vae = diffusers.AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, -0.4],
        latents_std=[1.5, 0.5, 2.0, 1.2],
        scale_factor_temporal=2,
        scale_factor_spatial=2,
    )
    return diffusers.WanPipeline(
        transformer=transformer,
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=vae,
        text_encoder=_umt5(),
        tokenizer=_tokenizer(),
    )


FAMILIES: dict[str, Callable[[], Any]] = {"sd3": _sd3, "flux": _flux, "wan": _wan}


def _vae(diffusers: Any) -> nn.Module:
    return diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=0.06,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _tokenizer() -> Any:
    tokenizer: Any = build_tokenizer(TEXT_LENGTH)
    end = [(EOS, tokenizer.eos_token_id)]  # where CLIP pools a text
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"$A {EOS}", None, end)
    return tokenizer


def _clip(*, projected: bool) -> nn.Module:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = _tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=CLIP_WIDTH,
        intermediate_size=32,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def _t5_shape() -> dict[str, Any]:
    tokenizer = _tokenizer()
    return {
        "vocab_size": len(tokenizer),
        "d_model": TEXT_WIDTH,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_heads": 2,
        "feed_forward_proj": "gated-gelu",
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _t5() -> nn.Module:
    from transformers import T5EncoderModel

    return T5EncoderModel(T5Config(**_t5_shape()))


def _umt5() -> nn.Module:
    from transformers import UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**_t5_shape()))


@torch.no_grad()
def _randomize(module: nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            fan_in = parameter[0].numel()
            parameter.normal_(0, max(WEIGHT_STD, fan_in**-0.5))
        elif name.endswith("bias"):
            parameter.normal_(0, WEIGHT_STD)
    module.eval()
