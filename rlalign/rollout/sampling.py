"""Drawing tokens: counter-based random numbers, filters, inversion of the distribution function.

    u_bt  = hash(seed_b, t) in (0, 1)                 no state: token t of a row needs only its seed
    token = min {v : sum_{i <= v} p_i > u}            p after temperature, top-k, top-p
    logp  = log p_token

The hash is the output function of splitmix64 (Steele, Lea and Flood, OOPSLA 2014) over seed + t *
golden ratio. Nothing here touches torch's generators, and no row sees another row.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch

from rlalign.rollout.engine import SamplingParams

GOLDEN = -0x61C8864680B583EB  # 0x9e3779b97f4a7c15 as a signed word
CHUNK_BYTES = 64 * 2**20  # float64 sums over the vocabulary that exist at once
UNIFORM_BITS = 48  # u times a float64 total then stays below the total, whatever the rounding


def sample(
    logits_BV: torch.Tensor, seed_B: torch.Tensor, step_B: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row: (int64 [B], its log-prob float32 [B]).

    `seed_B` and `step_B` (the number of tokens drawn before) are int64. At temperature 0 the token
    is the likeliest one, its log-prob that of temperature 1.
    """
    return pick(logits_BV, None if params.temperature == 0 else uniform(seed_B, step_B), params)


def pick(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor | None, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sample`, from its random numbers; at temperature 0 there are none."""
    if params.temperature == 0:
        logits_BV = logits_BV.float()
        largest_B, token_B = logits_BV.max(-1)
        return token_B, largest_B - logits_BV.logsumexp(-1)
    assert uniform_B is not None
    rows = max(1, CHUNK_BYTES // (8 * logits_BV.shape[-1]))
    if len(logits_BV) <= rows:
        return _pick(logits_BV, uniform_B, params)
    parts = [
        _pick(*part, params)
        for part in zip(logits_BV.split(rows), uniform_B.split(rows), strict=True)
    ]
    token_B, logp_B = (torch.cat(values) for values in zip(*parts, strict=True))
    return token_B, logp_B


def likeliest(
    logits_BV: torch.Tensor, params: SamplingParams
) -> list[tuple[tuple[int, float], ...]]:
    """The `params.num_top` likeliest tokens of each row with their log-probs in the distribution
    that `sample` draws from (temperature 0: of temperature 1), likeliest first; of equals the one
    with the lowest id. Tokens that it cannot draw are left out."""
    logits_BV = logits_BV.float()
    if params.temperature > 0:
        logits_BV = keep_likeliest(logits_BV / params.temperature, params.top_k, params.top_p)
    logp_BV = logits_BV.log_softmax(-1)
    count = min(params.num_top, logp_BV.shape[-1])
    # One more, to see whether the last one has equals that were left out.
    values_BN, ids_BN = logp_BV.topk(min(count + 1, logp_BV.shape[-1]), dim=-1)
    ids_BN, order_BN = ids_BN[:, :count].sort(-1)
    by_value_BN = values_BN.gather(-1, order_BN).sort(dim=-1, descending=True, stable=True)
    ids_BN = ids_BN.gather(-1, by_value_BN.indices)
    rows = [
        tuple(pair for pair in zip(ids, values, strict=True) if pair[1] > -math.inf)
        for ids, values in zip(ids_BN.tolist(), by_value_BN.values.tolist(), strict=True)
    ]
    last_B, beyond_B = values_BN[:, count - 1], values_BN[:, -1]
    if values_BN.shape[-1] > count:
        for row in ((last_B == beyond_B) & (last_B > -math.inf)).nonzero()[:, 0].tolist():
            rows[row] = _likeliest_of_equals(logp_BV[row], count)
    return rows


def _likeliest_of_equals(logp_V: torch.Tensor, count: int) -> tuple[tuple[int, float], ...]:
    kept = (logp_V >= logp_V.topk(count).values[-1]).nonzero()[:, 0]
    values, order = logp_V[kept].sort(dim=0, descending=True, stable=True)
    return tuple(zip(kept[order[:count]].tolist(), values[:count].tolist(), strict=True))


def _pick(
    logits_BV: torch.Tensor, uniform_B: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor]:
    scaled_BV = logits_BV.float() / params.temperature
    logits_BV = keep_likeliest(scaled_BV, params.top_k, params.top_p)
    max_B1 = logits_BV.amax(-1, keepdim=True)
    cumulative_BV = (logits_BV - max_B1).exp_().cumsum(-1, dtype=torch.float64)
    total_B = cumulative_BV[:, -1]
    target_B = uniform_B * total_B
    # The first entry ABOVE the target: a token of probability zero has the sum of its predecessor.
    token_B = torch.searchsorted(cumulative_BV, target_B[:, None], right=True)[:, 0]
    token_B.clamp_(max=logits_BV.shape[-1] - 1)  # NaN logits: the log-prob shows them
    logp_B = (_at(logits_BV, token_B) - max_B1[:, 0]).double() - total_B.log()
    return token_B, logp_B.float()


def keep_likeliest(logits_BV: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Logits with all but the kept tokens at -inf: the `top_k` largest (0: all), then of those the
    fewest likeliest whose probabilities add up to `top_p`. Ties with the last one kept are kept."""
    vocab = logits_BV.shape[-1]
    if 0 < top_k < vocab:
        smallest_B1 = logits_BV.topk(top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    if top_p < 1:
        sorted_BV = logits_BV.sort(-1, descending=True).values
        before_BV = sorted_BV.softmax(-1).double().cumsum(-1).roll(1, -1)
        before_BV[:, 0] = 0
        kept_B1 = (before_BV < top_p).sum(-1, keepdim=True)
        smallest_B1 = sorted_BV.gather(-1, kept_B1 - 1)
        logits_BV = logits_BV.masked_fill(logits_BV < smallest_B1, -torch.inf)
    return logits_BV


def uniform(seed_B: torch.Tensor, step_B: torch.Tensor) -> torch.Tensor:
    """Float64 in (0, 1) for each int64 (seed, step), of any shapes that fit together."""
    word = seed_B + (step_B + 1) * GOLDEN
    word = (word ^ _shift_right(word, 30)) * -0x40A7B892E31B1A47  # 0xbf58476d1ce4e5b9
    word = (word ^ _shift_right(word, 27)) * -0x6B2FB644ECCEEE15  # 0x94d049bb133111eb
    word = _shift_right(word ^ _shift_right(word, 31), 64 - UNIFORM_BITS)
    return (word.double() + 0.5) * 2.0**-UNIFORM_BITS


def _shift_right(word: torch.Tensor, bits: int) -> torch.Tensor:
    """The logical shift: torch's own copies the sign bit in."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _at(values_BV: torch.Tensor, index_B: torch.Tensor) -> torch.Tensor:
    return values_BV.gather(-1, index_B[:, None])[:, 0]
