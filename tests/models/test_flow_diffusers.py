"""Pipelines of diffusers as flow models, against the pipelines themselves: their own sampling loop,
scheduler, guidance and decoding, loaded by diffusers from the same folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlalign.algos.tree import validate
from rlalign.config.schema import FlowConfig, ImageConfig, LoraConfig, ModelConfig
from rlalign.models.errors import ModelError
from rlalign.models.flow import take_rows
from rlalign.models.flow_load import load_flow_model
from rlalign.models.flow_random import write_random_pipeline
from rlalign.models.lora import adapters_off
from rlalign.models.mini_flow import MiniFlow
from rlalign.models.pipeline import import_diffusers
from rlalign.rollout.flow import grow, make_plan, sample_ode
from rlalign.rollout.flow_noise import initial_noise
from rlalign.rollout.guidance import classifier_free, embedded
from rlalign.types import Prompt

FAMILIES = ("sd3", "flux", "wan")
STEPS, LENGTH = 4, 20
PROMPTS = [Prompt(f"p{i}", (), text) for i, text in enumerate(("a cat", "Two dogs, asleep"))]
KEYS = [("p0", 0), ("p1", 0)]
FLOW = FlowConfig(num_steps=STEPS, split_steps=[0, 2], micro_batch_rows=3)


def image_of(family: str) -> ImageConfig:
    return ImageConfig(16, 32, 3 if family == "wan" else None, LENGTH)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    return {f: write_random_pipeline(root / f, f, seed=1) for f in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family, folders):
    """For tests that leave it as it is."""
    return load_flow_model(str(folders[family]), image=image_of(family))


@pytest.fixture
def fresh(family, folders):
    return load_flow_model(str(folders[family]), image=image_of(family))


def pipeline_of(family: str, folder: Path):
    diffusers = import_diffusers()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if family == "wan":  # its own scheduler looks back at earlier steps
        pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    return pipeline


def run_pipeline(pipeline, family: str, noise, output: str, **options):
    """Latents, or pixels, of the pipeline's own loop from `noise`."""
    size = {"height": 16, "width": 32}
    if family == "wan":
        size["num_frames"] = 3
    if family == "flux":
        noise = pipeline._pack_latents(noise, *noise.shape)
    texts = [prompt.source for prompt in PROMPTS]
    [made] = pipeline(
        texts,
        latents=noise,
        num_inference_steps=STEPS,
        max_sequence_length=LENGTH,
        output_type=output,
        return_dict=False,
        **size,
        **options,
    )
    if family == "flux" and output == "latent":
        made = pipeline._unpack_latents(made, 16, 32, pipeline.vae_scale_factor)
    return made


def sampled(model, velocity) -> torch.Tensor:
    cond = model.condition(PROMPTS)

    def of_tree(z, sigma, tree):
        return velocity(z, sigma, take_rows(cond, tree))

    grid = model.time_grid(STEPS)
    return sample_ode(of_tree, KEYS, model.latent_shape, FLOW, seed=3, iteration=0, sigma_T1=grid)


def test_samples_images_and_grid_are_those_of_the_pipeline(family, folders, model):
    pipeline = pipeline_of(family, folders[family])
    noise = initial_noise(3, 0, KEYS, model.latent_shape)
    plain = {"guidance_scale": 3.5 if family == "flux" else 1.0}
    expected = run_pipeline(pipeline, family, noise, "latent", **plain)
    assert torch.equal(pipeline.scheduler.sigmas.double(), model.time_grid(STEPS))
    x0 = sampled(model, embedded(model, 3.5) if family == "flux" else model)
    assert (expected - noise).std() > 0.3
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-4)
    pixels = run_pipeline(pipeline, family, noise, "pt", **plain)
    assert pixels.std() > 0.05
    torch.testing.assert_close(model.decode(x0), pixels, rtol=0, atol=1e-4)


def test_classifier_free_guidance_is_that_of_the_pipeline(family, folders, model):
    pipeline = pipeline_of(family, folders[family])
    noise = initial_noise(3, 0, KEYS, model.latent_shape)
    scale = {"guidance_scale": 4.0}
    if family == "flux":
        scale = {"guidance_scale": 1.0, "true_cfg_scale": 4.0, "negative_prompt": ["", ""]}
    expected = run_pipeline(pipeline, family, noise, "latent", **scale)
    x0 = sampled(model, classifier_free(model, model.null_condition, 4.0))
    torch.testing.assert_close(x0, expected, rtol=0, atol=1e-4)
    assert (x0 - sampled(model, model)).abs().max() > 0.1


