"""nu of Algorithm 2 running away to NaN, as users report: when, how fast, and what stops it.

Every 50th batch is an outlier, k times the size of the others. The theory predicts nu from the
mean squares of the batches alone: in each step it is multiplied by 1 - p Gamma, p = 1 - alpha_bwd,
Gamma = psi2_B / (psi2_(t-1) + eps). An outlier multiplies it by about -p k^2; then psi2 is too
large for the next batches, Gamma almost 0, and nothing shrinks nu until psi2 has come down.
"""

import math

import numpy as np
import pytest
import torch

from normexp.norms import build_norm

C, T, B, EPS = 6, 8, 4, 1e-5
PERIOD = 50
STEPS = 20 * PERIOD


def scale_of(step: int, outlier: float) -> float:
    return outlier if step % PERIOD == PERIOD - 1 else 1.0


def batch_of_scale(step: int, outlier: float) -> torch.Tensor:
    """(T, B, C) with a mean square of exactly scale^2 in each channel."""
    x = torch.from_numpy(np.random.default_rng(step).standard_normal((T, B, C)))
    return x * scale_of(step, outlier) / x.square().mean((0, 1)).sqrt()


def gradient_of(step: int) -> torch.Tensor:
    """dL/dy (T, B, C) of a step."""
    return torch.from_numpy(np.random.default_rng(10**6 + step).standard_normal((T, B, C)))


def predicted_growth(alpha_fwd: float, alpha_bwd: float, outlier: float) -> float:
    """Mean of log|1 - p Gamma| per step, from the equations alone."""
    psi2, total = 1.0, 0.0
    for step in range(STEPS):
        gamma = scale_of(step, outlier) ** 2 / (psi2 + EPS)
        psi2 = alpha_fwd * psi2 + (1 - alpha_fwd) * scale_of(step, outlier) ** 2
        if step >= PERIOD:
            total += math.log(abs(1 - (1 - alpha_bwd) * gamma))
    return total / (STEPS - PERIOD)


def train(outlier: float, **options: object) -> tuple[np.ndarray, list[float], torch.nn.Module]:
    """log of the mean |nu| after each step, the largest |gradient| of each step, the layer."""
    norm = build_norm("power", C, eps=EPS, warmup_steps=PERIOD, **options).double()
    logs, largest = [], []
    for step in range(STEPS):
        x = batch_of_scale(step, outlier).requires_grad_()
        norm(x).backward(gradient_of(step))
        logs.append(float(norm.nu.abs().mean().log()))
        largest.append(float(x.grad.abs().max()))
    return np.array(logs), largest, norm


@pytest.mark.parametrize("outlier", [30.0, 100.0])
def test_nu_grows_as_predicted(outlier: float) -> None:
    expected = predicted_growth(0.9, 0.9, outlier)
    assert expected > 0.03, "the theory says that this nu runs away"
    logs, largest, norm = train(outlier, alpha_bwd=0.9)
    # Whole periods, late enough for the additive part p Lambda to be negligible.
    growth = (logs[-1] - logs[5 * PERIOD - 1]) / (STEPS - 5 * PERIOD)
    assert growth == pytest.approx(expected, rel=0.02)
    assert logs[-1] > math.log(1e20) and largest[-1] > 1e10
    assert norm.num_rejected == 0, "each batch by itself is harmless"


@pytest.mark.parametrize("outlier", [30.0, 100.0])
def test_bound_nu_keeps_nu_and_gradients_bounded(outlier: float) -> None:
    """|nu_t| <= max(|nu_(t-1)|, rms(g) / sqrt(Gamma)) in each channel and step."""
    norm = build_norm("power", C, eps=EPS, warmup_steps=PERIOD, bound_nu=True).double()
    paced = 0
    for step in range(STEPS):
        x = batch_of_scale(step, outlier).requires_grad_()
        g = gradient_of(step)
        before, psi2 = norm.nu.clone(), norm.running_psi2.clone()
        norm(x).backward(g)
        psi2_batch = x.detach().square().mean((0, 1))
        gamma = psi2_batch / ((psi2_batch if step < PERIOD else psi2) + EPS)
        paced += int((0.1 * gamma > 1).any())
        rms_g = g.square().mean((0, 1)).sqrt()
        bound = torch.maximum(before.abs(), rms_g / gamma.sqrt())
        assert (norm.nu.abs() <= bound * (1 + 1e-12)).all()
        assert x.grad.isfinite().all() and x.grad.abs().max() < 1e3
    assert paced == STEPS // PERIOD - 1, "every outlier after the warm-up needed the bound"
    assert norm.nu.abs().max() < 10


def test_raising_alpha_bwd_helps() -> None:
    """p = 0.001 with outliers of 30: the theory says that nu shrinks, and it stays small."""
    assert predicted_growth(0.9, 0.999, 30.0) < 0 < predicted_growth(0.9, 0.99, 30.0)
    logs, largest, _ = train(30.0, alpha_bwd=0.999)
    assert logs.max() < math.log(10) and max(largest) < 1e3


def test_released_group_scaling_bounds_what_an_outlier_can_do() -> None:
    """Every token is scaled first, so Gamma keeps near 1 and e stays small."""
    norm = build_norm("power_released", C, eps=EPS, warmup_steps=PERIOD).double()
    for step in range(STEPS):
        x = batch_of_scale(step, 100.0).requires_grad_()
        norm(x).backward(gradient_of(step))
        assert x.grad.isfinite().all()
    assert (0.1 * norm.e).abs().max() < 10
