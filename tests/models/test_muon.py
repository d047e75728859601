"""Muon: the update has the gradient's directions and singular values near 1; it is torch's rule."""

from __future__ import annotations

import pytest
import torch

from rlalign.models.muon import Muon, orthogonalize


@pytest.mark.parametrize("shape", [(16, 16), (8, 24), (3, 64)])
def test_singular_values_move_near_one_and_directions_stay(shape):
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(4, *shape, generator=generator)
    for matrix, result in zip(batch, orthogonalize(batch, 8), strict=True):
        u, _, vh = (part.double() for part in torch.linalg.svd(matrix, full_matrices=False))
        inner = u.T @ result.double() @ vh.T  # diagonal where the singular vectors are the same
        assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=1e-3)
        assert ((inner.diagonal() > 0.6) & (inner.diagonal() < 1.3)).all()


def test_an_update_does_not_depend_on_the_scale_of_the_gradient():
    matrix = torch.randn(2, 8, 24, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(orthogonalize(matrix), orthogonalize(1000 * matrix))


def test_steps_agree_with_the_optimizer_in_torch():
    """torch runs the iteration in bfloat16, so the updates agree to its precision only."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    shapes = [(16, 16), (8, 24), (24, 8), (16, 16)]
    generator = torch.Generator().manual_seed(2)
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in ours]
    start = [param.detach().clone() for param in ours]
    settings = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.1}
    optimizers = [
        Muon(ours, **settings),
        torch.optim.Muon(theirs, **settings, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(3):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            other.grad = mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        moved, expected = mine.detach() - before, other.detach() - before
        assert (moved - expected).norm() < 0.03 * expected.norm()
