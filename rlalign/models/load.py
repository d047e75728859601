"""Model and tokenizer from a folder, the hub, or `mini:<task>`; every failure says how to mend it.

Nothing here writes but the hub's own cache and the cache of mini models. Weights are read from
safetensors only: the older `.bin` files are pickles.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import cache
from pathlib import Path

import huggingface_hub
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from rlalign.config.schema import ModelConfig
from rlalign.hub import hub_problem, is_hub_id
from rlalign.models.errors import ModelError
from rlalign.models.mini import build_mini

MINI = "mini:"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
HUB_TWINS = ["*.fp16*"]  # the same weights once more
HUB_TIMEOUT_S = 10.0
PIPELINE_FILE = "model_index.json"  # in a folder of diffusers

__all__ = ["ModelError", "load_causal_lm", "load_tokenizer", "resolve_model_path"]

# What transformers raises for a folder it cannot use; its own classes derive from these.
LOAD_ERRORS = (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError)


def resolve_model_path(path: str, seed: int) -> str:
    """The local folder of `path`: a folder, a hub id (downloaded once), or `mini:<task>` (built
    once; `seed` keys its weights).

    Raises ModelError where there is no such folder, and within seconds where the hub is out of
    reach and its cache does not hold the model.
    """
    if path.startswith(MINI):
        return str(build_mini(path.removeprefix(MINI), seed))
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    if folder.exists():
        raise ModelError(f"model.path {path!r} is a file; name the folder that holds config.json")
    if is_hub_id(path):
        return _from_hub(path)
    raise ModelError(
        f"model.path {path!r}: there is no such folder, and it is no hub id (owner/name) and no "
        "mini:<task>. Check the path; mini:chain needs nothing"
    )


def context_of(folder: str | Path, at_most: int) -> int:
    """Tokens of the longest sequence of the model in a folder, at most so many. Raises ModelError
    for a folder without a configuration."""
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except LOAD_ERRORS as error:
        raise load_error("configuration", Path(folder), error) from error
    return min(getattr(config, "max_position_embeddings", None) or at_most, at_most)


def load_tokenizer(cfg: ModelConfig, seed: int = 0) -> PreTrainedTokenizerBase:
    """The tokenizer in the model's folder; without a padding token it pads with its end token.

    Raises ModelError where there is none, where it has no end-of-sequence token (a completion
    could never end), or where it needs code that is not trusted.
    """
    folder = model_folder(cfg.path, seed)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=cfg.trust_remote_code)
    except LOAD_ERRORS as error:
        raise load_error("tokenizer", folder, error) from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what no files at all come to
        raise ModelError(
            f"{folder} holds no tokenizer: save it there too, with tokenizer.save_pretrained"
        )
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer in {folder} has no end-of-sequence token, so no completion could end: "
            "set eos_token in tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_causal_lm(
    cfg: ModelConfig, seed: int = 0, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """The causal language model at `cfg.path`, in `cfg.dtype`, in evaluation mode, on `device`.

    Raises ModelError where the folder holds no safetensors weights, where they do not fill the
    model (it would start with random ones), or where it needs code that is not trusted.
    """
    folder = model_folder(cfg.path, seed)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(no_weights(folder))
    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]
            folder,
            dtype=getattr(torch, cfg.dtype),
            trust_remote_code=cfg.trust_remote_code,
            attn_implementation="sdpa",
            use_safetensors=True,
            output_loading_info=True,
        )
    except LOAD_ERRORS as error:
        raise load_error("model", folder, error) from error
    refuse_incomplete(folder, loaded["missing_keys"])
    return model.to(device)


def refuse_incomplete(folder: Path, missing: Collection[str]) -> None:
    """Raise ModelError if tensors of the model are `missing` in its files."""
    if missing:
        raise ModelError(
            f"the weights in {folder} lack {len(missing)} of the model's tensors, the first "
            f"{min(missing)!r}: the files are incomplete, or config.json is another model's"
        )


def model_folder(path: str, seed: int) -> Path:
    """`resolve_model_path`, and it holds a config.json: else ModelError."""
    folder = Path(resolve_model_path(path, seed))
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"{folder} holds no config.json: it is not a Hugging Face model folder. Name the "
            "folder that save_pretrained wrote"
        )
    return folder


@cache
def _from_hub(name: str) -> str:
    problem = hub_problem()

    def fetch(patterns: list[str]) -> str:
        return huggingface_hub.snapshot_download(
            name,
            allow_patterns=patterns,
            ignore_patterns=HUB_TWINS,
            etag_timeout=HUB_TIMEOUT_S,
            local_files_only=problem is not None,
        )

    try:
        index = Path(fetch([PIPELINE_FILE])) / PIPELINE_FILE
        return fetch(_pipeline_files(index) if index.is_file() else HUB_FILES)
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"model {name!r} is no local folder and not in the hub's cache, and "
            f"{problem or 'the hub did not answer'}. Give a folder, or fetch the model where there "
            "is a network"
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ModelError(
            f"model {name!r} cannot be fetched: {error}. Check the id, and the access token "
            "(HF_TOKEN) if the model is gated"
        ) from error


def _pipeline_files(index: Path) -> list[str]:
    """Files of a pipeline of diffusers: often the same weights lie beside its folders once more."""
    parts = [name for name, what in json.loads(index.read_text()).items() if isinstance(what, list)]
    return [PIPELINE_FILE, *(f"{name}/{files}" for name in parts for files in HUB_FILES)]


def no_weights(folder: Path) -> str:
    """What to say of a folder without safetensors."""
    if any(folder.glob("*.bin")):
        return (
            f"{folder} holds weights as .bin files only, which are pickles and are not loaded: "
            "convert them to safetensors (from_pretrained, then save_pretrained)"
        )
    return f"{folder} holds no weights (*.safetensors): the model was not saved there completely"


def load_error(what: str, folder: Path, error: BaseException) -> ModelError:
    """One of LOAD_ERRORS as ours."""
    text = str(error)
    if "trust_remote_code" in text:
        return ModelError(
            f"the {what} in {folder} needs Python that ships with it. Read that code, then set "
            "model.trust_remote_code=true"
        )
    if "does not recognize this architecture" in text:
        text += (
            " A diffusion language model (LLaDA, Dream, SDAR) is loaded with "
            "rollout.engine=masked_diffusion."
        )
    return ModelError(f"the {what} in {folder} cannot be loaded: {type(error).__name__}: {text}")
