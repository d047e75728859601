"""Rewards by the usual scorers of images: CLIP score, PickScore, aesthetic heads.

All are a CLIP model (transformers' CLIPModel) with something on top:

    clip_score   cos(text, image), or with `scaled` that times exp(logit_scale): PickScore (arXiv
                 2305.01569) is so trained a CLIP, CLIP score (2104.08718) is the plain cosine
    aesthetic    a head of linear layers on the normalised image embedding (LAION's predictors)

Images arrive as [C, H, W] in [0, 1] and are resized, cropped and normalised here, on tensors, with
the mean and std of the model's preprocessor_config.json.

Legend: N images, U different prompts, D embedding.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rlalign.rewards.images import stack
from rlalign.rewards.verdict import RewardError

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipScorer:
    """The base of both: a CLIP model that `load` reads, and the image embeddings it gives."""

    def __init__(self, path: str, batch_size: int, device: str) -> None:
        if batch_size < 1:
            raise RewardError(f"CLIP model {path!r}: batch_size = {batch_size}; allowed: >= 1")
        self._path, self._batch_size, self._device = path, batch_size, device

    def load(self) -> None:
        """Read the weights. RewardError when the folder or hub id is no CLIP model."""
        from transformers import AutoConfig, CLIPModel

        try:
            kind = AutoConfig.from_pretrained(self._path).model_type
            if kind != "clip":
                raise RewardError(f"{self._path!r} is no CLIP model, but a {kind}")
            model, info = CLIPModel.from_pretrained(  # type: ignore[misc]
                self._path, use_safetensors=True, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            raise RewardError(f"CLIP model {self._path!r} cannot be loaded: {error}") from error
        if info["missing_keys"]:
            raise RewardError(
                f"CLIP model {self._path!r} is incomplete: its weights lack "
                f"{sorted(info['missing_keys'])}, which would be random"
            )
        if self._device == "auto":
            self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.to(self._device).eval()
        self._size = model.config.vision_config.image_size
        self._mean, self._std = self._normalisation()

    @torch.inference_mode()
    def _image_embeddings(self, completions: list[Any]) -> Tensor:
        """[N, D] of length 1, float32."""
        pixels_NCHW = preprocess(stack(completions), self._size, self._mean, self._std)
        rows = [
            self._model.get_image_features(pixel_values=batch.to(self._device)).pooler_output
            for batch in pixels_NCHW.split(self._batch_size)
        ]
        return F.normalize(torch.cat(rows).float(), dim=1)

    def _normalisation(self) -> tuple[Tensor, Tensor]:
        from transformers.utils.hub import cached_file

        file = cached_file(
            self._path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False
        )
        said = json.loads(Path(file).read_text()) if file else {}
        mean, std = said.get("image_mean", CLIP_MEAN), said.get("image_std", CLIP_STD)
        return torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]


class ClipScore(ClipScorer):
    """The reward made by `clip_score`."""

    def __init__(self, path: str, scaled: bool, batch_size: int, device: str) -> None:
        super().__init__(path, batch_size, device)
        self._scaled = scaled

    def load(self) -> None:
        from transformers import AutoTokenizer

        super().load()
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self._path)
        except (OSError, ValueError) as error:
            raise RewardError(f"{self._path!r} has no usable tokenizer: {error}") from error

    def __call__(self, prompts: list[Any], completions: list[Any], **_: Any) -> list[float | None]:
        row = {text: u for u, text in enumerate(dict.fromkeys(map(_text, prompts)))}
        text_ND = self._text_embeddings(list(row))[[row[_text(prompt)] for prompt in prompts]]
        agreement_N = (self._image_embeddings(completions) * text_ND).sum(1)
        if self._scaled:
            agreement_N = agreement_N * self._model.logit_scale.detach().exp()
        return agreement_N.tolist()

    @torch.inference_mode()
    def _text_embeddings(self, texts: list[str]) -> Tensor:
        """[U, D] of length 1, float32. A text longer than the model reads is cut."""
        rows = []
        limit = self._model.config.text_config.max_position_embeddings
        for start in range(0, len(texts), self._batch_size):
            batch = self._tokenizer(
                texts[start : start + self._batch_size],
                padding=True,
                truncation=True,
                max_length=limit,
                return_tensors="pt",
            )
            seen = {name: batch[name].to(self._device) for name in ("input_ids", "attention_mask")}
            rows.append(self._model.get_text_features(**seen).pooler_output)
        return F.normalize(torch.cat(rows).float(), dim=1)


class Aesthetic(ClipScorer):
    """The reward made by `aesthetic`."""

    def __init__(self, path: str, head: str, batch_size: int, device: str) -> None:
        super().__init__(path, batch_size, device)
        self._head = head

    def load(self) -> None:
        super().load()
        self._layers = read_head(self._head)

    def __call__(self, completions: list[Any], **_: Any) -> list[float | None]:
        hidden_ND = self._image_embeddings(completions).cpu()
        for weight, bias in self._layers:
            hidden_ND = F.linear(hidden_ND, weight, bias)
        return hidden_ND[:, 0].tolist()


def clip_score(
    path: str, scaled: bool = False, batch_size: int = 64, device: str = "auto"
) -> ClipScore:
    """How well image and prompt agree: the cosine of their embeddings, times exp(logit_scale) with
    `scaled` (PickScore: path yuvalkirstain/PickScore_v1). `path` is an HF folder or hub id."""
    return ClipScore(path, scaled, batch_size, device)


def aesthetic(path: str, head: str, batch_size: int = 64, device: str = "auto") -> Aesthetic:
    """A score of looks, whatever the prompt: the head in the safetensors file `head` on the image
    embedding of the CLIP model at `path` (openai/clip-vit-large-patch14 for LAION's heads, whose
    .pth files are pickles: convert them once)."""
    return Aesthetic(path, head, batch_size, device)


def preprocess(image_NCHW: Tensor, size: int, mean: Tensor, std: Tensor) -> Tensor:
    """Grey to RGB, the shorter side to `size` (bicubic), the middle square, normalised."""
    rgb_NCHW = image_NCHW.expand(-1, 3, -1, -1)
    height, width = rgb_NCHW.shape[2:]
    scale = size / min(height, width)
    new = (max(size, round(height * scale)), max(size, round(width * scale)))
    if new != (height, width):
        rgb_NCHW = F.interpolate(rgb_NCHW, new, mode="bicubic", antialias=True).clamp(0, 1)
    top, left = (new[0] - size) // 2, (new[1] - size) // 2
    return (rgb_NCHW[:, :, top : top + size, left : left + size] - mean) / std


def read_head(path: str) -> list[tuple[Tensor, Tensor]]:
    """The (weight, bias) of the linear layers in a safetensors file, in the order of the numbers in
    their names. RewardError for a file that does not chain to one number."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RewardError(f"aesthetic head {path!r} cannot be read: {error}") from error
    names = [name.removesuffix("weight") for name in tensors if name.endswith("weight")]
    names.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    try:
        layers = [(tensors[f"{name}weight"], tensors[f"{name}bias"]) for name in names]
    except KeyError as error:
        raise RewardError(f"aesthetic head {path!r} lacks {error}: it is no linear head") from error
    widths = [weight.shape[0] for weight, _ in layers]
    if not layers or widths[-1] != 1:
        raise RewardError(f"aesthetic head {path!r} has layers of width {widths}, not one at last")
    return [(weight.float(), bias.float()) for weight, bias in layers]


def _text(prompt: Any) -> str:
    """A prompt as one text: of messages, the last one's content."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
