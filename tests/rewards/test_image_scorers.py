"""CLIP scorers on a random CLIP of a few thousand weights: agreement, heads, preprocessing."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import CLIPConfig, CLIPModel

from rlalign.models.random import write_random_model
from rlalign.models.tokenizer import build_tokenizer
from rlalign.rewards import RewardError
from rlalign.rewards.image_scorers import aesthetic, clip_score, preprocess

SIZE, DIM = 16, 8
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
TEXTS = ["a cat", "a dog", "a cat", "a rather long description of a bird on a tree"]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = build_tokenizer()
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    layers |= {"num_attention_heads": 2, "initializer_range": 0.5}
    special = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    config = CLIPConfig(
        text_config={
            **layers,
            **special,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 20,
        },
        vision_config={**layers, "image_size": SIZE, "patch_size": 8},
        projection_dim=DIM,
        logit_scale_init_value=1.5,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    said = {"image_mean": MEAN, "image_std": STD}
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    return folder


def images(num: int) -> torch.Tensor:
    return torch.rand(num, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))


def expected(clip, image: torch.Tensor, text: str) -> tuple[float, torch.Tensor, float]:
    """cos(text, image), the image's embedding and the logit, from the model's own forward pass on
    one pair, tokenised and normalised by hand."""
    model = CLIPModel.from_pretrained(clip)
    ids = build_tokenizer()(text, truncation=True, max_length=20)["input_ids"]
    pixels = (image - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    with torch.no_grad():
        out = model(input_ids=torch.tensor([ids]), pixel_values=pixels[None])
    cosine = float(F.cosine_similarity(out.text_embeds, out.image_embeds))
    return cosine, out.image_embeds[0], float(out.logits_per_image)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_agreement_is_the_models_own_for_each_pair(clip, batch_size):
    pictures = images(4)
    pairs = [expected(clip, image, text) for image, text in zip(pictures, TEXTS, strict=True)]
    for scaled, column in ((False, 0), (True, 2)):
        score = clip_score(str(clip), scaled=scaled, batch_size=batch_size, device="cpu")
        score.load()
        values = score(prompts=TEXTS, completions=list(pictures))
        assert values == pytest.approx([pair[column] for pair in pairs], abs=1e-4)
    chat = [[{"role": "user", "content": text}] for text in TEXTS]
    assert score(prompts=chat, completions=list(pictures)) == pytest.approx(values, abs=1e-6)


def test_a_head_of_linear_layers_on_the_image_embedding(clip, tmp_path):
    generator = torch.Generator().manual_seed(2)
    sizes = {0: (6, DIM), 2: (5, 6), 10: (1, 5)}  # 10 comes after 2, as a number
    tensors = {}
    for i, size in sizes.items():
        tensors[f"layers.{i}.weight"] = torch.randn(*size, generator=generator)
        tensors[f"layers.{i}.bias"] = torch.randn(size[0], generator=generator)
    save_file(tensors, tmp_path / "head.safetensors")
    score = aesthetic(str(clip), str(tmp_path / "head.safetensors"), device="cpu")
    score.load()
    pictures = images(3)
    values = score(completions=list(pictures))
    for image, value in zip(pictures, values, strict=True):
        hidden = expected(clip, image, "a cat")[1]
        for i in sizes:
            hidden = tensors[f"layers.{i}.weight"] @ hidden + tensors[f"layers.{i}.bias"]
        assert value == pytest.approx(float(hidden), abs=1e-4)


def test_images_become_the_middle_square_at_the_models_size():
    zero, one = torch.zeros(3, 1, 1), torch.ones(3, 1, 1)
    grey = torch.rand(2, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(3))
    assert torch.equal(preprocess(grey, SIZE, zero, one), grey.expand(2, 3, SIZE, SIZE))
    wide = torch.zeros(1, 3, SIZE, 3 * SIZE)
    wide[..., SIZE : 2 * SIZE] = 1
    assert torch.equal(preprocess(wide, SIZE, zero, one), torch.ones(1, 3, SIZE, SIZE))
    # resizing keeps what is smooth: a ramp stays the same ramp, sampled elsewhere
    ramp = torch.linspace(0, 1, 64)[None, None, :, None].expand(1, 3, 64, 80)
    small = preprocess(ramp, SIZE, zero, one)
    rows = small[0, 0, :, 5]
    steps = rows.diff()[2:-2]
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), atol=2e-3, rtol=0)
    assert float(steps.mean()) == pytest.approx(4 / 63, abs=2e-3)


def test_what_cannot_score_is_refused(clip, tmp_path):
    write_random_model(tmp_path / "text", hidden=16, layers=1)
    with pytest.raises(RewardError, match="no CLIP model, but a qwen2"):
        clip_score(str(tmp_path / "text"), device="cpu").load()
    with pytest.raises(RewardError, match="cannot be loaded"):
        clip_score(str(tmp_path / "nothing"), device="cpu").load()
    with pytest.raises(RewardError, match="batch_size = 0"):
        clip_score(str(clip), batch_size=0)
    head = tmp_path / "head.safetensors"
    for tensors, match in (
        ({"0.weight": torch.zeros(2, DIM), "0.bias": torch.zeros(2)}, r"width \[2\]"),
        ({"0.weight": torch.zeros(1, DIM)}, "lacks '0.bias'"),
    ):
        save_file(tensors, head)
        with pytest.raises(RewardError, match=match):
            aesthetic(str(clip), str(head), device="cpu").load()
    with pytest.raises(RewardError, match="cannot be read"):
        aesthetic(str(clip), str(tmp_path / "none.safetensors"), device="cpu").load()
