"""The methods on language models by name, as the command line knows them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlalign.config import testtime as configs
from rlalign.testtime.errors import DecodeError

REQUIRED, OPTIONAL, NONE = "required", "optional", "none"


@dataclass(frozen=True, slots=True)
class Method:
    """`function` is the public one, `module:name`; `config` the class of its options; `reward`
    says whether it takes one. `models` opens what it decodes with where that is several models;
    `checks` refuses options that make no sense together."""

    function: str
    config: str
    reward: str
    models: str = ""
    checks: str = ""

    def load(self) -> Callable[..., Any]:
        """The public function."""
        return _find(self.function)

    def check(self, cfg: configs.SearchConfig, num_experts: int, backend: str) -> None:
        """Before any model is there. Raises DecodeError."""
        if self.checks:
            models = {"num_experts": num_experts, "backend": backend} if self.models else {}
            _find(self.checks)(cfg, **models)

    def open_models(self, large: str, small: str, experts: Sequence[str], **how: str) -> Any:
        """The models of a method that decodes with several, to be closed."""
        return _find(self.models)(large, small, list(experts), **how)

    def config_class(self) -> type[configs.SearchConfig]:
        return getattr(configs, self.config)


METHODS = {
    "best-of-n": Method("rlalign.testtime.best_of_n:best_of_n", "BestOfConfig", REQUIRED),
    "majority": Method("rlalign.testtime.majority:majority", "MajorityConfig", OPTIONAL),
    "latent-seek": Method(
        "rlalign.testtime.latent_seek:latent_seek",
        "LatentSeekConfig",
        OPTIONAL,
        checks="rlalign.testtime.latent_seek:check",
    ),
    "rain": Method(
        "rlalign.testtime.rain:rain",
        "RainConfig",
        OPTIONAL,
        checks="rlalign.testtime.rain_run:check",
    ),
    "logit-fusion": Method(
        "rlalign.testtime.logit_fusion:logit_fusion",
        "FusionConfig",
        NONE,
        models="rlalign.testtime.open_fusion:open_fusion",
        checks="rlalign.testtime.logit_fusion:check",
    ),
}


def find_method(name: str) -> Method:
    """Raises DecodeError for a name that is none."""
    if name not in METHODS:
        raise DecodeError(f"there is no method {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name]


def _find(path: str) -> Callable[..., Any]:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
