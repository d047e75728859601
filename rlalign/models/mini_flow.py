"""The built-in flow model: a small network conditioned on one of a few labels.

Two networks, both modulated by time and label (adaptive layer norm, DiT, arXiv 2212.09748) and both
starting at v = 0:

    mlp   residual blocks on the flattened latent:  h + W2 silu(W1 [(1 + scale) norm(h) + shift])
    dit   a transformer over patches, whose branches are gated as well

Legend: N rows, X latent dimensions (channel, height, width), L tokens, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlalign.models.errors import ModelError
from rlalign.models.flow import Condition, FlowModel
from rlalign.types import Prompt

TIME_DIM = 64  # sines and cosines of the time
TIME_SCALE = 1000.0  # they are made for times 0 to 1000
MAX_PERIOD = 10_000.0


class MiniFlow(FlowModel):
    """A flow over latents in [-1, 1] that are the pixels themselves; prompts are its labels.

    The default is the network of `mini:digits`, 484,096 parameters; `net="dit", width=48, blocks=2`
    is a transformer of 90,916 that takes about four times as long for a step on a CPU.
    """

    def __init__(
        self,
        labels: Sequence[str],
        latent_shape: Sequence[int] = (1, 8, 8),
        net: str = "mlp",
        width: int = 192,
        blocks: int = 3,
        heads: int = 4,
        patch: int = 2,
    ) -> None:
        super().__init__()
        if net not in ("mlp", "dit"):
            raise ModelError(f"net={net!r} of a mini flow is neither mlp nor dit")
        self.labels, self.latent_shape = tuple(labels), tuple(latent_shape)
        self._shape = {"net": net, "width": width, "blocks": blocks, "heads": heads, "patch": patch}
        channels, height, _ = self.latent_shape
        if net == "mlp":
            self.net = AdaptiveMlp(math.prod(latent_shape), len(labels), width, blocks)
        else:
            self.net = TinyDiT(channels, height, len(labels), width, blocks, heads, patch)

    def condition(self, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        """The label that is each prompt's text. Raises ModelError for a text that is none."""
        number = {label: i for i, label in enumerate(self.labels)}
        unknown = [p for p in prompts if not isinstance(p.source, str) or p.source not in number]
        if unknown:
            raise ModelError(
                f"prompt {unknown[0].id!r} is {unknown[0].source!r}; this model knows only "
                f"{', '.join(map(repr, self.labels))}"
            )
        return {"label": torch.tensor([number[p.source] for p in prompts], device=self.device)}

    def null_condition(self, num: int) -> dict[str, Tensor]:
        return {"label": torch.full((num,), len(self.labels), device=self.device)}

    def forward(self, z_NX: Tensor, sigma_N: Tensor, cond: Condition) -> Tensor:
        time_ND = time_features(sigma_N, TIME_DIM)
        dtype = next(self.parameters()).dtype
        return self.net(z_NX.to(dtype), time_ND.to(dtype), cond["label"]).float()

    def decode(self, x0_NX: Tensor) -> Tensor:
        return ((x0_NX.float() + 1) / 2).clamp(0, 1)

    def classifier(self) -> tuple[Callable[[Tensor], Tensor], Condition] | None:
        """That of `mini:digits`, for a model of its labels."""
        from rlalign.models.digit_images import load_classifier
        from rlalign.tasks.digits import LABELS

        if self.labels != LABELS:
            return None
        network = load_classifier()
        classes = {"label": torch.arange(len(LABELS), device=self.device)}
        return lambda x0_NX: network.to(x0_NX.device)(self.decode(x0_NX)), classes

    def config_dict(self) -> dict[str, Any]:
        sizes = {"labels": list(self.labels), "latent_shape": list(self.latent_shape)}
        return {"architecture": "mini_flow", **sizes, **self._shape}


