"""Searches on vLLM: all of search_conformance.py, the same tokens as on transformers, and what is
vLLM's own.

One vLLM engine can live in a process: the fixture starts one for each folder that is asked for.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlalign.algos.latent import Ascent, LatentState
from rlalign.config.schema import VllmConfig
from rlalign.models.random import write_random_model
from rlalign.rollout import vllm_start
from rlalign.rollout.engine import EngineError, SamplingParams
from rlalign.rollout.search import Ascend, Choose, Draw, Drawn, Latents
from rlalign.rollout.search_hf import HFSearch, read_head
from rlalign.rollout.search_vllm import VllmSearch
from rlalign.tasks.mini import get_mini_task
from rlalign.testtime import FunctionReward, latent_seek, rain
from rlalign.testtime.open_engine import open_engine
from rlalign.testtime.prompt import make_prompt
from tests.rollout.search_conformance import CHECKS, CLOSE, CONTEXT, Subject, write_model

pytestmark = [
    pytest.mark.xdist_group("vllm"),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

IDS = tuple(range(10, 60))
GREEDY = SamplingParams(16, temperature=0.0, ignore_eos=True, num_top=3)


class Running:
    """The engine under test at present."""

    def __init__(self) -> None:
        self.key, self.found = "", None

    def get(self, key: str, make: Callable[[], Any]) -> Any:
        if key != self.key:
            self.close()
            self.key, self.found = key, make()
        return self.found

    def close(self) -> None:
        if self.found is not None:
            self.found.engine.close()
            self.key, self.found = "", None


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.close()


def start(path: Path, **options: Any) -> Subject:
    tokenizer = AutoTokenizer.from_pretrained(path)
    cfg = VllmConfig(max_num_seqs=8, **options)
    engine = VllmSearch.open(str(path), tokenizer, cfg, max_len=CONTEXT)
    return Subject(engine, AutoModelForCausalLM.from_pretrained(path).eval(), tokenizer)


@pytest.fixture
def subject(running: Running, tmp_path_factory) -> Subject:
    return running.get("plain", lambda: start(write_model(tmp_path_factory.mktemp("model"))))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_engine(subject: Subject, check):
    check(subject)


def test_torchs_random_state_is_kept(subject: Subject):
    before = torch.get_rng_state()
    subject.ask([Draw(IDS, SamplingParams(4), 1), Choose(IDS, (5,)), Latents(IDS, 1, 3)])
    assert torch.equal(torch.get_rng_state(), before)


def test_a_deadline_ends_the_wait_by_name_and_the_engine_goes_on(subject: Subject, monkeypatch):
    requests = [Draw(IDS, GREEDY), Latents(IDS, 1, 20), Choose(IDS, (5, 6))]
    before = subject.ask(requests)
    engine: Any = subject.engine
    monkeypatch.setattr(engine._cfg, "timeout_s", 1e-9)
    with pytest.raises(EngineError, match=r"searching: 0 of 3 sequences.*timeout_s"):
        engine.answer(requests)
    monkeypatch.undo()
    assert engine._stream.unfinished == 0 and not engine._stream._tap._kept
    assert subject.ask(requests)[0] == before[0]


def test_a_request_that_vllm_itself_refuses_has_its_error(subject: Subject):
    """It takes 128 options."""
    many = Choose(IDS, (5,) * 129)
    many, drawn = subject.engine.answer([many, Draw(IDS, GREEDY)])
    assert isinstance(many, EngineError) and "vLLM refuses it" in str(many)
    assert isinstance(drawn, Drawn)


@pytest.fixture(scope="module")
def exact() -> HFSearch:
    engine = open_engine("mini:chain")
    assert isinstance(engine, HFSearch)
    return engine


class Mini:
    def __init__(self) -> None:
        self.engine: Any = open_engine("mini:chain", backend="vllm", max_batch_size=16)


@pytest.fixture
def mini(running: Running) -> VllmSearch:
    return running.get("mini", Mini).engine


@pytest.fixture(scope="module")
def questions() -> list[tuple[int, ...]]:
    tokenizer = open_engine("mini:chain").tokenizer
    rows = get_mini_task("chain").make_rows("eval")
    return [make_prompt(tokenizer, row, i).ids for i, row in enumerate(rows)][:32]


def test_the_mini_model_answers_token_for_token_as_on_transformers(mini, exact, questions):
    assert mini.limits == exact.limits and mini.eos_ids == exact.eos_ids
    requests = [Draw(ids, SamplingParams(48, temperature=0.0, num_top=2)) for ids in questions]
    got, want = mini.answer(requests), exact.answer(requests)
    assert len({len(drawn.ids) for drawn in want}) > 1
    for one, other in zip(got, want, strict=True):
        assert (one.ids, one.finish) == (other.ids, other.finish)
        torch.testing.assert_close(torch.tensor(one.logp), torch.tensor(other.logp), **CLOSE)
        assert [[v for v, _ in step] for step in one.top] == [
            [v for v, _ in step] for step in other.top
        ]


@pytest.mark.parametrize("tokens", ["argmax", "categorical"])
def test_the_mini_models_latents_climb_to_equal_tokens(mini, exact, questions, tokens):
    how = Ascent(lr=0.2, tokens=tokens)
    drawn = exact.answer([Draw(ids, SamplingParams(32, temperature=0.0)) for ids in questions[:8]])
    for ids, reply in zip(questions, drawn, strict=False):
        whole, tokens_N = (*ids, *reply.ids), torch.tensor(reply.ids)
        asked = [Latents(whole, len(ids), len(whole))]
        moved = []
        for engine in (mini, exact):
            state, steps = LatentState.start(*engine.answer(asked), how), []
            rewarded_N = tokens_N
            for _ in range(4):
                [step] = engine.answer([Ascend(state, rewarded_N, -1.0, how, 7)])
                state, rewarded_N = step.state, step.tokens_N
                steps.append((step.before_N.tolist(), step.tokens_N.tolist()))
            moved.append(steps)
        assert moved[0] == moved[1]
        assert moved[0][-1][1] != list(reply.ids)


def test_new_weights_are_in_draws_latents_and_the_head(mini, exact, questions):
    """The mini model's head is its embedding: the copy that vLLM multiplies with changes too."""
    requests = [
        Draw(questions[0], GREEDY), Latents(questions[1], 1, 5), Choose(questions[2], (5, 6)),
    ]  # fmt: skip
    before, stream = mini.answer(requests), mini._stream
    old = {name: weight.clone() for name, weight in exact.model.named_parameters()}
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in exact.model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=rng))
    try:
        stream.update_weights(exact.model.named_parameters(), 1)
        got, want = mini.answer(requests), exact.answer(requests)
        assert got[0].ids == want[0].ids != before[0].ids
        torch.testing.assert_close(got[1], want[1], **CLOSE)
        torch.testing.assert_close(torch.tensor(got[2]), torch.tensor(want[2]), **CLOSE)
        assert torch.equal(stream.head().weight_VD, read_head(exact.model).weight_VD)
    finally:
        with torch.no_grad():
            for name, weight in exact.model.named_parameters():
                weight.copy_(old[name])
        stream.reset_weights()
    assert mini.answer(requests)[0] == before[0]


