"""Masked-diffusion models for tests: small ones of transformers, and one that is a formula."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rlalign.models.masked_diffusion import Canvas, MaskedDiffusionLM

VOCAB, MASK, EOS = 14, 13, 1


class Bag:
    """Logits of a position: from the mean over what it sees of a table of (token, distance), so
    that they depend on all tokens and where they are. In float64, a row at a time: a row is the
    same to the bit in any company. `calls` are the rows of each forward pass."""

    mask_id, vocab_size = MASK, VOCAB

    def __init__(self, seed: int = 0, block_size: int = 0, scale: float = 8.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shape = (VOCAB, 64, VOCAB)
        self.table = torch.randn(shape, generator=generator, dtype=torch.float64) * scale
        self.block_size = block_size
        self.calls: list[int] = []

    def logits(self, canvas: Canvas, start: int = 0, stop: int | None = None) -> torch.Tensor:
        self.calls.append(len(canvas))
        rows, width = canvas.ids_BT.shape
        real_BT = canvas.real_BT
        if real_BT is None:
            real_BT = torch.ones(rows, width, dtype=torch.bool)
        logits_BTV = torch.zeros(rows, width, VOCAB)
        for b in range(rows):
            ids_R = canvas.ids_BT[b][real_BT[b]]
            logits_BTV[b, real_BT[b]] = self.row(ids_R)
        return logits_BTV[:, start:stop]

    def row(self, ids_R: torch.Tensor) -> torch.Tensor:
        """Of one row without padding: float32 [R, V]."""
        logits_RV = torch.zeros(len(ids_R), VOCAB)
        for i in range(len(ids_R)):
            size = self.block_size or len(ids_R)
            seen = ids_R[: (i // size + 1) * size]
            distance = (torch.arange(len(seen)) - i) % 64
            logits_RV[i] = self.table[seen, distance].mean(0).float()
        logits_RV[:, MASK] = -torch.inf
        return logits_RV


def masked_llama(
    seed: int = 0, vocab: int = VOCAB, block_size: int = 0, layers: int = 2, shift: bool = False
) -> MaskedDiffusionLM:
    """A few layers, far from uniform; bidirectional. The mask is the last token."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=False,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    return MaskedDiffusionLM(model, vocab - 1, shift=shift, block_size=block_size)
