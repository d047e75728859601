"""What every engine of searches must do: plain functions, each a fact, run on any engine.

    subject = Subject(engine, model, tokenizer)
    for check in CHECKS: check(subject)

`model` is a plain HF model with the engine's weights; the references are its ordinary forward
passes, one sequence at a time. It comes from `write_model`: what reads the token POISON has no
finite logits, and nothing else does.

Shapes: N latent positions, D hidden size, V vocabulary.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlalign.algos.latent import Ascent, LatentState
from rlalign.models.random import write_random_model
from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.search import Ascend, Choose, Draw, Drawn, Latents, Request, SearchEngine
from tests.rollout.conformance import filtered

CONTEXT = 128
POISON = 299  # past the tokenizer's last
CLOSE = {"atol": 1e-4, "rtol": 0.0}  # nats, and units of a latent
GREEDY = SamplingParams(24, temperature=0.0, ignore_eos=True)


def write_model(path: Path, architecture: str = "qwen2") -> Path:
    """Heads of 32: the smallest that vLLM's CPU kernels take."""
    shape = {"hidden": 64, "heads": 2, "kv_heads": 1, "layers": 2, "mlp": 96, "vocab": POISON + 1}
    write_random_model(path, architecture, tied=False, max_positions=CONTEXT, **shape)
    [file] = path.glob("*.safetensors")
    weights = load_file(file)
    weights["model.embed_tokens.weight"][POISON] = torch.nan
    weights["lm_head.weight"][POISON] = 0  # hardly ever drawn
    save_file(weights, file, {"format": "pt"})
    return path