@pytest.fixture
def capped(running: Running, tmp_path_factory) -> Subject:
    """Gemma: its logits are made by the embedding itself, and capped."""
    path = tmp_path_factory.mktemp("gemma")

    def make() -> Subject:
        fields = {"final_logit_softcapping": 2.0, "attn_logit_softcapping": None}
        shape = {"hidden": 64, "heads": 2, "kv_heads": 1}
        write_random_model(path, "gemma2", max_positions=CONTEXT, **shape, **fields)
        return start(path)

    return running.get("gemma", make)


def test_the_head_has_the_models_cap(capped: Subject):
    drawn, latent_ND = capped.ask([Draw(IDS, GREEDY), Latents(IDS, 1, len(IDS))])
    engine: Any = capped.engine
    head = engine._stream.head()
    assert head.softcap == 2.0
    with torch.no_grad():
        want_NV = capped.model(torch.tensor([IDS])).logits[0, :-1]
    torch.testing.assert_close(head.logits(latent_ND), want_NV, atol=1e-3, rtol=0)
    assert drawn.ids[0] == int(capped.logits(IDS).argmax())


class Adapted:
    """A model in vLLM, and the same with an adapter that also acts on its head."""

    def __init__(self, path: Path) -> None:
        shape = {"hidden": 64, "heads": 2, "kv_heads": 1}
        write_random_model(path, "llama", tied=False, max_positions=CONTEXT, **shape)
        self.engine: Any = start(path, max_loras=1).engine
        targets = ["q_proj", "down_proj", "lm_head"]
        self.model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(path),
            LoraConfig(r=8, lora_alpha=16, target_modules=targets),
        ).eval()
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                if "lora" in name:
                    weight.copy_(0.1 * torch.randn(weight.shape, generator=rng))
        self.model.save_pretrained(path / "adapter", save_embedding_layers=False)
        self.adapter = self.engine._stream.load_adapter(path / "adapter", 1)
        self.exact = HFSearch(self.model, self.engine.tokenizer)