@torch.no_grad()
def test_a_row_depends_on_its_own_state_time_and_text_alone(model):
    torch.manual_seed(0)
    z, sigma = torch.randn(3, *model.latent_shape), torch.tensor([0.9, 0.2, 0.5])
    cond = take_rows(model.condition(PROMPTS), torch.tensor([1, 0, 1]))
    v = model(z, sigma, cond)
    for n in range(3):
        alone = model(z[n : n + 1], sigma[n : n + 1], take_rows(cond, torch.tensor([n])))
        torch.testing.assert_close(v[n : n + 1], alone, rtol=0, atol=1e-5)
    others = model(z, sigma.roll(1), cond), model(z, sigma, take_rows(cond, torch.tensor([1] * 3)))
    assert all((v - other)[0].abs().max() > 0.05 for other in others)
    decoded = model.decode(z)
    torch.testing.assert_close(decoded[1:2], model.decode(z[1:2]), rtol=0, atol=1e-6)


def test_a_text_is_encoded_once_and_by_itself(fresh, monkeypatch):
    model = fresh
    texts = []
    encode = model.encode
    monkeypatch.setattr(model, "encode", lambda text: texts.append(text) or encode(text))
    first, second = PROMPTS
    cond = model.condition([first, second, first, Prompt("other id", (), "a cat")])
    assert texts == ["a cat", "Two dogs, asleep"]
    both = model.condition([second, first])
    assert all(torch.equal(cond[name][[1, 0, 3]], both[name][[0, 1, 1]]) for name in cond)
    none, empty = model.null_condition(3), model.condition([Prompt("", (), "")])
    assert all(torch.equal(none[name][2:], empty[name]) for name in cond)
    assert texts.count("") == 2  # the unconditional one is kept
    model.null_condition(1)
    assert texts.count("") == 2 and model.condition([])["text"].shape[0] == 0


def test_trees_of_denoising_steps_are_valid(model):
    plan = make_plan(FLOW, 0, model.time_grid(STEPS))
    cond = model.condition(PROMPTS)

    def velocity(z, sigma, tree):
        return model(z, sigma, take_rows(cond, tree))

    group_R = torch.tensor([0, 1])
    found = grow(plan, velocity, KEYS, group_R, model.latent_shape, FLOW, seed=0, iteration=0)
    leaves = plan.shape.levels(2)[-1]
    reward_N = torch.full((len(found.tree),), torch.nan)
    reward_N[leaves] = model.decode(found.final_LX).flatten(1).mean(1)
    validate(found.tree.replace(reward_N=reward_N))
    assert found.final_LX.shape[0] == 8 and reward_N[leaves].std() > 0


def test_only_the_transformer_is_seen_and_trains(family, model):
    assert {name.split(".")[0] for name in model.state_dict()} == {"transformer"}
    parts = [p for p in model.pipeline.components.values() if isinstance(p, torch.nn.Module)]
    around = [w for p in parts if p is not model.transformer for w in p.parameters()]
    assert around and not any(w.requires_grad for w in around)
    cond = model.condition(PROMPTS)
    v = model(torch.randn(2, *model.latent_shape), torch.tensor([0.5, 0.9]), cond)
    v.square().mean().backward()
    assert all(w.grad is not None for w in model.parameters())
    twin = model.frozen_copy()
    assert twin.pipeline is model.pipeline and twin.transformer is not model.transformer
    assert not any(w.requires_grad for w in twin.parameters())


@torch.no_grad()
def test_a_saved_folder_differs_in_the_transformer_only(family, folders, fresh, tmp_path):
    model = fresh
    torch.manual_seed(0)
    for weight in model.parameters():
        weight += 0.02 * torch.randn_like(weight)
    model.save_pretrained(tmp_path / "saved")
    z, sigma = torch.randn(2, *model.latent_shape), torch.tensor([0.3, 0.8])
    cond = model.condition(PROMPTS)
    again = load_flow_model(str(tmp_path / "saved"), image=image_of(family))
    assert torch.equal(again(z, sigma, again.condition(PROMPTS)), model(z, sigma, cond))
    theirs = pipeline_of(family, tmp_path / "saved")
    expected = model.transformer.state_dict()
    assert all(torch.equal(w, expected[n]) for n, w in theirs.transformer.state_dict().items())
    source = {f.relative_to(folders[family]): f for f in folders[family].rglob("*") if f.is_file()}
    saved = {name: tmp_path / "saved" / name for name in source}
    assert {f for f in (tmp_path / "saved").rglob("*") if f.is_file()} == set(saved.values())
    changed = {n for n, file in source.items() if file.read_bytes() != saved[n].read_bytes()}
    assert changed == {Path("transformer/diffusion_pytorch_model.safetensors")}
    shutil.rmtree(tmp_path / "saved")
    assert all(file.is_file() for file in source.values())


