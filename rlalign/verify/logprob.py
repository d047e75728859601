"""Properties of the log-probs that every ratio is made of."""

from __future__ import annotations

import math

import torch

from rlalign.kernels.linear_logprob import linear_logprob
from rlalign.verify.cases import difference, worst
from rlalign.verify.table import shared


@shared(
    "log-probs without logits = log-softmax in float64 loops, entropy and gradient too",
    source="definition of the softmax, temperature 0.7",
    bound=1e-10,
)
def head() -> float:
    temperature, rows, width, vocabulary = 0.7, 7, 4, 11
    generator = torch.Generator().manual_seed(5)
    hidden_ND = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight_VD = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    target_N = torch.randint(0, vocabulary, (rows,), generator=generator)
    leaf_ND = hidden_ND.clone().requires_grad_(True)
    output = linear_logprob(
        leaf_ND, weight_VD, target_N, temperature=temperature, return_entropy=True, chunk_size=3
    )
    (gradient_ND,) = torch.autograd.grad(output.logp.sum(), leaf_ND)
    assert output.entropy is not None
    logp_N, entropy_N = output.logp.detach(), output.entropy.detach()
    errors = []
    for n in range(rows):
        logits = [
            sum(float(h) * float(w) for h, w in zip(hidden_ND[n], row, strict=True)) / temperature
            for row in weight_VD
        ]
        total = math.log(sum(math.exp(z) for z in logits))
        probability = [math.exp(z - total) for z in logits]
        target = int(target_N[n])
        entropy = -sum(p * math.log(p) for p in probability)
        slopes = [
            sum(
                (float(v == target) - p) * float(weight_VD[v, d]) / temperature
                for v, p in enumerate(probability)
            )
            for d in range(width)
        ]
        errors.append(abs(float(logp_N[n]) - (logits[target] - total)))
        errors.append(abs(float(entropy_N[n]) - entropy))
        errors.append(difference(gradient_ND[n], slopes))
    return worst(errors)
