"""Embeddings of texts, for what RAIN calls similar: hashed n-grams, or a sentence encoder.

Shapes: N texts, T tokens, D dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from rlalign.rollout.search import Rate, Search
from rlalign.testtime.errors import DecodeError

SIZES = (2, 3, 4)  # of the n-grams
DIMENSIONS = 512
PRIME = np.uint64(0x100000001B3)  # FNV's
MIX = np.uint64(0x9E3779B97F4A7C15)
CACHED = 2  # sentence encoders held


class Embedder(Protocol):
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Float32 [N, D] of unit norm. Equal texts have equal embeddings."""
        ...


class NGrams:
    """Counts of character n-grams, hashed with a sign into `DIMENSIONS`. Needs no model, and is the
    same on every machine."""

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Embedder`."""
        return _count(texts) if texts else np.zeros((0, DIMENSIONS), np.float32)


class SentenceEncoder:
    """The mean of a transformer's last hidden states: how sentence encoders such as MiniLM's are
    read. `folder` holds it, or is its name on the hub. Raises DecodeError where it cannot be
    loaded."""

    def __init__(self, folder: str, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoTokenizer

        try:
            self._tokenizer = AutoTokenizer.from_pretrained(folder)
            self._model = AutoModel.from_pretrained(folder).eval().to(device)
        except (OSError, ValueError) as error:
            raise DecodeError(
                f"embedder={folder!r} is no folder of a sentence encoder, and none was found by "
                f"that name: {str(error).rstrip('.')}. Give one, or `ngrams`, or `none`."
            ) from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._device = device
        longest = getattr(self._model.config, "max_position_embeddings", None) or 512
        self._longest = min(longest, 512)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """See `Embedder`. Texts are cut to the encoder's length, 512 tokens at most."""
        import torch

        batch = self._tokenizer(
            [text or " " for text in texts],
            padding=True,
            truncation=True,
            max_length=self._longest,
            return_tensors="pt",
        ).to(self._device)
        with torch.no_grad():
            hidden_NTD = self._model(**batch).last_hidden_state.float()
        mask_NT1 = batch["attention_mask"][..., None].float()
        mean_ND = (hidden_NTD * mask_NT1).sum(1) / mask_NT1.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(mean_ND, dim=-1).cpu().numpy()


class Embeddings:
    """An embedder as a `Rater`: what all searches in flight embed in one round is one call."""

    def __init__(self, embedder: Embedder) -> None:
        self._embedder = embedder

    def rate(self, items: Sequence[tuple[Any, str]]) -> list[Any]:
        """An embedding for each text; None where it is not finite."""
        texts = list(dict.fromkeys(text for _, text in items))
        rows = self._embedder.embed(texts)
        found = {
            text: row if bool(np.isfinite(row).all()) else None
            for text, row in zip(texts, rows, strict=True)
        }
        return [found[text] for _, text in items]

    def __call__(self, texts: Sequence[str]) -> Search[list[np.ndarray | None]]:
        """Their embeddings; the search that asks is one of many."""
        if not texts:
            return []
        return (yield [Rate(self, None, text) for text in texts])


@lru_cache(maxsize=CACHED + 1)
def load_embeddings(name: str) -> Embeddings | None:
    """By the option `embedder`: `ngrams`, `none` (None) or a sentence encoder, which is loaded
    once."""
    if name == "none":
        return None
    return Embeddings(NGrams() if name == "ngrams" else SentenceEncoder(name))


def _count(texts: Sequence[str]) -> np.ndarray:
    """[N, DIMENSIONS]. The n-grams of all texts are hashed in one row of characters, and those that
    begin in one text and end in another left out."""
    # The marks make the first and last character count, and an empty text have an n-gram.
    codes = [
        np.frombuffer(f"\x02{text}\x03".encode("utf-32-le", "surrogatepass"), dtype="<u4")
        for text in texts
    ]
    code_T = np.concatenate(codes).astype(np.uint64)
    text_T = np.repeat(np.arange(len(texts)), [len(code) for code in codes])
    count_ND = np.zeros((len(texts), DIMENSIONS))
    for size in SIZES:
        end = max(0, len(code_T) - size + 1)
        hash_T = np.full(end, np.uint64(size))
        for i in range(size):
            hash_T = (hash_T * PRIME) ^ code_T[i : i + end]
        hash_T = hash_T * MIX
        hash_T = (hash_T ^ (hash_T >> np.uint64(29))) * MIX
        place_T = (hash_T >> np.uint64(40)) % np.uint64(DIMENSIONS)
        sign_T = 1.0 - 2.0 * (hash_T >> np.uint64(63)).astype(float)
        whole_T = text_T[:end] == text_T[size - 1 :]
        place_T = (text_T[:end] * DIMENSIONS + place_T.astype(np.int64))[whole_T]
        count_N = np.bincount(place_T, sign_T[whole_T], count_ND.size)
        count_ND += count_N.reshape(count_ND.shape)
    norm_N = np.linalg.norm(count_ND, axis=1)
    # Where every n-gram cancelled, any direction is as good.
    count_ND[norm_N == 0, 0] = norm_N[norm_N == 0] = 1.0
    return (count_ND / norm_N[:, None]).astype(np.float32)
