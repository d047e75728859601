"""Logit fusion whose large model runs in vLLM; the small base and the experts stay with
transformers, in the same process.

vLLM decides which rows step, and has their logits first. At that moment the small models read the
same rows' last tokens, the strengths are searched, and vLLM is told the tokens. A row that vLLM
puts aside for want of memory leaves the small models' caches too, and is read anew as it returns.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlalign.config.schema import ModelConfig, VllmConfig
from rlalign.config.testtime import FusionConfig
from rlalign.models.load import context_of, load_tokenizer, resolve_model_path
from rlalign.rollout import vllm_requests, vllm_start
from rlalign.rollout.engine import EngineError
from rlalign.rollout.vllm_stream import VllmStream
from rlalign.testtime.errors import DecodeError
from rlalign.testtime.fusion_models import FusedModel, LockStep, Member
from rlalign.testtime.fusion_rows import FAILED, Row, advance, enter, grid
from rlalign.testtime.open_engine import CONTEXT, GPU_SHARE
from rlalign.testtime.prompt import Prompt


class FusedVllm(FusedModel):
    """`FusedModel` with the large model of a folder in vLLM, which is this object's: close it.
    Longest sequence: `max_len`. Raises EngineError as VllmStream does."""

    backend = "vllm"

    def __init__(
        self,
        folder: str,
        tokenizer: Any,
        small: Member,
        experts: Sequence[Member],
        cfg: VllmConfig,
        *,
        max_len: int,
        dtype: str = "float32",
        device: str = "cpu",
    ) -> None:
        large = Member(vllm_start.empty_model(folder), tokenizer)
        super().__init__(large, small, experts, max_batch_size=cfg.max_num_seqs)
        self.cfg, self.turn = cfg, Turn()
        self._device = torch.device(device)
        self.stream = VllmStream(
            folder, tokenizer, cfg, max_len=max_len, dtype=dtype, device=device,
            choose=self.turn.choose,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def in_lock_step(self) -> list[Member]:
        return self.members[1:]

    def room(self, prompts: Sequence[Prompt]) -> int:
        room = min(super().room(prompts), self.stream.limits.max_len - len(prompts[0].ids))
        if room < 1:
            raise DecodeError(
                f"prompt {prompts[0].id!r} fills vLLM's context of {self.stream.limits.max_len} "
                "tokens: no token can follow; open the models with a larger max_model_len"
            )
        return room

    def close(self) -> None:
        self.stream.close()


class Turn:
    """The rows that vLLM works on, and what they need for their next token."""

    def __init__(self) -> None:
        self.active: dict[str, Row] = {}
        self.last = 0.0  # when tokens were chosen
        self.is_taken = False

    def begin(self, fused: FusedVllm, step: LockStep, cfg: FusionConfig) -> None:
        self.active, self.last = {}, time.monotonic()
        self._fused, self._step, self._cfg, self._strengths = fused, step, cfg, grid(cfg)
        self._beside: list[Row] = []  # rows of the small models, in their order

    def choose(self, names: list[str], large_BV: Tensor) -> list[int]:
        """The next token of each row from the large model's logits; a row that is over gets any."""
        rows = [self.active[name] for name in names]
        for row in rows:
            if not row.tokens:
                enter(row, self._cfg)
        with torch.inference_mode():
            large_B1V = self._step.common(large_BV)[:, None]
            logits = torch.stack([large_B1V, *self._read(rows)])
            drafts: list[list[int]] = [[] for _ in rows]
            advance(rows, logits, drafts, self._cfg, self._strengths, self._fused)
        self.last = time.monotonic()
        return [row.tokens[-1] if row.tokens else 0 for row in rows]

    def _read(self, rows: Sequence[Row]) -> list[Tensor]:
        """The small models' logits [B, 1, V] of these rows, which are all that they keep."""
        wanted = {row.index for row in rows}
        stay = [i for i, row in enumerate(self._beside) if row.index in wanted]
        if len(stay) < len(wanted) and not self._step.refills:
            stay = []  # rows enter only together
        if len(stay) < len(self._beside):
            self._step.keep(stay)
        self._beside = [self._beside[i] for i in stay]
        present = {row.index for row in self._beside}
        entering = [row for row in rows if row.index not in present]
        parts: list[list[Tensor]] = [[] for _ in self._fused.members[1:]]
        if self._beside:
            found = self._step.read([[row.tokens[-1]] for row in self._beside])
            for i, part in enumerate(parts):
                part.append(found[i])
        if entering:
            ids = [[(*p.ids, *row.tokens) for p in row.prompts[1:]] for row in entering]
            for part, logits in zip(parts, self._step.admit(ids), strict=True):
                part.append(logits)
        self._beside += entering
        place = {row.index: i for i, row in enumerate(self._beside)}
        order = torch.tensor([place[row.index] for row in rows], device=self._fused.device)
        return [torch.cat(part)[order] for part in parts]


