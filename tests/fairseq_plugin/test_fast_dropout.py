"""Fast dropout is inverted dropout: right rate and scale, one mask for both passes, repeatable."""

from collections.abc import Callable, Iterator

import pytest
import torch
from fairseq.modules import FairseqDropout, MultiheadAttention
from torch import Tensor, nn

from normexp.config.settings import SpeedSettings
from normexp.fairseq_plugin.dropout import FastDropout, compiled_for, fast_dropout
from normexp.fairseq_plugin.fast_attention import FastAttention
from normexp.norms.kernels.choice import chosen_kernels, use_kernels
from normexp.training import speed

SHAPE = (67, 31, 33)  # no multiple of a segment, of a step, of a word


@pytest.fixture(params=["plain", "native"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = chosen_kernels()
    use_kernels("auto")
    if request.param == "native" and not compiled_for(torch.ones(1)):
        pytest.skip("no compiler")
    use_kernels(request.param)
    yield request.param
    use_kernels(chosen)


def _ones(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(SHAPE, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.5, 0.9])
def test_rate_and_scale(p: float, kernels: str) -> None:
    torch.manual_seed(1)
    y = fast_dropout(_ones(torch.float64), p)
    kept = y != 0
    rate, size = kept.double().mean().item(), kept.numel()
    assert abs(rate - (1 - p)) < 4 * (p * (1 - p) / size) ** 0.5
    (scale,) = y[kept].unique().tolist()
    # p is rounded to 16 or 15 bits, and the scale is exactly that of the rounded one
    bits = {"native": 16, "plain": 15}[kernels]
    assert scale == pytest.approx(1 / (1 - round(p * 2**bits) / 2**bits), rel=1e-15)


def test_masks_look_random_along_every_dimension(kernels: str) -> None:
    torch.manual_seed(2)
    kept = (fast_dropout(torch.ones(64, 64, 64), 0.5) != 0).double()
    for dims in ((0, 1), (0, 2), (1, 2)):
        counts = kept.sum(dims)  # of 4096 fair coins each
        assert (counts - 2048).abs().max() < 5 * 32
    flat = 2 * kept.flatten() - 1
    for lag in (1, 2, 4, 8, 16, 31, 32, 33, 64, 512, 1024, 2048, 4096):
        assert abs((flat[lag:] * flat[:-lag]).mean()) < 5 / len(flat) ** 0.5, lag


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_gradient_is_the_mask(dtype: torch.dtype, kernels: str) -> None:
    x = _ones(dtype)
    y = fast_dropout(x, 0.3)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert y.dtype == gradient.dtype == dtype and 0 < (y == 0).sum() < y.numel()
    assert torch.equal(gradient, y)
    given = torch.randn(SHAPE).to(dtype)
    x, mask = given.clone().requires_grad_(), None
    torch.manual_seed(5)
    y = fast_dropout(x, 0.3)
    torch.manual_seed(5)
    mask = fast_dropout(torch.ones(SHAPE, dtype=torch.float64), 0.3)
    torch.testing.assert_close(
        y.double(), given.double() * mask, rtol=2e-2 * (dtype == torch.bfloat16) + 1e-6, atol=0
    )


def test_transposed_inputs_and_gradients_keep_their_places(kernels: str) -> None:
    base = torch.ones(5, 7, 1001, requires_grad=True)
    y = fast_dropout(base.transpose(0, 2), 0.4)
    (gradient,) = torch.autograd.grad(y.transpose(0, 1), base, torch.ones(7, 1001, 5))
    assert torch.equal(gradient.transpose(0, 2), y)


def test_calls_are_independent_and_repeatable(kernels: str) -> None:
    torch.manual_seed(3)
    first, second = fast_dropout(_ones(), 0.5), fast_dropout(_ones(), 0.5)
    agreeing = ((first != 0) == (second != 0)).double().mean().item()
    assert abs(agreeing - 0.5) < 5 * (0.25 / first.numel()) ** 0.5
    torch.manual_seed(3)
    assert torch.equal(fast_dropout(_ones(), 0.5), first)
    torch.manual_seed(4)
    assert not torch.equal(fast_dropout(_ones(), 0.5), first)


def test_threads_do_not_matter(kernels: str) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            torch.manual_seed(6)
            found.append(fast_dropout(_ones(), 0.3))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_nothing_happens_without_p_or_in_evaluation(kernels: str) -> None:
    x, state = _ones(), torch.get_rng_state()
    assert fast_dropout(x, 0.0) is x
    assert FastDropout(0.5).eval()(x) is x
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(FastDropout(0.5).train()(x), x)
    assert fast_dropout(torch.ones(0, 3), 0.5).shape == (0, 3)
    with pytest.raises(ValueError, match=r"below 1, got 1\.0"):
        fast_dropout(x, 1.0)


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_attention_is_fairseqs(need_weights: bool, causal: bool) -> None:
    """Without dropout, against the stock module with the same weights, padding included."""
    torch.manual_seed(1)
    stock = MultiheadAttention(24, 3, self_attention=True).double().train()
    ours = MultiheadAttention(24, 3, self_attention=True).double().train()
    ours.load_state_dict(stock.state_dict())
    ours.__class__ = FastAttention
    padding = torch.arange(6) >= torch.tensor([6, 4, 1])[:, None]
    mask = torch.full((6, 6), -torch.inf, dtype=torch.double).triu(1) if causal else None
    results = []
    for module in (stock, ours):
        x = torch.randn(6, 3, 24, generator=torch.Generator().manual_seed(2), dtype=torch.double)
        x.requires_grad_()
        y, weights = module(
            x, x, x, key_padding_mask=padding, attn_mask=mask, need_weights=need_weights
        )
        gradients = torch.autograd.grad((y * y.detach().cos()).sum(), [x, *module.parameters()])
        results.append([y, *gradients, *([weights] if need_weights else [])])
        assert (weights is None) is not need_weights
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


def test_settings_replace_modules_only_when_on(build_translation: Callable[..., nn.Module]) -> None:
    def kinds(**chosen: object) -> set[type]:
        model = build_translation(dropout=0.1)
        speed.apply_to_model(SpeedSettings(**chosen), model, nn.Identity())
        return {type(module) for module in model.modules()}

    assert {FairseqDropout, MultiheadAttention} <= kinds()
    fast = kinds(fast_dropout=True)
    assert {FastDropout, FastAttention} <= fast and FairseqDropout not in fast
    assert {FairseqDropout, FastAttention} <= kinds(precision="bfloat16")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_precision_is_of_training_only(precision: str) -> None:
    class Criterion(nn.Module):
        def forward(self, model: nn.Module, sample: dict[str, Tensor]) -> torch.dtype:
            return (sample["target"] @ sample["target"]).dtype

    model, criterion = nn.Linear(2, 2), Criterion()
    speed.apply_to_model(SpeedSettings(precision=precision), model, criterion)
    sample = {"target": torch.ones(2, 2)}
    assert criterion(model.train(), sample) == getattr(torch, precision)
    assert criterion(model.eval(), sample) == torch.float32
