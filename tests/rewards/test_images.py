"""Image rewards: what they measure, and how they are named, called, masked and refused."""

from __future__ import annotations

import math

import pytest
import torch

from rlalign.config.schema import AlgoConfig, RewardsConfig, RewardSpec
from rlalign.models.digit_images import load_classifier, load_digits
from rlalign.rewards import RewardError, build_scorer, check
from rlalign.rewards.images import ink, symmetry
from rlalign.types import Prompt


def scorer(*specs: RewardSpec, functions=None, **settings):
    config = RewardsConfig(functions=list(specs), **settings)
    return build_scorer(config, AlgoConfig(), 1, functions=functions, images=True)


def prompts(*answers) -> list[Prompt]:
    return [Prompt(f"p/{i}", (0,), f"digit {a}", a) for i, a in enumerate(answers)]


def test_symmetry_and_ink_by_hand():
    image = torch.tensor([[[0.0, 1.0, 0.5], [0.2, 0.3, 0.2]]])
    assert symmetry()([image, image.flip(2), torch.zeros(1, 2, 3)]) == pytest.approx(
        [1 - (0.5 + 0.5) / 6, 1 - 1 / 6, 1.0]
    )
    assert ink()([image]) == pytest.approx([2.2 / 6])
    assert ink(target=0.5)([image, torch.ones(1, 2, 3)]) == pytest.approx([2.2 / 6 - 0.5, -0.5])
    with pytest.raises(RewardError, match=r"within \[0, 1\]"):
        ink(target=1.5)


def test_the_class_probability_is_the_classifier_s_for_the_answer(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    monkeypatch.setenv("RLALIGN_CACHE", str(tmp_path))
    data = load_digits()
    images, label_N = (data.test_NCHW[:40] + 1) / 2, data.test_label_N[:40]
    asked = prompts(*label_N[:39].tolist(), None)
    with scorer(RewardSpec(name="digits_class_probability")) as score:
        scores = score.score_images(asked, images, torch.zeros(40, dtype=torch.long))
        prob_NC = load_classifier()(images).softmax(1)
        expected = prob_NC[torch.arange(39), label_N[:39]]
        torch.testing.assert_close(scores.reward_B[:39], expected)
        assert float(expected.mean()) > 0.9
        assert math.isnan(scores.reward_B[39]) and scores.errors == {}
        torch.testing.assert_close(scores.acc_B, scores.reward_B, equal_nan=True)
        with pytest.raises(RewardError, match=r"\(1, 8, 8\)"):
            score.score_images(prompts(1), torch.zeros(1, 3, 8, 8), torch.zeros(1))


def test_several_rewards_add_up_and_normalise_within_the_groups_given():
    images = torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    group_id_B = torch.tensor([1, 0, 1, 0, 1, 0])
    specs = RewardSpec(name="symmetry", weight=2.0), RewardSpec(name="ink", weight=-1.0)
    shape, mass = (torch.tensor(f(list(images))) for f in (symmetry(), ink()))
    with scorer(*specs) as score:
        plain = score.score_images(prompts(*range(6)), images, group_id_B)
    torch.testing.assert_close(plain.reward_B, 2 * shape - mass)
    assert set(plain.by_function) == {"symmetry", "ink"}
    with scorer(*specs, aggregation="normalize_then_sum") as score:
        reward_B = score.score_images(prompts(*range(6)), images, group_id_B).reward_B
    for group in (0, 1):
        inside = group_id_B == group
        a, b = shape[inside], mass[inside]
        expected = 2 * (a - a.mean()) / a.std() - (b - b.mean()) / b.std()
        torch.testing.assert_close(reward_B[inside], expected, atol=1e-2, rtol=1e-2)


def test_a_user_s_function_gets_images_prompts_and_columns_in_this_process(tmp_path, monkeypatch):
    (tmp_path / "my_image_rewards.py").write_text(
        "import os\n"
        "def redness(prompts, completions, hue, **columns):\n"
        "    assert prompts == ['a', 'b'], prompts\n"
        "    assert [tuple(c.shape) for c in completions] == [(3, 2, 2)] * 2\n"
        "    assert columns['pid'] == [os.getpid()] * 2\n"
        "    return [float(c[0].mean()) * h for c, h in zip(completions, hue)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    import os

    columns = [{"hue": h, "pid": os.getpid()} for h in (1.0, 2.0)]
    asked = [Prompt(t, (0,), t, None, c) for t, c in zip("ab", columns, strict=True)]
    images = torch.stack([torch.full((3, 2, 2), 0.25), torch.full((3, 2, 2), 0.5)])
    spec = RewardSpec(name="my_image_rewards:redness")
    check(RewardsConfig(functions=[spec]), ["hue", "pid"], images=True)
    with scorer(spec) as score:
        scores = score.score_images(asked, images, torch.zeros(2, dtype=torch.long))
    assert scores.reward_B.tolist() == [0.25, 1.0]


def test_what_is_no_number_is_masked_and_counted():
    functions = {"odd": lambda completions: [math.nan, None, 0.5, 1.0, 0.0]}
    with scorer(RewardSpec(name="odd"), functions=functions) as score:
        scores = score.score_images(
            prompts(*range(5)), torch.zeros(5, 1, 2, 2), torch.zeros(5, dtype=torch.long)
        )
    assert scores.reward_B.isnan().tolist() == [True, True, False, False, False]
    assert scores.errors == {"invalid": 1}


def test_text_where_an_image_belongs_is_named():
    for wrong in ("an image", torch.zeros(2, 2)):
        with pytest.raises(RewardError, match="scores images"):
            symmetry()([wrong])
