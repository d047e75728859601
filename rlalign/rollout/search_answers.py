"""What the engines of searches have in common."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from rlalign.algos.latent import Head, ascend, gradient, likeliest, rows_at_once, wander
from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.sampling import sample
from rlalign.rollout.search import Ascend, Ascended, Latents

PLAIN = SamplingParams(1)  # at temperature 1, from the whole vocabulary


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
    state, how = request.state.to(device), request.how
    before_N = likeliest(state.latent_ND, head)
    if how.proposal == "random_signs":
        moved, is_still = wander(state, request.seed, how), False
    else:
        tokens_N = request.tokens_N.to(device)
        grad_ND = gradient(state.latent_ND, tokens_N, request.reward, head)
        moved = ascend(state, grad_ND, how)
        is_still = not bool(grad_ND.any()) and torch.equal(moved.latent_ND, state.latent_ND)
    drawn = how.tokens == "categorical"
    choose = partial(_drawn, seed=request.seed) if drawn else likeliest
    after_N = choose(moved.latent_ND, head)
    return Ascended(moved.to("cpu"), after_N.cpu(), before_N.cpu(), is_still)


def _drawn(latent_ND: Tensor, head: Head, seed: int) -> Tensor:
    """A token of each latent's distribution, int64 [N], keyed by the seed and the position."""
    step_N = torch.arange(len(latent_ND), device=latent_ND.device)
    rows = rows_at_once(head)
    parts = zip(latent_ND.split(rows), step_N.split(rows), strict=True)
    tokens = [sample(head.logits(z), torch.full_like(t, seed), t, PLAIN)[0] for z, t in parts]
    return torch.cat(tokens)
