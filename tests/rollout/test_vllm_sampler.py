"""Each sequence of a batch has the columns that it asked for, as if it were alone."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from rlalign.config.schema import VllmConfig
from rlalign.rollout.vllm_start import eager

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

B, VOCAB = 4, 40
NAMED = {1: [3, 5, 7], 3: [9]}


def run(named, num_top, temperature):
    """Tokens, column ids and log-probs of a batch of B rows."""
    from vllm.platforms import current_platform
    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.sampler import Sampler

    from rlalign.rollout import vllm_sampler

    current_platform.import_kernels()
    seeds = [torch.Generator().manual_seed(i) for i in range(B)]
    random = temperature > 0
    metadata = SamplingMetadata(
        temperature=torch.full((B,), temperature) if random else None, all_greedy=not random,
        all_random=random, top_p=None, top_k=torch.full((B,), 6) if random else None,
        generators=dict(enumerate(seeds)) if random else {}, max_num_logprobs=num_top,
        no_penalties=True, prompt_token_ids=None, frequency_penalties=torch.zeros(B),
        presence_penalties=torch.zeros(B), repetition_penalties=torch.ones(B),
        output_token_ids=[[] for _ in range(B)], allowed_token_ids_mask=None,
        bad_words_token_ids={}, logitsprocs=LogitsProcessors(), logprob_token_ids=named,
    )  # fmt: skip
    logits = torch.randn(B, VOCAB, generator=torch.Generator().manual_seed(0))
    with eager("cpu", VllmConfig()):
        output = vllm_sampler.forward(
            Sampler("processed_logprobs"), logits, sampling_metadata=metadata
        )
    found = output.logprobs_tensors
    assert found is not None
    return output.sampled_token_ids[:, 0].tolist(), found.logprob_token_ids, found.logprobs


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("num_top", [1, 2, 5])
def test_rows_have_their_own_columns_in_one_batch(temperature, num_top):
    drawn, ids, logp = run(NAMED, num_top, temperature)
    drawn_top, top_ids, top_logp = run(None, num_top, temperature)
    drawn_named, named_ids, named_logp = run(NAMED, None, temperature)
    assert drawn == drawn_top == drawn_named
    for row in range(B):
        width = 1 + (len(NAMED[row]) if row in NAMED else num_top)
        want_ids, want = (named_ids, named_logp) if row in NAMED else (top_ids, top_logp)
        assert torch.equal(ids[row, :width], want_ids[row, :width])
        assert torch.equal(logp[row, :width], want[row, :width])
        assert bool(torch.isneginf(logp[row, width:]).all())
    assert ids.dtype == top_ids.dtype and logp.dtype == torch.float32


def test_named_columns_are_of_the_whole_vocabulary():
    _, ids, logp = run(NAMED, 2, 0.0)
    logits = torch.randn(B, VOCAB, generator=torch.Generator().manual_seed(0))
    want_BV = logits.log_softmax(-1)
    assert ids[1, 1:4].tolist() == NAMED[1]
    torch.testing.assert_close(logp[1, 1:4], want_BV[1, NAMED[1]])
    torch.testing.assert_close(logp[3, 1], want_BV[3, 9])
    torch.testing.assert_close(logp[0, 1:3], want_BV[0].topk(2).values)
