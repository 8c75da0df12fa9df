"""Inputs with other dimensions than (T, B, C); the same tokens in a list (N, C) are the oracle."""

import pytest
import torch
from support.stateful import assert_same, state
from torch import Tensor, nn

from normexp.norms import (
    available_norms,
    build_norm,
    norm_class,
    norm_options,
    padding_mask_for,
    replace_layer_norms,
)
from normexp.norms.kernels.choice import chosen_kernels, use_kernels

C = 4
OF_TOKENS = [name for name in available_norms() if not hasattr(norm_class(name), "mixes_positions")]
IMAGES = (2, 3, 5, C)  # (B, H, W, C), or (B, heads, T, C)
LENGTHS = torch.tensor([2, 3, 1, 3])


@pytest.fixture(params=["native", "plain"])
def kernels(request: pytest.FixtureRequest):
    before = chosen_kernels()
    use_kernels("auto" if request.param == "native" else "plain")
    yield
    use_kernels(before)


def build(name: str) -> nn.Module:
    options = {"warmup_steps": 1} if "warmup_steps" in norm_options(name) else {}
    return build_norm(name, C, **options).double()


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 0.3


def assert_as_a_list(
    name: str, shape: tuple[int, ...], mask: Tensor | None, of_tokens: Tensor | None
) -> None:
    """mask: as the norm gets it; of_tokens: the same, shape[:-1]."""
    norm, listed = build(name), build(name)
    flat = None if of_tokens is None else of_tokens.reshape(-1)
    for seed in range(3):
        gradient = random(shape, 100 + seed)
        if of_tokens is not None:
            gradient = gradient.masked_fill(of_tokens[..., None], 0.0)
        x = random(shape, seed).requires_grad_()
        rows = x.detach().reshape(-1, C).requires_grad_()
        y, expected = norm(x, mask), listed(rows, flat)
        y.backward(gradient)
        expected.backward(gradient.reshape(-1, C))
        assert y.shape == shape
        real = slice(None) if flat is None else ~flat
        assert_same(y.reshape(-1, C)[real], expected[real], 1e-12)
        assert_same(x.grad.reshape(-1, C)[real], rows.grad[real], 1e-12)
        for module in (norm, listed):
            if hasattr(module, "penalty"):
                module.penalty()
    assert_same(state(norm), state(listed), 1e-12)
    x = random(shape, 9)
    y, expected = norm.eval()(x, mask), listed.eval()(x.reshape(-1, C), flat)
    assert_same(y.reshape(-1, C)[real], expected[real], 1e-12)


@pytest.mark.parametrize("shape", [(C,), IMAGES, (2, 2, 3, 2, C)], ids=len)
@pytest.mark.parametrize("name", OF_TOKENS)
def test_channels_last_of_any_rank(name: str, shape: tuple[int, ...], kernels: None) -> None:
    assert_as_a_list(name, shape, None, None)


@pytest.mark.parametrize("name", OF_TOKENS)
def test_padding_of_the_first_dimensions_or_of_each_token(name: str) -> None:
    shape = (3, 4, 2, C)  # (T, B, heads, C)
    mask = torch.arange(3) >= LENGTHS[:, None]  # (B, T)
    of_tokens = mask.t()[..., None].expand(shape[:-1])
    assert_as_a_list(name, shape, mask, of_tokens)
    each = of_tokens.clone()
    each[0, 0, 1] = True
    assert_as_a_list(name, shape, each, each)


def test_instance_says_that_it_needs_to_know_the_positions() -> None:
    for shape in (IMAGES, (C,)):
        with pytest.raises(ValueError, match="which dimensions are the positions"):
            build_norm("instance", C)(torch.randn(shape))


class OneNorm(nn.Module):
    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x)


@pytest.mark.parametrize("shape", [IMAGES, (2, 2, 2, 2, C)], ids=len)
@pytest.mark.parametrize("batch_first", [True, False])
def test_replaced_norms_take_any_rank_where_nothing_is_padded(
    shape: tuple[int, ...], batch_first: bool
) -> None:
    model = OneNorm(nn.LayerNorm(C)).double()
    replace_layer_norms(model, "batch", batch_first=batch_first)
    nothing = torch.zeros(shape[:2] if batch_first else shape[:2][::-1], dtype=torch.bool)
    for mask in (None, nothing):
        with padding_mask_for(model, padding_mask=mask):
            y = model(random(shape, 0))
        stock = nn.BatchNorm1d(C).double()(random(shape, 0).reshape(-1, C))
        torch.testing.assert_close(y.reshape(-1, C), stock, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layout", ["B T heads C", "B heads T C", "T B heads C"])
def test_padding_of_heads_is_that_of_their_sentences(layout: str) -> None:
    sizes = {"B": 4, "T": 3, "heads": 2, "C": C}
    letters = layout.split()
    mask = torch.arange(3) >= LENGTHS[:, None]  # (B, T)
    x = random(tuple(sizes[letter] for letter in letters), 0)
    model = OneNorm(nn.LayerNorm(C)).double()
    replace_layer_norms(model, "batch", batch_first=letters[0] == "B")
    with padding_mask_for(model, padding_mask=mask):
        y = model(x)
    order = [letters.index(letter) for letter in ("B", "T", "heads", "C")]
    real, y = x.permute(order)[~mask], y.permute(order)[~mask]
    stock = nn.BatchNorm1d(C).double()(real.reshape(-1, C))
    torch.testing.assert_close(y.reshape(-1, C), stock, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("shape", "batch_first", "message"),
    [
        ((4, 3, 3, C), True, r"can be \(B, T, ..., C\) and \(B, ..., T, C\)"),
        ((4, 5, 2, C), True, "does not fit"),
        ((3, 2, 4, C), False, "does not fit"),
        ((3, 4, 2, C), True, "does not fit"),
    ],
)
def test_padding_that_fits_no_or_two_layouts_is_refused(
    shape: tuple[int, ...], batch_first: bool, message: str
) -> None:
    model = OneNorm(nn.LayerNorm(C))
    replace_layer_norms(model, "power", batch_first=batch_first)
    mask = torch.arange(3) >= LENGTHS[:, None]
    with (
        padding_mask_for(model, padding_mask=mask),
        pytest.raises(ValueError, match=message),
    ):
        model(torch.randn(shape))
    assert model.norm.step == 0
