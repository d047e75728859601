"""The facts that hold for every training engine; test_engine.py and test_deepspeed_engine.py check
them all. The reference is a plain torch loop, written here without the engine's helpers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import nn

from rlalign.config.schema import OptimConfig
from rlalign.trainer.engine import EngineStateError, TrainEngine

Make = Callable[..., TrainEngine]  # make(module, optim, dtype=torch.float32)

ROWS = 8
SPLITS = ((0, 3), (3, 4), (4, 8))
OPTIM = OptimConfig(
    learning_rate=1e-2, weight_decay=0.1, adam_beta1=0.8, adam_beta2=0.95, max_grad_norm=0.5
)


class Output(NamedTuple):
    prediction: torch.Tensor
    penalty: torch.Tensor | None


class Net(nn.Module):
    """Frozen, trained and sometimes unused parameters; one too large for ZeRO-3 to keep whole, and
    sizes that do not divide by the number of processes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(77)
        self.frozen = nn.Linear(5, 401).requires_grad_(False)
        torch.manual_seed(seed)
        self.wide = nn.Linear(401, 251)
        self.narrow = nn.Linear(251, 7, bias=False)
        self.out = nn.Linear(7, 1)
        self.spare = nn.Parameter(torch.randn(3))

    def forward(self, x: torch.Tensor, *, use_spare: bool = False) -> Output:
        hidden = torch.tanh(self.narrow(torch.tanh(self.wide(self.frozen(x.to(dtype_of(self)))))))
        penalty = self.spare.square().sum() if use_spare else None
        return Output(self.out(hidden).float().squeeze(-1), penalty)


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, 5, generator=generator), torch.randn(ROWS, generator=generator)


def share(module, rows: slice, step: int = 0, use_spare: bool = False) -> torch.Tensor:
    """The rows' share of the global loss, whose scale changes with the step so that some steps
    are clipped and some are not."""
    x, y = data()
    output = module(x[rows], use_spare=use_spare)
    loss = (output.prediction - y[rows]).square().sum() * 0.2 * (step + 0.02) / ROWS
    return loss if output.penalty is None else loss + output.penalty * (step + 1)


def learning_rate(step: int) -> float:
    return 1e-2 / (step + 1)


def losses(module, step: int = 0, splits=SPLITS) -> Iterator[torch.Tensor]:
    """The loss of each micro-batch. The spare parameter is used at step 0, and at step 2 in the
    last micro-batch only."""
    for i, (first, last) in enumerate(splits):
        use_spare = (step == 0 and i == 0) or (step == 2 and i == len(splits) - 1)
        yield share(module, slice(first, last), step, use_spare)


def take_step(engine: TrainEngine, step: int = 0, splits=SPLITS, poison: float | None = None):
    """One step over all rows. `poison` multiplies the loss of the first micro-batch."""
    for i, loss in enumerate(losses(engine.forward, step, splits)):
        engine.backward(loss * poison if poison is not None and i == 0 else loss)
    return engine.step(learning_rate(step))


def snapshot(engine: TrainEngine) -> dict[str, torch.Tensor]:
    return dict(engine.export_state())


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


def plain_torch(num_steps: int, max_grad_norm: float = OPTIM.max_grad_norm):
    """Parameters and gradient norms of the same training without any engine."""
    net = Net()
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.8, 0.95), weight_decay=0.1, foreach=False)
    norms = []
    for step in range(num_steps):
        for loss in losses(net, step):
            loss.backward()
        for p in trained:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        norm = torch.sqrt(sum(p.grad.double().square().sum() for p in trained))
        if max_grad_norm and norm > max_grad_norm:
            for p in trained:
                p.grad.mul_(max_grad_norm / (norm + 1e-6))
        optimizer.param_groups[0]["lr"] = learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
        norms.append(float(norm))
    return net, norms


def same_updates_as_a_plain_torch_loop(make: Make) -> None:
    reference, norms = plain_torch(4)
    assert min(norms) < OPTIM.max_grad_norm < max(norms), "both sides of the clip are tried"
    engine = make(Net(), OPTIM)
    results = [take_step(engine, step) for step in range(4)]
    assert [r.grad_norm for r in results] == pytest.approx(norms, rel=1e-6)
    assert not any(r.skipped for r in results) and engine.num_updates == 4
    found = {name: tensor.clone() for name, tensor in engine.named_parameters_full()}
    assert list(found) == [name for name, _ in reference.named_parameters()]
    for name, param in reference.named_parameters():
        torch.testing.assert_close(found[name], param.detach(), atol=1e-6, rtol=0, msg=name)


