"""The planner of ToyDrive: a masked-diffusion model of waypoint tokens, given a scene.

A transformer over the tokens of a plan and those of the scene, in which everything sees everything;
it knows neither time nor order (models/masked_diffusion.py has the contract). The scene comes as
`canvas.cond`, the features of tasks/driving/features.py.

Legend: B rows, T = 2N tokens of a plan, S of the scene, L = T + S, D width, V = size + 1 tokens, of
which the last is the mask.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlalign.models.errors import ModelError
from rlalign.models.flow import WEIGHTS_FILE
from rlalign.models.masked_diffusion import Canvas
from rlalign.tasks.driving.codebook import Codebook
from rlalign.tasks.driving.features import FEATURE_SIZES, scene_features
from rlalign.tasks.driving.scenes import NUM_WAYPOINTS, Scene

CONFIG_FILE = "config.json"
NUM_TOKENS = 2 * NUM_WAYPOINTS


class Planner(nn.Module):
    """Plans of 8 waypoints in the tokens of `codebook`: 418,673 parameters by default."""

    block_size = 0

    def __init__(
        self,
        codebook: Codebook | None = None,
        width: int = 96,
        layers: int = 3,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.codebook = codebook or Codebook()
        self.mask_id, self.vocab_size = self.codebook.size, self.codebook.size + 1
        self._shape = {"width": width, "layers": layers, "heads": heads}
        num_places = NUM_TOKENS + sum(num for num, _ in FEATURE_SIZES.values())
        self.token = nn.Embedding(self.vocab_size, width)
        self.place_LD = nn.Parameter(0.02 * torch.randn(num_places, width))
        self.enter = nn.ModuleDict(
            {name: nn.Linear(size, width) for name, (_, size) in FEATURE_SIZES.items()}
        )
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, self.codebook.size)

    def hidden(self, canvas: Canvas) -> Tensor:
        """Final hidden states [B, T, D]. Raises ModelError for a canvas of another shape."""
        cond = canvas.cond
        if cond is None or set(cond) != set(FEATURE_SIZES) or canvas.ids_BT.shape[1] != NUM_TOKENS:
            raise ModelError(
                f"the planner reads {NUM_TOKENS} tokens and, as cond, {sorted(FEATURE_SIZES)}; "
                f"this canvas has {canvas.ids_BT.shape[1]} and {sorted(cond or ())}: make it with "
                "blank_canvas"
            )
        context = [self.enter[name](cond[name]) for name in FEATURE_SIZES]
        hidden_BLD = torch.cat([self.token(canvas.ids_BT), *context], 1) + self.place_LD
        for block in self.blocks:
            hidden_BLD = block(hidden_BLD)
        return self.norm(hidden_BLD[:, :NUM_TOKENS])

    def logits(self, canvas: Canvas, start: int = 0, stop: int | None = None) -> Tensor:
        """As `MaskedModel` says: float32 [B, stop - start, V]."""
        return F.pad(self.head(self.hidden(canvas)[:, start:stop]), (0, 1), value=-torch.inf)

    def blank_canvas(self, scenes: Sequence[Scene]) -> Canvas:
        """A plan of mask tokens for each scene."""
        device = self.place_LD.device
        ids_BT = torch.full((len(scenes), NUM_TOKENS), self.mask_id, device=device)
        features = {name: value.to(device) for name, value in scene_features(scenes).items()}
        return Canvas(ids_BT, cond=features)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `load_planner` reads."""
        grid = {"extent_m": self.codebook.extent_m, "step_m": self.codebook.step_m}
        config = {"architecture": "toydrive_planner", "codebook": grid, **self._shape}
        (Path(folder) / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(self.state_dict(), Path(folder) / WEIGHTS_FILE)


def load_planner(folder: str | Path) -> Planner:
    """Raises ModelError for a folder without a planner."""
    try:
        config = json.loads((Path(folder) / CONFIG_FILE).read_text())
        if config.pop("architecture") != "toydrive_planner":
            raise ValueError("another architecture")
        planner = Planner(Codebook(**config.pop("codebook")), **config)
        planner.load_state_dict(load_file(Path(folder) / WEIGHTS_FILE))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise ModelError(
            f"{folder} holds no planner ({error}): take a folder that build_planner returned"
        ) from error
    return planner.eval().requires_grad_(False)


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden_BLD: Tensor) -> Tensor:
        qkv = self.qkv(self.before(hidden_BLD)).unflatten(2, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value)
        hidden_BLD = hidden_BLD + self.out(attended.transpose(1, 2).flatten(2))
        return hidden_BLD + self.down(F.gelu(self.up(self.between(hidden_BLD))))
