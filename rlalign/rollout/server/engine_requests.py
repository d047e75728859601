"""What vLLM is given for a message to the engine process, and what is read from its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.hf import NOT_FINITE
from rlalign.rollout.search_answers import climb
from rlalign.rollout.server.search_messages import ascend_of, ascended, pack
from rlalign.rollout.vllm_requests import capturing, choosing, chosen, scoring, sequence_logp

CONTINUED = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: seeds of continuations are far apart


def for_vllm(
    stream: Any, message: dict[str, Any], drawn: Sequence[int]
) -> tuple[Sequence[int], Any]:
    """Token ids and parameters for a message of which `drawn` is known already. Raises EngineError
    for what this engine cannot do."""
    kind, ids = message["kind"], message["ids"]
    if kind == "draw":
        return _drawing(stream, message, drawn)
    stream.limits.check_ids(ids, 1 if kind == "choose" else 0, "a sequence")
    if kind == "choose":
        return ids, choosing(message["options"])
    if kind == "latents":
        return ids[: message["stop"] - 1], capturing(message["start"])
    return ids[:-1], scoring(ids[-1])


def read_output(stream: Any, message: dict[str, Any], output: Any) -> dict[str, Any]:
    """What `done` says of a message that drew nothing. Raises EngineError where the model's logits
    are not finite."""
    if message["kind"] == "choose":
        return {"logp": chosen(output, message["options"])}
    if message["kind"] == "latents":
        return {"latent": pack(stream.latents(output.request_id))}
    logp = sequence_logp(output)
    if not math.isfinite(sum(logp)):
        raise EngineError(NOT_FINITE)
    return {"logp": logp}


def climbed(stream: Any, message: dict[str, Any], adapter: Any) -> dict[str, Any]:
    """What `done` says of an `ascend`, under the head with the job's adapter on it."""
    head = stream.head(adapter)
    return ascended(climb(ascend_of(message), head, head.weight_VD.device))


def _drawing(
    stream: Any, message: dict[str, Any], drawn: Sequence[int]
) -> tuple[Sequence[int], Any]:
    wanted = SamplingParams(**message["params"])
    stream.limits.check_params(wanted)
    stream.limits.check_ids(message["ids"], wanted.max_completion_length, "the prompt")
    stream.limits.check_seeds([message["seed"]], "the request")
    left = wanted.max_completion_length - len(drawn)
    # Other random numbers than those that the first tokens were drawn with.
    seed = (message["seed"] + len(drawn) * CONTINUED) % 2**63
    params = stream.sampling(replace(wanted, max_completion_length=left), seed)
    return [*message["ids"], *drawn], params