@dataclass
class Subject:
    """An engine, and the model whose weights it holds."""

    engine: SearchEngine
    model: Any
    tokenizer: Any

    def prompts(self, count: int, seed: int = 0) -> list[tuple[int, ...]]:
        """Random prompts; the lengths straddle the usual cache blocks."""
        draw = random.Random(seed)
        lengths = (1, 7, 33, 64)
        return [
            tuple(draw.randrange(2, POISON) for _ in range(lengths[i % len(lengths)]))
            for i in range(count)
        ]

    def ask(self, requests: Sequence[Request]) -> list[Any]:
        """The replies, none of them an error."""
        replies = self.engine.answer(requests)
        assert len(replies) == len(requests)
        for reply in replies:
            assert not isinstance(reply, EngineError), reply
        return replies

    @torch.no_grad()
    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Float64 [V]: of the token after `ids`."""
        return self.model(torch.tensor([list(ids)])).logits[0, -1].double()

    @torch.no_grad()
    def latents(self, ids: Sequence[int]) -> torch.Tensor:
        """What the head reads, [len, D]."""
        return self.model.get_decoder()(torch.tensor([list(ids)])).last_hidden_state[0]


def reference_logp(subject: Subject, ids: Sequence[int], params: SamplingParams) -> torch.Tensor:
    """Float64 [V]: the log of the distribution that the token after `ids` is drawn from."""
    logits_V = subject.logits(ids) / (params.temperature or 1.0)
    if params.top_k or params.top_p < 1:
        logits_V = filtered(logits_V, params)
    return logits_V.log_softmax(-1)


def assert_drawn(subject: Subject, request: Draw, drawn: Drawn) -> None:
    """Log-probs and the likeliest tokens of every step are those of the model."""
    assert len(drawn.logp) == len(drawn.ids)
    assert len(drawn.top) == (len(drawn.ids) if request.params.num_top else 0)
    for t, token in enumerate(drawn.ids):
        logp_V = reference_logp(subject, [*request.ids, *drawn.ids[:t]], request.params)
        assert abs(drawn.logp[t] - float(logp_V[token])) <= CLOSE["atol"]
        if not request.params.temperature:
            assert token == int(logp_V.argmax())
        if drawn.top:
            possible = min(request.params.num_top, int(logp_V.isfinite().sum()))
            want = logp_V.topk(possible)
            assert [v for v, _ in drawn.top[t]] == want.indices.tolist()
            got = torch.tensor([logp for _, logp in drawn.top[t]], dtype=torch.float64)
            torch.testing.assert_close(got, want.values, **CLOSE)


# --- drawing


def greedy_draws_and_their_likeliest_tokens_are_the_models(subject: Subject) -> None:
    for num_top in (0, 5):
        params = replace(GREEDY, num_top=num_top)
        requests = [Draw(ids, params, i) for i, ids in enumerate(subject.prompts(8))]
        for request, drawn in zip(requests, subject.ask(requests), strict=True):
            assert_drawn(subject, request, drawn)
            assert (len(drawn.ids), drawn.finish) == (24, "length")


def draws_of_one_call_are_each_drawn_in_their_own_way(subject: Subject) -> None:
    ways = (
        SamplingParams(9, ignore_eos=True),
        SamplingParams(3, temperature=0.7, top_k=4, num_top=6, ignore_eos=True),
        SamplingParams(12, temperature=0.0, num_top=2, ignore_eos=True),
        SamplingParams(6, temperature=1.2, top_p=0.6, num_top=30, ignore_eos=True),
    )
    requests = [Draw(ids, ways[i % 4], i) for i, ids in enumerate(subject.prompts(12))]
    replies = subject.ask(requests)
    for request, drawn in zip(requests, replies, strict=True):
        assert len(drawn.ids) == request.params.max_completion_length
        assert_drawn(subject, request, drawn)
    # A draw depends on its own seed alone.
    for request, drawn in zip(requests[:4], replies, strict=False):
        [again] = subject.ask([request])
        assert again.ids == drawn.ids
    others = subject.ask([replace(request, seed=1000 + request.seed) for request in requests])
    sampled = [i for i in range(12) if requests[i].params.temperature]
    assert any(others[i].ids != replies[i].ids for i in sampled)


def a_draw_ends_with_a_token_that_ends_it_or_at_its_limit(subject: Subject) -> None:
    [ids] = subject.prompts(1)
    [free] = subject.ask([Draw(ids, GREEDY)])
    place = next(i for i in range(1, 24) if free.ids[i] not in free.ids[:i])
    stopped = replace(GREEDY, stop_token_ids=(free.ids[place],), ignore_eos=False)
    short = replace(GREEDY, max_completion_length=2)
    drawn, limited = subject.ask([Draw(ids, stopped), Draw(ids, short)])
    if subject.engine.eos_ids.isdisjoint(free.ids[:place]):
        assert (drawn.ids, drawn.finish) == (free.ids[: place + 1], "stop")
    assert (limited.ids, limited.finish) == (free.ids[:2], "length")


# --- reading


def choices_have_the_models_log_probs_in_any_company(subject: Subject) -> None:
    prompts = subject.prompts(8, seed=1)
    options = [tuple(range(5, 6 + 3 * i)) for i in range(8)]
    choices = [Choose(*pair) for pair in zip(prompts, options, strict=True)]
    top = [Draw(ids, replace(GREEDY, num_top=3)) for ids in prompts]
    mixed = [request for pair in zip(choices, top, strict=True) for request in pair]
    replies = subject.ask(mixed)
    for alone, choice, got in zip(subject.ask(choices), choices, replies[::2], strict=True):
        want = reference_logp(subject, choice.ids, GREEDY)[list(choice.options)]
        for reply in (alone, got):
            assert isinstance(reply, tuple)
            torch.testing.assert_close(torch.tensor(reply, dtype=torch.float64), want, **CLOSE)
    for request, drawn in zip(top, replies[1::2], strict=True):
        assert_drawn(subject, request, drawn)


def options_are_answered_in_their_order_repeated_or_not(subject: Subject) -> None:
    [ids] = subject.prompts(1)
    [got] = subject.ask([Choose(ids, (9, 5, 9))])
    want = reference_logp(subject, ids, GREEDY)[[9, 5, 9]]
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want, **CLOSE)


def latents_are_what_the_head_reads(subject: Subject) -> None:
    """Also of a text that was just drawn, and so is in the prefix cache."""
    prompts = [ids for ids in subject.prompts(8, seed=2) if len(ids) > 1]
    drawn = subject.ask([Draw(ids, GREEDY) for ids in prompts])
    requests = []
    for ids, reply in zip(prompts, drawn, strict=True):
        whole = (*ids, *reply.ids)
        requests += [
            Latents(whole, len(ids), len(whole)), Latents(whole, 1, 2),
            Latents(whole, 1, len(whole)), Latents(whole, len(ids), len(ids) + 7),
        ]  # fmt: skip
    mixed = [*requests, *[Draw(ids, GREEDY) for ids in prompts]]
    for request, got in zip(requests, subject.ask(mixed), strict=False):
        want_ND = subject.latents(request.ids)[request.start - 1 : request.stop - 1]
        assert (got.dtype, got.device.type) == (torch.float32, "cpu")
        torch.testing.assert_close(got, want_ND, **CLOSE)


def the_longest_sequences_fit(subject: Subject) -> None:
    [ids] = [tuple(2 + i % 100 for i in range(CONTEXT))]
    latent_ND, drawn = subject.ask(
        [
            Latents(ids, CONTEXT - 1, CONTEXT),
            Draw(ids[:-1], replace(GREEDY, max_completion_length=1)),
        ]
    )
    torch.testing.assert_close(latent_ND, subject.latents(ids)[CONTEXT - 2 : CONTEXT - 1], **CLOSE)
    assert drawn.ids == (int(subject.logits(ids[:-1]).argmax()),)


# --- climbing


def latents_climb_as_autograd_says(subject: Subject) -> None:
    """Three steps of torch's own Adam on reward * log pi."""
    ids = subject.prompts(4, seed=3)[2]
    [latent_ND] = subject.ask([Latents(ids, 1, len(ids))])
    how, reward = Ascent(lr=0.3), -0.7
    head = subject.model.get_output_embeddings()
    wanted_ND = latent_ND.clone().requires_grad_()
    adam = torch.optim.Adam([wanted_ND], lr=how.lr, maximize=True)
    state, tokens_N = LatentState.start(latent_ND, how), head(latent_ND).argmax(-1)
    for _ in range(3):
        adam.zero_grad()
        logp_N = head(wanted_ND).log_softmax(-1).gather(1, tokens_N[:, None])
        (reward * logp_N.sum()).backward()
        adam.step()
        [ascended] = subject.ask([Ascend(state, tokens_N, reward, how)])
        state = ascended.state
        torch.testing.assert_close(state.latent_ND, wanted_ND.detach(), atol=1e-3, rtol=0)
        assert torch.equal(ascended.before_N, tokens_N)
        tokens_N = head(wanted_ND).argmax(-1)
        assert torch.equal(ascended.tokens_N, tokens_N)
        assert not ascended.is_still
    assert not torch.equal(tokens_N, head(latent_ND).argmax(-1))
    # Without a reward there is no gradient, but what Adam remembers moves on.
    fresh = LatentState.start(latent_ND, how)
    still, moves = subject.ask([Ascend(s, tokens_N, 0.0, how) for s in (fresh, state)])
    assert still.is_still and torch.equal(still.state.latent_ND, fresh.latent_ND)
    assert not moves.is_still and not torch.equal(moves.state.latent_ND, state.latent_ND)


