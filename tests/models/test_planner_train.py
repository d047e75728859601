"""Training of the planner: its loss is the bound it says, its weights a function of the seed."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rlalign.models.planner_train as planner_train
from rlalign.models.errors import ModelError
from rlalign.models.masked_diffusion import Canvas
from rlalign.models.planner import Planner, load_planner
from rlalign.models.planner_train import (
    FIRST_TEST_SEED,
    PlannerRecipe,
    build_planner,
    masked_loss,
    ordinal_targets,
    train,
    train_recipe,
    training_data,
)
from rlalign.tasks.driving import Scorer, expert_distance, track

pytest.importorskip("shapely")

QUIET = lambda stage, done, total: None  # noqa: E731
TINY = PlannerRecipe(num_scenes=6, steps=3, batch_size=4, width=16, layers=1, heads=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return training_data(12, tmp_path_factory.mktemp("cache"), QUIET)


def complete(data, planner: Planner) -> Canvas:
    features = {name: value for name, value in data.items() if name != "waypoints"}
    return Canvas(planner.codebook.encode(data["waypoints"].numpy()), cond=features)


class TestTargets:
    def test_they_are_distributions_around_the_truth(self):
        target_VV = ordinal_targets(401, 1.5)
        assert torch.allclose(target_VV.sum(1), torch.ones(401), atol=1e-5)
        assert torch.equal(target_VV.argmax(1), torch.arange(401))
        weights = [math.exp(-(k**2) / 4.5) for k in range(-8, 9)]
        assert float(target_VV[200, 203]) == pytest.approx(math.exp(-2) / sum(weights), rel=1e-4)
        assert float(target_VV[0, 1] / target_VV[0, 0]) == pytest.approx(math.exp(-1 / 4.5))

    def test_without_width_they_are_the_truth(self):
        assert torch.equal(ordinal_targets(5, 0.0), torch.eye(5))


class TestLoss:
    def test_a_planner_that_knows_nothing_loses_log_v_whatever_is_masked(self, data):
        planner = Planner()
        torch.nn.init.zeros_(planner.head.weight)
        torch.nn.init.zeros_(planner.head.bias)
        for _ in range(5):
            loss = masked_loss(planner, complete(data, planner), torch.eye(401))
            assert loss.item() == pytest.approx(math.log(401), rel=1e-5)

    def test_every_number_of_masks_counts_the_same(self):
        """The bound is the mean, over numbers of masks, of the mean loss of a masked token. Here
        that loss is known: all tokens are 7, whose logit depends on the number of masks alone."""
        logit_L = torch.linspace(1.0, 7.0, 16)
        loss_L = torch.log(1 + 400 * torch.exp(-logit_L))

        def head(num_M1):
            logits_MV = torch.zeros(len(num_M1), 401)
            logits_MV[:, 7] = logit_L[num_M1[:, 0] - 1]
            return logits_MV

        def hidden(canvas):
            return (canvas.ids_BT == 401).sum(1)[:, None, None].expand(-1, 16, 1)

        known = SimpleNamespace(mask_id=401, head=head, hidden=hidden)
        torch.manual_seed(0)
        loss = masked_loss(known, Canvas(torch.full((20_000, 16), 7)), torch.eye(401))
        assert float(loss) == pytest.approx(float(loss_L.mean()), rel=0.01)

    def test_masks_fall_on_every_place_equally_often(self, data):
        planner, seen = Planner(width=16, layers=1, heads=2), []
        inner = planner.hidden

        def spy(canvas):
            seen.append(canvas.ids_BT == planner.mask_id)
            return inner(canvas)

        planner.hidden = spy
        torch.manual_seed(1)
        batch = complete(data, planner).rows(torch.arange(12).repeat(300))
        masked_loss(planner, batch, torch.eye(401))
        share_T = seen[0].float().mean(0)
        assert torch.allclose(share_T, torch.full((16,), 8.5 / 16), atol=0.03)
        counts = torch.bincount(seen[0].sum(1), minlength=17)
        assert counts[0] == 0 and counts[1:].min() > 160  # of 3600, 225 each


def test_a_planner_can_learn_plans_by_heart(data):
    """Four of them, so that all tokens can be told from the scene alone, to within the bell."""
    few = {name: value[:4] for name, value in data.items()}
    recipe = PlannerRecipe(num_scenes=4, steps=150, batch_size=16, lr=5e-3, width=48, layers=1)
    planner = train(recipe, 0, few)
    canvas = complete(few, planner)
    blank = canvas.with_ids(torch.full_like(canvas.ids_BT, planner.mask_id))
    missed_BT = (planner.logits(blank).argmax(-1) - canvas.ids_BT).abs()
    assert float(missed_BT.float().mean()) < 1.0


def test_weights_are_a_function_of_the_seed_and_nothing_else_moves(data):
    torch.set_num_threads(2)
    try:
        state = torch.get_rng_state()
        first, again, other = (train(TINY, seed, data).state_dict() for seed in (1, 1, 2))
        assert torch.get_num_threads() == 2 and torch.equal(state, torch.get_rng_state())
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_data_are_the_experts_plans_and_kept(tmp_path, monkeypatch):
    first = training_data(5, tmp_path, QUIET)
    assert first["waypoints"].shape == (5, 8, 2) and first["route"].shape == (5, 16, 4)
    scene = planner_train.make_scene(3)
    assert np.array_equal(first["waypoints"][3].numpy(), scene.expert_N2)
    made = []
    real = planner_train.make_scene
    monkeypatch.setattr(planner_train, "make_scene", lambda seed: made.append(seed) or real(seed))
    again = training_data(5, tmp_path, QUIET)
    assert made == list(range(planner_train.NUM_FINGERPRINT))  # for the digest alone
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_a_planner_is_built_once_for_each_recipe_and_seed(tmp_path):
    folder = train_recipe(TINY, 0, tmp_path, QUIET)
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert train_recipe(TINY, 0, tmp_path, QUIET) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert train_recipe(TINY, 1, tmp_path, QUIET) != folder
    wider = PlannerRecipe(num_scenes=6, steps=3, batch_size=4, width=32, layers=1, heads=2)
    assert train_recipe(wider, 0, tmp_path, QUIET) != folder
    assert load_planner(folder).codebook.size == 401


def test_progress_names_both_stages(tmp_path):
    said = []
    train_recipe(TINY, 5, tmp_path, lambda *report: said.append(report))
    assert ("scenes", 6, 6) in said and ("planner", 3, 3) in said


def test_another_size_is_refused():
    with pytest.raises(ModelError, match="full, smoke"):
        build_planner(0, "huge")


@pytest.mark.slow
def test_the_smoke_recipe_learns_to_drive(tmp_path):
    """In one step, all tokens at once; an untrained planner is 42 m off, and never on the road."""
    planner = load_planner(build_planner(0, "smoke", tmp_path, QUIET))
    scenes = [planner_train.make_scene(FIRST_TEST_SEED + i) for i in range(40)]
    ids_BT = planner.logits(planner.blank_canvas(scenes)).argmax(-1)
    on_road, apart_m = [], []
    for scene, ids_T in zip(scenes, ids_BT, strict=True):
        states_KT3 = track(planner.codebook.decode(ids_T[None]), scene.speed)
        apart_m.append(expert_distance(states_KT3, scene)[0])
        on_road.append(Scorer(scene).score(states_KT3).dac_K[0])
    assert np.mean(apart_m) < 10 and np.mean(on_road) > 0.3
