"""A search's requests as messages to the engine process, and its answers as replies.

    Draw      {"kind": "draw", "ids": [..], "seed": 3, "params": {..}}
    Choose    {"kind": "choose", "ids": [..], "options": [..]}            done: "logp"
    Latents   {"kind": "latents", "ids": [..], "start": 4, "stop": 9}     done: "latent"
    Ascend    {"kind": "ascend", "state": {..}, "tokens": [..], "how": {..}, "rest": {..}}
                                                     done: "state", "tokens", "before", "is_still"

None leaves anything behind in the engine, so each can be asked again of another one. Tensors
travel as base64.
"""

from __future__ import annotations

import base64
import dataclasses
from typing import Any

import torch
from torch import Tensor

from rlalign.algos.latent import Ascent, LatentState
from rlalign.rollout.engine import EngineError
from rlalign.rollout.limits import Limits
from rlalign.rollout.search import Ascend, Ascended, Choose, Draw, Drawn, Latents, Reply, Request
from rlalign.rollout.search_answers import check_span

TENSORS = ("latent_ND", "first_ND", "second_ND")


def message_of(request: Request, limits: Limits) -> tuple[dict[str, Any], int]:
    """A request as a message, and the tokens it may cost. Raises EngineError for what this engine
    cannot serve."""
    if isinstance(request, Draw):
        return _draw(request, limits)
    if isinstance(request, Choose):
        limits.check_ids(request.ids, 1, "a prompt of a search")
        limits.check_ids(request.options, 0, "the options of a search")
        return {
            "kind": "choose", "ids": list(request.ids), "options": list(request.options),
        }, len(request.ids) + 1  # fmt: skip
    if isinstance(request, Latents):
        limits.check_ids(request.ids, 0, "a sequence of a search")
        check_span(request)
        ids, span = list(request.ids), {"start": request.start, "stop": request.stop}
        return {"kind": "latents", "ids": ids, **span}, len(ids)
    assert isinstance(request, Ascend)
    return _ascend(request), max(1, len(request.tokens_N))


def _draw(request: Draw, limits: Limits) -> tuple[dict[str, Any], int]:
    limits.check_params(request.params)
    longest = request.params.max_completion_length
    limits.check_ids(request.ids, longest, "a prompt of a search")
    limits.check_seeds([request.seed], "a draw of a search")
    params = dataclasses.asdict(request.params)
    message = {"kind": "draw", "ids": list(request.ids), "seed": request.seed, "params": params}
    return message, len(request.ids) + longest


def _ascend(request: Ascend) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(request)} - {"state", "tokens_N", "how"}
    return {
        "kind": "ascend",
        "state": pack_state(request.state),
        "tokens": request.tokens_N.tolist(),
        "how": dataclasses.asdict(request.how),
        "rest": {name: getattr(request, name) for name in names},
    }


def reply_of(request: Request, done: dict[str, Any]) -> Reply:
    """What the engine's `done` message says to a request."""
    if isinstance(request, Draw):
        top = tuple(tuple((token, logp) for token, logp in row) for row in done.get("top", ()))
        return Drawn(tuple(done["ids"]), tuple(done["logp"]), done["finish"], top)
    if isinstance(request, Choose):
        return tuple(done["logp"])
    if isinstance(request, Latents):
        return unpack(done["latent"])
    tokens_N, before_N = torch.tensor(done["tokens"]), torch.tensor(done["before"])
    return Ascended(unpack_state(done["state"]), tokens_N, before_N, done["is_still"])


def ascend_of(message: dict[str, Any]) -> Ascend:
    """The request that an `ascend` message stands for."""
    how = Ascent(**{**message["how"], "betas": tuple(message["how"]["betas"])})
    tokens_N = torch.tensor(message["tokens"], dtype=torch.int64)
    return Ascend(unpack_state(message["state"]), tokens_N, how=how, **message["rest"])


def ascended(reply: Ascended) -> dict[str, Any]:
    """A reply to `ascend` as the part of `done` that is its own."""
    return {
        "state": pack_state(reply.state), "tokens": reply.tokens_N.tolist(),
        "before": reply.before_N.tolist(), "is_still": reply.is_still,
    }  # fmt: skip


def pack_state(state: LatentState) -> dict[str, Any]:
    tensors = {name: pack(getattr(state, name)) for name in TENSORS}
    return {**tensors, "num_steps": state.num_steps}


def unpack_state(packed: dict[str, Any]) -> LatentState:
    tensors = {name: unpack(packed[name]) for name in TENSORS}
    return LatentState(**tensors, num_steps=packed["num_steps"])


def pack(tensor: Tensor) -> dict[str, Any]:
    """A tensor as JSON."""
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    data = base64.b64encode(flat.numpy().tobytes()).decode()
    return {
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": [*tensor.shape],
        "b64": data,
    }


def unpack(packed: dict[str, Any]) -> Tensor:
    """The tensor again. Raises EngineError for one that is not whole."""
    dtype, data = getattr(torch, packed["dtype"]), bytearray(base64.b64decode(packed["b64"]))
    try:
        flat = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return flat.reshape(packed["shape"])
    except (ValueError, RuntimeError) as error:
        raise EngineError(f"a tensor of {packed['shape']} did not come whole: {error}") from error