class AdaptiveMlp(nn.Module):
    def __init__(self, size: int, num_labels: int, width: int, blocks: int) -> None:
        super().__init__()
        self.time = nn.Linear(TIME_DIM, width)
        self.label = nn.Embedding(num_labels + 1, width)  # the last: none
        self.enter = nn.Linear(size, width)
        self.blocks = nn.ModuleList(_MlpBlock(width) for _ in range(blocks))
        self.leave = zeroed(nn.Linear(width, size))

    def forward(self, z_NX: Tensor, time_ND: Tensor, label_N: Tensor) -> Tensor:
        cond_ND = F.silu(self.time(time_ND) + self.label(label_N))
        hidden_ND = self.enter(z_NX.flatten(1))
        for block in self.blocks:
            hidden_ND = block(hidden_ND, cond_ND)
        return self.leave(norm(hidden_ND)).reshape(z_NX.shape)


class _MlpBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.modulate = nn.Linear(width, 2 * width)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, hidden_ND: Tensor, cond_ND: Tensor) -> Tensor:
        scale_ND, shift_ND = self.modulate(cond_ND).chunk(2, dim=1)
        inner_ND = self.up(torch.addcmul(shift_ND, norm(hidden_ND), 1 + scale_ND))
        return hidden_ND + self.down(F.silu(inner_ND))


class TinyDiT(nn.Module):
    def __init__(
        self,
        channels: int,
        side: int,
        num_labels: int,
        width: int,
        blocks: int,
        heads: int,
        patch: int,
    ) -> None:
        super().__init__()
        self.patch = patch
        self.time = nn.Sequential(nn.Linear(TIME_DIM, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(num_labels + 1, width)  # the last: none
        self.enter = nn.Linear(channels * patch**2, width)
        self.blocks = nn.ModuleList(_DiTBlock(width, heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.leave = zeroed(nn.Linear(width, channels * patch**2))
        place_LD = place_features(side // patch, width)
        self.register_buffer("place_LD", place_LD, persistent=False)

    def forward(self, z_NX: Tensor, time_ND: Tensor, label_N: Tensor) -> Tensor:
        cond_ND = F.silu(self.time(time_ND) + self.label(label_N))
        patches_NCL = F.unfold(z_NX, self.patch, stride=self.patch)
        hidden_NLD = self.enter(patches_NCL.mT) + self.place_LD
        for block in self.blocks:
            hidden_NLD = block(hidden_NLD, cond_ND)
        patches_NCL = self.leave(self.norm(hidden_NLD)).mT
        return F.fold(patches_NCL, z_NX.shape[2:], self.patch, stride=self.patch)


class _DiTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulate = zeroed(nn.Linear(width, 6 * width))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden_NLD: Tensor, cond_ND: Tensor) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulate(cond_ND)[:, None].chunk(
            6, dim=2
        )
        attended_NLD = self._attend(norm(hidden_NLD) * (1 + scale) + shift)
        hidden_NLD = hidden_NLD + gate * attended_NLD
        inner_NLF = F.gelu(self.up(norm(hidden_NLD) * (1 + scale_mlp) + shift_mlp))
        return hidden_NLD + gate_mlp * self.down(inner_NLF)

    def _attend(self, hidden_NLD: Tensor) -> Tensor:
        rows, tokens, width = hidden_NLD.shape
        qkv = self.qkv(hidden_NLD).reshape(rows, tokens, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(1, 2).reshape(rows, tokens, width))


def time_features(sigma_N: Tensor, dim: int) -> Tensor:
    """Cosines and sines of 1000 sigma at `dim` / 2 frequencies from 1 down to 1 / 10,000: float32
    [N, dim]."""
    return _waves(TIME_SCALE * sigma_N.float(), dim)


def place_features(side: int, dim: int) -> Tensor:
    """The same of row and of column for a square of `side` tokens a side: [side * side, dim]."""
    at_L = torch.arange(side * side)
    return torch.cat([_waves(at_L // side, dim // 2), _waves(at_L % side, dim // 2)], dim=1)


def norm(hidden: Tensor) -> Tensor:
    """Layer norm without parameters of its own: the modulation has them."""
    return F.layer_norm(hidden, hidden.shape[-1:])


def zeroed(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _waves(at_N: Tensor, dim: int) -> Tensor:
    half = torch.arange(dim // 2, dtype=torch.float32, device=at_N.device)
    angle_NF = at_N.float()[:, None] * torch.exp(-math.log(MAX_PERIOD) / (dim // 2) * half)
    return torch.cat([angle_NF.cos(), angle_NF.sin()], dim=1)
