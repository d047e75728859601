"""LatentSeek as its authors' script runs it: one prompt at a time, no cache, autograd.

Every token of every answer is a forward pass over all tokens before it, and latents are those of
the first decoding. What is left out cannot be seen in these measurements: four verifiers (their
reward is a function here), several stop strings, and a smoothed logarithm.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Literal:
    """The answers of one prompt, step by step, their rewards, and what they cost."""

    answers: list[tuple[int, ...]] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    token_forwards: int = 0  # tokens that went through the transformer
    generated: int = 0


def literal_seek(
    model: Any,
    prompt: Sequence[int],
    reward: Callable[[tuple[int, ...]], float],
    *,
    eos_ids: frozenset[int],
    rho: float,
    lr: float,
    max_steps: int,
    max_new_tokens: int,
    tau: float = -0.2,
    max_latent_len: int = 300,
    dtype: torch.dtype = torch.bfloat16,
) -> Literal:
    """Search for an answer to `prompt`; the last one is the result."""
    found = Literal()
    answer, hidden_TD = _decode(model, prompt, (), eos_ids, max_new_tokens, found)
    _enter(found, answer, reward)
    num = min(int(rho * len(answer)), max_latent_len)
    if num == 0:
        return found
    latent_ND = hidden_TD[:num].to(dtype).clone().requires_grad_()
    optimizer = torch.optim.Adam([latent_ND], lr=lr)
    head = model.get_output_embeddings()
    for _ in range(max_steps):
        if found.rewards[-1] > tau:
            break
        optimizer.zero_grad()
        logits_NV = head(latent_ND.to(head.weight.dtype))
        tokens_N = logits_NV.argmax(-1)
        logp_N = logits_NV.softmax(-1).gather(1, tokens_N[:, None])[:, 0].log()
        (-found.rewards[-1] * logp_N.sum()).backward()
        optimizer.step()
        with torch.no_grad():
            prefix = head(latent_ND.to(head.weight.dtype)).argmax(-1).tolist()
        answer, _ = _decode(model, prompt, tuple(prefix), eos_ids, max_new_tokens, found)
        _enter(found, answer, reward)
    return found


def _enter(
    found: Literal, answer: tuple[int, ...], reward: Callable[[tuple[int, ...]], float]
) -> None:
    found.answers.append(answer)
    found.rewards.append(reward(answer))


@torch.no_grad()
def _decode(
    model: Any,
    prompt: Sequence[int],
    prefix: tuple[int, ...],
    eos_ids: frozenset[int],
    max_new_tokens: int,
    found: Literal,
) -> tuple[tuple[int, ...], torch.Tensor]:
    """`prefix` continued greedily, and what each new token was predicted from."""
    answer, hidden = [*prefix], []
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    while len(answer) < max_new_tokens:
        ids_1T = torch.tensor([[*prompt, *answer]])
        state_TD = decoder(input_ids=ids_1T, use_cache=False).last_hidden_state[0]
        found.token_forwards += ids_1T.shape[1]
        found.generated += 1
        hidden.append(state_TD[-1])
        answer.append(int(head(state_TD[-1]).argmax()))
        if answer[-1] in eos_ids:
            break
    return tuple(answer), torch.stack(hidden) if hidden else torch.empty(0)
