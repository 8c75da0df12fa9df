"""The linear layers that took norm(x) give the same from x."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from normexp.norms import available_norms, build_norm
from normexp.norms.fold_into_linear import fold_into, why_not_foldable

KNOWN = {"batch", "power", "power_v", "regularized_batch", "unified"}
KNOWN_NOT = {"layer", "rms", "group", "batch_released", "power_released", "instance", "none"}
FOLDABLE = [name for name in available_norms() if why_not_foldable(build_norm(name, 8)) is None]


def _trained(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    norm = build_norm(name, 6)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    for _ in range(3):
        norm(torch.randn(4, 3, 6, generator=generator) * 3 + 2)
    return norm.to(dtype).eval()


def test_the_known_norms_are_foldable_or_not() -> None:
    assert set(FOLDABLE) >= KNOWN and not KNOWN_NOT & set(FOLDABLE)


@pytest.mark.parametrize("name", FOLDABLE)
@pytest.mark.parametrize("bias", [True, False])
def test_folded_layers_equal_norm_and_layer(name: str, bias: bool) -> None:
    norm = _trained(name)
    layers = [nn.Linear(6, width, bias=bias).double() for width in (4, 7)]
    x = torch.randn(5, 2, 6, dtype=torch.float64)
    expected = [layer(norm(x)) for layer in layers]
    fold_into(norm, layers)
    for layer, want in zip(layers, expected, strict=True):
        torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_folding_rounds_once() -> None:
    """In bfloat16 the folded weights are the nearest to the exact product."""
    norm, layer = _trained("power", torch.float32), nn.Linear(6, 4).to(torch.bfloat16)
    scale, shift = norm.inference_affine()
    weight, bias = layer.weight.double(), layer.bias.double()
    fold_into(norm, [layer])
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert torch.equal(layer.weight, (weight * scale.double()).bfloat16())
    assert torch.equal(layer.bias, (weight @ shift.double() + bias).bfloat16())


def test_shared_parameters_are_not_changed_elsewhere() -> None:
    embedding, layer = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
    layer.weight = embedding.weight
    before = embedding.weight.clone()
    fold_into(_trained("power", torch.float32), [layer])
    assert torch.equal(embedding.weight, before) and not torch.equal(layer.weight, before)


@pytest.mark.parametrize("name", sorted(set(available_norms()) - set(FOLDABLE)))
def test_other_norms_are_refused_and_nothing_is_changed(name: str) -> None:
    layer = nn.Linear(8, 4)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=r"cannot fold: \w+ (is no affine|scales each token)"):
        fold_into(build_norm(name, 8), [layer])
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_layers_of_other_widths_are_refused_before_any_is_changed() -> None:
    matching, other = nn.Linear(6, 4), nn.Linear(5, 4)
    before = matching.weight.clone()
    with pytest.raises(ValueError, match="cannot fold 6 channels into Linear"):
        fold_into(_trained("batch", torch.float32), [matching, other])
    assert torch.equal(matching.weight, before)


def test_a_layer_named_twice_is_folded_once() -> None:
    norm, layer = _trained("batch"), nn.Linear(6, 4).double()
    x = torch.randn(5, 6, dtype=torch.float64)
    expected = layer(norm(x))
    fold_into(norm, [layer, layer])
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "normalized", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_computed_at_each_call_are_refused(normalized: Callable) -> None:
    """The computation would undo the folding."""
    layer = normalized(nn.Linear(6, 4))
    with pytest.raises(ValueError, match="its weight is computed at each call"):
        fold_into(_trained("batch", torch.float32), [layer])
