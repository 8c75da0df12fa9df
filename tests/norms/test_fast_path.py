"""Norms assigned by hand within torch's TransformerEncoder, which in eval mode computes LN itself.

The oracle is torch with that path switched off.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from normexp.norms import available_norms, build_norm, norm_class, norm_options

B, T, C = 3, 6, 8
PADDING = torch.arange(T) >= torch.tensor([[4], [2], [6]])

every_norm = pytest.mark.parametrize("name", available_norms())


@contextmanager
def slow_path() -> Iterator[None]:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def fill(layer: nn.Module, name: str, build: Callable[..., nn.Module]) -> None:
    options = {"warmup_steps": 1} if "warmup_steps" in norm_options(name) else {}
    for attribute in ("norm1", "norm2"):
        norm = build(name, C, **options).double()
        for parameter in norm.parameters():
            parameter.data += 0.3 * torch.randn_like(parameter)
        setattr(layer, attribute, norm)


def directly(name: str, num_features: int, **options: object) -> nn.Module:
    return norm_class(name)(num_features, **options)


def stock_layer() -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(C, 2, 12, dropout=0.0, batch_first=True).double()


def states(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(B, T, C, generator=generator, dtype=torch.float64) + 0.5


def assert_right_in_eval_mode(model: nn.Module, mask: Tensor | None) -> None:
    model.train()
    for seed in range(3):
        model(states(seed), src_key_padding_mask=mask).square().mean().backward()
        for norm in model.modules():
            if hasattr(norm, "penalty"):
                norm.penalty()
    model.eval()
    real = slice(None) if mask is None else ~mask
    with slow_path():
        expected = model(states(9), src_key_padding_mask=mask)[real]
    for gradients in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with gradients():
            y = model(states(9), src_key_padding_mask=mask)[real]
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-11)


@every_norm
@pytest.mark.parametrize("build", [build_norm, directly])
@pytest.mark.parametrize("mask", [PADDING, None], ids=["padded", "unpadded"])
def test_in_a_layer(name: str, build: Callable[..., nn.Module], mask: Tensor | None) -> None:
    layer = stock_layer()
    fill(layer, name, build)
    assert_right_in_eval_mode(layer, mask)
    assert_right_in_eval_mode(copy.deepcopy(layer), mask)


@pytest.mark.parametrize("name", sorted(set(available_norms()) - {"instance"}))
@pytest.mark.parametrize("filled", ["before", "after"])
def test_in_an_encoder(name: str, filled: str) -> None:
    """Filled before its layers are stacked, or after; padded batches may become nested tensors.

    `instance` has to be told the layout and the padding (replace_layer_norms): with batch_first and
    without a mask it takes sentences for positions, and only of nested tensors it knows better.
    """
    layer = stock_layer()
    if filled == "before":
        fill(layer, name, build_norm)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says when it makes no nested tensors
        encoder = nn.TransformerEncoder(layer, 2)
    if filled == "after":
        for of_encoder in encoder.layers:
            fill(of_encoder, name, build_norm)
    assert_right_in_eval_mode(encoder, PADDING)


@every_norm
def test_beside_a_stock_norm(name: str) -> None:
    layer = stock_layer()
    fill(layer, name, build_norm)
    layer.norm1 = nn.LayerNorm(C).double()
    assert_right_in_eval_mode(layer, PADDING)


@every_norm
def test_what_torch_looks_for_is_no_parameter(name: str) -> None:
    norm = build_norm(name, C)
    named = {key for key, _ in (*norm.named_parameters(), *norm.named_buffers())}
    assert norm.state_dict().keys() <= named
    for parameter in ("weight", "bias"):
        assert (getattr(norm, parameter) is not None) == (parameter in named)