@torch.no_grad()
def test_weights_in_one_storage_are_saved_in_shards(folders, tmp_path, monkeypatch):
    """Engines hold all parameters as views of one flat tensor."""
    monkeypatch.setattr("rlalign.models.pipeline.SHARD_SIZE", "100KB")
    model = load_flow_model(str(folders["flux"]))
    weights = list(model.parameters())
    flat = torch.cat([w.flatten() for w in weights])
    for weight, part in zip(weights, flat.split([w.numel() for w in weights]), strict=True):
        weight.data = part.view(weight.shape)
    model.save_pretrained(tmp_path)
    files = [file.stat().st_size for file in (tmp_path / "transformer").glob("*.safetensors")]
    assert len(files) == 4 and sum(files) < 1.1 * flat.numel() * 4
    theirs = pipeline_of("flux", tmp_path).transformer.state_dict()
    assert all(torch.equal(w, theirs[name]) for name, w in model.transformer.state_dict().items())


@torch.no_grad()
def test_adapters_begin_as_nothing_and_are_saved_merged_and_alone(family, folders, fresh, tmp_path):
    model = fresh
    z, sigma = torch.randn(2, *model.latent_shape), torch.tensor([0.3, 0.8])
    cond = model.condition(PROMPTS)
    before = model(z, sigma, cond)
    model.prepare(ModelConfig(path="", lora=LoraConfig(rank=2, alpha=3.0)), seed=0)
    trained = {name for name, w in model.named_parameters() if w.requires_grad}
    assert trained and all(".lora_" in name for name in trained)
    assert torch.equal(model(z, sigma, cond), before)
    for name, weight in model.named_parameters():
        if ".lora_B." in name:
            weight += 0.05 * torch.randn_like(weight)
    after = model(z, sigma, cond)
    assert (after - before).abs().max() > 0.01
    with adapters_off(model):
        assert torch.equal(model(z, sigma, cond), before)
    model.save_pretrained(tmp_path)
    again = load_flow_model(str(tmp_path), image=image_of(family))
    torch.testing.assert_close(again(z, sigma, cond), after, rtol=0, atol=1e-5)
    base = load_flow_model(str(folders[family]), image=image_of(family))
    base.pipeline.load_lora_weights(tmp_path / "adapter")
    torch.testing.assert_close(base(z, sigma, cond), after, rtol=0, atol=1e-5)


def test_checkpointed_gradients_are_the_same(fresh):
    model = fresh
    cond, z = model.condition(PROMPTS), torch.randn(2, *model.latent_shape)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(z, torch.tensor([0.5, 0.9]), cond).square().mean().backward()
        return torch.cat([w.grad.flatten() for w in model.parameters()])

    expected = gradient()
    model.prepare(ModelConfig(path="", gradient_checkpointing=True), seed=0)
    assert model.transformer.is_gradient_checkpointing
    torch.testing.assert_close(gradient(), expected, rtol=1e-5, atol=1e-7)


def test_grids_are_the_published_formulas(family, model):
    i = torch.arange(STEPS, dtype=torch.float64)
    if family == "flux":  # 4 x 8 tokens
        mu = 0.5 + (1.15 - 0.5) * (32 - 8) / (64 - 8)
        t, k = 1 - i / STEPS, torch.tensor(mu).double().exp()
    else:  # the scheduler's shift acts on its range of sigmas, and once more on the grid in it
        k = torch.tensor(3.0, dtype=torch.float64)
        low = 3 * 0.001 / (1 + 2 * 0.001)
        t = 1 - (1 - low) * i / (STEPS - 1)
    expected = torch.cat([k * t / (1 + (k - 1) * t), torch.zeros(1)])
    torch.testing.assert_close(model.time_grid(STEPS), expected, rtol=0, atol=1e-6)
    assert model.time_grid(STEPS, shift=3.0) is None


