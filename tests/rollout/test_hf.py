"""Facts about the HF engine that the conformance suite does not ask of every engine."""

import copy
import random

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer

from rlalign.models.random import ARCHITECTURES, write_random_model
from rlalign.rollout import hf
from rlalign.rollout.engine import EngineError, GenerateRequest, SamplingParams
from rlalign.rollout.hf import HFEngine
from rlalign.rollout.hf_cache import PreallocatedLayer, preallocated_cache
from rlalign.rollout.hf_fast import is_plain_decoder
from tests.rollout.conformance import SAMPLING_CHECKS, WEIGHT_CHECKS, Subject

TOLERANCE = 1e-5  # nats, float32


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A fresh model and its tokenizer, by architecture and overrides."""
    folders = {}

    def make(architecture="qwen2", **overrides):
        key = (architecture, *sorted(overrides.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp(architecture)
            write_random_model(folders[key], architecture, max_positions=160, **overrides)
        model = AutoModelForCausalLM.from_pretrained(folders[key])
        return model, AutoTokenizer.from_pretrained(folders[key])

    return make


@pytest.fixture(params=["fast", "generic"])
def path(request, monkeypatch):
    """Both ways of decoding."""
    if request.param == "generic":
        monkeypatch.setattr(hf, "is_plain_decoder", lambda model, longest: False)
    return request.param


def requests(count=5, copies=3, seed=0):
    draw = random.Random(seed)
    return [
        GenerateRequest(
            f"p{i}",
            tuple(draw.randrange(2, 200) for _ in range(1 + 7 * i)),
            tuple(draw.randrange(2**63) for _ in range(copies)),
        )
        for i in range(count)
    ]


@torch.no_grad()
def plain_logp(model, prompt, completion, temperature=1.0):
    """One ordinary forward pass, no cache, no padding."""
    ids = [*prompt, *completion]
    logits_TV = model(torch.tensor([ids]), use_cache=False).logits[0].double() / temperature
    logp_TV = logits_TV.log_softmax(-1)
    return [float(logp_TV[t - 1, ids[t]]) for t in range(len(prompt), len(ids))]


def worst_error(model, wanted, groups, temperature=1.0):
    errors = [
        abs(a - b)
        for request, group in zip(wanted, groups, strict=True)
        for s in group
        for a, b in zip(
            s.logp,
            plain_logp(model, request.token_ids, s.token_ids, temperature),
            strict=True,
        )
    ]
    assert len(errors) > 200
    return max(errors)


def stop_token(model, tokenizer, wanted):
    """A token that ends some completions early and not others."""
    engine = HFEngine(model, tokenizer)
    drawn = engine.generate(wanted, SamplingParams(30, temperature=0.9))
    counts = torch.bincount(torch.tensor([t for g in drawn for s in g for t in s.token_ids[:20]]))
    return int(counts.argmax())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logp_is_that_of_a_plain_forward(load, path, architecture):
    model, tokenizer = load(architecture)
    wanted = requests()
    stop = stop_token(model, tokenizer, wanted)
    for batch in (4, 64):  # queueing and refilling; all at once
        engine = HFEngine(model, tokenizer, max_batch_size=batch)
        params = SamplingParams(50, temperature=0.9, stop_token_ids=(stop,))
        groups = engine.generate(wanted, params)
        assert len({len(s.token_ids) for g in groups for s in g}) > 3
        assert worst_error(model.eval(), wanted, groups, 0.9) < TOLERANCE


def test_the_fast_path_is_taken_where_it_is_exact(load):
    for architecture in ("llama", "qwen2", "qwen3", "mistral"):
        model, _ = load(architecture)
        assert is_plain_decoder(model, 160)
    assert not is_plain_decoder(load("gemma2")[0], 160)
    windowed, _ = load("mistral", sliding_window=24)
    assert is_plain_decoder(windowed, 24)
    assert not is_plain_decoder(windowed, 25)
    model, _ = load("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    assert not is_plain_decoder(model, 160)


def test_sliding_windows_shorter_than_the_row(load):
    model, tokenizer = load("mistral", sliding_window=24)
    wanted = requests()
    groups = HFEngine(model, tokenizer).generate(wanted, SamplingParams(50))
    assert worst_error(model.eval(), wanted, groups) < TOLERANCE


LAYERS = ["q_proj", "v_proj", "gate_proj", "down_proj"]


@pytest.mark.parametrize("targets", [LAYERS, [*LAYERS, "lm_head"], ["lm_head"]])
@pytest.mark.parametrize("wrapped", [True, False])
def test_lora_adapters_are_live(load, path, wrapped, targets):
    model, tokenizer = load(tied="lm_head" not in targets)
    base = copy.deepcopy(model)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets)
    if wrapped:
        model = get_peft_model(model, config)
    else:
        model.add_adapter(config)
    engine = HFEngine(model, tokenizer)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(1))
    wanted = requests()
    groups = engine.generate(wanted, SamplingParams(30))
    assert worst_error(model.eval(), wanted, groups) < TOLERANCE
    assert worst_error(base.eval(), wanted, groups) > 0.01  # the adapters do matter
    receipt = engine.update_weights(model.named_parameters(), 4)
    assert receipt.version == 4
    assert HFEngine(base, tokenizer).version.digest != receipt.digest


def test_bfloat16_stays_close_to_its_own_forward(load, path):
    model, tokenizer = load("qwen3", init_std=0.05)
    model = model.to(torch.bfloat16)
    wanted = requests()
    groups = HFEngine(model, tokenizer).generate(wanted, SamplingParams(40))
    assert worst_error(model.eval(), wanted, groups) < 0.1


@pytest.mark.parametrize("check", SAMPLING_CHECKS + WEIGHT_CHECKS, ids=lambda c: c.__name__)
def test_the_generic_path_conforms(load, monkeypatch, check, tmp_path_factory):
    monkeypatch.setattr(hf, "is_plain_decoder", lambda model, longest: False)
    path = tmp_path_factory.getbasetemp() / "conforming"
    if not path.exists():
        write_random_model(path, hidden=32, heads=2, kv_heads=1, mlp=48, max_positions=128)
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(path), tokenizer, max_batch_size=16)
    check(Subject(engine, AutoModelForCausalLM.from_pretrained(path).eval(), tokenizer))


def test_the_trainers_step_is_seen_at_once(load, path):
    model, tokenizer = load()
    engine = HFEngine(model, tokenizer)
    wanted = requests(2)
    engine.generate(wanted, SamplingParams(4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    engine.update_weights(model.named_parameters(), 1)
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    groups = engine.generate(requests(), SamplingParams(20))
    assert worst_error(model.eval(), requests(), groups) < TOLERANCE


def test_mode_and_gradients_are_left_as_they_were(load, path):
    model, tokenizer = load()
    model.train()
    model.model.layers[0].eval()  # a frozen part
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    modes = {name: module.training for name, module in model.named_modules()}
    engine = HFEngine(model, tokenizer)
    state = torch.get_rng_state()
    wanted = requests()
    groups = engine.generate(wanted, SamplingParams(30))
    engine.score([[3, 4, 5]])
    engine.hidden_states([[3, 4, 5]])
    with pytest.raises(EngineError):
        engine.generate(wanted, SamplingParams(10**6))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.equal(torch.get_rng_state(), state)
    loss = model(torch.tensor([[3, 4, 5]])).logits.sum()
    loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert worst_error(model.eval(), wanted, groups) < TOLERANCE


def test_attention_dropout_is_off(load, path):
    model, tokenizer = load("qwen2", attention_dropout=0.5)
    model.train()
    wanted = requests()
    groups = HFEngine(model, tokenizer).generate(wanted, SamplingParams(20))
    assert worst_error(model.eval(), wanted, groups) < TOLERANCE


@pytest.mark.parametrize("architecture", ["qwen2", "gemma2"])
def test_hidden_states_are_what_the_head_reads(load, architecture):
    model, tokenizer = load(architecture)
    engine = HFEngine(model, tokenizer)
    sequences = [list(range(5, 5 + n)) for n in (1, 30, 12, 31)]
    for sequence, hidden_TD in zip(sequences, engine.hidden_states(sequences), strict=True):
        with torch.no_grad():
            output = model.eval()(torch.tensor([sequence]), output_hidden_states=True)
        torch.testing.assert_close(hidden_TD, output.hidden_states[-1][0], atol=1e-5, rtol=1e-5)
    assert not hidden_TD.is_inference()  # so that a caller may build a graph on it


def test_score_in_small_pieces_is_the_same(load, monkeypatch):
    model, tokenizer = load()
    engine = HFEngine(model, tokenizer)
    sequences = [list(range(3, 3 + n)) for n in (40, 2, 17, 1, 40, 33)]
    whole = engine.score(sequences, 0.8)
    monkeypatch.setattr(hf, "SCORE_TOKENS", 50)
    parts = engine.score(sequences, 0.8)
    for sequence, a, b in zip(sequences, whole, parts, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
        expected = plain_logp(model.eval(), sequence[:1], sequence[1:], 0.8)
        assert a.tolist() == pytest.approx(expected, abs=TOLERANCE)


def test_weights_that_are_not_finite_are_refused(load):
    model, tokenizer = load()
    engine = HFEngine(model, tokenizer)
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    before = {name: tensor.clone() for name, tensor in weights.items()}
    name = list(weights)[3]
    weights[name].view(-1)[7] = torch.inf
    with pytest.raises(EngineError, match=f"1 of .* values of {name} are not finite"):
        engine.update_weights(weights.items(), 1)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_a_model_that_diverged_is_an_error_not_a_sample(load, path):
    model, tokenizer = load()
    torch.nn.init.constant_(model.model.norm.weight, torch.nan)
    with pytest.raises(EngineError, match="not finite"):
        HFEngine(model, tokenizer).generate(requests(1), SamplingParams(4))


def test_every_eos_of_the_generation_config_ends_a_completion(load, path):
    model, tokenizer = load()
    [[first]] = HFEngine(model, tokenizer).generate(
        requests(1, copies=1), SamplingParams(6, temperature=0.0)
    )
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, first.token_ids[2]]
    [[second]] = HFEngine(model, tokenizer).generate(
        requests(1, copies=1), SamplingParams(6, temperature=0.0)
    )
    end = first.token_ids.index(first.token_ids[2]) + 1
    assert second.token_ids == first.token_ids[:end]
    assert second.finish_reason == "stop"


@torch.no_grad()
def test_the_preallocated_cache_holds_what_transformers_would():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = PreallocatedLayer(), DynamicLayer()
    rows = 3
    for step in range(60):
        columns = 70 if step == 0 else 1 + step % 5
        shape = (2, rows, 2, columns, 4)
        key, value = torch.randn(shape, generator=generator)
        for a, b in zip(ours.update(key, value), theirs.update(key, value), strict=True):
            assert torch.equal(a, b)
        assert ours.get_seq_length() == theirs.get_seq_length()
        if step % 7 == 0:
            count = 1 + step % 6
            index = torch.randint(0, rows, (count,), generator=generator)
            ours.reorder_cache(index)
            theirs.reorder_cache(index)
            rows = count


def test_other_layers_of_a_cache_stay_transformers_own(load):
    model, _ = load("gemma2")
    usual = DynamicCache(config=model.config)
    for ours, theirs in zip(preallocated_cache(model.config).layers, usual.layers, strict=True):
        assert type(ours) is (PreallocatedLayer if type(theirs) is DynamicLayer else type(theirs))
