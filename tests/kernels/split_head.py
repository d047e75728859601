"""A head on one process, or (run as a script by several) split over them by rows."""

from __future__ import annotations

import math
import os
import sys

import torch
import torch._dynamo  # before a group exists: see rlalign/trainer/distributed.py
import torch.distributed as dist

from rlalign.kernels.linear_logprob import Lora, VocabParallel
from tests.kernels.cases import DEVICE, draw, gradients, score

OPTIONS = {"temperature": 0.7, "softcap": 6.0, "logit_scale": 1.3, "return_entropy": True}
N, D, V, RANK = 23, 16, 301, 5
REAL = 290  # rows of the head that are no padding
BOUNDS = {2: (0, 90, V), 3: (0, 128, 295, V)}  # uneven; the last of three is padding alone


def adapter():
    rng = torch.Generator("cpu").manual_seed(9)
    a_RD = torch.randn(RANK, D, generator=rng, device="cpu") / math.sqrt(D)
    b_VR = torch.randn(V, RANK, generator=rng, device="cpu")
    return a_RD.to(DEVICE).requires_grad_(), b_VR.to(DEVICE).requires_grad_()


def compute(start: int = 0, stop: int = V, shard: VocabParallel | None = None):
    """logp, entropy and lse; gradients of hidden, the adapter's input, weight, bias, adapter."""
    hidden, weight, bias, target, *upstream = draw(N, D, V, bias=True, dtype=torch.float32)
    a_RD, b_VR = adapter()
    mine = [x[start:stop].detach().requires_grad_() for x in (weight, bias, b_VR)]
    low = (hidden.detach() @ a_RD.detach().T).requires_grad_()
    out = score(
        hidden, mine[0], target % REAL, bias=mine[1], lora=Lora(low, mine[2]), vocab_size=REAL,
        vocab_parallel=shard, return_lse=True, **OPTIONS,
    )  # fmt: skip
    grads = gradients(out, upstream, [hidden, low, *mine])
    return [x.detach() for x in out], list(grads)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), int(os.environ["WORLD_SIZE"])
    start, stop = BOUNDS[size][rank : rank + 2]
    torch.save(compute(start, stop, VocabParallel(start, stop)), f"{sys.argv[1]}/{rank}.pt")
    dist.destroy_process_group()