# --- bad requests


def a_bad_request_has_an_error_and_the_others_their_replies(subject: Subject) -> None:
    good = [Draw((5, 6, 7), GREEDY, 1), Choose((5, 6), (7, 8)), Latents((5, 6, 7), 1, 3)]
    long = tuple(2 + i % 100 for i in range(CONTEXT + 1))
    bad = [
        Draw((), GREEDY), Draw((5, POISON + 1), GREEDY), Draw((5, -1), GREEDY), Draw(long, GREEDY),
        Draw(long[:-10], GREEDY), Draw((5,), SamplingParams(0)),
        Draw((5,), SamplingParams(4, temperature=-1.0)), Draw((5,), GREEDY, 2**70),
        Choose((), (5,)), Choose((5,), ()), Choose((5,), (POISON + 1,)), Choose(long, (5,)),
        Latents((), 1, 2), Latents((5, 6), 0, 1), Latents((5, 6), 1, 3), Latents((5, 6, 7), 2, 2),
        Latents(long, 1, 2), Latents((5, POISON + 1), 1, 2),
    ]  # fmt: skip
    mixed: list[Request] = [*bad[:9], *good, *bad[9:]]
    replies = subject.engine.answer(mixed)
    for request, reply in zip(mixed, replies, strict=True):
        assert isinstance(reply, EngineError) == any(request is one for one in bad), request
    assert_same(replies[9:12], subject.ask(good))


