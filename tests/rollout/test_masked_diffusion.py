"""What is particular to the engine; what all engines do is in test_conformance.py."""

import copy

import pytest
import torch

from rlalign.config.schema import DiffusionConfig
from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams
from rlalign.rollout.masked_diffusion import MaskedDiffusionEngine, masked_scores
from rlalign.trainer.publish import WeightSyncError, check_engine, publish
from tests.rollout.masked_fakes import EOS, MASK, VOCAB, masked_llama


class Letters:
    """One letter a token; the end token is special."""

    eos_token_id, pad_token_id = EOS, 0

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(ord("a") + i) for i in ids if not (skip_special_tokens and i == EOS))


LENGTH = 12
REQUESTS = [GenerateRequest("long", (3, 7, 2, 5, 6), (1, 2, 3)), GenerateRequest("one", (4,), (9,))]


def engine(lm=None, max_batch_size=256, **options):
    lm = lm or masked_llama()
    return MaskedDiffusionEngine(
        lm, Letters(), DiffusionConfig(**options), max_batch_size=max_batch_size
    )


def generate(subject, params=None, requests=REQUESTS):
    return subject.generate(requests, params or SamplingParams(LENGTH))


@torch.no_grad()
def replayed(lm, prompt, sample, temperature):
    """Log-probs of a whole completion: those of step k where all of step k and later is masked."""
    tokens, steps, logps = list(sample.token_ids), list(sample.steps), []
    for token, step in zip(tokens, steps, strict=True):
        seen = [t if s < step else MASK for t, s in zip(tokens, steps, strict=True)]
        logits_TV = lm.model(torch.tensor([[*prompt, *seen]])).logits[0].double()
        row_V = logits_TV[len(prompt) + len(logps)]
        row_V[MASK] = -torch.inf
        logps.append(float((row_V / temperature).log_softmax(-1)[token]))
    return torch.tensor(logps)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"steps": 6, "block_size": 4},
        {"steps": 3, "order": "entropy"},
        {"block_size": 6, "threshold": 0.3},
        {"order": "origin", "steps": 4},
    ],
)
def test_logp_and_steps_are_those_of_the_commits(options):
    lm = masked_llama()
    groups = generate(engine(lm, eos_policy="all", **options), SamplingParams(LENGTH, 0.7))
    for request, group in zip(REQUESTS, groups, strict=True):
        for sample in group:
            expected = replayed(lm, request.token_ids, sample, 0.7)
            torch.testing.assert_close(torch.tensor(sample.logp), expected.float())


def test_what_is_behind_the_first_end_token():
    lm, many = masked_llama(), [GenerateRequest("p", (4, 9), tuple(range(40)))]
    [kept] = generate(engine(lm, eos_policy="all"), requests=many)
    ends = [sample.token_ids.index(EOS) + 1 for sample in kept if EOS in sample.token_ids]
    assert 3 < len(ends) < 40 and min(ends) < LENGTH
    for policy in (None, "drop"):
        [cut] = generate(engine(lm, eos_policy=policy), requests=many)
        for short, whole in zip(cut, kept, strict=True):
            ended = EOS in whole.token_ids
            end = whole.token_ids.index(EOS) + 1 if ended else LENGTH
            assert short.finish_reason == whole.finish_reason == ("stop" if ended else "length")
            assert short.token_ids == whole.token_ids[:end] and len(whole.token_ids) == LENGTH
            assert (short.logp, short.steps) == (whole.logp[:end], whole.steps[:end])
            assert short.spans[0].num_tokens == end
            assert short.text == whole.text == Letters().decode(whole.token_ids[:end], True)
    for policy in ("visible", "masked"):
        assert generate(engine(lm, eos_policy=policy), requests=many) == [kept]


def test_a_completion_without_an_end_token_has_reached_its_length():
    subject = engine(suppress_ids=[EOS], eos_early_stop=True, block_size=4)
    for sample in [sample for group in generate(subject) for sample in group]:
        assert sample.finish_reason == "length" and len(sample.token_ids) == LENGTH
        assert EOS not in sample.token_ids


def test_steps_are_shared_out_over_blocks():
    params = SamplingParams(LENGTH, ignore_eos=True)
    for options, per_block in (
        ({"steps": 6, "block_size": 4}, [2, 2, 2]),
        ({"steps": 3}, [3]),
        ({"block_size": 6}, [6, 6]),
    ):
        subject = engine(**options)
        [sample, *_], _ = generate(subject, params)
        size = LENGTH // len(per_block)
        parts = [sample.steps[i : i + size] for i in range(0, LENGTH, size)]
        assert [len(set(part)) for part in parts] == per_block
        assert max(sample.steps) + 1 == sum(per_block)


