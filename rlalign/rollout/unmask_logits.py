"""The logits that a sampler of a masked-diffusion model decides by.

    guided   un + (s + 1) (cond - un)       un: the same canvas with all that was given masked

Source of the guidance: LLaDA (arXiv 2502.09992). It holds before temperature and confidence.

Caches of keys and values (Fast-dLLM, arXiv 2505.22618) are made when a block begins, and then hold
for its steps: `prefix` those of the columns before the block, `dual` also those behind it. With
full attention every other column sees the block, so what is kept is stale from the block's second
step on. A model with blocks of its own never sees a later one: there what is kept is exact, and
grows block by block.

Legend: B rows, A rows that are asked for, C rows that a cache holds, T columns, W columns asked
for, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.models.masked_attention import KV
from rlalign.models.masked_diffusion import Canvas, MaskedDiffusionLM, MaskedModel
from rlalign.rollout.engine import EngineError

CACHES = ("none", "prefix", "dual")


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A block that begins: its columns, the rows that are not full, and the number of columns that
    are final in all of those."""

    low: int
    high: int
    rows_C: Tensor
    final: int


class Reader:
    """Reads a canvas as it is filled. `free_BT` says what is filled, the rest was given.
    EngineError for a cache of a model that has none."""

    def __init__(
        self,
        model: MaskedModel,
        canvas: Canvas,
        free_BT: Tensor,
        *,
        cfg_scale: float = 0.0,
        suppress_ids: tuple[int, ...] = (),
        cache: str = "none",
    ) -> None:
        self._mask_id, self._free_BT, self._cfg_scale = model.mask_id, free_BT, cfg_scale
        banned = [model.mask_id, *suppress_ids]
        self._banned = torch.tensor(banned, device=free_BT.device)
        self._plain = not (cfg_scale or suppress_ids)
        views = 2 if cfg_scale else 1
        self._views = [_view(model, canvas, cache) for _ in range(views)]

    def begin(self, ids_BT: Tensor, span: Span) -> None:
        """Keep what a cache keeps while a block is filled."""
        for view, seen_BT in zip(self._views, self._canvases(ids_BT), strict=False):
            view.begin(seen_BT, span)

    def logits(self, ids_BT: Tensor, rows_A: Tensor, low: int, high: int) -> Tensor:
        """Of columns `low` to `high` of the given rows: float32 [A, W, V], guided, -inf at the mask
        token and what is suppressed. With a cache, the columns are of the block that began last."""
        found = [
            view.logits(seen_BT, rows_A, low, high)
            for view, seen_BT in zip(self._views, self._canvases(ids_BT), strict=False)
        ]
        logits_AWV = found[0]
        if self._cfg_scale:
            logits_AWV = found[1] + (self._cfg_scale + 1) * (logits_AWV - found[1])
        if self._plain:
            return logits_AWV
        return logits_AWV.index_fill(-1, self._banned, -torch.inf)  # the mask: no -inf minus -inf

    def _canvases(self, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
        """What the views read: the canvas, and the one without what was given."""
        return ids_BT, torch.where(self._free_BT, ids_BT, self._mask_id)


def _view(model: MaskedModel, canvas: Canvas, cache: str) -> _Whole | _Cached:
    if cache not in CACHES:
        raise EngineError(f"cache {cache!r} is unknown; it is one of {', '.join(CACHES)}")
    if cache == "none":
        return _Whole(model, canvas)
    if not isinstance(model, MaskedDiffusionLM):
        raise EngineError(
            f"{type(model).__name__} keeps no keys and values, so cache={cache} is not for it: use "
            "cache=none"
        )
    return _Cached(model, canvas, behind=cache == "dual" and not model.block_size)


class _Whole:
    """Runs everything, every time."""

    def __init__(self, model: MaskedModel, canvas: Canvas) -> None:
        self._model, self._canvas = model, canvas

    def begin(self, ids_BT: Tensor, span: Span) -> None:
        """Nothing is kept."""

    def logits(self, ids_BT: Tensor, rows_A: Tensor, low: int, high: int) -> Tensor:
        return self._model.logits(self._canvas.with_ids(ids_BT).rows(rows_A), low, high)


class _Cached:
    """Runs the block and what is behind it, or (`behind`) the block alone."""

    def __init__(self, model: MaskedDiffusionLM, canvas: Canvas, *, behind: bool) -> None:
        self._model, self._canvas, self._behind = model, canvas, behind
        self._begun_kv, self._begun_C = KV(), torch.arange(len(canvas), device=canvas.ids_BT.device)
        self._kv, self._rows_A = self._begun_kv, self._begun_C
        self._span = Span(0, 0, self._begun_C, 0)

    def begin(self, ids_BT: Tensor, span: Span) -> None:
        canvas = self._canvas.with_ids(ids_BT).rows(span.rows_C)
        if self._model.block_size:
            kept = self._begun_kv.rows(_places(span.rows_C, self._begun_C))
            self._begun_kv = self._model.prefill(canvas, span.final, kept)
        elif self._behind:
            self._begun_kv = self._model.prefill(canvas, ids_BT.shape[1])
        else:
            self._begun_kv = self._model.prefill(canvas, span.low)
        self._begun_C, self._span = span.rows_C, span
        self._kv, self._rows_A = self._begun_kv, span.rows_C

    def logits(self, ids_BT: Tensor, rows_A: Tensor, low: int, high: int) -> Tensor:
        if not torch.equal(rows_A, self._rows_A):
            self._kv = self._begun_kv.rows(_places(rows_A, self._begun_C))
            self._rows_A = rows_A
        canvas = self._canvas.with_ids(ids_BT).rows(rows_A)
        if not self._behind:
            return self._model.logits_cached(canvas, self._kv, low, high)
        span = self._span
        logits_AWV = self._model.logits_within(canvas, self._kv, span.low, span.high)
        return logits_AWV[:, low - span.low : high - span.low]


def _places(rows_A: Tensor, among_C: Tensor) -> Tensor:
    """Where each of the rows is among the (ascending) others."""
    return torch.searchsorted(among_C, rows_A)
