"""Norms of every row's gradient against one backward pass a row through the model's own logits."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from rlalign.config.schema import OptimConfig, TrainerConfig
from rlalign.models.random import write_random_model
from rlalign.trainer.deepspeed_engine import DeepSpeedEngine
from rlalign.trainer.distributed import World
from rlalign.trainer.engine import TorchEngine
from rlalign.trainer.gradient_norms import GradientNormError, norms_of_batch
from rlalign.types import TrainBatch
from tests.trainer.ranks import run_ranks
from tests.trainer.test_policy import (
    FAMILIES,
    GROUPS,
    WITH_HEAD,
    batch,
    build,
    own_model,
    trained_lora,
    write_family,
)

TEMPERATURE = 0.7
BOTH = pytest.mark.parametrize("grad_params", ["lm_head", "embed_tokens"])
# a prompt of 5 tokens shared by four rows, one of 3 by two; an empty completion among them
SHAPES = ((5, 9), (3, 0), (8, 2), (5, 1), (5, 12), (3, 4), (1, 6), (5, 3))
SETS = torch.tensor([0, 2, 3, 4, 0, 2, -1, 4])  # within prompts; none has id 1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        tied: write_random_model(root / str(tied), "qwen2", tied=tied) for tied in (True, False)
    }


def rows(shapes=SHAPES) -> TrainBatch:
    """Without a mask on the third row and on some tokens of the fifth."""
    drawn = batch(shapes, groups=True)
    drawn.mask_BT[2] = 0
    drawn.mask_BT[4, 2:7] = 0
    return drawn


def gradients(model, drawn: TrainBatch, weight: Tensor, output_side: bool = False) -> Tensor:
    """[B, V, D], row by row; `output_side`: as if the hidden states did not depend on `weight`."""
    weight.requires_grad_()
    head, result = model.get_output_embeddings(), []
    config = model.config.get_text_config()
    for b, sequence in enumerate(drawn.sequences):
        ids, count = torch.tensor([sequence]), int(drawn.completion_len_B[b])
        if output_side:
            seen = []
            handle = head.register_forward_pre_hook(
                lambda module, args, seen=seen: (seen.append(args[0]) or args[0].detach(),)
            )
            logits = model(input_ids=ids, use_cache=False).logits[0]
            handle.remove()
            assert len(seen) == 1
        else:
            logits = model(input_ids=ids, use_cache=False).logits[0]
        assert logits.shape[1] == config.vocab_size
        logp = (logits / TEMPERATURE).log_softmax(-1)
        total = logits.sum() * 0
        for t in range(count):
            place = len(sequence) - count + t
            total = total + drawn.mask_BT[b, t] * logp[place - 1, sequence[place]]
        result.append(torch.autograd.grad(total, weight)[0].double())
    return torch.stack(result)


def assert_near(found: Tensor, grads: Tensor, relative: float = 1e-5) -> None:
    want = grads.flatten(1).norm(dim=1)
    assert found.dtype == torch.float32 and found.shape == want.shape
    assert (found[want == 0] == 0).all() and (found[want > 0] > 0).all()
    error = (found.double() - want).abs() / want.clamp(min=1e-12)
    assert float(error.max()) <= relative, error


def wanted(model, drawn: TrainBatch, grad_params: str) -> Tensor:
    if grad_params == "lm_head":
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        return gradients(model, drawn, model.get_output_embeddings().weight, output_side=tied)
    return gradients(model, drawn, model.get_input_embeddings().weight)


@BOTH
@pytest.mark.parametrize("packing", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_norms_equal_those_of_single_backward_passes(folders, tied, packing, grad_params):
    policy, drawn = build(folders[tied], packing=packing), rows()
    found = policy(drawn, TEMPERATURE, grad_params=grad_params)
    assert found.mean_squared_K is None
    assert found.norm_B[1] == found.norm_B[2] == 0  # no completion; no token that counts
    assert_near(found.norm_B, wanted(own_model(folders[tied]), drawn, grad_params))


@BOTH
@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_transform_logits_or_embeddings(tmp_path, family, grad_params):
    path = write_family(tmp_path, family, **FAMILIES[family])
    own = own_model(path)
    if family == "phi":
        torch.nn.init.normal_(own.lm_head.bias)
        own.save_pretrained(path)
    if family == "gemma2":
        own.set_attn_implementation("eager")  # transformers' sdpa leaves the attention cap out
    drawn = rows()
    found = build(path)(drawn, TEMPERATURE, grad_params=grad_params)
    assert_near(found.norm_B, wanted(own, drawn, grad_params))


@BOTH
@pytest.mark.parametrize(
    "targets", ["all-linear", WITH_HEAD, r".*\.\w+_proj|embed_tokens"], ids=["layers", "head", "in"]
)
def test_with_adapters_the_norm_is_that_of_the_matrix_beneath(folders, targets, grad_params):
    """As GVM's choice of one tensor has it, frozen or not."""
    policy, drawn = trained_lora(folders[False], targets), rows()
    found = policy(drawn, TEMPERATURE, grad_params=grad_params)
    sides = (policy.model.get_input_embeddings(), policy.model.get_output_embeddings())
    inner, outer = (getattr(side, "base_layer", side).weight for side in sides)
    weight = outer if grad_params == "lm_head" else inner
    assert not weight.requires_grad
    assert_near(found.norm_B, gradients(policy.model, drawn, weight))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_padding_token_has_no_gradient_as_an_input(tmp_path, folders, tied):
    """torch leaves it out of an embedding's gradient; here it is in prompts and completions."""
    policy, drawn = build(folders[tied]), rows()
    pad = policy.model.get_input_embeddings().padding_idx
    assert pad is not None
    sequences = tuple(row if len(row) < 4 else (*row[:2], pad, *row[3:]) for row in drawn.sequences)
    sequences = (*sequences[:-1], (*sequences[-1][:-2], pad, sequences[-1][-1]))
    drawn = drawn.replace(sequences=sequences)
    found = policy(drawn, TEMPERATURE, grad_params="embed_tokens").norm_B
    assert_near(found, wanted(own_model(folders[tied]), drawn, "embed_tokens"))


