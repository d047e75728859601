"""Next tokens that someone else than vLLM's sampler chooses, from vLLM's logits.

vLLM's first runner (0.32) samples in one method, which is replaced here; the second one, on GPUs,
is kept away by `vllm_start`. A step must be over before the next begins (no async scheduling),
since who chooses may end a sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlalign.rollout.engine import EngineError

Chooser = Callable[[list[str], Tensor], Sequence[int]]


def install(
    runner: Any,
    choose: Chooser,
    name_of: Callable[[str], str],
    mark_sick: Callable[[str], None] | None = None,
) -> None:
    """`choose(names, logits [B, V])` gives the next token of each sequence that `runner` would have
    sampled one of; `name_of` turns vLLM's own name of a sequence into ours. `mark_sick` is told
    vLLM's names of those whose logits are not finite. Raises EngineError for a runner that samples
    elsewhere."""
    from vllm.v1.outputs import SamplerOutput

    if not hasattr(runner, "_sample"):
        raise EngineError(
            "vLLM's second runner was started, whose logits cannot be had: set "
            "VLLM_USE_V2_MODEL_RUNNER=0, or begin in a process that has run no vLLM before"
        )

    def sample(logits: Tensor, spec_decode_metadata: Any) -> SamplerOutput:
        batch = runner.input_batch
        # Of a prompt that is read in pieces there are logits too soon.
        partial = runner.discard_request_mask.np[: batch.num_reqs]
        rows = [row for row in range(batch.num_reqs) if not partial[row]]
        token_B1 = torch.zeros(batch.num_reqs, 1, dtype=torch.int32)
        if rows:
            if mark_sick is not None:
                for row in (~logits.amax(-1).isfinite()).nonzero()[:, 0].tolist():
                    mark_sick(batch.req_ids[row])
            names = [name_of(batch.req_ids[row]) for row in rows]
            whole = len(rows) == batch.num_reqs
            chosen = choose(names, logits if whole else logits[rows])
            token_B1[rows, 0] = torch.tensor(list(chosen), dtype=torch.int32)
        return SamplerOutput(token_B1.to(logits.device), None)

    runner._sample = sample
