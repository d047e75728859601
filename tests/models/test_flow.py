"""The contract of flow models, by the two built-in networks: rows alone, folders, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from rlalign.models.errors import ModelError
from rlalign.models.flow import take_rows
from rlalign.models.flow_load import load_flow_model
from rlalign.models.mini_flow import MiniFlow, place_features, time_features
from rlalign.types import Prompt

LABELS = ("a cat", "a dog", "a bird")
NETS = {
    "mlp": {"net": "mlp", "width": 24, "blocks": 2},
    "dit": {"net": "dit", "width": 24, "blocks": 2},
}


def flow(net: str, seed: int = 0) -> MiniFlow:
    """A model whose every parameter is random: zeroed layers would hide a mistake."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MiniFlow(LABELS, (2, 4, 6) if net == "mlp" else (2, 6, 6), **NETS[net])
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def prompts(*texts: str) -> list[Prompt]:
    return [Prompt(f"p/{i}", (), text) for i, text in enumerate(texts)]


def states(model: MiniFlow, num: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    z = torch.randn(num, *model.latent_shape, generator=generator)
    return z, torch.rand(num, generator=generator)


def test_the_published_sizes():
    digits = tuple(map(str, range(10)))
    mlp, dit = MiniFlow(digits), MiniFlow(digits, net="dit", width=48, blocks=2, heads=4)
    assert sum(p.numel() for p in mlp.parameters()) == 484_096
    assert sum(p.numel() for p in dit.parameters()) == 90_916


@pytest.mark.parametrize("net", NETS)
def test_a_new_model_stands_still(net):
    model = MiniFlow(LABELS, (1, 4, 4), **NETS[net])
    z, sigma_N = states(model, 3)
    assert torch.equal(model(z, sigma_N, model.null_condition(3)), torch.zeros_like(z))


@pytest.mark.parametrize("net", NETS)
@torch.no_grad()
def test_a_row_depends_on_its_own_state_time_and_prompt_only(net):
    model = flow(net)
    z, sigma_N = states(model, 6)
    cond = take_rows(model.condition(prompts(*LABELS)), torch.tensor([2, 0, 1, 1, 0, 2]))
    v = model(z, sigma_N, cond)
    for n in range(6):
        row = slice(n, n + 1)
        alone = model(z[row], sigma_N[row], take_rows(cond, torch.tensor([n])))
        torch.testing.assert_close(alone[0], v[n], atol=1e-4, rtol=1e-4)
    others = {"label": (cond["label"] + 1) % 3}
    for changed in (
        model(-z, sigma_N, cond),
        model(z, 1 - sigma_N, cond),
        model(z, sigma_N, others),
    ):
        assert bool(((changed - v).flatten(1).abs().amax(1) > 1e-3).all())


@pytest.mark.parametrize("net", NETS)
@torch.no_grad()
def test_conditions_are_the_prompts_texts_and_none_is_one_more(net):
    model = flow(net)
    cond = model.condition(prompts("a dog", "a cat", "a dog"))
    assert cond["label"].tolist() == [1, 0, 1]
    assert model.null_condition(2)["label"].tolist() == [3, 3]
    for text in ("a fish", [{"role": "user", "content": "a cat"}]):
        with pytest.raises(ModelError, match="knows only 'a cat', 'a dog', 'a bird'"):
            model.condition([Prompt("p/0", (), text)])


@torch.no_grad()
def test_the_transformer_knows_where_its_patches_are():
    """With equal patches everywhere, only the place tells tokens apart; and an image comes out
    with its pixels where they were: moving one patch of the input changes nothing in a network
    whose blocks do nothing, but at the two places."""
    model = flow("dit")
    v = model(torch.ones(1, 2, 6, 6), torch.tensor([0.5]), model.null_condition(1))
    patches = v.unfold(2, 2, 2).unfold(3, 2, 2).permute(2, 3, 0, 1, 4, 5).reshape(9, -1)
    assert float(torch.cdist(patches, patches).fill_diagonal_(1).min()) > 1e-3
    for block in model.net.blocks:
        torch.nn.init.zeros_(block.modulate.weight)
        torch.nn.init.zeros_(block.modulate.bias)
    z = torch.zeros(1, 2, 6, 6)
    moved = z.clone()
    moved[:, :, 2:4, 4:6] = 1
    sigma, cond = torch.tensor([0.5]), model.null_condition(1)
    difference = (model(moved, sigma, cond) - model(z, sigma, cond)).abs().amax((0, 1))
    outside = difference.clone()
    outside[2:4, 4:6] = 0
    assert float(difference.amax()) > 1e-2 and float(outside.amax()) == 0


def test_features_tell_close_times_and_all_places_apart():
    close = time_features(torch.tensor([0.0, 0.001, 0.5, 0.999, 1.0]), 64)
    assert float(torch.cdist(close, close).fill_diagonal_(9).min()) > 0.3
    places = place_features(4, 48)
    assert float(torch.cdist(places, places).fill_diagonal_(9).min()) > 0.3
    torch.testing.assert_close((close**2).sum(1), torch.full((5,), 32.0))


@pytest.mark.parametrize("net", NETS)
@torch.no_grad()
def test_a_folder_brings_the_same_model_back(net, tmp_path):
    model = flow(net)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    back = load_flow_model(str(tmp_path))
    z, sigma_N = states(model, 4)
    cond = model.condition(prompts("a cat", "a dog", "a dog", "a bird"))
    assert torch.equal(back(z, sigma_N, cond), model(z, sigma_N, cond))
    assert back.latent_shape == model.latent_shape and not back.training
    half = load_flow_model(str(tmp_path), dtype="bfloat16")
    v = half(z, sigma_N, cond)
    assert v.dtype == torch.float32
    torch.testing.assert_close(v, model(z, sigma_N, cond), atol=0.5, rtol=0.1)


def test_pixels_are_clamped_to_the_unit_range():
    latent = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).reshape(5, 1, 1, 1)
    assert flow("mlp").decode(latent).flatten().tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]


def test_folders_that_hold_no_flow_model_are_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        load_flow_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Qwen2ForCausalLM"]}))
    with pytest.raises(ModelError, match="mini:digits for one"):
        load_flow_model(str(tmp_path))
    model = flow("mlp")
    model.save_pretrained(tmp_path)
    config = model.config_dict()
    for changes, match in (({"width": 8}, "size mismatch"), ({"depth": 3}, "depth")):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ModelError, match=match):
            load_flow_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(config | {"net": "cnn"}))
    with pytest.raises(ModelError, match="neither mlp nor dit"):
        load_flow_model(str(tmp_path))
