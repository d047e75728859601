"""What the engines of searches have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rlalign.algos.latent import Head, ascend, gradient, likeliest
from rlalign.rollout.engine import EngineError
from rlalign.rollout.search import Ascend, Ascended, Latents


def check_options(options: Sequence[int], vocab: int) -> None:
    """Raise EngineError unless `options` are tokens of a model that has `vocab` of them."""
    if not options:
        raise EngineError("a choice among no tokens: name at least one option")
    if not 0 <= min(options) <= max(options) < vocab:
        raise EngineError(
            f"a choice among token ids from {min(options)} to {max(options)}, the model knows 0 to "
            f"{vocab - 1}: model and tokenizer do not belong together"
        )


def check_span(request: Latents) -> None:
    """Raise EngineError unless `request` asks for tokens that have a predecessor."""
    if not 1 <= request.start < request.stop <= len(request.ids):
        raise EngineError(
            f"latents of tokens {request.start} to {request.stop} of {len(request.ids)}: the first "
            "token has none, and at least one is wanted"
        )


@torch.no_grad()
def climb(request: Ascend, head: Head, device: torch.device) -> Ascended:
    """The reply to a request, computed on `device`, where the head is; what is in it is on the
    CPU."""
    state = request.state.to(device)
    before_N = likeliest(state.latent_ND, head)
    grad_ND = gradient(state.latent_ND, request.tokens_N.to(device), request.reward, head)
    moved = ascend(state, grad_ND, request.how)
    is_still = not bool(grad_ND.any())
    after_N = likeliest(moved.latent_ND, head)
    return Ascended(moved.to("cpu"), after_N.cpu(), before_N.cpu(), is_still)
