"""What may follow a node of RAIN's tree: token sets with their probabilities.

    one token       the q likeliest, p^(1/tau) renormalised over them
    more of them    the greedy sequence and distinct samples under top-k at tau; a set's probability
                    is the product of its steps', each renormalised over the k likeliest tokens;
                    p_greedy <- max(min(p_greedy, sum of samples), largest + smallest sample)

so the greedy sequence outranks every sample. Greedy steps come with log-probs at temperature 1,
from which those at tau follow.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rlalign.config.testtime import RainConfig
from rlalign.rollout.engine import SamplingParams
from rlalign.rollout.search import Draw, Drawn, Top
from rlalign.testtime.rain_tree import Candidate

LOWEST = -700.0  # log of what a float still holds: long sets have a probability above zero

Close = Callable[[tuple[int, ...]], tuple[tuple[int, ...], bool]]


def draws(
    ids: tuple[int, ...], length: int, cfg: RainConfig, seed_of: Callable[[int], int]
) -> list[Draw]:
    """Requests for the children of the node that `ids` lead to, sets of `length` tokens; `seed_of`
    gives the seed of each sample."""
    if length == 1:
        most = max(cfg.num_candidates, cfg.max_children)
        return [Draw(ids, SamplingParams(1, temperature=0.0, num_top=most))]
    greedy = SamplingParams(length, temperature=0.0, num_top=cfg.candidate_top_k)
    attempts = cfg.num_attempts or cfg.num_candidates - 1
    return [Draw(ids, greedy), *(sample(ids, length, cfg, seed_of(i)) for i in range(attempts))]


def sample(ids: tuple[int, ...], length: int, cfg: RainConfig, seed: int) -> Draw:
    """Request for one sampled set."""
    params = SamplingParams(length, cfg.candidate_temperature, top_k=cfg.candidate_top_k)
    return Draw(ids, params, seed)


def read(
    replies: Sequence[Drawn], length: int, cfg: RainConfig, close: Close
) -> tuple[list[Candidate], list[Candidate]]:
    """The children, in order of creation, and the candidates to add later. `close` cuts a set where
    the answer ends in it."""
    if length == 1:
        return _likeliest(replies[0].top[0], cfg, close)
    first, *others = replies
    steps = zip(first.top, first.logp, strict=True)
    logp = sum(filtered(top, logp, cfg.candidate_temperature) for top, logp in steps)
    greedy = _candidate(close(first.ids), logp)
    found: dict[tuple[int, ...], Candidate] = {}
    for reply in others:
        candidate = sampled(reply, close)
        if candidate.tokens != greedy.tokens and len(found) < cfg.num_candidates - 1:
            found.setdefault(candidate.tokens, candidate)
    samples = list(found.values())
    bounded = clamp(greedy.p, [candidate.p for candidate in samples])
    return [Candidate(greedy.tokens, bounded, greedy.ends), *samples], []


def sampled(reply: Drawn, close: Close) -> Candidate:
    """The candidate that was drawn by `sample`."""
    return _candidate(close(reply.ids), sum(reply.logp))


def filtered(top: Top, logp: float, temperature: float) -> float:
    """Log-prob at `temperature` among the tokens `top`, from log-probs at temperature 1."""
    scaled = [value / temperature for _, value in top]
    largest = max(scaled)
    total = largest + math.log(sum(math.exp(value - largest) for value in scaled))
    return logp / temperature - total


def clamp(greedy: float, samples: Sequence[float]) -> float:
    """The probability of the greedy sequence beside those of the samples."""
    if not samples:
        return greedy
    return max(min(greedy, sum(samples)), max(samples) + min(samples))


def _likeliest(top: Top, cfg: RainConfig, close: Close) -> tuple[list[Candidate], list[Candidate]]:
    likely = [
        _candidate(close((token,)), filtered(top, logp, cfg.candidate_temperature))
        for token, logp in top
    ]
    children, reserve = likely[: cfg.num_candidates], likely[cfg.num_candidates :]
    if cfg.compat == "official":
        children = sorted(children, key=lambda candidate: candidate.tokens)
    return children, reserve


def _candidate(closed: tuple[tuple[int, ...], bool], logp: float) -> Candidate:
    tokens, ends = closed
    return Candidate(tokens, math.exp(max(logp, LOWEST)), ends)
