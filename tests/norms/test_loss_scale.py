"""What multiplies the loss, and the averages of gradients that PN and its kin keep.

Factors are powers of two, so that equal means equal to the last bit.
"""

import pytest
import torch
from support.stateful import CASES, CHANGED_IN_BACKWARD, batch, state

from normexp.norms import build_norm, follow_loss_scale

every_case = pytest.mark.parametrize(
    "case", [case for case in CASES if CASES[case].name in CHANGED_IN_BACKWARD]
)
SCALES = [2.0**15, 2.0**15, 2.0**14, 2.0**13, 2.0**13, 2.0**16, 1.0, 2.0**15]


def learn(norm: torch.nn.Module, scales: list[float], follow: bool) -> list[torch.Tensor]:
    """Gradients of every step, divided by the step's scale as an optimizer does."""
    results = []
    for step, scale in enumerate(scales):
        if follow and step and scale != scales[step - 1]:
            follow_loss_scale(norm, scale / scales[step - 1])
        of = batch(step)
        x = torch.from_numpy(of.x).requires_grad_()
        y = norm(x, torch.from_numpy(of.pad))
        loss = scale * (y * torch.from_numpy(of.gy)).sum()
        results += [g / scale for g in torch.autograd.grad(loss, [x, norm.weight, norm.bias])]
    return results


def same(obtained: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(obtained, expected, strict=True))


@every_case
def test_a_constant_factor_cancels(case: str) -> None:
    plain, scaled = CASES[case].build(), CASES[case].build()
    follow_loss_scale(scaled, 1024.0)  # some cases begin with averages that are not zero
    assert same(learn(scaled, [1024.0] * 8, False), learn(plain, [1.0] * 8, False))
    for name in CHANGED_IN_BACKWARD[CASES[case].name]:
        assert torch.equal(getattr(scaled, name), 1024 * getattr(plain, name))


@every_case
def test_a_factor_that_changes_is_followed(case: str) -> None:
    """As if it had been the last one all the time; and it is not so if nobody tells the layer."""
    followed, ignored, constant = (CASES[case].build() for _ in range(3))
    expected = learn(constant, [SCALES[-1]] * len(SCALES), False)
    assert same(learn(followed, SCALES, True), expected)
    for name, value in state(constant).items():
        assert torch.equal(state(followed)[name], value), name
    if case != "power-warming-up":  # whose averages are not used yet
        assert not same(learn(ignored, SCALES, False), expected)


def test_every_layer_of_a_model_is_told_and_nothing_else() -> None:
    model = torch.nn.Sequential(*(build_norm(name, 4) for name in ("power", "batch", "layer")))
    before = state(model)
    model[0].nu.fill_(3)
    follow_loss_scale(model, 0.5)
    assert torch.equal(model[0].nu, torch.full((4,), 1.5))
    before["0.nu"] = model[0].nu
    for name, value in state(model).items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("factor", [0, -1.0, float("nan"), None])
def test_senseless_factors_are_refused(factor: object) -> None:
    with pytest.raises(ValueError, match="factor must be greater than 0"):
        follow_loss_scale(build_norm("power", 4), factor)
