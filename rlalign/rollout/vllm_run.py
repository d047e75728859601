"""A batch of sequences on a vLLM that has nothing else to do, from start to end."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rlalign.config.schema import VllmConfig
from rlalign.rollout import vllm_start
from rlalign.rollout.engine import EngineError
from rlalign.rollout.vllm_stream import VllmStream

Work = Mapping[str, tuple[Sequence[int], Any]]  # token ids and vLLM's parameters, by name


def run_all(
    stream: VllmStream,
    what: str,
    work: Work,
    cfg: VllmConfig,
    device: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """vLLM's final output of every sequence, by name; of one that it refuses, the EngineError.
    `on_progress` is told (sequences done, sequences in all) after every step.

    Raises EngineError for a failure inside vLLM and when `cfg.timeout_s` have passed; `what` is
    being done, for the message. No sequence is left behind.
    """
    deadline = time.monotonic() + cfg.timeout_s
    results: dict[str, Any] = {}
    with _stepping(stream, work, results, cfg, device):
        for name, (token_ids, params) in work.items():
            try:
                stream.add(name, token_ids, params)
            except EngineError as error:
                stream.check_usable()
                results[name] = error
        while len(results) < len(work):
            if time.monotonic() > deadline:
                raise EngineError(
                    f"{what}: {len(results)} of {len(work)} sequences after {cfg.timeout_s:g} s, "
                    "which is the deadline; raise rollout.vllm.timeout_s or send fewer at once"
                )
            for output in stream.step():
                results[output.request_id] = output
            if on_progress is not None:
                on_progress(len(results), len(work))
    return results


@contextlib.contextmanager
def _stepping(
    stream: VllmStream, work: Work, results: Mapping[str, Any], cfg: VllmConfig, device: str
) -> Iterator[None]:
    """Leave no request behind, and torch's random state as it was."""
    with vllm_start.rng_kept(device), vllm_start.eager(device, cfg):
        try:
            yield
        finally:
            stream.abort([name for name in work if name not in results])