@pytest.fixture
def adapted(running: Running, tmp_path_factory) -> Adapted:
    return running.get("adapted", lambda: Adapted(tmp_path_factory.mktemp("llama")))


def test_sequences_have_their_own_adapter_or_none(adapted: Adapted):
    from rlalign.rollout.vllm_requests import capturing, choosing, chosen, drawn_top

    stream, outputs = adapted.engine._stream, {}
    requests = [Draw(IDS, GREEDY), Choose(IDS, (5, 6, 7)), Latents(IDS, 4, len(IDS))]
    with vllm_start.eager("cpu", VllmConfig()), vllm_start.rng_kept("cpu"):
        for name, adapter in (("with", adapted.adapter), ("without", None)):
            stream.add(f"{name} 0", IDS, stream.sampling(GREEDY, 0), adapter)
            stream.add(f"{name} 1", IDS, choosing((5, 6, 7)), adapter)
            stream.add(f"{name} 2", IDS[:-1], capturing(4), adapter)
        while stream.unfinished:
            outputs |= {output.request_id: output for output in stream.step()}

    def assert_read(name: str) -> None:
        drawn, choice, latent_ND = adapted.exact.answer(requests)
        completion = outputs[f"{name} 0"].outputs[0]
        assert tuple(completion.token_ids) == drawn.ids
        assert [[v for v, _ in step] for step in drawn_top(completion)] == [
            [v for v, _ in step] for step in drawn.top
        ]
        got = torch.tensor(chosen(outputs[f"{name} 1"], (5, 6, 7)))
        torch.testing.assert_close(got, torch.tensor(choice), **CLOSE)
        torch.testing.assert_close(stream.latents(f"{name} 2"), latent_ND, **CLOSE)

    assert_read("with")
    z_ND = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    head, plain = stream.head(adapted.adapter), stream.head()
    with torch.no_grad():
        torch.testing.assert_close(head.logits(z_ND), read_head(adapted.model).logits(z_ND))
        with adapted.model.disable_adapter():
            assert_read("without")
            torch.testing.assert_close(plain.logits(z_ND), read_head(adapted.model).logits(z_ND))
    assert float((head.weight_VD - plain.weight_VD).abs().max()) > 0.1


def test_a_closed_engine_says_so(adapted: Adapted, running: Running):
    """Runs last: the engine is gone afterwards."""
    engine = adapted.engine
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.answer([Draw(IDS, GREEDY)])


def test_whole_methods_give_the_same_results_as_on_transformers(mini, exact):
    """At temperature 0, where nothing depends on an engine's own random numbers."""

    def right(completions, answer):
        return [-1.0 + (f">{a}<" in text) for text, a in zip(completions, answer, strict=True)]

    def shares_digits(completions, answer):
        pairs = zip(completions, answer, strict=True)
        return [len(set(text) & set(a)) / len(set(a)) for text, a in pairs]

    rows = get_mini_task("chain").make_rows("eval")[:12]
    seek = {"rho": 0.6, "lr": 0.1, "max_steps": 6, "max_new_tokens": 48, "oracle": True}
    tree = {"num_candidates": 1, "rollout": {"temperature": 0.0}, "max_searches": 6, "min_fresh": 2}
    for kind, options, judge in ((latent_seek, seek, right), (rain, tree, shares_digits)):
        with FunctionReward(judge) as reward:
            got, want = (kind(engine, rows, reward, **options) for engine in (mini, exact))
        for one, other in zip(got, want, strict=True):
            assert not one.error and one.token_ids == other.token_ids
            assert (one.stop_reason, one.counters) == (other.stop_reason, other.counters)
            assert one.num_generated_tokens == other.num_generated_tokens
            assert one.num_prefill_tokens == other.num_prefill_tokens
            assert one.reward == pytest.approx(other.reward)