def test_a_completion_of_another_length_takes_as_many_steps_per_token():
    subject = engine(steps=6, block_size=4)
    short = [GenerateRequest("p", (3,), (1,), max_completion_length=8)]
    [[sample]] = generate(subject, SamplingParams(LENGTH, ignore_eos=True), short)
    assert len(sample.token_ids) == 8 and max(sample.steps) + 1 == 4


def test_evaluation_has_steps_of_its_own():
    subject = engine(steps=12, eval_steps=3)
    params = SamplingParams(LENGTH, ignore_eos=True)
    with subject.evaluation():
        assert max(generate(subject, params)[1][0].steps) + 1 == 3
    assert max(generate(subject, params)[1][0].steps) + 1 == 12


def test_stats_are_of_the_last_call():
    subject = engine(steps=4)
    generate(subject, SamplingParams(LENGTH, ignore_eos=True))
    stats = subject.last_stats
    assert (stats.samples, stats.tokens, stats.forwards) == (4, 48, 16)
    assert stats.tokens_per_forward == 3
    subject.generate([], SamplingParams(LENGTH))
    assert subject.last_stats.tokens_per_forward == 0


def test_batches_are_small_enough_and_change_nothing():
    lm, rows = masked_llama(), []
    lm.model.get_input_embeddings().register_forward_hook(
        lambda _m, args, _o: rows.append(len(args[0]))
    )
    requests = [
        GenerateRequest(
            f"p{i}", tuple(range(2, 4 + i)), (i, i + 50), max_completion_length=6 + i % 2
        )
        for i in range(4)
    ]
    whole = generate(engine(lm), requests=requests)
    assert max(rows) == 4  # those of one length
    rows.clear()
    parts = generate(engine(lm, max_batch_size=3), requests=requests)
    assert max(rows) == 3
    tokens = [[[s.token_ids for s in group] for group in groups] for groups in (whole, parts)]
    assert tokens[0] == tokens[1]


def test_modes_of_submodules_are_kept():
    lm = masked_llama()
    lm.train()
    lm.model.model.layers[0].eval()
    before = [module.training for module in lm.modules()]
    for cache in ("none", "prefix"):
        generate(engine(lm, cache=cache))
        assert [module.training for module in lm.modules()] == before


@torch.no_grad()
def test_weights_that_are_not_used_are_found_by_the_check_sequence():
    lm = masked_llama()
    subject, sequence = engine(lm), (3, 4, 5, 6, 7)
    publish(subject, lm.model.named_parameters(), 3)
    assert check_engine(subject, sequence, masked_scores(lm, sequence), 1e-6) == 0
    other = copy.deepcopy(lm)
    with torch.no_grad():
        other.model.model.layers[0].mlp.down_proj.weight[0] += 0.05
    with pytest.raises(WeightSyncError):
        check_engine(subject, sequence, masked_scores(other, sequence), 1e-3)


def test_long_sequences_are_scored_in_parts(monkeypatch):
    sequence = tuple(2 + i % 9 for i in range(20))
    [whole] = engine().score([sequence], 0.8)
    monkeypatch.setattr("rlalign.rollout.masked_diffusion.SCORE_TOKENS", 60)
    [parts] = engine().score([sequence], 0.8)
    assert len(whole) == 19
    torch.testing.assert_close(parts, whole)


def test_what_does_not_go_with_the_model_is_refused():
    with pytest.raises(EngineError, match=r"block_size=8.*blocks of 4"):
        engine(masked_llama(block_size=4), block_size=8)
    with pytest.raises(EngineError, match=rf"token {VOCAB}, the model knows 0 to {VOCAB - 1}"):
        engine(suppress_ids=[3, VOCAB])
    with pytest.raises(EngineError, match=rf"'culprit' holds the mask token {MASK}"):
        generate(engine(), requests=[GenerateRequest("culprit", (3, MASK), (1,))])
    with pytest.raises(EngineError, match="max_batch_size is 0"):
        engine(max_batch_size=0)
    with pytest.raises(EngineError, match="above 0"):
        engine().score([(3, 4)], 0.0)


def test_a_model_with_blocks_takes_prompts_of_any_length():
    lm = masked_llama(block_size=4)
    requests = [GenerateRequest(f"p{n}", (5,) * n, (n,)) for n in range(1, 7)]
    for cache in ("none", "prefix"):
        subject = engine(lm, cache=cache, steps=6)
        groups = generate(subject, SamplingParams(LENGTH, ignore_eos=True), requests)
        for request, [sample] in zip(requests, groups, strict=True):
            assert len(sample.token_ids) == LENGTH
            [[alone]] = generate(subject, SamplingParams(LENGTH, ignore_eos=True), [request])
            assert alone.token_ids == sample.token_ids and alone.steps == sample.steps
