"""Deterministic images: the same starts for every model, exact paths, and what a report says."""

from __future__ import annotations

import pytest
import torch

from rlalign.models.digit_images import load_digits
from rlalign.models.flow import FlowModel
from rlalign.rollout.flow_evaluate import evaluate_digits, ode_latents
from rlalign.tasks.digits import LABELS
from rlalign.types import Prompt

PROMPTS = [Prompt(f"digits/{i}", (), label, i) for i, label in enumerate(LABELS)]


class Towards(FlowModel):
    """The exact flow to one image per label, x0: v = (z - x0) / sigma, a straight line."""

    def __init__(self, x0: torch.Tensor) -> None:
        super().__init__()
        self.x0 = torch.nn.Parameter(x0)
        self.latent_shape = tuple(x0.shape[1:])
        self.rows: list[int] = []

    def condition(self, prompts):
        return {"label": torch.tensor([p.answer for p in prompts])}

    def null_condition(self, num):
        raise NotImplementedError

    def forward(self, z_NX, sigma_N, cond):
        self.rows.append(len(z_NX))
        return (z_NX - self.x0[cond["label"]]) / sigma_N[:, None, None, None]

    def decode(self, x0_NX):
        return ((x0_NX + 1) / 2).clamp(0, 1)

    def config_dict(self):
        return {}


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_straight_flow_ends_at_its_image_on_any_grid(shift):
    x0 = torch.linspace(-1, 1, 3 * 4).reshape(3, 1, 2, 2)
    model = Towards(x0)
    latents = ode_latents(model, PROMPTS[:3], 4, num_steps=5, shift=shift)
    torch.testing.assert_close(latents, x0[:, None].expand(3, 4, 1, 2, 2), atol=1e-5, rtol=0)


def test_starts_are_keyed_by_prompt_and_image_however_rows_are_divided():
    model = Towards(torch.zeros(10, 1, 2, 2))

    def half_way(prompts, num, **settings):
        """Twice the straight velocity overshoots to minus the start on one step."""
        double = lambda z, sigma_N, cond: 2 * model(z, sigma_N, cond)  # noqa: E731
        return ode_latents(model, prompts, num, velocity=double, num_steps=1, **settings)

    whole = half_way(PROMPTS, 6)
    assert torch.equal(whole, half_way(PROMPTS, 6, max_rows=7))
    assert model.rows == [60, *[7] * 8, 4]
    assert torch.equal(whole[3:5, :2], half_way(PROMPTS[3:5], 2))
    assert not torch.equal(whole, half_way(PROMPTS, 6, seed=1))
    assert len({tuple(row) for row in whole.reshape(60, 4).tolist()}) == 60


def test_real_digits_are_worth_nearly_everything_and_wrong_ones_nearly_nothing(
    tmp_path, monkeypatch
):
    pytest.importorskip("sklearn")
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path))
    data = load_digits()
    first = [int((data.test_label_N == digit).nonzero()[1]) for digit in range(10)]
    x0 = data.test_NCHW[first]
    right = evaluate_digits(Towards(x0), PROMPTS, 3)
    assert right.class_probability > 0.85 and right.judge_accuracy == 1.0
    assert right.pixel_std == pytest.approx(0, abs=1e-5)
    wrong = evaluate_digits(Towards(x0.roll(1, 0)), PROMPTS, 3)
    assert wrong.class_probability < 0.05 and wrong.judge_accuracy == 0.0


def test_diversity_is_the_std_of_the_clamped_pixels(tmp_path, monkeypatch):
    """No velocity leaves N(0, 1) latents; clamped at -1 and 1 their variance is 1 - 2 phi(1)."""
    pytest.importorskip("sklearn")
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path))
    model = Towards(torch.zeros(10, 1, 8, 8))
    still = lambda z, sigma_N, cond: torch.zeros_like(z)  # noqa: E731
    report = evaluate_digits(model, PROMPTS, 200, velocity=still, num_steps=1)
    assert report.pixel_std == pytest.approx(0.5161**0.5, abs=0.01)