def logits_that_are_not_finite_are_an_error_of_their_request(subject: Subject) -> None:
    bad = [
        Draw((5, POISON), GREEDY), Draw((5, POISON), SamplingParams(4, num_top=2), 3),
        Choose((5, POISON), (5, 6)), Latents((5, POISON, 6), 1, 3),
    ]  # fmt: skip
    good = [
        Draw((5, 6, 7), GREEDY, 1), Choose((5, 6), (7, 8)), Latents((5, 6, POISON), 1, 3),
        Draw((8, 9), SamplingParams(4, num_top=2), 3),
    ]  # fmt: skip
    replies = subject.engine.answer(
        [request for pair in zip(bad, good, strict=True) for request in pair]
    )
    for reply in replies[::2]:
        assert isinstance(reply, EngineError) and "not finite" in str(reply)
    assert_same(replies[1::2], subject.ask(good))


def what_is_not_finite_leaves_nothing_behind(subject: Subject) -> None:
    """Neither for who asks the same again, nor for those that share the beginning of the text."""
    shared = tuple(2 + i % 90 for i in range(66))
    bad = [
        Draw((POISON, *shared), replace(GREEDY, max_completion_length=2)),
        Choose((POISON, *shared), (5,)),
    ]
    for _ in range(2):
        assert all(isinstance(reply, EngineError) for reply in subject.engine.answer(bad))
    good = [Draw((*shared, token), GREEDY) for token in (7, 8)]
    want = subject.ask(good)
    late = [
        Choose((*shared, POISON), (5, 6)),
        Draw((*shared, POISON), replace(GREEDY, max_completion_length=3)),
    ]
    replies = subject.engine.answer([good[0], *late, good[1]])
    assert all(isinstance(reply, EngineError) for reply in replies[1:3])
    assert_same([replies[0], replies[3]], want)
    assert_same(subject.ask(good), want)


def assert_same(got: Sequence[Any], want: Sequence[Any]) -> None:
    """A draw and what is read, whatever else was in the batch."""
    for one, other in zip(got, want, strict=True):
        if isinstance(one, Drawn):
            assert one.ids == other.ids
        else:
            torch.testing.assert_close(torch.as_tensor(one), torch.as_tensor(other), **CLOSE)


def nothing_asked_nothing_given(subject: Subject) -> None:
    assert subject.engine.answer([]) == []


def the_engine_says_what_it_can_read(subject: Subject) -> None:
    limits = subject.engine.limits
    assert (limits.vocab, limits.max_len) == (POISON + 1, CONTEXT)
    assert subject.engine.eos_ids == {subject.tokenizer.eos_token_id}
    assert subject.engine.tokenizer is subject.tokenizer


CHECKS: tuple[Callable[[Subject], None], ...] = (
    greedy_draws_and_their_likeliest_tokens_are_the_models,
    draws_of_one_call_are_each_drawn_in_their_own_way,
    a_draw_ends_with_a_token_that_ends_it_or_at_its_limit,
    choices_have_the_models_log_probs_in_any_company,
    options_are_answered_in_their_order_repeated_or_not,
    latents_are_what_the_head_reads,
    the_longest_sequences_fit,
    latents_climb_as_autograd_says,
    a_bad_request_has_an_error_and_the_others_their_replies,
    logits_that_are_not_finite_are_an_error_of_their_request,
    what_is_not_finite_leaves_nothing_behind,
    nothing_asked_nothing_given,
    the_engine_says_what_it_can_read,
)
