"""Searches on a model of transformers in this process: the exact engine, batched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from rlalign.algos.latent import Head
from rlalign.config.schema import KernelsConfig
from rlalign.models.head import LoraLinearLogProb, build_head
from rlalign.rollout.decoding import FAILED
from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams
from rlalign.rollout.hf import NOT_FINITE, HFEngine
from rlalign.rollout.hf_cache import base_model
from rlalign.rollout.in_process import check_ids, check_requests
from rlalign.rollout.limits import Limits
from rlalign.rollout.search import Ascend, Choose, Draw, Drawn, Latents, Reply, Request
from rlalign.rollout.search_answers import check_options, check_span, climb

ANY = SamplingParams(1)  # every request brings its own
UNLIMITED = 2**31


class HFSearch:
    """`SearchEngine` over any causal LM of transformers, plain or wrapped by PEFT, which stays the
    caller's and as it is.

    >>> engine = HFSearch(model, tokenizer)                                    # doctest: +SKIP
    >>> [drawn] = engine.answer([Draw((5, 9), SamplingParams(16, temperature=0.0))])
    """

    def __init__(self, model: nn.Module, tokenizer: Any, *, max_batch_size: int = 256) -> None:
        self.tokenizer = tokenizer
        self._engine = HFEngine(model, tokenizer, max_batch_size=max_batch_size)
        self._config = base_model(model).config.get_text_config()
        self.eos_ids = self._engine.eos_ids
        longest = getattr(self._config, "max_position_embeddings", None) or UNLIMITED
        self.limits = Limits(self._config.vocab_size, longest)

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """See `SearchEngine`."""
        kinds: dict[type, Callable[[Sequence[Any]], list[Reply]]] = {
            Draw: self._draw, Choose: self._choose, Latents: self._latents, Ascend: self._ascend,
        }  # fmt: skip
        replies: list[Reply] = [self._problem(request) for request in requests]
        for kind, reply_to in kinds.items():
            index = [
                i for i, r in enumerate(requests) if isinstance(r, kind) and replies[i] is None
            ]
            if index:
                for i, reply in zip(index, reply_to([requests[i] for i in index]), strict=True):
                    replies[i] = reply
        return replies

    @property
    def model(self) -> nn.Module:
        """The model. Raises EngineError after `close`."""
        return self._engine.model

    def close(self) -> None:
        """Let go of the model; further requests raise EngineError."""
        self._engine.close()

    def __enter__(self) -> HFSearch:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _problem(self, request: Request) -> EngineError | None:
        """Why a request cannot be served."""
        try:
            if isinstance(request, Draw):
                wanted = GenerateRequest("of a search", request.ids, (request.seed,))
                check_requests(self._config, [wanted], request.params)
            elif isinstance(request, Choose):
                check_ids(self._config, request.ids, 0, "a prompt of a search")
                check_options(request.options, self.limits.vocab)
            elif isinstance(request, Latents):
                check_ids(self._config, request.ids, 0, "a sequence of a search")
                check_span(request)
        except EngineError as error:
            return error
        return None

    def _draw(self, requests: Sequence[Draw]) -> list[Reply]:
        wanted = [GenerateRequest("", r.ids, (r.seed,), params=r.params) for r in requests]
        replies: list[Reply] = []
        for [row] in self._engine.rows(wanted, ANY):
            if row.finish_reason == FAILED:
                replies.append(EngineError(NOT_FINITE))
            else:
                ids, logp = tuple(row.tokens), tuple(row.logps)
                replies.append(Drawn(ids, logp, row.finish_reason, tuple(row.tops)))
        return replies

    def _choose(self, requests: Sequence[Choose]) -> list[Reply]:
        latents = self._engine.hidden_states([request.ids for request in requests])
        last_ND = torch.stack([latent_TD[-1] for latent_TD in latents])
        replies: list[Reply] = []
        logits_NV = read_head(self.model).logits(last_ND)
        for request, logits_V in zip(requests, logits_NV, strict=True):
            logp_V = logits_V.log_softmax(-1)
            chosen = tuple(logp_V[list(request.options)].tolist())
            finite = bool(torch.isfinite(logp_V.max()))
            replies.append(chosen if finite else EngineError(NOT_FINITE))
        return replies

    def _latents(self, requests: Sequence[Latents]) -> list[Reply]:
        hidden = self._engine.hidden_states(
            [request.ids[: request.stop - 1] for request in requests]
        )
        found = [
            latent_TD[request.start - 1 :].float().cpu()
            for request, latent_TD in zip(requests, hidden, strict=True)
        ]
        return [
            latent_ND if bool(latent_ND.isfinite().all()) else EngineError(NOT_FINITE)
            for latent_ND in found
        ]

    def _ascend(self, requests: Sequence[Ascend]) -> list[Reply]:
        head = read_head(self.model)
        return [climb(request, head, self._device) for request in requests]


def read_head(model: nn.Module) -> Head:
    """The head of a causal LM, with a LoRA adapter on it merged into a copy. Raises ModelError
    where the logits are not linear in the hidden states, but for a factor and a cap."""
    linear = build_head(base_model(model), KernelsConfig())
    bias = None if linear.bias is None else linear.bias.detach()
    with torch.no_grad():
        weight_VD = linear.weight.detach()
        if isinstance(linear, LoraLinearLogProb):
            low = linear.low_rank(torch.eye(weight_VD.shape[1]).to(weight_VD))
            if low is not None:
                weight_VD = weight_VD + (low.hidden @ low.weight.T).T.to(weight_VD.dtype)
    cap = linear.options["softcap"]
    return Head(weight_VD, bias, linear.options["logit_scale"], cap or 0.0)
