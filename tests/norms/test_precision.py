"""Half precision, and activations so large or small that squares leave the range of numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.batches import few_examples, quick_options, random_batch
from support.norm_steps import penalty_of
from support.thorough import default_cases

from normexp.norms import available_norms, build_norm
from normexp.norms.reference import build_reference

C = 8  # statistics of two channels would be too badly conditioned for narrow tolerances
HALF = [torch.float16, torch.bfloat16]
# torch's own layer wants parameters of the input's dtype, and keeps for its backward what it
# divided by in that dtype.
TORCHS_OWN = {"layer"}


def near(
    obtained: torch.Tensor, expected: np.ndarray, dtype: torch.dtype, what: str, slack: float = 1.0
) -> None:
    """Equal but for rounding to `dtype`, once, and the rounding of float32 arithmetic."""
    size = max(1.0, float(np.abs(expected).max(initial=0)))
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    np.testing.assert_allclose(
        obtained.detach().double().numpy(),
        expected,
        rtol=1.01 * slack * rounding + 1e-5,
        atol=(slack - 1) * rounding * size + 2e-5 * size,
        err_msg=what,
    )


def representable(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    return torch.from_numpy(values).to(dtype).double().numpy()


@pytest.mark.parametrize("converted", [False, True], ids=["autocast", "whole-model"])
@pytest.mark.parametrize("dtype", default_cases(HALF, {torch.bfloat16}), ids=str)
@pytest.mark.parametrize("name", available_norms())
@settings(few_examples, max_examples=3)
@given(seed=st.integers(0, 10**6))
def test_half_precision_is_near_float64(
    name: str, dtype: torch.dtype, converted: bool, seed: int
) -> None:
    """Half in, half out; in between and in the state the digits of float32.

    `converted`: the parameters are half too, as in model.half(); the state never is.
    """
    slack = 20.0 if name in TORCHS_OWN else 1.0
    norm = build_norm(name, C, **quick_options(name))
    reference = build_reference(name, C, **quick_options(name))
    if converted or name in TORCHS_OWN:
        norm = norm.to(dtype)
    rng = np.random.default_rng(seed)
    for parameter_name, parameter in norm.named_parameters():
        value = representable(rng.uniform(0.5, 1.5, parameter.shape), dtype)
        parameter.data.copy_(torch.from_numpy(value))
        reference.parameters[parameter_name] = value
    for step in range(5):
        batch = random_batch(6, 2, seed + step, c=C)
        batch.pad[:, :5] = False  # few tokens would make the variances badly conditioned
        x, gy = representable(batch.x, dtype), representable(batch.gy, dtype)
        if not reference.padding_takes_part:
            gy = gy * batch.token_mask[..., None]
        leaf = torch.from_numpy(x).to(dtype).requires_grad_()
        norm.zero_grad()
        y = norm(leaf, torch.from_numpy(batch.pad))
        loss = (y * torch.from_numpy(gy).to(dtype)).sum(dtype=torch.float64)
        (loss + penalty_of(norm)).backward()
        expected = reference.train_step(x, batch.pad, gy)
        assert y.dtype == leaf.grad.dtype == dtype
        near(y[batch.token_mask], expected.y[batch.token_mask], dtype, "y")
        near(leaf.grad[batch.token_mask], expected.gx[batch.token_mask], dtype, "gx", slack)
        for parameter_name, parameter in norm.named_parameters():
            gradient = expected.gradients[parameter_name]
            near(parameter.grad, gradient, parameter.dtype, parameter_name, slack)
        for buffer_name, buffer in norm.named_buffers():
            assert buffer.dtype in (torch.float32, torch.long), buffer_name
            if buffer_name != "num_rejected":
                near(buffer, reference.state[buffer_name], torch.float32, buffer_name)
    x = representable(batch.x, dtype)
    y = norm.eval()(torch.from_numpy(x).to(dtype), torch.from_numpy(batch.pad))
    assert y.dtype == dtype
    near(y[batch.token_mask], reference.infer(x, batch.pad)[batch.token_mask], dtype, "y_eval")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", available_norms())
def test_output_has_the_dtype_of_the_input(name: str, dtype: torch.dtype) -> None:
    norm = build_norm(name, C).to(dtype)
    x = torch.randn(4, 3, C, dtype=dtype)
    for training in (True, False):
        y = norm.train(training)(x, torch.zeros(3, 4, dtype=torch.bool))
        assert y.dtype == dtype and y.shape == x.shape


# Scale of the activations, batch by batch.
EXTREMES = {
    "large": [1e18] * 6,
    "small": [1e-18] * 6,
    "subnormal": [1e-38] * 6,
    "zero": [0.0] * 6,
    "zero-then-one": [0.0] * 3 + [1.0] * 3,
    "one-then-zero": [1.0] * 3 + [0.0] * 3,
    "one-then-small": [1.0] * 3 + [1e-18] * 3,
    "one-then-large": [1.0] * 3 + [1e18] * 3,
}
HALF_EXTREMES = {"largest": [6e4] * 6, "least": [6e-8] * 6, "zero": [0.0] * 6}


def extremes() -> list:
    cases = [(torch.float32, case) for case in EXTREMES.items()]
    cases += [(torch.bfloat16, case) for case in EXTREMES.items()]
    cases += [(torch.float16, case) for case in HALF_EXTREMES.items()]
    return [pytest.param(d, s, id=f"{str(d)[6:]}-{what}") for d, (what, s) in cases]


@pytest.mark.parametrize(("dtype", "scales"), extremes())
@pytest.mark.parametrize("name", available_norms())
def test_extreme_activations_give_no_nan(
    name: str, dtype: torch.dtype, scales: list[float]
) -> None:
    """In outputs, gradients and state, from warm-up to inference."""
    norm = build_norm(name, C, **quick_options(name))
    if name in TORCHS_OWN:
        norm = norm.to(dtype)
    for seed, scale in enumerate(scales):
        batch = random_batch(5, 3, seed, c=C)
        signs = torch.from_numpy(np.sign(batch.x))
        # magnitudes up to `scale` and no more: 6e4 is close to the largest float16
        x = (torch.from_numpy(np.abs(batch.x) / np.abs(batch.x).max()) * signs * scale).to(dtype)
        leaf = x.requires_grad_()
        norm.zero_grad()
        y = norm(leaf, torch.from_numpy(batch.pad))
        ((y.double() * torch.from_numpy(batch.gy)).sum() + penalty_of(norm)).backward()
        for what, value in {
            "y": y,
            "gx": leaf.grad,
            **{f"gradient of {n}": p.grad for n, p in norm.named_parameters()},
            **dict(norm.named_buffers()),
        }.items():
            assert not value.isnan().any(), f"{what} in step {seed}"
        for what, value in norm.named_buffers():
            assert value.isfinite().all(), f"{what} in step {seed}"
    assert not norm.eval()(x, torch.from_numpy(batch.pad)).isnan().any()


@pytest.mark.parametrize("name", available_norms())
def test_one_real_token_gives_finite_results(name: str) -> None:
    """No variance, in training and inference, in float32 and half precision."""
    for dtype in (torch.float32, *HALF):
        norm = build_norm(name, C, **quick_options(name))
        if name in TORCHS_OWN:
            norm = norm.to(dtype)
        pad = torch.ones(3, 4, dtype=torch.bool)
        pad[1, 2] = False
        for seed in range(4):
            x = torch.from_numpy(random_batch(4, 3, seed, c=C).x).to(dtype).requires_grad_()
            y = norm(x, pad)
            (y[2, 1].sum() + penalty_of(norm)).backward()
            assert y[2, 1].isfinite().all() and x.grad.isfinite().all()
        assert all(buffer.isfinite().all() for buffer in norm.buffers())
        assert norm.eval()(x, pad)[2, 1].isfinite().all()