def decode_on_vllm(fused: FusedVllm, waiting: Sequence[Row], cfg: FusionConfig) -> Iterator[Row]:
    """Rows as they end, the longest prompt first. Raises EngineError when vLLM fails, and when it
    chooses no token for `timeout_s`; DecodeError while another call's rows are in it."""
    if fused.turn.is_taken:
        raise DecodeError(
            "this model is answering another call, whose on_done may not ask it anything: collect "
            "the results and ask afterwards, or open it with backend=hf"
        )
    queue = deque(sorted(waiting, key=lambda row: -row.length))
    longest = max((row.length + row.limit for row in queue), default=0)
    device, turn, stream = str(fused.device), fused.turn, fused.stream
    with fused.decoding(longest) as step:
        turn.begin(fused, step, cfg)
        turn.is_taken = True
        try:
            while queue or turn.active:
                refused = []
                if step.refills or not turn.active:
                    refused = _add(queue, turn.active, fused)
                if turn.active:
                    with vllm_start.rng_kept(device), vllm_start.eager(device, fused.cfg):
                        ended = stream.step()
                    _fail_unfinished(turn.active, ended)
                    _check_deadline(turn, fused.cfg)
                over = {name: row for name, row in turn.active.items() if row.finish_reason}
                stream.abort(list(over))
                for name in over:
                    del turn.active[name]
                yield from [*refused, *over.values()]
        finally:
            stream.abort(list(turn.active))
            turn.active, turn.is_taken = {}, False


def open_on_vllm(
    large: str,
    small: Member,
    experts: Sequence[Member],
    *,
    device: str,
    dtype: str,
    max_batch_size: int,
    seed: int,
    max_model_len: int | None,
) -> FusedVllm:
    """See `open_fusion`."""
    folder = resolve_model_path(large, seed)
    free, total = torch.cuda.mem_get_info() if device != "cpu" else (1, 1)
    cfg = VllmConfig(
        max_num_seqs=max_batch_size,
        gpu_memory_utilization=GPU_SHARE * free / total,  # the small models are there already
        sleep_mode=False,
    )
    return FusedVllm(
        folder,
        load_tokenizer(ModelConfig(path=large, dtype=dtype), seed),
        small,
        experts,
        cfg,
        max_len=context_of(folder, CONTEXT) if max_model_len is None else max_model_len,
        dtype=dtype,
        device=device,
    )


def _add(queue: deque[Row], active: dict[str, Row], fused: FusedVllm) -> list[Row]:
    """Give vLLM rows while it has places; those that it refuses, which are over."""
    refused = []
    while queue and len(active) < fused.max_batch_size:
        row = queue.popleft()
        try:
            params = vllm_requests.following(row.limit)
            fused.stream.add(str(row.index), row.prompts[0].ids, params)
        except EngineError as error:
            fused.stream.check_usable()
            row.finish_reason, row.error = FAILED, str(error)
            refused.append(row)
        else:
            active[str(row.index)] = row
    return refused


def _fail_unfinished(active: Mapping[str, Row], ended: Sequence[Any]) -> None:
    """A row ends here first; where vLLM ended one by itself, it would wait for ever."""
    for output in ended:
        row = active.get(output.request_id)
        if row is not None and not row.finish_reason:
            row.finish_reason = FAILED
            reason = output.outputs[0].finish_reason
            row.error = f"vLLM ended it after {len(row.tokens)} tokens, reason {reason!r}"


def _check_deadline(turn: Turn, cfg: VllmConfig) -> None:
    if time.monotonic() - turn.last > cfg.timeout_s:
        raise EngineError(
            f"logit fusion: vLLM had no logits for any of {len(turn.active)} sequences in "
            f"{cfg.timeout_s:g} s; if memory is short, take a smaller max_batch_size or "
            "max_model_len"
        )