@torch.no_grad()
def test_bfloat16_leaves_tables_of_positions_and_the_vae_alone(family, folders, model):
    low = load_flow_model(str(folders[family]), dtype="bfloat16", image=image_of(family))
    assert {w.dtype for w in low.parameters()} == {torch.bfloat16}
    assert low.pipeline.vae.dtype == torch.float32
    z, sigma = torch.randn(2, *model.latent_shape), torch.tensor([0.3, 0.8])
    v, expected = (m(z, sigma, m.condition(PROMPTS)) for m in (low, model))
    assert v.dtype == torch.float32
    assert 0 < (v - expected).std() < 0.03 * expected.std()
    if family == "wan":
        assert {b.dtype for b in low.buffers()} == {torch.float32}


def broken(folders, family: str, tmp_path: Path, file: str, **changes) -> str:
    """A copy of the pipeline whose JSON `file` has `changes`."""
    shutil.copytree(folders[family], tmp_path / family)
    path = tmp_path / family / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return str(tmp_path / family)


@pytest.mark.parametrize(
    ("family", "image", "message"),
    [
        ("sd3", {"height": 18}, r"height=18: StableDiffusion3Pip.* multiples of 4 pixels; take 16"),
        ("flux", {"width": 17}, r"width=17.*multiples of 4 pixels"),
        ("sd3", {"num_frames": 3}, r"num_frames=3.*images, not videos"),
        ("wan", {"num_frames": 4}, r"num_frames=4.*multiples of 2 more; take 5"),
    ],
)
def test_sizes_that_a_pipeline_does_not_make_are_refused(folders, family, image, message):
    with pytest.raises(ModelError, match=message):
        load_flow_model(str(folders[family]), image=ImageConfig(**image))


def test_unset_sizes_are_the_pipelines_own(folders):
    shapes = [load_flow_model(str(folders[family])).latent_shape for family in FAMILIES]
    assert shapes == [(4, 8, 8), (4, 128, 128), (4, 41, 240, 416)]


def test_what_is_no_such_pipeline_is_refused(folders, tmp_path):
    other = broken(folders, "flux", tmp_path, "model_index.json", _class_name="FluxFillPipeline")
    with pytest.raises(ModelError, match=r"FluxFillPipeline, which is none of .*WanPipeline"):
        load_flow_model(other)
    two = broken(folders, "wan", tmp_path, "model_index.json", boundary_ratio=0.9)
    with pytest.raises(ModelError, match=r"two networks that take turns"):
        load_flow_model(two)
    with pytest.raises(ModelError, match=r"'p' is a list of chat messages"):
        load_flow_model(str(folders["sd3"])).condition([Prompt("p", (), [{"role": "user"}])])
    labels = MiniFlow(["a"])
    with pytest.raises(ModelError, match=r"MiniFlow has no adapters"):
        labels.prepare(ModelConfig(path="", lora=LoraConfig(rank=1)), seed=0)


def test_weights_that_are_missing_or_pickled_are_refused(folders, tmp_path):
    shutil.copytree(folders["sd3"], tmp_path / "sd3")
    file = tmp_path / "sd3" / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights.pop("proj_out.weight")
    save_file(weights, file)
    with pytest.raises(ModelError, match=r"lack 1 of the network's tensors.*'proj_out.weight'"):
        load_flow_model(str(tmp_path / "sd3"))
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pytest.raises(ModelError, match=r"no file named diffusion_pytorch_model.safetensors"):
        load_flow_model(str(tmp_path / "sd3"))


def test_guidance_scalars_go_to_networks_that_take_them(folders, tmp_path):
    model = load_flow_model(str(folders["flux"]), image=image_of("flux"))
    z, sigma = torch.randn(2, *model.latent_shape), torch.tensor([0.3, 0.8])
    cond = model.condition(PROMPTS)
    assert torch.equal(embedded(model, 1.0)(z, sigma, cond), model(z, sigma, cond))
    assert (embedded(model, 4.0)(z, sigma, cond) - model(z, sigma, cond)).abs().max() > 1e-3
    model.transformer.register_to_config(guidance_embeds=False)
    with pytest.raises(ModelError, match="takes no guidance scalar"):
        embedded(model, 4.0)(z, sigma, cond)


def test_a_scheduler_of_no_flow_is_refused(folders):
    model = load_flow_model(str(folders["sd3"]), image=image_of("sd3"))
    model.pipeline.scheduler = import_diffusers().DDIMScheduler()
    with pytest.raises(ModelError, match=r"DDIMScheduler, which is none of a flow"):
        model.time_grid(STEPS)