@BOTH
def test_the_norms_are_of_sums_over_tokens(folders, grad_params):
    """With the first token alone counted, then the second: they add up as vectors, not as means."""
    policy, drawn = build(folders[False]), batch(((4, 2),) * 3)
    own = own_model(folders[False])
    parts = [
        drawn.replace(mask_BT=torch.tensor([mask] * 3)) for mask in ([1.0, 0], [0, 1.0], [1.0, 1])
    ]
    first, second, both = (wanted(own, part, grad_params) for part in parts)
    torch.testing.assert_close(first + second, both, atol=1e-5, rtol=1e-4)
    for part, grads in zip(parts, (first, second, both), strict=True):
        assert_near(policy(part, TEMPERATURE, grad_params=grad_params).norm_B, grads)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_squared_norm_of_the_mean_gradient_of_a_set(folders, tied):
    drawn = rows()
    set_id_B = torch.tensor([0, -1, 2, 2, 0, -1, 3, 2])  # none has id 1
    found = build(folders[tied])(drawn, TEMPERATURE, grad_params="lm_head", set_id_B=set_id_B)
    grads = wanted(own_model(folders[tied]), drawn, "lm_head")
    assert_near(found.norm_B, grads)
    assert found.mean_squared_K[1] == 0
    for k in (0, 2, 3):
        want = grads[set_id_B == k].mean(0).norm() ** 2
        assert float(found.mean_squared_K[k]) == pytest.approx(float(want), rel=2e-5)
    assert found.mean_squared_K[3] == pytest.approx(float(found.norm_B[6]) ** 2, rel=1e-5)


@BOTH
def test_batches_without_tokens_that_count(folders, grad_params):
    policy = build(folders[True])
    for shapes in ((), ((3, 0), (2, 0))):
        found = policy(batch(shapes), TEMPERATURE, grad_params=grad_params)
        assert found.norm_B.tolist() == [0.0] * len(shapes)
    masked = batch(((3, 2), (2, 4)))
    masked = masked.replace(mask_BT=torch.zeros_like(masked.mask_BT))
    assert policy(masked, TEMPERATURE, grad_params=grad_params).norm_B.tolist() == [0.0, 0.0]


@BOTH
def test_training_is_not_disturbed(folders, grad_params):
    """No gradient is left behind, no flag or hook moved; checkpointing or not."""
    policy = build(folders[True], gradient_checkpointing=True)
    flags = [p.requires_grad for p in policy.parameters()]
    hooks = dict(policy.model.get_input_embeddings()._forward_hooks)
    found = policy(rows(), TEMPERATURE, grad_params=grad_params).norm_B
    assert all(p.grad is None for p in policy.parameters())
    assert [p.requires_grad for p in policy.parameters()] == flags
    assert policy.model.get_input_embeddings()._forward_hooks == hooks
    plain = build(folders[True])(rows(), TEMPERATURE, grad_params=grad_params).norm_B
    torch.testing.assert_close(found, plain, atol=0, rtol=1e-6)


def test_what_cannot_be_had_is_an_error(folders):
    policy, drawn = build(folders[True]), rows()
    with pytest.raises(GradientNormError, match=r"'mlp'.*lm_head, embed_tokens"):
        policy(drawn, TEMPERATURE, grad_params="mlp")
    sets = torch.zeros(len(drawn), dtype=torch.long)
    with pytest.raises(GradientNormError, match="for grad_params=lm_head only"):
        policy(drawn, TEMPERATURE, grad_params="embed_tokens", set_id_B=sets)
    embedding = policy.model.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: output + 1)
    with pytest.raises(GradientNormError, match="does more than"):
        policy(drawn, TEMPERATURE, grad_params="embed_tokens")
    handle.remove()


