"""Steps of a flow or diffusion sampler, and the log-probs of the random ones: pure functions.

A rectified flow carries z = (1 - sigma) x0 + sigma eps from noise (sigma = 1) to data (0); its
network predicts v = eps - x0, so x0_hat = z - sigma v and eps_hat = z + (1 - sigma) v. With sigma'
the next, lower time and d = sigma' - sigma, one step is z' = mean + std xi, xi ~ N(0, I):

    ode          mean = z + d v,  std = 0
    dance, flow  mean = z + d [v + g^2 / (2 sigma) eps_hat],  std = g sqrt(-d)
                 dance: g = eta;  flow: g = eta sqrt(sigma / (1 - sigma)), where sigma_1 stands in
                 for the sigma = 1 of the denominator
    cps          mean = (1 - sigma') x0_hat + sqrt(sigma'^2 - std^2) eps_hat,
                 std = sigma' sin(eta pi / 2)

The bracket is v - g^2/2 score, with score = -eps_hat / sigma: Euler-Maruyama steps that keep the
marginals to first order. dance: DanceGRPO (arXiv 2505.07818), BranchGRPO (2509.06040); flow:
Flow-GRPO (2505.05470). cps keeps the weights of x0 and eps that time sigma' has, but its noise does
not shrink with the step, so on fine grids it narrows the marginals. `ddim_table` is the same for
variance-preserving diffusion (DDIM, 2010.02502, equations 12 and 16).

Every mean is a z + b v with two numbers a step, so rows that stand at different steps are one
gather from a `StepTable`, in the rollout and in training alike. A step whose std is 0 has no
log-prob.

Legend: T steps, T1 = T + 1 grid points, N rows, X the latent's own dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from rlalign.errors import RlalignError

KINDS = ("ode", "dance", "flow", "cps")
MIN_STD = 1e-8  # below it a step counts as deterministic
LOGP_DTYPES = (torch.float32, torch.float64)


class FlowError(RlalignError, ValueError):
    """Settings of a flow sampler that mean nothing; the message names the value and the remedy."""


@dataclass(frozen=True, slots=True)
class StepTable:
    """Per step: mean = a z + b v, and std (0: deterministic). Three tensors [T] of one dtype.

    >>> step_table(time_grid(2), "dance", eta=0.6)  # delta is -0.5 twice
    StepTable(a_T=[0.91, 0.82], b_T=[-0.5, -0.59], std_T=[0.4243, 0.4243])
    """

    a_T: Tensor
    b_T: Tensor
    std_T: Tensor

    def to(self, device: torch.device | str) -> StepTable:
        return StepTable(self.a_T.to(device), self.b_T.to(device), self.std_T.to(device))


def time_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """sigma_0 = 1 > ... > sigma_T = 0, float64 [num_steps + 1].

    t falls linearly and sigma = k t / (1 + (k - 1) t) with k = `shift`: above 1 more steps are
    spent near the noise (3 in the runs of DanceGRPO, MixGRPO and BranchGRPO on FLUX).
    """
    if num_steps < 1 or not 0 < shift < math.inf:
        raise FlowError(f"num_steps={num_steps}, shift={shift}: need num_steps >= 1 and shift > 0")
    t_T1 = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift * t_T1 / (1 + (shift - 1) * t_T1)


def step_table(
    sigma_T1: Tensor,
    kind: str,
    eta: float,
    *,
    sde_steps: Collection[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> StepTable:
    """The steps of a rectified flow on a falling grid within [0, 1].

    `eta` >= 0 is the noise level, at most 1 for cps. Steps that are not in `sde_steps` (None: all
    are) take the ODE. Computed in float64, whatever `dtype` comes out.
    Raises FlowError for a grid, kind, eta or step that is none, and for kind flow on one step only,
    where 1 - sigma_1 says nothing about the noise.
    """
    sigma_T1 = sigma_T1.to("cpu", torch.float64)
    _check_steps(sigma_T1, kind, eta)
    sigma_T, next_T = sigma_T1[:-1], sigma_T1[1:]
    delta_T = next_T - sigma_T
    if kind == "cps":
        std_T = next_T * math.sin(eta * math.pi / 2)
        kept_T = next_T * math.cos(eta * math.pi / 2)  # of eps_hat: sqrt(sigma'^2 - std^2)
        a_T, b_T = (1 - next_T) + kept_T, kept_T * (1 - sigma_T) - (1 - next_T) * sigma_T
    else:
        drift_T = _noise_rate(sigma_T1, kind, eta) ** 2 / (2 * sigma_T) * delta_T
        std_T = _noise_rate(sigma_T1, kind, eta) * torch.sqrt(-delta_T)
        a_T, b_T = 1 + drift_T, delta_T + drift_T * (1 - sigma_T)
    random_T = (std_T >= MIN_STD) & _chosen(sde_steps, len(std_T))
    return StepTable(
        torch.where(random_T, a_T, 1.0).to(dtype),
        torch.where(random_T, b_T, delta_T).to(dtype),
        torch.where(random_T, std_T, 0.0).to(dtype),
    )


def ddim_table(
    alpha_bar_T1: Tensor,
    eta: float,
    prediction: str = "epsilon",
    *,
    dtype: torch.dtype = torch.float32,
) -> StepTable:
    """Stochastic DDIM for z = sqrt(ab) x0 + sqrt(1 - ab) eps, on a rising grid of ab within (0, 1].

    With ab' the next value: std^2 = eta^2 (1 - ab') / (1 - ab) (1 - ab / ab') and
    mean = sqrt(ab') x0_hat + sqrt(1 - ab' - std^2) eps_hat; `eta` from 0 (deterministic) to 1
    (DDPM). `prediction` says what the network gives: epsilon, v = sqrt(ab) eps - sqrt(1 - ab) x0,
    or x0; b multiplies that.
    """
    ab_T1 = alpha_bar_T1.to("cpu", torch.float64)
    rising = len(ab_T1) >= 2 and bool((ab_T1.diff() > 0).all())
    if not rising or float(ab_T1[0]) <= 0 or float(ab_T1[-1]) > 1:
        raise FlowError(f"alpha_bar must rise within (0, 1], from noise to data; got {ab_T1}")
    if not 0 <= eta <= 1:
        raise FlowError(f"eta={eta}: DDIM takes 0 (deterministic) to 1 (DDPM)")
    ab_T, next_T = ab_T1[:-1], ab_T1[1:]
    signal_T, noise_T = ab_T.sqrt(), (1 - ab_T).sqrt()
    hats = {  # x0_hat = x_z z + x_n n, eps_hat = e_z z + e_n n, for a network that gives n
        "epsilon": (1 / signal_T, -noise_T / signal_T, 0 * ab_T, 1 + 0 * ab_T),
        "v": (signal_T, -noise_T, noise_T, signal_T),
        "x0": (0 * ab_T, 1 + 0 * ab_T, 1 / noise_T, -signal_T / noise_T),
    }
    if prediction not in hats:
        raise FlowError(f"prediction={prediction!r} is none of {', '.join(hats)}")
    x_z, x_n, e_z, e_n = hats[prediction]
    std_T = eta * ((1 - next_T) / (1 - ab_T) * (1 - ab_T / next_T)).sqrt()
    std_T = torch.where(std_T < MIN_STD, 0.0, std_T)
    x_T, e_T = next_T.sqrt(), (1 - next_T - std_T**2).clamp(min=0).sqrt()
    a_T, b_T = x_T * x_z + e_T * e_z, x_T * x_n + e_T * e_n
    return StepTable(a_T.to(dtype), b_T.to(dtype), std_T.to(dtype))


def step_mean(table: StepTable, step_N: Tensor, z_NX: Tensor, v_NX: Tensor) -> Tensor:
    """The mean of z' (of a deterministic step: z' itself), in the table's dtype or a wider one.

    `step_N` (int64) says at which step each row stands; all on one device.
    """
    a_NX, b_NX = _per_row(table.a_T[step_N], z_NX), _per_row(table.b_T[step_N], z_NX)
    return a_NX * z_NX + b_NX * v_NX


def ode_step(z_NX: Tensor, v_NX: Tensor, sigma: float, sigma_next: float) -> Tensor:
    """z + (sigma' - sigma) v."""
    return z_NX + (sigma_next - sigma) * v_NX


def sde_step(mean_NX: Tensor, std_N: Tensor, xi_NX: Tensor) -> Tensor:
    """mean + std xi."""
    return mean_NX + _per_row(std_N, mean_NX) * xi_NX


def predict_x0(z_NX: Tensor, v_NX: Tensor, sigma_N: Tensor) -> Tensor:
    """x0_hat = z - sigma v of a rectified flow."""
    return z_NX - _per_row(sigma_N, z_NX) * v_NX


def edge_logp(next_NX: Tensor, mean_NX: Tensor, std_N: Tensor, reduce: str = "mean") -> Tensor:
    """log N(next; mean, std^2 I) of each row, [N], summed or averaged over the latent's dimensions.

    `sum` is the density; `mean` is what the published codes use: log-ratios, and the clip range
    that fits them, shrink by the number of dimensions. `next_NX` must be the state AS STORED:
    rounding it to bfloat16 after its log-prob was taken moves the ratio of unchanged weights.
    Raises FlowError for float16 anywhere, a mean or std below float32, and std <= 0.
    """
    _check_dtypes(next_NX, mean_NX, std_N)
    if not bool((std_N > 0).all()):
        raise FlowError("a deterministic step (std 0) has no log-prob: leave its edges out")
    std_NX = _per_row(std_N, mean_NX)
    logp_NX = -(((next_NX - mean_NX) / std_NX) ** 2) / 2 - std_NX.log() - math.log(2 * math.pi) / 2
    return _reduce(logp_NX, reduce)


def gaussian_kl(
    mean_NX: Tensor, mean_ref_NX: Tensor, std_N: Tensor, reduce: str = "mean"
) -> Tensor:
    """KL(N(mean, std^2 I), N(mean_ref, std^2 I)) = (mean - mean_ref)^2 / (2 std^2), [N], summed or
    averaged over the latent's dimensions. Raises FlowError as `edge_logp` does for dtypes."""
    _check_dtypes(mean_ref_NX, mean_NX, std_N)
    return _reduce(((mean_NX - mean_ref_NX) / _per_row(std_N, mean_NX)) ** 2 / 2, reduce)


def _noise_rate(sigma_T1: Tensor, kind: str, eta: float) -> Tensor:
    """g of each step, float64 [T]."""
    sigma_T = sigma_T1[:-1]
    if kind == "flow":
        room_T = torch.where(sigma_T == 1, 1 - sigma_T1[1], 1 - sigma_T)
        return eta * (sigma_T / room_T).sqrt()
    return torch.full_like(sigma_T, eta if kind == "dance" else 0.0)


def _check_steps(sigma_T1: Tensor, kind: str, eta: float) -> None:
    falling = sigma_T1.ndim == 1 and len(sigma_T1) >= 2 and bool((sigma_T1.diff() < 0).all())
    if not falling or float(sigma_T1[0]) > 1 or float(sigma_T1[-1]) < 0:
        raise FlowError(f"the time grid must fall within [0, 1]; got {sigma_T1}")
    if kind not in KINDS:
        raise FlowError(f"sampler kind {kind!r} is none of {', '.join(KINDS)}")
    if not 0 <= eta < math.inf or (kind == "cps" and eta > 1):
        raise FlowError(f"eta={eta}: kind {kind} takes eta >= 0{', at most 1' * (kind == 'cps')}")
    if kind == "flow" and len(sigma_T1) == 2:
        raise FlowError("kind flow is not defined on a single step: take more steps, or kind dance")


def _chosen(sde_steps: Collection[int] | None, num_steps: int) -> Tensor:
    """Which steps may be random, bool [T]."""
    chosen_T = torch.full((num_steps,), sde_steps is None)
    for step in sde_steps or ():
        if not 0 <= step < num_steps:
            raise FlowError(f"SDE step {step} is outside 0..{num_steps - 1}")
        chosen_T[step] = True
    return chosen_T


def _check_dtypes(state_NX: Tensor, mean_NX: Tensor, std_N: Tensor) -> None:
    low = {t.dtype for t in (mean_NX, std_N)} - set(LOGP_DTYPES)
    if low or state_NX.dtype == torch.float16:
        raise FlowError(
            f"log-probs of states in {state_NX.dtype}, mean in {mean_NX.dtype}, std in "
            f"{std_N.dtype}: mean and std must be float32 or wider, states not float16. Cast the "
            "network's output with .float(), and store states in float32 or bfloat16"
        )


def _reduce(value_NX: Tensor, reduce: str) -> Tensor:
    if reduce not in ("mean", "sum"):
        raise FlowError(f"logp_reduce={reduce!r} is neither mean nor sum")
    value_ND = value_NX.flatten(1)
    return value_ND.mean(1) if reduce == "mean" else value_ND.sum(1)


def _per_row(value_N: Tensor, like_NX: Tensor) -> Tensor:
    return value_N.reshape(-1, *[1] * (like_NX.ndim - 1))
