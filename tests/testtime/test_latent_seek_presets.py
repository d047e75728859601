"""The shipped settings of LatentSeek."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlalign.config.load import parse
from rlalign.config.testtime import LatentSeekConfig

ROOT = Path(__file__).resolve().parent.parent.parent
PRESETS = sorted((ROOT / "configs" / "latent_seek").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_are_configs(path):
    cfg = parse(LatentSeekConfig, path)
    assert 0.05 <= cfg.rho <= 0.5 and cfg.max_steps == 10 and cfg.tau == -0.2
    if path.stem.count("_") == 2:
        assert cfg.select == "last" and path.stem.endswith(cfg.template)


def test_the_presets_are_those_of_the_papers_tables():
    """Tables 21 to 26 and the learning rates of the text, by hand."""

    def of(name: str) -> tuple[float, float]:
        cfg = parse(LatentSeekConfig, ROOT / f"configs/latent_seek/{name}.yaml")
        return cfg.rho, cfg.lr

    assert of("qwen2.5-1.5b_gsm8k_json") == (0.2, 10.0)
    assert of("qwen2.5-1.5b_gsm8k_boxed") == (0.05, 0.03)
    assert of("qwen2.5-7b_gsm8k_boxed") == (0.2, 0.05)
    assert of("qwen2.5-14b_math500_json") == (0.1, 0.05)
    assert of("llama-3.1-8b_aime24_json") == (0.2, 0.03)
    assert of("qwen2.5-1.5b_aime24_json") == (0.3, 10.0)
    assert of("qwen2-7b_math500_boxed") == (0.1, 0.03)
    assert len(PRESETS) == 5 * 3 * 2 + 2
