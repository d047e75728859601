"""What every rollout engine must do: plain functions, each a fact, run on any engine.

    subject = Subject(engine, sender, tokenizer)
    for check in (*SAMPLING_CHECKS, *WEIGHT_CHECKS): check(subject)

`sender` is a plain HF model with the weights that the engine holds when a check begins; it plays
the trainer. The references are its ordinary forward passes, one sequence at a time, without a
cache. A masked-diffusion model (its config names a mask token) is to be filled from left to right,
one token at a time, so that the same facts hold: its logits of a token are those of a canvas whose
later tokens are masked, and it scores a token given all the others. To put a new engine under test,
add it to ENGINES in test_conformance.py.

Shapes: T tokens of one sequence, V vocabulary.
"""

from __future__ import annotations

import copy
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from rlalign.rollout.digest import WeightDigest
from rlalign.rollout.engine import EngineError, GenerateRequest, RolloutEngine, SamplingParams
from rlalign.types import Sample, VersionSpan

MAX_PROMPT = 96  # engines under test take prompts of this length ...
MAX_COMPLETION = 32  # ... and this many tokens more, which together is the model's context
MAX_BATCH = 16  # they decode this many sequences together: larger batches must queue
MAX_LOGP_ERROR = 1e-3  # nats, float32, a single token
MEAN_LOGP_ERROR = 1e-5  # nats, float32, over all tokens


@dataclass
class Subject:
    """An engine, and the model whose weights it holds."""

    engine: RolloutEngine
    sender: Any
    tokenizer: Any

    @property
    def vocab(self) -> int:
        return self.sender.config.vocab_size

    @property
    def eos(self) -> int:
        return self.tokenizer.eos_token_id

    def prompts(self, count: int, lengths: Sequence[int] = (1, 7, 33, 64), seed: int = 0):
        """Random prompts; the lengths straddle the usual cache blocks."""
        draw = random.Random(seed)
        return [
            tuple(draw.randrange(2, self.vocab) for _ in range(lengths[i % len(lengths)]))
            for i in range(count)
        ]

    def one_each(
        self, prompts: Sequence[tuple[int, ...]], params: SamplingParams, seed: int = 100
    ) -> list[Sample]:
        requests = [GenerateRequest(f"p{i}", p, (seed + i,)) for i, p in enumerate(prompts)]
        return [group[0] for group in self.engine.generate(requests, params)]


def mask_of(model: Any) -> int | None:
    return getattr(model.config, "mask_token_id", None)


@torch.no_grad()
def next_logits(model: Any, prompt: Sequence[int], done: Sequence[int], limit: int) -> torch.Tensor:
    """Float64 [V]: of the token after `done` in a completion of at most `limit` tokens."""
    tokens = [*prompt, *done]
    if mask_of(model) is None:
        return model(torch.tensor([tokens])).logits[0, -1].double()
    return masked_logits(model, [*tokens, *[0] * (limit - len(done))], [len(tokens)], True)[0]


@torch.no_grad()
def completion_logits(
    model: Any, prompt: Sequence[int], completion: Sequence[int], limit: int
) -> torch.Tensor:
    """Float64 [T, V]: of each token of a completion of at most `limit` tokens."""
    tokens, start = [*prompt, *completion], len(prompt)
    if mask_of(model) is None:
        return model(torch.tensor([tokens])).logits[0, start - 1 : -1].double()
    canvas = [*tokens, *[0] * (limit - len(completion))]
    return masked_logits(model, canvas, range(start, len(tokens)), True)


