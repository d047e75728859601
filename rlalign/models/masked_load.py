from __future__ import annotations

from rlalign.models.load import load_causal_lm
from rlalign.models.masked_diffusion import MaskedDiffusionLM


def load_masked_lm(cfg, seed=0, device="cpu", kernels=None):
    model = load_causal_lm(cfg, seed, device)
    c = model.config
    return MaskedDiffusionLM(
        model,
        c.mask_token_id,
        shift=c.diffusion_shift,
        block_size=c.diffusion_block_size,
        kernels=kernels,
    )
