"""The exact rollout engine: the model's own forward pass over a KV cache, in this process.

Given the trainer's module it samples from the trainer's parameters themselves, so there is nothing
to synchronise; given a model of its own, `update_weights` copies. Prompts are read once per group,
rows leave as they finish (decoding.py), and every draw depends on a row's seed alone (sampling.py).

Shapes: B sequences, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlalign.rollout.decoding import FAILED, Decoder, RewindingDecoder, Row, decode
from rlalign.rollout.digest import WeightDigest
from rlalign.rollout.engine import Capabilities, EngineError, GenerateRequest, SamplingParams
from rlalign.rollout.hf_cache import CacheDecoder, base_model
from rlalign.rollout.hf_fast import FastDecoder, is_plain_decoder
from rlalign.rollout.in_process import check_ids, check_requests, evaluating
from rlalign.rollout.intake import take_weights
from rlalign.types import PolicyVersion, Sample, VersionSpan

SCORE_BYTES = 128 * 2**20  # logits that exist at once in `score`, or those of one sequence
NOT_FINITE = (
    "the model's logits are not finite, so nothing can be sampled from it: the weights diverged. "
    "Go back to an earlier checkpoint and lower the learning rate."
)
SCORE_TOKENS = 4096  # tokens, padding included, of one forward pass of `score`


class HFEngine:
    """`RolloutEngine` over any causal LM of transformers, plain or wrapped by PEFT.

    `model` stays where it is and is put back into its mode (train or eval, use of the global random
    generator) after every call. `version` is stamped on samples until the first `update_weights`.
    Weight names are those of `model.named_parameters()`; aliases of tied weights are accepted.

    >>> engine = HFEngine(model, tokenizer)                                    # doctest: +SKIP
    >>> [[sample]] = engine.generate([GenerateRequest("p", (5, 9), seeds=(1,))], params)
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        *,
        version: int = 0,
        max_batch_size: int = 256,
        shares_parameters: bool = True,
    ) -> None:
        if max_batch_size < 1:
            raise EngineError(f"max_batch_size is {max_batch_size}; it must be at least 1")
        self.capabilities = Capabilities(
            shares_parameters=shares_parameters, hidden_states=True, score_temperature=True
        )
        self._module: nn.Module | None = model
        self._tokenizer = tokenizer
        self._max_batch_size = max_batch_size
        self._config = base_model(model).config.get_text_config()
        self.eos_ids = eos_token_ids(model, tokenizer)
        digest = WeightDigest()
        for name, param in model.named_parameters():
            digest.add(name, param)
        self.version = PolicyVersion(version, digest.hexdigest())

    def generate(
        self, requests: Sequence[GenerateRequest], params: SamplingParams
    ) -> list[list[Sample]]:
        """One list of samples per request, one sample per seed, in order.

        Raises EngineError for requests that do not fit the model and logits that are not finite.
        """
        check_requests(self._config, requests, params)
        rows = self.rows(requests, params)
        if any(row.finish_reason == FAILED for completions in rows for row in completions):
            raise EngineError(NOT_FINITE)
        return [
            [self._sample(request, i, row) for i, row in enumerate(completions)]
            for request, completions in zip(requests, rows, strict=True)
        ]

    def rows(self, requests: Sequence[GenerateRequest], params: SamplingParams) -> list[list[Row]]:
        """As `generate`, for requests that fit the model, before they are made into samples. A row
        whose logits are not finite ends there, alone, with the reason FAILED."""
        with evaluating(self.model), torch.inference_mode():
            decoder = self._decoder(requests, params)
            return decode(
                decoder, requests, params, self.eos_ids, self._max_batch_size, self._device
            )

    def score(self, sequences: Sequence[Sequence[int]], temperature: float = 1.0) -> list[Tensor]:
        """Log-prob of every token given its prefix: float32 [len - 1] per sequence, on the CPU.

        Raises EngineError for an empty sequence, a sequence that does not fit the model's context,
        and a temperature that is not positive.
        """
        if not temperature > 0:
            raise EngineError(f"score at temperature {temperature}: it must be above 0")
        limit = min(SCORE_TOKENS, SCORE_BYTES // (4 * self._config.vocab_size))
        scores: list[Tensor] = [torch.empty(0)] * len(sequences)
        with evaluating(self.model), torch.no_grad():
            for index, ids_BT, mask_BT in self._padded(sequences, limit):
                logits_BTV = self.model(
                    input_ids=ids_BT, attention_mask=mask_BT, use_cache=False
                ).logits
                for i, logits_TV, ids_T in zip(index, logits_BTV, ids_BT, strict=True):
                    target_T = ids_T[1 : len(sequences[i]), None]
                    scaled_TV = logits_TV[: len(target_T)].float() / temperature
                    logp_T = scaled_TV.gather(-1, target_T)[:, 0] - scaled_TV.logsumexp(-1)
                    scores[i] = logp_T.cpu()
        return scores

    def hidden_states(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """What the language-model head reads: [len, D] per sequence, in the model's dtype, on its
        device. Raises EngineError as `score` does."""
        hidden: list[Tensor] = [torch.empty(0)] * len(sequences)
        with evaluating(self.model), torch.no_grad():
            decoder = base_model(self.model).get_decoder()
            for index, ids_BT, mask_BT in self._padded(sequences, SCORE_TOKENS):
                output = decoder(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False)
                for row, i in enumerate(index):
                    hidden[i] = output.last_hidden_state[row, : len(sequences[i])].clone()
        return hidden

    def update_weights(
        self, parameters: Iterable[tuple[str, Tensor]], version: int
    ) -> PolicyVersion:
        """Take new weights and return `version` with the digest of what was received.

        Tensors that are the model's own storage are not copied. Raises EngineError, with nothing
        changed, for weights that are not this model's or not finite (see intake.py).
        """
        digest = take_weights(self.model, parameters)
        self.version = PolicyVersion(version, digest)
        return self.version

    def sleep(self) -> None:
        """Nothing: the weights are the trainer's, and no cache outlives a call."""

    def wake(self) -> None:
        """Nothing, see `sleep`."""

    def close(self) -> None:
        """Let go of the model; further calls raise EngineError."""
        self._module = None

    @property
    def model(self) -> nn.Module:
        """The model. Raises EngineError after `close`."""
        if self._module is None:
            raise EngineError("the engine was closed; build a new HFEngine")
        return self._module

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _decoder(self, requests: Sequence[GenerateRequest], params: SamplingParams) -> Decoder:
        longest = max(
            (len(r.token_ids) + r.limited(params).max_completion_length for r in requests),
            default=0,
        )
        return make_decoder(self.model, self._tokenizer, longest)

    def _sample(self, request: GenerateRequest, i: int, row: Row) -> Sample:
        return Sample(
            prompt_id=request.prompt_id,
            index=request.first_index + i,
            token_ids=tuple(row.tokens),
            logp=tuple(row.logps),
            finish_reason=row.finish_reason,
            spans=(VersionSpan(len(row.tokens), self.version.version),),
            text=self._tokenizer.decode(row.tokens, skip_special_tokens=True),
            top=tuple(row.tops),
        )

    def _padded(
        self, sequences: Sequence[Sequence[int]], max_tokens: int
    ) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """(indices, ids, mask) of batches of sequences of similar length, padded on the right, with
        at most `max_tokens` tokens each (or one sequence)."""
        for i, sequence in enumerate(sequences):
            check_ids(self._config, sequence, 0, f"sequence {i}")
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        while order:
            width = len(sequences[order[0]])
            count = max(1, max_tokens // width)
            index, order = order[:count], order[count:]
            ids_BT = torch.zeros(len(index), width, dtype=torch.long)
            mask_BT = torch.zeros_like(ids_BT)
            for row, i in enumerate(index):
                ids_BT[row, : len(sequences[i])] = torch.tensor(sequences[i])
                mask_BT[row, : len(sequences[i])] = 1
            yield index, ids_BT.to(self._device), mask_BT.to(self._device)


def make_decoder(model: nn.Module, tokenizer: Any, longest: int) -> RewindingDecoder:
    """The quickest decoder that computes what `model` does, for rows of up to `longest` tokens."""
    if is_plain_decoder(model, longest):
        return FastDecoder(model, longest)
    pad_id = tokenizer.pad_token_id
    return CacheDecoder(model, 0 if pad_id is None else pad_id)


def eos_token_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every token that ends a completion: the tokenizer's, and those of the generation config."""
    config = getattr(base_model(model), "generation_config", None)
    ids = getattr(config, "eos_token_id", None)
    listed = ids if isinstance(ids, list) else [ids]
    return frozenset(i for i in [tokenizer.eos_token_id, *listed] if i is not None)