@torch.no_grad()
def scoring_logits(model: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Float64 [T - 1, V]: what each token but the first is scored by."""
    if mask_of(model) is None:
        return model(torch.tensor([list(tokens)])).logits[0, :-1].double()
    return masked_logits(model, tokens, range(1, len(tokens)), False)


def masked_logits(
    model: Any, tokens: Sequence[int], columns: Sequence[int], later: bool
) -> torch.Tensor:
    """Float64 [T, V]: of each of the T columns, where it is masked and (`later`) all behind it."""
    if not columns:
        return torch.zeros(0, model.config.vocab_size).double()
    canvas = torch.tensor(list(tokens)).repeat(len(columns), 1)
    for row, column in zip(canvas, columns, strict=True):
        row[column : None if later else column + 1] = mask_of(model)
    logits_TCV = model(canvas).logits.double()
    logits_TV = logits_TCV[torch.arange(len(columns)), torch.tensor(list(columns))]
    logits_TV[:, mask_of(model)] = -torch.inf
    return logits_TV


def sampling_logp(logits_TV: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The log of the distribution sampled from, by the definition."""
    logits_TV = logits_TV / (params.temperature or 1.0)
    if params.top_k or params.top_p < 1:
        logits_TV = torch.stack([filtered(row_V, params) for row_V in logits_TV])
    return logits_TV.log_softmax(-1)


def filtered(row_V: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """One row with -inf at the tokens left out: the k likeliest, and of them as few as add up to
    top_p."""
    likeliest = row_V.argsort(descending=True)[: params.top_k or None].tolist()
    probs = row_V[likeliest].softmax(-1).tolist()
    kept, total = [], 0.0
    for v, prob in zip(likeliest, probs, strict=True):
        if total >= params.top_p:
            break
        kept.append(v)
        total += prob
    out_V = torch.full_like(row_V, -torch.inf)
    out_V[kept] = row_V[kept]
    return out_V


def reference_logp(
    model: Any, prompt: Sequence[int], completion: Sequence[int], params: SamplingParams
) -> torch.Tensor:
    logits_TV = completion_logits(model, prompt, completion, params.max_completion_length)
    logp_TV = sampling_logp(logits_TV, params)
    return logp_TV.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def assert_logp(
    model: Any,
    prompts: Sequence[tuple[int, ...]],
    samples: Sequence[Sample],
    params: SamplingParams,
) -> None:
    """The samples' log-probs are those of `model`, within the bars."""
    errors = torch.cat(
        [
            (torch.tensor(s.logp).double() - reference_logp(model, p, s.token_ids, params)).abs()
            for p, s in zip(prompts, samples, strict=True)
        ]
    )
    assert len(errors) > 100
    assert float(errors.max()) <= MAX_LOGP_ERROR
    assert float(errors.mean()) <= MEAN_LOGP_ERROR


def greedy_by_hand(model: Any, prompt: Sequence[int], count: int, eos: int) -> tuple[int, ...]:
    tokens: list[int] = []
    while len(tokens) < count and eos not in tokens:
        tokens.append(int(next_logits(model, prompt, tokens, count).argmax()))
    return tuple(tokens)


def perturbed(model: Any, seed: int = 1) -> Any:
    """A copy with other weights, far enough away for any stale part to show."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in other.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise, alpha=0.1)
    return other


def digest_of(parameters) -> str:
    digest = WeightDigest()
    for name, tensor in parameters:
        digest.add(name, tensor)
    return digest.hexdigest()


# --- what is drawn


def logp_is_that_of_the_sampling_distribution(subject: Subject) -> None:
    for temperature in (1.0, 0.7):
        params = SamplingParams(MAX_COMPLETION, temperature=temperature)
        prompts = subject.prompts(20)
        assert_logp(subject.sender, prompts, subject.one_each(prompts, params), params)


def filters_renormalise_the_logp(subject: Subject) -> None:
    for top_p, top_k in ((0.8, 0), (1.0, 5), (0.9, 8)):
        params = SamplingParams(16, temperature=0.9, top_p=top_p, top_k=top_k)
        prompts = subject.prompts(12)
        assert_logp(subject.sender, prompts, subject.one_each(prompts, params), params)


def greedy_is_the_argmax_with_logp_at_temperature_1(subject: Subject) -> None:
    params = SamplingParams(MAX_COMPLETION, temperature=0.0)
    prompts = subject.prompts(6)
    samples = subject.one_each(prompts, params)
    for prompt, sample in zip(prompts, samples, strict=True):
        expected = greedy_by_hand(subject.sender, prompt, MAX_COMPLETION, subject.eos)
        assert sample.token_ids == expected
    assert_logp(subject.sender, prompts, samples, params)


def equal_seeds_give_equal_tokens_in_any_company(subject: Subject) -> None:
    params = SamplingParams(MAX_COMPLETION)
    prompts = subject.prompts(4)
    wanted = [GenerateRequest(f"w{i}", p, (2**62 + i, i)) for i, p in enumerate(prompts)]
    alone = [subject.engine.generate([request], params)[0] for request in wanted]
    for company, seed in ((3, 1), (17, 2), (17, 3)):
        others = [
            GenerateRequest(f"o{i}", p, (seed * 1000 + i,))
            for i, p in enumerate(subject.prompts(company, seed=seed))
        ]
        mixed = subject.engine.generate([*others[:2], *wanted, *others[2:]], params)[2:6]
        assert [[s.token_ids for s in group] for group in mixed] == [
            [s.token_ids for s in group] for group in alone
        ]


def other_seeds_give_other_tokens(subject: Subject) -> None:
    [prompt] = subject.prompts(1, lengths=(9,))
    # High bits alone must matter too, or half of the keys would be wasted.
    seeds = (0, 1, 2, 2**20, 2**31, 2**62 + 1, 2**63 - 1)
    [group] = subject.engine.generate(
        [GenerateRequest("p", prompt, seeds)], SamplingParams(MAX_COMPLETION, ignore_eos=True)
    )
    assert len({sample.token_ids for sample in group}) == len(seeds)


def frequencies_are_the_probabilities(subject: Subject) -> None:
    """Chi-square of the first and the second token over consecutive seeds, the worst ones for a
    weak generator. A second draw that reuses the first one's noise fails the second."""
    [prompt] = subject.prompts(1, lengths=(9,), seed=5)
    count = 2000
    params = SamplingParams(2, temperature=0.8, ignore_eos=True)
    [group] = subject.engine.generate([GenerateRequest("p", prompt, tuple(range(count)))], params)
    first_V = sampling_logp(next_logits(subject.sender, prompt, (), 2)[None], params)[0].exp()
    last_VV = torch.stack(
        [next_logits(subject.sender, prompt, (v,), 2) for v in range(subject.vocab)]
    )
    second_V = first_V @ sampling_logp(last_VV, params).exp()
    for position, probs_V in enumerate((first_V, second_V)):
        drawn = Counter(sample.token_ids[position] for sample in group)
        assert_chi_square(drawn, probs_V.tolist(), count)


def assert_chi_square(drawn: Counter[int], probs: Sequence[float], count: int) -> None:
    likely = [v for v, p in enumerate(probs) if p * count >= 5]
    cells = [(drawn[v], probs[v] * count) for v in likely]
    rest = count - sum(expected for _, expected in cells)
    if rest >= 5:
        cells.append((count - sum(drawn[v] for v in likely), rest))
    statistic = sum((observed - expected) ** 2 / expected for observed, expected in cells)
    freedom = len(cells) - 1
    assert freedom >= 3
    # Mean and standard deviation of the chi-square distribution are k and sqrt(2k): five of them.
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


# --- how it ends, and how it is handed back


def completions_end_with_eos_or_at_the_limit(subject: Subject) -> None:
    params = SamplingParams(MAX_COMPLETION)
    prompts = subject.prompts(16)
    # A token the model likes, so that both ends occur whatever the weights.
    liked = Counter(t for s in subject.one_each(prompts, params) for t in s.token_ids)
    extra = liked.most_common(3)[-1][0]
    params = SamplingParams(MAX_COMPLETION, stop_token_ids=(extra,))
    ends = {subject.eos, extra}
    reasons = Counter()
    for sample in subject.one_each(prompts * 4, params):
        *body, last = sample.token_ids
        assert not ends & set(body)
        assert (sample.finish_reason == "stop") == (last in ends)
        assert sample.finish_reason == "stop" or len(sample.token_ids) == MAX_COMPLETION
        assert len(sample.logp) == len(sample.token_ids)
        reasons[sample.finish_reason] += 1
    assert set(reasons) == {"stop", "length"}


def eos_on_the_last_allowed_token_is_a_stop(subject: Subject) -> None:
    prompts = subject.prompts(4)
    for prompt in prompts:
        first = greedy_by_hand(subject.sender, prompt, 1, subject.eos)[0]
        [sample] = subject.one_each(
            [prompt], SamplingParams(1, temperature=0.0, stop_token_ids=(first,))
        )
        assert (sample.token_ids, sample.finish_reason) == ((first,), "stop")


def requests_of_one_call_may_have_limits_of_their_own(subject: Subject) -> None:
    """A shorter one is the beginning of what the same seed draws without; of masked diffusion, what
    it draws alone."""
    prompt, params = subject.prompts(1)[0], SamplingParams(24, ignore_eos=True)
    limits = (None, 1, 9, 30)
    requests = [
        GenerateRequest("p", prompt, (4, 5), max_completion_length=limit) for limit in limits
    ]
    whole, *others = subject.engine.generate(requests, params)
    assert [len(sample.token_ids) for sample in whole] == [24, 24]
    for limit, samples in zip(limits[1:], others, strict=True):
        for sample, other in zip(samples, whole, strict=True):
            assert len(sample.token_ids) == limit and sample.finish_reason == "length"
            if mask_of(subject.sender) is None:
                assert sample.token_ids[:24] == other.token_ids[:limit]
        alone = [GenerateRequest("p", prompt, (4, 5), max_completion_length=limit)]
        [again] = subject.engine.generate(alone, params)
        assert [sample.token_ids for sample in again] == [sample.token_ids for sample in samples]
    for limit in (0, MAX_PROMPT + MAX_COMPLETION):
        wrong = GenerateRequest("p", prompt, (1,), max_completion_length=limit)
        with pytest.raises(EngineError):
            subject.engine.generate([wrong], params)


def requests_of_one_call_may_be_drawn_in_ways_of_their_own(subject: Subject) -> None:
    """Each as in a call of its own, and the others as the call says."""
    prompts, call = subject.prompts(6), SamplingParams(24, temperature=0.8, ignore_eos=True)
    ways = (
        None,
        SamplingParams(12, temperature=0.0, ignore_eos=True),
        SamplingParams(20, temperature=1.3, top_k=5, ignore_eos=True),
        SamplingParams(20, temperature=1.3, top_p=0.7, ignore_eos=True),
        None,
        SamplingParams(31, stop_token_ids=tuple(range(2, subject.vocab, 5))),
    )
    requests = [
        GenerateRequest(f"p{i}", prompt, (i, 50 + i), params=way)
        for i, (prompt, way) in enumerate(zip(prompts, ways, strict=True))
    ]
    found = subject.engine.generate(requests, call)
    for request, samples in zip(requests, found, strict=True):
        own = request.params or call
        [alone] = subject.engine.generate([replace(request, params=None)], own)
        assert [s.token_ids for s in samples] == [s.token_ids for s in alone]
        for sample in samples:
            want = reference_logp(subject.sender, request.token_ids, sample.token_ids, own)
            torch.testing.assert_close(
                torch.tensor(sample.logp).double(), want, atol=MAX_LOGP_ERROR, rtol=0
            )
    assert {len(sample.token_ids) for sample in found[1]} == {12}
    limited = replace(requests[1], max_completion_length=5)
    [[sample, _]] = subject.engine.generate([limited], call)
    assert sample.token_ids == found[1][0].token_ids[:5] or mask_of(subject.sender) is not None
    for wrong in (SamplingParams(0), SamplingParams(4, temperature=-1.0)):
        with pytest.raises(EngineError):
            subject.engine.generate([requests[0], replace(requests[1], params=wrong)], call)


def the_likeliest_tokens_of_each_step_are_told(subject: Subject) -> None:
    """Of the distribution drawn from, as many as were asked for or there are. What is decided in
    an order of its own has no steps, and says so."""
    prompts = subject.prompts(6)
    call = SamplingParams(16, temperature=0.7, num_top=4, ignore_eos=True)
    ways = (
        None, replace(call, temperature=0.0, num_top=2), replace(call, top_k=3, num_top=9),
        replace(call, num_top=0), replace(call, num_top=subject.vocab + 5), None,
    )  # fmt: skip
    requests = [
        GenerateRequest(f"p{i}", prompt, (i,), params=way)
        for i, (prompt, way) in enumerate(zip(prompts, ways, strict=True))
    ]
    if mask_of(subject.sender) is not None:
        with pytest.raises(EngineError, match="num_top"):
            subject.engine.generate(requests, call)
        return
    for request, [sample] in zip(requests, subject.engine.generate(requests, call), strict=True):
        own = request.params or call
        assert len(sample.top) == (16 if own.num_top else 0)
        logits_TV = completion_logits(subject.sender, request.token_ids, sample.token_ids, 16)
        for top, logp_V in zip(sample.top, sampling_logp(logits_TV, own), strict=False):
            assert len(top) == min(own.num_top, int(logp_V.isfinite().sum()))
            got = torch.tensor([logp for _, logp in top], dtype=torch.float64)
            assert got.tolist() == sorted(got.tolist(), reverse=True)
            want = logp_V[[token for token, _ in top]]
            torch.testing.assert_close(got, want, atol=MAX_LOGP_ERROR, rtol=0)
            # None that is left out is likelier than one that is told.
            assert float(logp_V.topk(len(top)).values[-1] - want.min()) <= MAX_LOGP_ERROR
            assert len({token for token, _ in top}) == len(top)
    with pytest.raises(EngineError, match="num_top"):
        subject.engine.generate(requests[:1], replace(call, num_top=-1))


def ignore_eos_draws_to_the_limit(subject: Subject) -> None:
    prompts = subject.prompts(24)
    drawn = subject.one_each(prompts, SamplingParams(MAX_COMPLETION, ignore_eos=True))
    assert {len(s.token_ids) for s in drawn} == {MAX_COMPLETION}
    assert {s.finish_reason for s in drawn} == {"length"}


def groups_are_ragged_and_numbered(subject: Subject) -> None:
    prompts = subject.prompts(5)
    sizes, firsts = (3, 0, 1, 20, 2), (0, 0, 7, 2, 100)
    requests = [
        GenerateRequest(f"p{i}", p, tuple(range(50 * i, 50 * i + n)), first_index=first)
        for i, (p, n, first) in enumerate(zip(prompts, sizes, firsts, strict=True))
    ]
    params = SamplingParams(8)
    groups = subject.engine.generate(requests, params)
    assert [len(group) for group in groups] == list(sizes)
    for request, group, first in zip(requests, groups, firsts, strict=True):
        assert [s.index for s in group] == list(range(first, first + len(group)))
        assert {s.prompt_id for s in group} <= {request.prompt_id}
        for seed, sample in zip(request.seeds, group, strict=True):
            # The sample belongs to the prompt and seed of its place.
            alone = GenerateRequest("x", request.token_ids, (seed,))
            assert subject.engine.generate([alone], params)[0][0].token_ids == sample.token_ids


def text_is_the_decoded_completion(subject: Subject) -> None:
    for sample in subject.one_each(subject.prompts(12), SamplingParams(MAX_COMPLETION)):
        decoded = subject.tokenizer.decode(list(sample.token_ids), skip_special_tokens=True)
        assert sample.text == decoded


def nothing_asked_nothing_given(subject: Subject) -> None:
    assert subject.engine.generate([], SamplingParams(4)) == []
    assert subject.engine.score([]) == []
    assert subject.engine.generate([GenerateRequest("p", (5,), ())], SamplingParams(4)) == [[]]


# --- scores


def score_is_the_log_softmax_of_a_plain_forward(subject: Subject) -> None:
    longest = MAX_PROMPT + MAX_COMPLETION
    sequences = [*subject.prompts(10), *subject.prompts(2, lengths=(longest,))]
    can_scale = subject.engine.capabilities.score_temperature
    for temperature in (1.0, 0.7) if can_scale else (1.0,):
        scores = subject.engine.score(sequences, temperature)
        for sequence, score in zip(sequences, scores, strict=True):
            logits_TV = scoring_logits(subject.sender, sequence)
            logp_TV = (logits_TV / temperature).log_softmax(-1)
            expected = logp_TV.gather(-1, torch.tensor(sequence, dtype=torch.long)[1:, None])[:, 0]
            assert score.dtype == torch.float32
            torch.testing.assert_close(score.double(), expected, atol=MAX_LOGP_ERROR, rtol=0)
    if not can_scale:
        with pytest.raises(EngineError, match="temperature"):
            subject.engine.score(sequences, 0.7)


# --- weights


def an_update_is_used_at_once(subject: Subject) -> None:
    """Also by prompts that are in the prefix cache."""
    params = SamplingParams(MAX_COMPLETION)
    prompts = subject.prompts(16, lengths=(33, 64, 90))
    subject.one_each(prompts, params)
    for seed in (1, 2):
        other = perturbed(subject.sender, seed)
        subject.engine.update_weights(other.named_parameters(), 10 + seed)
        assert_logp(other, prompts, subject.one_each(prompts, params), params)
        [score] = subject.engine.score(prompts[:1])
        logp_TV = scoring_logits(other, prompts[0]).log_softmax(-1)
        expected = logp_TV.gather(-1, torch.tensor(prompts[0])[1:, None])[:, 0]
        torch.testing.assert_close(score.double(), expected, atol=MAX_LOGP_ERROR, rtol=0)


def samples_carry_the_version(subject: Subject) -> None:
    for version in (7, 3):
        returned = subject.engine.update_weights(subject.sender.named_parameters(), version)
        assert returned == subject.engine.version
        assert returned.version == version
        for sample in subject.one_each(subject.prompts(6), SamplingParams(8)):
            assert sample.spans == (VersionSpan(len(sample.token_ids), version),)


def the_digest_is_of_what_was_received(subject: Subject) -> None:
    weights = {name: p.detach().clone() for name, p in subject.sender.named_parameters()}
    sent = digest_of(weights.items())
    assert subject.engine.update_weights(weights.items(), 1).digest == sent
    assert subject.engine.update_weights(reversed(weights.items()), 1).digest == sent
    for name in list(weights)[:: len(weights) // 5]:  # one element wrong on the way
        damaged = {n: t.clone() if n == name else t for n, t in weights.items()}
        damaged[name].view(-1)[-1] += 1e-3
        assert subject.engine.update_weights(damaged.items(), 1).digest != sent


def every_name_of_a_tied_weight_is_known(subject: Subject) -> None:
    other = perturbed(subject.sender)
    prompts = subject.prompts(8)
    subject.engine.update_weights(other.state_dict().items(), 4)
    params = SamplingParams(MAX_COMPLETION, ignore_eos=True)
    assert_logp(other, prompts, subject.one_each(prompts, params), params)


def a_refused_update_changes_nothing(subject: Subject) -> None:
    good = {name: p.detach() for name, p in perturbed(subject.sender).named_parameters()}
    first, *_, last = good
    attempts = {
        "shape": {**good, last: torch.zeros(3, 5)},
        "missing": {name: tensor for name, tensor in good.items() if name != last},
        "unknown": {**good, "model.layers.99.bias": torch.zeros(3)},
        "renamed": {("x" if name == first else name): tensor for name, tensor in good.items()},
    }
    prompts, params = subject.prompts(8), SamplingParams(MAX_COMPLETION)
    before = subject.engine.version
    for attempt in attempts.values():
        with pytest.raises(EngineError, match="old weights stay in use"):
            subject.engine.update_weights(attempt.items(), 99)
        assert subject.engine.version == before
        assert_logp(subject.sender, prompts, subject.one_each(prompts, params), params)


def a_sender_that_fails_half_way_changes_nothing(subject: Subject) -> None:
    def broken():
        for i, item in enumerate(perturbed(subject.sender).named_parameters()):
            if i == 5:
                raise ConnectionError("the trainer died")
            yield item

    before = subject.engine.version
    with pytest.raises(ConnectionError):
        subject.engine.update_weights(broken(), 99)
    assert subject.engine.version == before
    prompts, params = subject.prompts(8), SamplingParams(MAX_COMPLETION)
    assert_logp(subject.sender, prompts, subject.one_each(prompts, params), params)


# --- bad requests, and being a good neighbour


def bad_requests_are_named_and_do_no_harm(subject: Subject) -> None:
    engine = subject.engine
    good = GenerateRequest("fine", (5, 6), (1,))
    too_long = tuple(2 + i % 100 for i in range(MAX_PROMPT + MAX_COMPLETION + 1))
    cases = {
        "culprit.*no tokens": (),
        f"culprit.*{subject.vocab}": (5, subject.vocab),
        "culprit.*-1": (5, -1),
        f"culprit.*{len(too_long)} tokens": too_long,
    }
    for message, token_ids in cases.items():
        with pytest.raises(EngineError, match=message):
            engine.generate([good, GenerateRequest("culprit", token_ids, (1,))], SamplingParams(8))
        with pytest.raises(EngineError):
            engine.score([good.token_ids, token_ids])
    with pytest.raises(EngineError, match="max_completion_length"):
        engine.generate([good], SamplingParams(0))
    prompts, params = subject.prompts(8), SamplingParams(MAX_COMPLETION)
    assert_logp(subject.sender, prompts, subject.one_each(prompts, params), params)


def the_process_is_left_as_it_was(subject: Subject) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    set_num_threads, grad = torch.set_num_threads, torch.is_grad_enabled()
    subject.one_each(subject.prompts(6), SamplingParams(8))
    subject.engine.score(subject.prompts(3))
    subject.engine.update_weights(subject.sender.named_parameters(), 1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.set_num_threads is set_num_threads
    assert torch.is_grad_enabled() == grad
    assert all(p.requires_grad and p.grad is None for p in subject.sender.parameters())


def sleep_and_wake_change_nothing(subject: Subject) -> None:
    prompts, params = subject.prompts(6), SamplingParams(8)
    before = subject.one_each(prompts, params)
    subject.engine.sleep()
    subject.engine.wake()
    assert subject.one_each(prompts, params) == before
    subject.engine.sleep()
    subject.engine.update_weights(subject.sender.named_parameters(), subject.engine.version.version)
    subject.engine.wake()
    assert subject.one_each(prompts, params) == before


SAMPLING_CHECKS: tuple[Callable[[Subject], None], ...] = (
    logp_is_that_of_the_sampling_distribution,
    filters_renormalise_the_logp,
    greedy_is_the_argmax_with_logp_at_temperature_1,
    equal_seeds_give_equal_tokens_in_any_company,
    other_seeds_give_other_tokens,
    frequencies_are_the_probabilities,
    completions_end_with_eos_or_at_the_limit,
    eos_on_the_last_allowed_token_is_a_stop,
    requests_of_one_call_may_have_limits_of_their_own,
    requests_of_one_call_may_be_drawn_in_ways_of_their_own,
    the_likeliest_tokens_of_each_step_are_told,
    ignore_eos_draws_to_the_limit,
    groups_are_ragged_and_numbered,
    text_is_the_decoded_completion,
    nothing_asked_nothing_given,
    bad_requests_are_named_and_do_no_harm,
    the_process_is_left_as_it_was,
    sleep_and_wake_change_nothing,
)
WEIGHT_CHECKS: tuple[Callable[[Subject], None], ...] = (
    score_is_the_log_softmax_of_a_plain_forward,
    an_update_is_used_at_once,
    samples_carry_the_version,
    the_digest_is_of_what_was_received,
    every_name_of_a_tied_weight_is_known,
    a_refused_update_changes_nothing,
    a_sender_that_fails_half_way_changes_nothing,
)


def closing_twice_is_fine_and_final(subject: Subject) -> None:
    """Runs last: the engine is gone afterwards."""
    subject.engine.close()
    subject.engine.close()
    with pytest.raises(EngineError, match="closed"):
        subject.one_each(subject.prompts(1), SamplingParams(4))
