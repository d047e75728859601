"""Several language models in one step: what they must have in common, and their caches.

Shapes: B rows, K tokens that are read at once, V tokens that all models know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from peft import PeftModel
from torch import Tensor, nn

from rlalign.config.schema import ModelConfig
from rlalign.models.load import load_causal_lm, load_tokenizer
from rlalign.rollout.decoding import RewindingDecoder
from rlalign.rollout.hf import eos_token_ids, make_decoder
from rlalign.rollout.hf_cache import CacheDecoder, base_model
from rlalign.rollout.in_process import check_ids, evaluating
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.prompt import Given, Prompt, make_prompt

UNLIMITED = 2**31
BASE = "__base__"  # PEFT's name for no adapter
ADAPTER_FILE = "adapter_config.json"


class Member(NamedTuple):
    """A causal LM of transformers, plain or wrapped by PEFT, and its tokenizer.

    `adapter` names the adapter of a PeftModel that makes it this member (BASE: none of them).
    Members of one model are then read in one forward pass, with its weights in memory once.
    """

    model: nn.Module
    tokenizer: Any
    adapter: str = ""

    @property
    def config(self) -> Any:
        return base_model(self.model).config.get_text_config()

    @property
    def max_len(self) -> int:
        """Longest sequence, tokens."""
        return getattr(self.config, "max_position_embeddings", None) or UNLIMITED


class FusedModel:
    """A large model, a small base, and experts that were trained from the small base; all stay the
    caller's and as they are. Without experts it is the large model.

    Their tokenizers must give every text the same ids; vocabularies may be padded to different
    sizes. What ends an answer for one of them ends it. Raises DecodeError where they do not agree.

    >>> fused = FusedModel(Member(large, tok), Member(small, tok), [Member(expert, tok)])
    ...                                                                        # doctest: +SKIP
    """

    backend = "hf"  # that runs the large model

    def __init__(
        self,
        large: Member,
        small: Member,
        experts: Sequence[Member],
        *,
        max_batch_size: int = 64,
    ) -> None:
        if max_batch_size < 1:
            raise DecodeError(f"max_batch_size is {max_batch_size}; it must be at least 1")
        self.members = [large, small, *experts] if experts else [large]
        self.names = ["large", "small", *(f"experts[{t}]" for t in range(len(experts)))]
        self.max_batch_size = max_batch_size
        self.tokenizer = large.tokenizer
        self.vocab = min(member.config.vocab_size for member in self.members)
        self.eos_ids = frozenset().union(
            *(eos_token_ids(m.model, m.tokenizer) for m in self.members)
        )
        for name, member in zip(self.names[1:], self.members[1:], strict=False):
            _check_same_ids(self.tokenizer, member.tokenizer, name)
        longest = max(self.tokenizer.get_vocab().values())
        if longest >= self.vocab:
            raise DecodeError(
                f"the tokenizer has ids up to {longest}, one of the models knows {self.vocab} "
                "tokens: models and tokenizer do not belong together"
            )

    @property
    def num_experts(self) -> int:
        return max(0, len(self.members) - 2)

    @property
    def device(self) -> torch.device:
        """Where logits are put together."""
        return next(self.members[0].model.parameters()).device

    @property
    def in_lock_step(self) -> list[Member]:
        """The models that are read here."""
        return self.members

    def prompts(
        self, given: Given, index: int, *, chat: bool | None = None, system: str = ""
    ) -> list[Prompt]:
        """What each model reads: the prompt by its own chat template. Raises DecodeError or
        EngineError where one of them cannot."""
        prompts = [
            make_prompt(member.tokenizer, given, index, chat=chat, system=system)
            for member in self.members
        ]
        for name, member, prompt in zip(self.names, self.members, prompts, strict=False):
            check_ids(member.config, prompt.ids, 0, f"prompt {prompt.id!r} of {name}")
        return prompts

    def room(self, prompts: Sequence[Prompt]) -> int:
        """How many tokens may follow in every model. Raises DecodeError for none."""
        pairs = zip(self.members, prompts, strict=True)
        room = min(member.max_len - len(prompt.ids) for member, prompt in pairs)
        if room < 1:
            raise DecodeError(
                f"prompt {prompts[0].id!r} fills the context of one of the models "
                f"({[member.max_len for member in self.members]} tokens): no token can follow"
            )
        return room

    @contextlib.contextmanager
    def decoding(self, longest: int) -> Iterator[LockStep]:
        """Empty caches for rows of up to `longest` tokens, every model in evaluation mode."""
        with contextlib.ExitStack() as stack:
            for member in self.in_lock_step:
                stack.enter_context(evaluating(member.model))
            stack.enter_context(torch.inference_mode())
            yield LockStep(self.in_lock_step, self.vocab, self.device, longest)

    def close(self) -> None:
        """Release what was opened for this model; models that were given to it stay."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class LockStep:
    """The same rows, of up to `longest` tokens, in every model. Logits are float32 or wider, on
    `device`, of the first `vocab` tokens, one tensor [B, K, V] for each model."""

    def __init__(
        self, members: Sequence[Member], vocab: int, device: torch.device, longest: int
    ) -> None:
        self._groups = _groups(members)
        self._decoders = [_decoder([members[i] for i in group], longest) for group in self._groups]
        self._vocab, self._device = vocab, device
        self._num_rows = 0
        self.refills = all(decoder.refills for decoder in self._decoders)
        self.rewinds = all(decoder.rewinds for decoder in self._decoders) and all(
            len(group) == 1 for group in self._groups
        )

    def admit(self, prompts: Sequence[Sequence[Sequence[int]]]) -> list[Tensor]:
        """Append a row for each prompt, which is one sequence of ids for each model; K is 1."""
        self._num_rows += len(prompts)
        found = {}
        for group, decoder in zip(self._groups, self._decoders, strict=True):
            ids = [prompt[i] for i in group for prompt in prompts]
            self._share(found, group, decoder.admit(ids, [1] * len(ids))[:, None])
        return [found[i] for i in range(len(found))]

    def read(
        self, tokens_BK: Sequence[Sequence[int]], models: Sequence[int] = ()
    ) -> dict[int, Tensor]:
        """Append tokens to every row of `models` (none named: of all), by their number."""
        found: dict[int, Tensor] = {}
        for group, decoder in zip(self._groups, self._decoders, strict=True):
            if models and group[0] not in models:
                continue
            tokens = [token for _ in group for token in tokens_BK]
            if len(tokens_BK[0]) > 1:
                logits = decoder.extend(tokens)
            else:
                logits = decoder.step([token for [token] in tokens])[:, None]
            self._share(found, group, logits)
        return found

    def rewind(self, counts: Sequence[int]) -> None:
        """Row i forgets its last `counts[i]` tokens; only where `rewinds`."""
        if any(counts):
            for decoder in self._decoders:
                decoder.rewind(counts)

    def keep(self, index: Sequence[int]) -> None:
        """Row i becomes what row `index[i]` was; the others are dropped."""
        for group, decoder in zip(self._groups, self._decoders, strict=True):
            starts = range(0, len(group) * self._num_rows, self._num_rows)
            decoder.keep([start + i for start in starts for i in index])
        self._num_rows = len(index)

    def _share(self, found: dict[int, Tensor], group: Sequence[int], logits: Tensor) -> None:
        for i, part in zip(group, self.common(logits).chunk(len(group)), strict=True):
            found[i] = part

    def common(self, logits: Tensor) -> Tensor:
        """Of the tokens that all models know, in the type and the place of all logits."""
        logits = logits[..., : self._vocab].to(self._device)
        return logits if logits.dtype == torch.float64 else logits.float()