def no_clipping_when_it_is_off(make: Make) -> None:
    _, norms = plain_torch(1, max_grad_norm=0.0)
    engine = make(Net(), OptimConfig(max_grad_norm=0.0, adam_beta1=0.8))
    result = take_step(engine)
    assert result.grad_norm == pytest.approx(norms[0], rel=1e-6)
    first = snapshot(engine)
    total = sum(v.double().square().sum() for k, v in first.items() if k.startswith("exp_avg/"))
    assert float(total.sqrt()) / 0.2 == pytest.approx(norms[0], rel=1e-6)


def the_split_into_micro_batches_does_not_matter(make: Make) -> None:
    whole, split = make(Net(), OPTIM), make(Net(), OPTIM)
    take_step(whole, splits=((0, 8),))
    take_step(split, splits=((0, 1), (1, 2), (2, 7), (7, 8)))
    ours, theirs = snapshot(whole), snapshot(split)
    for key in (key for key in ours if key.startswith("exp_avg/")):  # the gradient, times 1 - beta1
        error = (ours[key] - theirs[key]).norm() / ours[key].norm()
        assert error <= 1e-6, (key, error)


def a_non_finite_gradient_changes_nothing(make: Make) -> None:
    engine, calm = make(Net(), OPTIM), make(Net(), OPTIM)
    take_step(engine, 0)
    take_step(calm, 0)
    before = snapshot(engine)
    weights = {name: tensor.clone() for name, tensor in engine.named_parameters_full()}
    for poison in (float("nan"), float("inf")):
        result = take_step(engine, 1, poison=poison)
        assert result.skipped and not abs(result.grad_norm) < float("inf")
        assert_same(snapshot(engine), before)
        assert_same(dict(engine.named_parameters_full()), weights)
        assert engine.num_updates == 1
    for step in (1, 2):  # and leaves no trace in the steps that follow
        assert take_step(engine, step) == take_step(calm, step)
    assert_same(snapshot(engine), snapshot(calm))


def frozen_parameters_stay_and_unused_ones_have_a_zero_gradient(make: Make) -> None:
    frozen = Net().frozen.weight.detach()
    engine = make(Net(), OPTIM)
    moments = []
    for step in range(4):
        take_step(engine, step)
        moments.append(snapshot(engine)["exp_avg/spare"])
    assert not any("frozen" in key for key in snapshot(engine))
    assert torch.equal(dict(engine.named_parameters_full())["frozen.weight"], frozen)
    torch.testing.assert_close(moments[1], moments[0] * 0.8)  # unused at step 1: it only decays
    assert not torch.allclose(moments[2], moments[1] * 0.8)
    torch.testing.assert_close(moments[3], moments[2] * 0.8)


def state_is_exported_before_the_first_step(make: Make) -> None:
    module = Net()
    expected = {name: p.detach().clone() for name, p in module.named_parameters()}
    state = snapshot(make(module, OPTIM))
    names = [name for name in expected if "frozen" not in name]
    assert list(state) == [f"{k}/{n}" for n in names for k in ("master", "exp_avg", "exp_avg_sq")]
    for name in names:
        assert torch.equal(state[f"master/{name}"], expected[name])
        assert not state[f"exp_avg/{name}"].any() and not state[f"exp_avg_sq/{name}"].any()


def a_state_read_back_goes_on_bit_for_bit(make: Make) -> None:
    first = make(Net(), OPTIM)
    take_step(first, 0)
    take_step(first, 1)
    state, count = snapshot(first), first.num_updates
    fresh = make(Net(seed=9), OPTIM)
    fresh.load_state(state, count)
    assert_same(snapshot(fresh), state)
    other = make(Net(seed=5), OPTIM)
    take_step(other, 0)
    other.load_state(state, count)  # over a state of its own
    for step in (2, 3):
        assert take_step(first, step) == take_step(fresh, step) == take_step(other, step)
    assert first.num_updates == fresh.num_updates == other.num_updates == 4
    weights = {n: t.clone() for n, t in first.named_parameters_full() if "frozen" not in n}
    for engine in (fresh, other):
        assert_same(snapshot(engine), snapshot(first))
        found = {n: t.clone() for n, t in engine.named_parameters_full() if "frozen" not in n}
        assert_same(found, weights)


