"""The rollout engine of masked-diffusion language models: completions are filled, not continued.

    [padding, prompt, L masks]  --unmask.py-->  L tokens  --eos_policy-->  completion

It samples from the trainer's parameters themselves, as the hf engine does. Completions of equal
length are filled together, those of similar prompts side by side; a sample depends on its seed,
prompt and length alone. Note that here `max_completion_length` is the length of the canvas, which
the model sees: a shorter one is not the beginning of a longer one.

Legend: B rows, T columns, L completion length, M places.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlalign.config.schema import DiffusionConfig
from rlalign.models.masked_diffusion import Canvas, MaskedDiffusionLM
from rlalign.rollout.digest import WeightDigest
from rlalign.rollout.engine import Capabilities, EngineError, GenerateRequest, SamplingParams
from rlalign.rollout.hf import eos_token_ids
from rlalign.rollout.in_process import check_ids, check_requests, evaluating
from rlalign.rollout.intake import take_weights
from rlalign.rollout.unmask import Unmasked, UnmaskParams, unmask
from rlalign.types import FINISH_LENGTH, FINISH_STOP, PolicyVersion, Sample, VersionSpan

SCORE_TOKENS = 4096  # tokens of one forward pass of `score`, or those of one sequence


@dataclass(frozen=True, slots=True)
class GenerateStats:
    """What one `generate` took. Forward passes are counted per row: a batch of 8 is 8.

    >>> GenerateStats(samples=2, tokens=64, forwards=40)      # 1.6 tokens per forward
    """

    samples: int
    tokens: int  # places that were filled, whatever became of them
    forwards: int

    @property
    def tokens_per_forward(self) -> float:
        return self.tokens / self.forwards if self.forwards else 0.0


@dataclass(frozen=True, slots=True)
class _Row:
    """One completion to be made, and whose it is."""

    request: int
    index: int
    prompt: tuple[int, ...]
    seed: int
    length: int
    params: SamplingParams


class MaskedDiffusionEngine:
    """`RolloutEngine` over a masked-diffusion language model.

    `model` stays where it is and is put back into its mode after every call. `version` is stamped
    on samples until the first `update_weights`, whose names are those of
    `model.model.named_parameters()`. `last_stats` are those of the last `generate`.

    >>> engine = MaskedDiffusionEngine(model, tokenizer, DiffusionConfig())    # doctest: +SKIP
    >>> [[sample]] = engine.generate([GenerateRequest("p", (5, 9), seeds=(1,))], params)
    """

    capabilities = Capabilities(shares_parameters=True, hidden_states=False, score_temperature=True)

    def __init__(
        self,
        model: MaskedDiffusionLM,
        tokenizer: Any,
        diffusion: DiffusionConfig,
        *,
        version: int = 0,
        max_batch_size: int = 256,
    ) -> None:
        if max_batch_size < 1:
            raise EngineError(f"max_batch_size is {max_batch_size}; it must be at least 1")
        self.last_stats = GenerateStats(0, 0, 0)
        _check_fit(model, diffusion)
        self._lm: MaskedDiffusionLM | None = model
        self._config = model.model.config.get_text_config()
        self._tokenizer = tokenizer
        self._diffusion = diffusion
        self._max_batch_size = max_batch_size
        self._steps = diffusion.steps
        self._eos_ids = eos_token_ids(model.model, tokenizer)
        digest = WeightDigest()
        for name, param in model.model.named_parameters():
            digest.add(name, param)
        self.version = PolicyVersion(version, digest.hexdigest())

    def generate(
        self, requests: Sequence[GenerateRequest], params: SamplingParams
    ) -> list[list[Sample]]:
        """One list of samples per request, one sample per seed, in order. `Sample.logp` are the
        log-probs at which the tokens were committed, `Sample.steps` when that was.

        Raises EngineError for requests that do not fit the model and logits that are not finite.
        """
        check_requests(self._config, requests, params)
        self._refuse_masks(requests)
        if any(request.limited(params).num_top for request in requests):
            raise EngineError(
                "num_top asks for the likeliest tokens of each step, and a masked-diffusion model "
                "decides many at once: leave it at 0"
            )
        samples: list[list[Any]] = [[None] * len(request.seeds) for request in requests]
        tokens = forwards = 0
        with evaluating(self._model), torch.inference_mode():
            for rows in self._batches(requests, params):
                filled = self._fill(rows)
                tokens += len(rows) * rows[0].length
                forwards += int(filled.forwards_B.sum())
                for row, sample in zip(rows, self._read(rows, requests, filled), strict=True):
                    samples[row.request][row.index] = sample
        self.last_stats = GenerateStats(sum(map(len, samples)), tokens, forwards)
        return samples

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[Tensor]:
        """Log-prob of every token but the first given ALL others: float32 [len - 1], on the CPU.

        Such a model has no log-prob of a token given its prefix. This one takes a forward pass per
        token, with that token masked, and depends on every weight: it tells whether two sides hold
        the same ones. Raises EngineError as `HFEngine.score` does.
        """
        if not temperature > 0:
            raise EngineError(f"score at temperature {temperature}: it must be above 0")
        for i, sequence in enumerate(sequences):
            check_ids(self._config, sequence, 0, f"sequence {i}")
        with evaluating(self._model), torch.inference_mode():
            return [masked_scores(self._model, sequence, temperature) for sequence in sequences]

    def update_weights(
        self, parameters: Iterable[tuple[str, Tensor]], version: int
    ) -> PolicyVersion:
        """Take new weights and return `version` with the digest of what was received; all or
        nothing, as `HFEngine.update_weights`."""
        digest = take_weights(self._model.model, parameters)
        self.version = PolicyVersion(version, digest)
        return self.version

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """`generate` takes `eval_steps` in here."""
        self._steps = self._diffusion.eval_steps or self._diffusion.steps
        try:
            yield
        finally:
            self._steps = self._diffusion.steps

    def sleep(self) -> None:
        """Nothing: the weights are the trainer's, and no cache outlives a call."""

    def wake(self) -> None:
        """Nothing, see `sleep`."""

    def close(self) -> None:
        """Let go of the model; further calls raise EngineError."""
        self._lm = None

    @property
    def _model(self) -> MaskedDiffusionLM:
        if self._lm is None:
            raise EngineError("the engine was closed; build a new MaskedDiffusionEngine")
        return self._lm

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def _refuse_masks(self, requests: Sequence[GenerateRequest]) -> None:
        for request in requests:
            if self._model.mask_id in request.token_ids:
                raise EngineError(
                    f"prompt {request.prompt_id!r} holds the mask token {self._model.mask_id}, "
                    "which stands for what is to be filled in: take it out of the data"
                )

    def _batches(
        self, requests: Sequence[GenerateRequest], params: SamplingParams
    ) -> Iterator[list[_Row]]:
        """All rows, at most `max_batch_size` of one completion length and way at a time."""
        rows = []
        for r, request in enumerate(requests):
            length, own = request.limited(params).max_completion_length, request.params or params
            rows += [
                _Row(r, i, request.token_ids, seed, length, own)
                for i, seed in enumerate(request.seeds)
            ]
        rows.sort(key=lambda row: (row.length, dataclasses.astuple(row.params), len(row.prompt)))
        for _, alike in itertools.groupby(rows, lambda row: (row.length, row.params)):
            same = list(alike)
            for start in range(0, len(same), self._max_batch_size):
                yield same[start : start + self._max_batch_size]

    def _fill(self, rows: Sequence[_Row]) -> Unmasked:
        length, width = rows[0].length, max(len(row.prompt) for row in rows)
        ids_BT = torch.full((len(rows), width + length), self._model.mask_id)
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        for i, row in enumerate(rows):
            pad = width - len(row.prompt)
            ids_BT[i, :pad], real_BT[i, :pad] = 0, False
            ids_BT[i, pad:width] = torch.tensor(row.prompt)
        padded = not bool(real_BT.all())
        canvas = Canvas(ids_BT.to(self._device), real_BT.to(self._device) if padded else None)
        seed_B = torch.tensor([row.seed for row in rows], device=self._device)
        how = self._unmask_params(length, rows[0].params)
        return unmask(self._model, canvas, how, seed_B, start=width)

    def _unmask_params(self, length: int, params: SamplingParams) -> UnmaskParams:
        """`steps` are shared out over a completion of `params`; one of another length takes as
        many per token."""
        config, whole = self._diffusion, params.max_completion_length
        block = self._model.block_size or config.block_size or length
        steps = whole if self._steps is None else self._steps
        return UnmaskParams(
            steps=max(1, math.ceil(steps * min(block, length) / whole)),
            block_size=block,
            temperature=params.temperature,
            order=config.order,
            alg_temp=config.alg_temp,
            top_p=params.top_p,
            top_k=params.top_k,
            threshold=config.threshold,
            factor=config.factor,
            cfg_scale=config.cfg_scale,
            edit_threshold=config.edit_threshold,
            suppress_ids=tuple(config.suppress_ids),
            eos_ids=() if params.ignore_eos else tuple(sorted(self._stops(params))),
            eos_confidence=config.eos_confidence,
            eos_early_stop=config.eos_early_stop,
            cache=config.cache,
        )

    def _stops(self, params: SamplingParams) -> frozenset[int]:
        return frozenset() if params.ignore_eos else self._eos_ids | set(params.stop_token_ids)

    def _read(
        self,
        rows: Sequence[_Row],
        requests: Sequence[GenerateRequest],
        filled: Unmasked,
    ) -> Iterator[Sample]:
        """The samples of the rows of a filled canvas."""
        stops, length = self._stops(rows[0].params), rows[0].length
        parts = (filled.ids_BT, filled.logp_BT, filled.step_BT)
        columns = (part_BT[:, -length:].tolist() for part_BT in parts)
        for row, ids, logps, steps in zip(rows, *columns, strict=True):
            request = requests[row.request]
            end = next((i + 1 for i, token in enumerate(ids) if token in stops), None)
            kept = end if end and self._diffusion.eos_policy in (None, "drop") else length
            yield Sample(
                prompt_id=request.prompt_id,
                index=request.first_index + row.index,
                token_ids=tuple(ids[:kept]),
                logp=tuple(logps[:kept]),
                finish_reason=FINISH_STOP if end else FINISH_LENGTH,
                spans=(VersionSpan(kept, self.version.version),),
                text=self._tokenizer.decode(ids[:end], skip_special_tokens=True),
                steps=tuple(steps[:kept]),
            )