# --- engines and processes -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A head of over 10^5 numbers: ZeRO-3 keeps smaller ones whole."""
    path = tmp_path_factory.mktemp("models") / "wide"
    return write_random_model(path, "qwen2", tied=False, hidden=400, layers=1, init_std=0.1)


def config(micro_batch_tokens: int = 10_000):
    return SimpleNamespace(
        rollout=SimpleNamespace(temperature=TEMPERATURE),
        trainer=SimpleNamespace(packing=True, micro_batch_tokens=micro_batch_tokens),
    )


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_norms_come_out_of_deepspeed(wide, stage):
    """The same as from torch, before and after a step, which they do not disturb."""
    optim = OptimConfig(learning_rate=1e-2)
    plain = TorchEngine(build(wide), optim)
    trainer = TrainerConfig(zero_stage=stage, optim=optim)
    drawn = rows()
    sets = torch.tensor([0, 0, 0, 0, 0, 0, 1, -1])
    with closing(DeepSpeedEngine(build(wide), trainer)) as engine:
        assert (engine.module.head.weight.numel() == 0) == (stage == 3)
        for _ in range(2):
            for kinds, given in (("lm_head", sets), ("embed_tokens", None)):
                if kinds == "embed_tokens" and stage == 3:
                    continue
                ours, theirs = (
                    x.forward(drawn, TEMPERATURE, grad_params=kinds, set_id_B=given)
                    for x in (plain, engine)
                )
                torch.testing.assert_close(theirs.norm_B, ours.norm_B, atol=0, rtol=1e-4)
                if given is not None:
                    torch.testing.assert_close(
                        theirs.mean_squared_K, ours.mean_squared_K, atol=0, rtol=1e-4
                    )
            steps = []
            for x in (plain, engine):
                x.backward((drawn.weight_BT * x.forward(drawn, TEMPERATURE).logp_BT).sum())
                steps.append(x.step(1e-2))
            assert steps[1].grad_norm == pytest.approx(steps[0].grad_norm, rel=1e-5)


def test_embeddings_under_zero_3_are_an_error(wide):
    trainer = TrainerConfig(zero_stage=3)
    engine = DeepSpeedEngine(build(wide), trainer)
    with closing(engine), pytest.raises(GradientNormError, match=r"ZeRO-3.*zero_stage <= 2"):
        engine.forward(rows(), TEMPERATURE, grad_params="embed_tokens")


class FakeWorld(World):
    """One of two processes, whose sums are left to the test."""

    def all_reduce_sum(self, tensor, name):
        return tensor


@BOTH
@pytest.mark.parametrize("limit", [12, 30, 10_000])
def test_micro_batches_and_processes_do_not_change_the_norms(folders, limit, grad_params):
    policy, drawn = build(folders[True]), batch(GROUPS, groups=True)
    engine = TorchEngine(policy, OptimConfig())
    sets = torch.tensor([2, -1, 1, -1, 2, 1, 2, 0, -1, 0, 0]) if grad_params == "lm_head" else None
    whole = policy(drawn, TEMPERATURE, grad_params=grad_params, set_id_B=sets)
    parts = [
        norms_of_batch(engine, drawn, config(limit), world, grad_params, sets)
        for world in (FakeWorld(rank=0, size=2), FakeWorld(rank=1, size=2))
    ]
    assert all(part.norm_B.any() for part in parts), "both have work"
    torch.testing.assert_close(parts[0].norm_B + parts[1].norm_B, whole.norm_B, atol=0, rtol=1e-5)
    if sets is not None:
        found = parts[0].mean_squared_K + parts[1].mean_squared_K
        torch.testing.assert_close(found, whole.mean_squared_K, atol=0, rtol=1e-5)


def test_two_processes_under_zero_3(wide, tmp_path):
    """Which together have the numbers of one, also where one of them has no row."""
    run_ranks(Path(__file__).with_name("norms_worker.py"), str(wide), str(tmp_path))
    policy = build(wide)
    for name, drawn, sets in (("many", rows(), SETS), ("one", rows().rows([0, 3]), None)):
        whole = policy(drawn, TEMPERATURE, grad_params="lm_head", set_id_B=sets)
        for rank in (0, 1):
            norm_B, squared_K = torch.load(tmp_path / f"{name}-{rank}.pt")
            torch.testing.assert_close(norm_B, whole.norm_B, atol=0, rtol=1e-5)
            if sets is not None:
                torch.testing.assert_close(squared_K, whole.mean_squared_K, atol=0, rtol=1e-5)


def test_a_set_over_several_prompts_is_refused(folders):
    engine = TorchEngine(build(folders[True]), OptimConfig())
    sets = torch.tensor([0, -1, 0, -1, -1, -1, -1, -1])
    with pytest.raises(GradientNormError, match="set 0 has rows with different prompts"):
        norms_of_batch(engine, rows(), config(), World(), "lm_head", sets)