def a_state_that_does_not_fit_is_refused_whole(make: Make) -> None:
    engine = make(Net(), OPTIM)
    take_step(engine)
    before = snapshot(engine)
    other = {key: value + 1 for key, value in before.items()}
    missing = {key: value for key, value in other.items() if key != "exp_avg_sq/out.bias"}
    for wrong, word in (
        (missing, "exp_avg_sq/out.bias"),
        (other | {"master/extra": torch.ones(1)}, "master/extra"),
        (other | {"exp_avg/out.bias": torch.ones(2)}, "exp_avg/out.bias"),
    ):
        with pytest.raises(EngineStateError, match=word):
            engine.load_state(wrong, 7)
        assert_same(snapshot(engine), before)
        assert engine.num_updates == 1


def parameters_are_whole_and_the_forward_pass_works_in_between(make: Make) -> None:
    engine = make(Net(), OPTIM)
    take_step(engine)
    one_by_one = {name: tensor.clone() for name, tensor in engine.named_parameters_full()}
    x, _ = data()
    with engine.full_parameters(), torch.no_grad():
        together = {
            name: param.detach().clone() for name, param in engine.module.named_parameters()
        }
        inside = {name: tensor.clone() for name, tensor in engine.named_parameters_full()}
        outputs = [engine.module(x).prediction for _ in range(2)]
        again = {name: param.detach().clone() for name, param in engine.module.named_parameters()}
    for found in (together, inside, again):
        assert_same(found, one_by_one)
    plain = Net(seed=3)
    plain.load_state_dict(one_by_one)
    with torch.no_grad():
        expected = plain(x).prediction
    for output in outputs:
        torch.testing.assert_close(output, expected, atol=1e-6, rtol=0)
    assert not take_step(engine, 1).skipped  # training goes on after it


CONFORMANCE = [
    same_updates_as_a_plain_torch_loop,
    no_clipping_when_it_is_off,
    the_split_into_micro_batches_does_not_matter,
    a_non_finite_gradient_changes_nothing,
    frozen_parameters_stay_and_unused_ones_have_a_zero_gradient,
    state_is_exported_before_the_first_step,
    a_state_read_back_goes_on_bit_for_bit,
    a_state_that_does_not_fit_is_refused_whole,
    parameters_are_whole_and_the_forward_pass_works_in_between,
]


def bfloat16_trains_float32_masters(make: Make) -> None:
    """Steps far below bfloat16's resolution add up in the masters, and the forward pass sees the
    masters rounded."""
    optim = OptimConfig(max_grad_norm=0.0)
    engine = make(Net(), optim, torch.bfloat16)
    start = snapshot(engine)
    for _ in range(3):
        for first, last in ((0, 4), (4, 8)):
            engine.backward(share(engine.forward, slice(first, last), 1))
        engine.step(1e-5)
    end = snapshot(engine)
    moved = (end["master/out.weight"] - start["master/out.weight"]).abs()
    assert moved.max() < 4e-5 and (moved > 0).all()
    for name, param in engine.named_parameters_full():
        assert param.dtype == torch.bfloat16
        if "frozen" not in name:
            assert torch.equal(param, end[f"master/{name}"].bfloat16())
    fresh = make(Net(seed=9), optim, torch.bfloat16)
    fresh.load_state(end, engine.num_updates)
    assert_same(snapshot(fresh), end)
    loaded = {n: t.clone() for n, t in fresh.named_parameters_full() if "frozen" not in n}
    assert_same(loaded, {n: t.clone() for n, t in engine.named_parameters_full() if n in loaded})


def bfloat16_gradients_add_up_in_float32(make: Make) -> None:
    """32 equal micro-batches give 32 times the gradient of one; a bfloat16 sum would lose about
    1 %."""
    optim = OptimConfig(max_grad_norm=0.0)
    once, often = make(Net(), optim, torch.bfloat16), make(Net(), optim, torch.bfloat16)
    for engine, times in ((once, 1), (often, 32)):
        for _ in range(times):
            engine.backward(share(engine.forward, slice(0, 1), 1))
        engine.step(0.0)
    ours, theirs = snapshot(once), snapshot(often)
    for key in (key for key in ours if key.startswith("exp_avg/") and "spare" not in key):
        error = (ours[key] * 32 - theirs[key]).norm() / theirs[key].norm()
        assert error < 1e-6, (key, error)


CONFORMANCE_BFLOAT16 = [
    bfloat16_trains_float32_masters,
    bfloat16_gradients_add_up_in_float32,
    a_non_finite_gradient_changes_nothing,
]