def _check_fit(model: MaskedDiffusionLM, diffusion: DiffusionConfig) -> None:
    """Raise EngineError for a sampler that is not for this model."""
    if model.block_size and diffusion.block_size not in (None, model.block_size):
        raise EngineError(
            f"rollout.diffusion.block_size={diffusion.block_size}: the model attends by blocks of "
            f"{model.block_size}, and is filled by them; leave it out"
        )
    if wrong := [i for i in diffusion.suppress_ids if not 0 <= i < model.vocab_size]:
        raise EngineError(
            f"rollout.diffusion.suppress_ids names the token {wrong[0]}, the model knows 0 to "
            f"{model.vocab_size - 1}"
        )


def masked_scores(
    model: MaskedDiffusionLM, sequence: Sequence[int], temperature: float = 1.0
) -> Tensor:
    """Log-prob of each token 1.. of `sequence` given all the others: float32 [len - 1], on the
    CPU."""
    device = next(model.parameters()).device
    ids_T = torch.tensor(list(sequence), device=device)
    column_M = torch.arange(1, len(ids_T), device=device)
    scores = [torch.empty(0)]
    for column_m in column_M.split(max(1, SCORE_TOKENS // len(ids_T))) if len(column_M) else ():
        row_m = torch.arange(len(column_m), device=device)
        ids_mT = ids_T.repeat(len(column_m), 1)
        ids_mT[row_m, column_m] = model.mask_id
        scores.append(
            model.logp(Canvas(ids_mT), row_m, column_m, ids_T[column_m], temperature).cpu()
        )
    return torch.cat(scores)
