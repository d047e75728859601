import importlib.util
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlalign import bench
from rlalign.rollout.engine import GenerateRequest, SamplingParams
from rlalign.rollout.hf import HFEngine

sys.path.insert(0, str(Path(bench.FOLDER)))
import train
from _train_spec import TrainSpec, step_flops, write_model

SMALL = {"hidden": 64, "layers": 2, "mlp": 96}


def draw_lengths(spec, folder, copies=16):
    path = write_model(spec, folder)
    tokenizer = AutoTokenizer.from_pretrained(path)
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(path), tokenizer)
    prompts = spec.prompts()[:10]
    requests = [
        GenerateRequest(
            str(i), tuple(tokenizer(p)["input_ids"]), tuple(range(i * 99, i * 99 + copies))
        )
        for i, p in enumerate(prompts)
    ]
    groups = engine.generate(requests, SamplingParams(spec.max_completion_length))
    return sorted(len(sample.token_ids) for group in groups for sample in group)


def test_natural_lengths_spread_over_8_to_128(tmp_path):
    spec = TrainSpec(lengths="natural", max_completion_length=128, **SMALL)
    lengths = draw_lengths(spec, tmp_path)
    count = len(lengths)
    assert sum(length < 8 for length in lengths) <= 0.05 * count
    assert sum(length == 128 for length in lengths) <= 0.25 * count
    assert 45 <= sum(lengths) / count <= 90
    assert lengths[count // 10] < 40
    assert lengths[-count // 10] > 100


def test_equal_lengths_are_equal(tmp_path):
    lengths = draw_lengths(TrainSpec(lengths="equal", **SMALL), tmp_path)
    assert set(lengths) == {64}


def test_required_arithmetic_is_that_of_the_parameters(tmp_path):
    spec = TrainSpec(**SMALL)
    model = AutoModelForCausalLM.from_pretrained(write_model(spec, tmp_path))
    # One token read and trained on, not sampled: 2 + 6 a weight of the matrices in the layers.
    matrices = sum(p.numel() for p in model.model.layers.parameters() if p.dim() == 2)
    assert step_flops(spec, 1, 0) == matrices * (2 + 6)
    # One token sampled: the head as well.
    with_head = matrices + model.lm_head.weight.numel()
    assert step_flops(spec, 0, 1) == with_head * (2 + 6)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="trl is not installed")
def test_both_sides_do_the_same_work():
    spec = TrainSpec(steps=2, num_prompts=2, group_size=4, max_completion_length=12, **SMALL)
    figures = train._measure(spec, ["hf"], turns=1)
    assert len(figures) == 2
    for [turn] in figures.values():
        assert turn["tokens"] == [2 * 4 * 12] * 2
        assert set(turn["lengths"]) == {12}
        assert len(turn["step_s"]) == len(turn["cpu_s"]) == 2
        for i, step_s in enumerate(turn["step_s"]):
            parts = sum(seconds[i] for seconds in turn["split_s"].values())
            assert 0 < parts <= step_s
