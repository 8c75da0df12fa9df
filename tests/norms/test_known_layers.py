"""Normalizations against torch's own layers and against each other, where they must agree."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.batches import few_examples, random_batch
from support.norm_steps import penalty_of

from normexp.norms import available_norms, build_norm

C = 8
DESIGN = (
    "layer rms scale group instance adaptive dynamic_tanh none batch regularized_batch power_v "
    "power batch_released power_released unified"
)


def double(name: str, **options: object) -> torch.nn.Module:
    """The layer in float64 with random parameters, the same for all layers."""
    norm = build_norm(name, C, **options).double()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.rand(parameter.shape, generator=generator).double() + 0.5)
    return norm


def tensors(t: int, b: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, mask, gy; no gradient at padded positions."""
    batch = random_batch(t, b, seed, c=C)
    gy = batch.gy * batch.token_mask[..., None]
    return torch.from_numpy(batch.x), torch.from_numpy(batch.pad), torch.from_numpy(gy)


def forward_backward(
    function: Callable[..., torch.Tensor], x: torch.Tensor, gy: torch.Tensor, *more: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf, *more)
    y.backward(gy)
    return y.detach(), leaf.grad


def test_every_normalization_of_the_design_is_there() -> None:
    assert set(DESIGN.split()) <= set(available_norms())


@few_examples
@given(t=st.integers(2, 6), b=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_batch_is_torchs_over_the_real_tokens(t: int, b: int, seed: int) -> None:
    """Outputs, gradients and running values of BatchNorm1d on the list of real tokens."""
    ours, torchs = double("batch", momentum=0.2), torch.nn.BatchNorm1d(C, momentum=0.2).double()
    torchs.load_state_dict(ours.state_dict(), strict=False)
    for step in range(3):
        x, mask, gy = tensors(t, b, seed + step)
        token_mask = ~mask.t()
        if token_mask.sum() < 2:  # torch refuses a single token
            continue
        y, gx = forward_backward(ours, x, gy, mask)
        expected_y, expected_gx = forward_backward(torchs, x[token_mask], gy[token_mask])
        torch.testing.assert_close(y[token_mask], expected_y, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(gx[token_mask], expected_gx, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours.running_mean, torchs.running_mean)
        torch.testing.assert_close(ours.running_var, torchs.running_var)
    torch.testing.assert_close(ours.eval()(x, mask)[token_mask], torchs.eval()(x[token_mask]))


STOCK: dict[str, Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]] = {
    "layer": lambda norm, x: F.layer_norm(x, (C,), norm.weight, norm.bias),
    "rms": lambda norm, x: F.rms_norm(x, (C,), norm.weight, 1e-5),
    "group": lambda norm, x: F.group_norm(x.reshape(-1, C), 4, norm.weight, norm.bias).reshape(
        x.shape
    ),
    "instance": lambda norm, x: F.instance_norm(
        x.permute(1, 2, 0), weight=norm.weight, bias=norm.bias
    ).permute(2, 0, 1),
    "scale": lambda norm, x: norm.g * F.normalize(x, dim=-1, eps=1e-5),
}


@pytest.mark.parametrize("name", STOCK)
def test_without_padding_as_torchs_function(name: str) -> None:
    norm = double(name)
    x, _, _ = tensors(6, 4, seed=1)
    gy = torch.randn_like(x)
    obtained = forward_backward(norm, x, gy)
    expected = forward_backward(lambda leaf: STOCK[name](norm, leaf), x, gy)
    torch.testing.assert_close(obtained, expected, rtol=1e-10, atol=1e-10)


def test_layer_is_torchs_module() -> None:
    """Bit by bit, and with its state dict, so that stock checkpoints load."""
    ours, torchs = build_norm("layer", C), torch.nn.LayerNorm(C)
    assert isinstance(ours, torch.nn.LayerNorm)
    torchs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 3, C)
    assert torch.equal(ours(x), torchs(x))


@few_examples
@given(t=st.integers(1, 6), b=st.integers(1, 4), seed=st.integers(0, 10**6))
def test_power_in_warmup_is_power_v(t: int, b: int, seed: int) -> None:
    """Same output, same (exact) gradients, same running statistic."""
    power, power_v = double("power", warmup_steps=3), double("power_v")
    for step in range(3):
        x, mask, gy = tensors(t, b, seed + step)
        results = []
        for norm in (power, power_v):
            norm.zero_grad()
            y, gx = forward_backward(norm, x, gy, mask)
            token_mask = ~mask.t()
            results.append(
                [y[token_mask], gx[token_mask], norm.weight.grad, norm.bias.grad, norm.running_psi2]
            )
        for of_power, of_power_v in zip(*results, strict=True):
            torch.testing.assert_close(of_power, of_power_v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["batch", "power_v", "instance", "layer", "rms", "group", "scale"])
def test_gradient_is_exact(name: str) -> None:
    """Torch's own gradient checker: outputs of real tokens, inputs at padding included."""
    x, mask, _ = tensors(4, 3, seed=1)
    norm = double(name)
    names = [n for n, _ in norm.named_parameters()]

    def output(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        given = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(norm, given, (x, mask))[~mask.t()]

    inputs = (x.requires_grad_(), *norm.parameters())
    assert torch.autograd.gradcheck(output, inputs, eps=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", sorted(set(available_norms()) - {"adaptive"}))
def test_gradient_in_inference_is_exact(name: str) -> None:
    """Also where that of training is not, and no state changes. (AdaNorm's never is.)"""
    x, mask, gy = tensors(4, 3, seed=1)
    norm = double(name)
    for seed in range(3):
        batch, pad, gradient = tensors(5, 2, seed=10 + seed)
        forward_backward(norm, batch, gradient, pad)
        penalty_of(norm)
    norm.eval()
    before = {what: buffer.clone() for what, buffer in norm.named_buffers()}
    leaf = x.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda leaf: norm(leaf, mask)[~mask.t()], leaf, eps=1e-6, atol=1e-7
    )
    (norm(leaf, mask) * gy).sum().backward()
    for what, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[what]), what


def test_one_group_is_layer_normalization() -> None:
    x, mask, gy = tensors(5, 3, seed=2)
    torch.testing.assert_close(
        forward_backward(double("group", num_groups=1), x, gy, mask),
        forward_backward(double("layer"), x, gy, mask),
        rtol=1e-10,
        atol=1e-10,
    )


def test_sentences_in_instance_are_independent() -> None:
    """Each sentence gives what it gives alone, cut to its real tokens."""
    norm = double("instance")
    x, mask, gy = tensors(6, 4, seed=3)
    y, gx = forward_backward(norm, x, gy, mask)
    for b in range(4):
        token_mask = ~mask[b]
        if token_mask.any():
            alone = forward_backward(norm, x[token_mask, b], gy[token_mask, b])
            torch.testing.assert_close(
                (y[token_mask, b], gx[token_mask, b]), alone, rtol=1e-10, atol=1e-10
            )
