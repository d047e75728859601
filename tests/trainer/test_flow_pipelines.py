"""The shipped configs of pipelines, whole runs of them on random miniatures of their models."""

from __future__ import annotations

import base64
import json
import struct
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rlalign
from rlalign.models.flow_load import load_flow_model
from rlalign.models.flow_random import write_random_pipeline

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
FRAMES = {"sd3": None, "flux": None, "wan": 3}


def small(family: str, tmp_path: Path, *overrides: str):
    """The shipped config, on a miniature and a CPU."""
    write_random_pipeline(tmp_path / "model", family)
    texts = ("a cat", "two dogs", "a bird")
    (tmp_path / "train.jsonl").write_text("".join(f'{{"prompt": "{text}"}}\n' for text in texts))
    image = {"height": 16, "width": 32, "max_text_tokens": 20, "num_frames": FRAMES[family]}
    options = [
        f"model.path={tmp_path / 'model'}",
        "model.dtype=float32",
        f"task.train={tmp_path / 'train.jsonl'}",
        f"task.eval={tmp_path / 'train.jsonl'}",
        f"rollout.flow.image={json.dumps(image)}",
        "rollout.flow.num_steps=4",
        "rollout.flow.split_steps=[0,1]",
        "rollout.flow.eval_samples=2",
        f"tracking.runs_dir={tmp_path / 'runs'}",
        "tracking.live=false",
        "trainer.engine=torch",
        "trainer.zero_stage=0",
        "trainer.device=cpu",
        "trainer.prompts_per_step=2",
        "trainer.max_steps=1",
        *overrides,
    ]
    return rlalign.load_config(ROOT / "configs" / "branch_grpo" / f"{family}.yaml", options)


@pytest.fixture(autouse=True)
def my_rewards(monkeypatch):
    """The module that the configs name; its rewards are the brightness of images and videos."""

    def brightness(prompts, completions, **_):
        return [float(image.mean()) for image in completions]

    module = types.ModuleType("my_rewards")
    module.pick_score = module.hps_v2 = module.motion_quality = brightness
    monkeypatch.setitem(sys.modules, "my_rewards", module)


@pytest.mark.parametrize("family", FRAMES)
def test_one_step_moves_the_transformer_and_nothing_else(family, tmp_path):
    config = small(family, tmp_path)
    result = rlalign.train(config, quiet=True)
    saved, source = result.path / "checkpoints" / "step_1", tmp_path / "model"
    changed = {
        str(file.relative_to(source))
        for file in source.rglob("*")
        if file.is_file() and file.read_bytes() != (saved / file.relative_to(source)).read_bytes()
    }
    assert changed == {WEIGHTS}
    old, new = load_file(source / WEIGHTS), load_file(saved / WEIGHTS)
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    if family == "sd3":  # adapters of the attention, as configured
        assert moved and all(".attn" in name and name.endswith(".weight") for name in moved)
        assert (saved / "adapter" / "pytorch_lora_weights.safetensors").is_file()
    else:
        assert len(moved) > 0.9 * len(old)
    load_flow_model(str(saved))
    figures = json.loads((result.path / "metrics.jsonl").read_text().splitlines()[0])
    assert figures["optim/grad_norm"] > 0 and figures["reward_std"] > 0
    if family == "sd3":
        assert figures["kl"] == 0  # before the first update


def test_a_run_of_a_pipeline_goes_on_from_its_checkpoint(tmp_path):
    """Two steps, or one and one more: the same weights; adapters come back as such."""
    config = small("sd3", tmp_path, "trainer.max_steps=2", "trainer.checkpoint_every=1")
    whole = rlalign.train(config, quiet=True).path
    config.name, config.trainer.max_steps = "halves", 1
    rlalign.train(config, quiet=True)
    config.trainer.max_steps = 2
    half = rlalign.train(config, resume=True, quiet=True).path
    one, two = (load_file(path / "checkpoints" / "step_2" / WEIGHTS) for path in (whole, half))
    assert half != whole and all(torch.equal(one[name], two[name]) for name in one)


def test_pictures_of_videos_and_of_large_images_are_small_frames(tmp_path):
    image = '{"height": 16, "width": 144, "num_frames": 3, "max_text_tokens": 20}'
    config = small("wan", tmp_path, f"rollout.flow.image={image}")
    path = rlalign.train(config, quiet=True).path
    [file] = (path / "trees").iterdir()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    pictures = [image for row in rows for image in row["nodes"]["image"] if image]
    assert pictures
    png = base64.b64decode(pictures[0].partition(",")[2])
    assert struct.unpack(">II", png[16:24]) == (72, 8)  # half of 144 x 16
