"""Every engine passes every check of conformance.py; those that concern weights also without a tied
head, where an engine's loading takes another way.

One vLLM engine can live in a process, and its start costs seconds: all tests of one engine and
model share it, and the xdist group keeps vLLM on one worker (`--dist loadgroup`).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlalign.config.schema import DiffusionConfig, RolloutConfig, ServerConfig, VllmConfig
from rlalign.models.masked_diffusion import MaskedDiffusionLM
from rlalign.models.random import write_random_model
from rlalign.rollout.client import RolloutClient
from rlalign.rollout.engine import RolloutEngine
from rlalign.rollout.hf import HFEngine
from rlalign.rollout.masked_diffusion import MaskedDiffusionEngine
from rlalign.rollout.vllm import VllmEngine
from tests.rollout import conformance
from tests.rollout.conformance import (
    MAX_BATCH,
    MAX_COMPLETION,
    MAX_PROMPT,
    SAMPLING_CHECKS,
    WEIGHT_CHECKS,
    Subject,
)
from tests.rollout.live_server import LiveServer


def hf_engine(path: str, tokenizer) -> RolloutEngine:
    model = AutoModelForCausalLM.from_pretrained(path)
    return HFEngine(model, tokenizer, max_batch_size=MAX_BATCH)


def masked_engine(path: str, tokenizer) -> RolloutEngine:
    """Blocks of one token: see conformance.py."""
    model = AutoModelForCausalLM.from_pretrained(path)
    lm = MaskedDiffusionLM(model, model.config.mask_token_id)
    diffusion = DiffusionConfig(block_size=1)
    return MaskedDiffusionEngine(lm, tokenizer, diffusion, max_batch_size=MAX_BATCH)


def vllm_engine(path: str, tokenizer) -> RolloutEngine:
    cfg = RolloutConfig(
        max_completion_length=MAX_COMPLETION, vllm=VllmConfig(max_num_seqs=MAX_BATCH)
    )
    return VllmEngine(path, tokenizer, cfg, max_prompt_length=MAX_PROMPT)


class ServedEngine(RolloutClient):
    """A job on a server of its own, which ends with it."""

    def __init__(self, path: str, tokenizer) -> None:
        folder = Path(path)
        self._server = LiveServer(folder, folder.parent, f"vllm.max_num_seqs={MAX_BATCH}")
        try:
            connection = ServerConfig(name=str(self._server.connection))
            super().__init__("conformance", tokenizer, connection)
        except BaseException:
            self._server.close()
            raise

    def close(self) -> None:
        super().close()
        self._server.close()


NEEDS_VLLM = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
)
ENGINES = {
    "hf": (hf_engine, ()),
    "masked_diffusion": (masked_engine, ()),
    "vllm": (vllm_engine, (pytest.mark.xdist_group("vllm"), NEEDS_VLLM)),
    "server": (ServedEngine, (pytest.mark.xdist_group("vllm"), NEEDS_VLLM)),
}


CASES = [
    pytest.param(
        name, tied, check, marks=marks, id=f"{name}-{'tied' if tied else 'untied'}-{check.__name__}"
    )
    for name, (_, marks) in ENGINES.items()
    for tied, checks in ((True, (*SAMPLING_CHECKS, *WEIGHT_CHECKS)), (False, WEIGHT_CHECKS))
    for check in checks
]


class Running:
    """The engine under test at present: one at a time, built when another one is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.key: tuple[str, bool] | None = None
        self.subject: Subject | None = None

    def get(self, name: str, tied: bool) -> Subject:
        if self.subject is None or self.key != (name, tied):
            self.close()
            path = self.folder / f"{name}-{tied}"
            write_model(path, tied, **(MASKED if name == "masked_diffusion" else {}))
            tokenizer = AutoTokenizer.from_pretrained(path)
            engine = ENGINES[name][0](str(path), tokenizer)
            sender = AutoModelForCausalLM.from_pretrained(path).eval()
            self.key, self.subject = (name, tied), Subject(engine, sender, tokenizer)
        return self.subject

    def close(self) -> None:
        if self.subject is not None:
            conformance.closing_twice_is_fine_and_final(self.subject)
            self.subject = None


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Running]:
    running = Running(tmp_path_factory.mktemp("models"))
    yield running
    running.close()


MASKED = {"is_causal": False, "mask_token_id": 0}  # no prompt of conformance.py holds a 0


def write_model(path: Path, tied: bool, **fields: Any) -> Path:
    """Heads of 32: the smallest that vLLM's CPU kernels take."""
    shape = {"hidden": 64, "heads": 2, "kv_heads": 1, "layers": 2, "mlp": 96}
    positions = MAX_PROMPT + MAX_COMPLETION
    return write_random_model(path, tied=tied, max_positions=positions, **shape, **fields)


@pytest.mark.parametrize(("name", "tied", "check"), CASES)
def test_engine(running: Running, name: str, tied: bool, check: Callable[[Subject], None]) -> None:
    subject = running.get(name, tied)
    # The sender's weights, whatever the check before left there.
    subject.engine.update_weights(subject.sender.named_parameters(), 0)
    check(subject)
