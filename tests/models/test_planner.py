"""The planner keeps the contract of masked models, and its files."""

from __future__ import annotations

import pytest
import torch

from rlalign.models.errors import ModelError
from rlalign.models.masked_diffusion import Canvas, MaskedModel
from rlalign.models.planner import Planner, load_planner
from rlalign.tasks.driving import Codebook, make_scene

pytest.importorskip("shapely")

SCENES = [make_scene(seed) for seed in range(4)]


@pytest.fixture(scope="module")
def planner() -> Planner:
    torch.manual_seed(0)
    return Planner().eval().requires_grad_(False)


def half_filled(planner: Planner) -> Canvas:
    canvas = planner.blank_canvas(SCENES)
    ids_BT = canvas.ids_BT.clone()
    ids_BT[:, ::2] = torch.arange(4)[:, None] * 10 + torch.arange(8)
    return canvas.with_ids(ids_BT)


def test_it_is_a_masked_model(planner):
    model: MaskedModel = planner
    assert (model.mask_id, model.vocab_size, model.block_size) == (401, 402, 0)
    assert sum(p.numel() for p in planner.parameters()) == 418_673
    logits_BTV = model.logits(half_filled(planner))
    assert logits_BTV.shape == (4, 16, 402) and logits_BTV.dtype == torch.float32
    assert (logits_BTV[..., 401] == -torch.inf).all() and logits_BTV[..., :401].isfinite().all()
    assert torch.equal(model.logits(half_filled(planner), 3, 9), logits_BTV[:, 3:9])


def test_a_row_depends_on_that_row_alone(planner):
    canvas = half_filled(planner)
    together = planner.logits(canvas)[..., :401]
    for i in range(4):
        alone = planner.logits(canvas.rows(torch.tensor([i])))[..., :401]
        assert torch.allclose(alone[0], together[i], atol=1e-5)


def test_every_position_sees_every_token_and_the_scene(planner):
    canvas = half_filled(planner).rows(torch.tensor([0]))
    before = planner.logits(canvas)[..., :401]
    for column in (0, 7, 15):
        ids_BT = canvas.ids_BT.clone()
        ids_BT[0, column] = 200
        assert (planner.logits(canvas.with_ids(ids_BT))[..., :401] != before).any(-1).all()
    for name, value in canvas.cond.items():
        cond = {**canvas.cond, name: value + 0.1}
        changed = planner.logits(Canvas(canvas.ids_BT, cond=cond))[..., :401]
        assert (changed != before).any(-1).all(), name


def test_a_blank_canvas_is_all_masks(planner):
    canvas = planner.blank_canvas(SCENES[:2])
    assert canvas.ids_BT.tolist() == [[401] * 16] * 2 and len(canvas) == 2


def test_what_is_no_canvas_of_its_own_is_refused(planner):
    canvas = planner.blank_canvas(SCENES[:1])
    partial = {"ego": canvas.cond["ego"]}
    for other in (
        Canvas(canvas.ids_BT),
        Canvas(canvas.ids_BT, cond=partial),
        Canvas(canvas.ids_BT[:, :14], cond=canvas.cond),
    ):
        with pytest.raises(ModelError, match="blank_canvas"):
            planner.logits(other)


def test_a_planner_comes_back_from_its_files(tmp_path):
    planner = Planner(Codebook(60.0, 0.5), width=32, layers=1, heads=2).eval()
    planner.save_pretrained(tmp_path)
    again = load_planner(tmp_path)
    assert again.codebook == Codebook(60.0, 0.5) and not again.training
    canvas = planner.blank_canvas(SCENES)
    assert torch.equal(again.logits(canvas), planner.logits(canvas))
    assert not any(p.requires_grad for p in again.parameters())


def test_what_is_no_planner_is_refused(tmp_path):
    with pytest.raises(ModelError, match="build_planner"):
        load_planner(tmp_path)
    Planner(width=32, layers=1, heads=2).save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    whole = config.read_text()
    for text in ("{}", whole.replace("toydrive", "other"), whole.replace("32", "48"), "nothing"):
        config.write_text(text)
        with pytest.raises(ModelError, match="build_planner"):
            load_planner(tmp_path)