def open_small(
    small: str, experts: Sequence[str], *, dtype: str, seed: int, device: str
) -> tuple[Member, list[Member]]:
    """The small base and its experts. See `open_fusion`."""
    base = open_member(small, dtype=dtype, seed=seed, device=device)
    adapters = {t: p for t, p in enumerate(experts) if (Path(p) / ADAPTER_FILE).is_file()}
    if adapters:
        base = Member(_with_adapters(base.model, adapters), base.tokenizer, BASE)
    members = [
        base._replace(adapter=_adapter_name(t))
        if t in adapters
        else open_member(path, dtype=dtype, seed=seed, device=device)
        for t, path in enumerate(experts)
    ]
    return base, members


def open_member(path: str, *, dtype: str, seed: int, device: str) -> Member:
    config = ModelConfig(path=path, dtype=dtype)
    return Member(load_causal_lm(config, seed, device), load_tokenizer(config, seed))


def _with_adapters(model: nn.Module, folders: Mapping[int, str]) -> PeftModel:
    wrapped: Any = None
    for t, folder in folders.items():
        name = _adapter_name(t)
        try:
            if wrapped is None:
                wrapped = PeftModel.from_pretrained(model, folder, adapter_name=name)  # pyright: ignore
            else:
                wrapped.load_adapter(folder, adapter_name=name)
        except (ValueError, RuntimeError, OSError) as error:
            raise DecodeError(
                f"experts[{t}], the adapter in {folder}, does not fit the small base: {error} Name "
                "the model that it was trained from"
            ) from error
    return wrapped.eval()


def _adapter_name(expert: int) -> str:
    return f"expert{expert}"


def _groups(members: Sequence[Member]) -> list[list[int]]:
    """Numbers of the members that are read together."""
    groups: dict[Any, list[int]] = {}
    for i, member in enumerate(members):
        groups.setdefault(id(member.model) if member.adapter else f"alone {i}", []).append(i)
    return list(groups.values())


def _decoder(members: Sequence[Member], longest: int) -> RewindingDecoder:
    first = members[0]
    if not first.adapter:
        return make_decoder(first.model, first.tokenizer, longest)
    pad_id = first.tokenizer.pad_token_id or 0
    return CacheDecoder(first.model, pad_id, [member.adapter for member in members])


def _check_same_ids(first: Any, other: Any, name: str) -> None:
    """Raise DecodeError unless two tokenizers have the same tokens under the same ids."""
    ids, others = first.get_vocab(), other.get_vocab()
    odd = min(ids.items() ^ others.items(), key=lambda item: item[1], default=None)
    if odd is not None:
        token, _ = odd
        raise DecodeError(
            f"token {token!r} is {ids.get(token)} for large and {others.get(token)} for {name} "
            "(None: unknown): logits can be added only where ids mean the same, so take models of "
            "one family"
        )
