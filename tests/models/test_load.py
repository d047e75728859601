"""Models load from where they are, and whatever is wrong with a folder is named with its remedy."""

from __future__ import annotations

import json
import time

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects

from rlalign.config import ModelConfig
from rlalign.models.load import ModelError, load_causal_lm, load_tokenizer, resolve_model_path
from rlalign.models.random import write_random_model


@pytest.fixture
def folder(tmp_path):
    return write_random_model(tmp_path / "model")


def edit(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def failure(folder, load=load_causal_lm, **settings) -> str:
    with pytest.raises(ModelError) as caught:
        load(ModelConfig(path=str(folder), **settings))
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_saved_is_what_is_loaded(folder, dtype):
    from safetensors.torch import load_file

    model = load_causal_lm(ModelConfig(path=str(folder), dtype=dtype))
    saved = load_file(folder / "model.safetensors")
    loaded = dict(model.named_parameters())
    assert saved.keys() == loaded.keys()
    for name, tensor in saved.items():
        assert torch.equal(loaded[name], tensor.to(getattr(torch, dtype)))
    assert model.config._attn_implementation == "sdpa" and not model.training


def test_a_tokenizer_without_padding_pads_with_its_end_token(folder):
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    edit(folder / "tokenizer_config.json", pad_token=None, unk_token=None)
    tokenizer = load_tokenizer(ModelConfig(path=str(folder)))
    assert tokenizer.pad_token_id is not None


def test_a_tokenizer_without_end_of_sequence(tmp_path):
    folder = write_random_model(tmp_path / "model", "llama")
    edit(folder / "tokenizer_config.json", eos_token=None)
    text = failure(folder, load_tokenizer)
    assert "no end-of-sequence token" in text and "eos_token" in text and str(folder) in text


@pytest.mark.parametrize("path", ["no/such/folder/here", "./missing", "missing", "~/missing-model"])
def test_a_missing_folder(path):
    with pytest.raises(ModelError, match="no such folder") as caught:
        resolve_model_path(path, 0)
    assert repr(path) in str(caught.value)


def test_a_file_is_no_folder(folder):
    assert "is a file" in failure(folder / "config.json")


def test_a_hub_model_out_of_reach_is_an_error_within_seconds(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    text = failure("no-such-owner/no-such-model")
    assert "127.0.0.1:9 is out of reach" in text and "not in the hub's cache" in text
    assert time.monotonic() - start < 10


def test_a_folder_without_config(tmp_path):
    (tmp_path / "x").mkdir()
    assert "config.json" in failure(tmp_path / "x")
    assert "config.json" in failure(tmp_path / "x", load_tokenizer)


def test_a_folder_without_weights_or_with_pickled_ones(folder):
    (folder / "model.safetensors").unlink()
    assert "holds no weights" in failure(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert "pickles" in failure(folder)


def test_weights_that_are_cut_short(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert "cannot be loaded" in failure(folder)


def test_weights_that_do_not_fill_the_model(folder):
    edit(folder / "config.json", num_hidden_layers=3, layer_types=None)
    text = failure(folder)
    assert "lack" in text and "model.layers.2." in text


def test_weights_of_another_shape(folder):
    edit(folder / "config.json", intermediate_size=96)
    assert "cannot be loaded" in failure(folder)


def test_a_folder_without_tokenizer(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "no tokenizer" in failure(folder, load_tokenizer)


def test_code_that_ships_with_a_model_runs_only_when_trusted(tmp_path):
    folder = write_random_model(tmp_path / "model")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    edit(folder / "config.json", model_type="own-kind", auto_map=auto_map)
    start = time.monotonic()
    assert "model.trust_remote_code=true" in failure(folder)
    assert time.monotonic() - start < 10  # no prompt on the terminal is waited for
    assert not (tmp_path / "ran").exists()


def test_mini_names_a_task_that_is_built_in():
    from rlalign.errors import RlalignError

    with pytest.raises(RlalignError, match="chain"):
        resolve_model_path("mini:chess", 0)


def test_of_a_pipeline_on_the_hub_only_its_parts_are_fetched(tmp_path, monkeypatch):
    index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"], "odd": None}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    there = ["model_index.json", "vae/config.json", "vae/a.safetensors", "vae/a.fp16.safetensors"]
    there += ["flux1-dev.safetensors", "ae.safetensors", "odd/b.json", "vae/a.bin"]
    asked = []

    def download(name, *, allow_patterns, ignore_patterns, **_):
        asked.append(
            list(
                filter_repo_objects(
                    there, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns
                )
            )
        )
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr("rlalign.models.load.hub_problem", lambda: None)
    assert resolve_model_path("owner/a-pipeline", 0) == str(tmp_path)
    assert asked == [there[:1], there[:3]]
