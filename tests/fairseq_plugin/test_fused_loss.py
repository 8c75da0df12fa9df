"""The fused loss is fairseq's loss: values, gradients and what is logged."""

import argparse
import copy
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from normexp.fairseq_plugin.fused_loss import compiled_for, fused_loss
from normexp.norms.kernels.choice import chosen_kernels, use_kernels

PAD = 1
# rtol, atol of values and of gradients (the latter as a share of the largest element)
TOLERANCE = {torch.float64: (1e-10, 1e-10), torch.float32: (2e-6, 2e-6)}


@pytest.fixture(params=["plain", "native"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    chosen = chosen_kernels()
    use_kernels("auto")
    if request.param == "native" and not compiled_for(torch.ones(1)):
        pytest.skip("no compiler")
    use_kernels(request.param)
    yield request.param
    use_kernels(chosen)


def _close(got: Tensor, want: Tensor, tolerance: tuple[float, float]) -> None:
    rtol, share = tolerance
    atol = share * want.abs().max().item() if want.numel() else 0
    torch.testing.assert_close(got, want.to(got.dtype), rtol=rtol, atol=atol)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    rows=st.integers(0, 40),
    classes=st.integers(2, 150),
    eps=st.sampled_from([0.0, 0.1, 0.6]),
    chunk=st.integers(1, 45),
    with_bias=st.booleans(),
    kernels=st.sampled_from(["plain", "auto"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    scale=st.sampled_from([1.0, 30.0]),
    seed=st.integers(0, 99),
)
def test_equals_fairseqs_formula(
    rows, classes, eps, chunk, with_bias, kernels, dtype, scale, seed
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.double)

    given_ = [draw(rows, 8) * scale, draw(classes, 8), draw(classes)][: 3 if with_bias else 2]
    targets = torch.randint(classes, (rows,), generator=generator)
    wide = [tensor.to(dtype).double().requires_grad_() for tensor in given_]
    logits = F.linear(*wide)
    loss, nll = label_smoothed_nll_loss(F.log_softmax(logits, 1), targets, eps)
    expected = torch.autograd.grad(loss.sum() * 3, wide)

    chosen = chosen_kernels()
    use_kernels(kernels)
    try:
        own = [tensor.to(dtype).requires_grad_() for tensor in given_]
        features, weight, bias = [*own, None][:3]
        result = fused_loss(features, weight, bias, targets, eps, count_correct=True, chunk=chunk)
        gradients = torch.autograd.grad(result.loss * 3, own)
        with torch.no_grad():
            again = fused_loss(features, weight, bias, targets, eps, chunk=chunk)
    finally:
        use_kernels(chosen)
    tolerance = TOLERANCE[dtype]
    _close(result.loss, loss.sum().detach(), tolerance)
    _close(result.nll, nll.sum().detach(), tolerance)
    torch.testing.assert_close(again.loss, result.loss.detach(), rtol=1e-6, atol=1e-6)
    assert int(result.num_correct) == int((logits.argmax(1) == targets).sum())
    for got, want in zip(gradients, expected, strict=True):
        _close(got, want, tolerance)


def test_compiled_rows_follow_extreme_logits(kernels: str) -> None:
    features = torch.tensor([[0.0], [1.0], [1e4], [-1e4], [float("nan")]])
    weight = torch.linspace(-1, 1, 131)[:, None]
    targets = torch.tensor([0, 65, 130, 130, 3])
    for row in range(4):
        part = slice(row, row + 1)
        want = F.cross_entropy(features[part] @ weight.t(), targets[part])
        got = fused_loss(features[part], weight, None, targets[part]).loss
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    assert fused_loss(features, weight, None, targets).loss.isnan()


def test_can_be_differentiated_once() -> None:
    weight = torch.randn(5, 3, requires_grad=True)
    loss = fused_loss(torch.randn(4, 3), weight, None, torch.tensor([0, 1, 2, 3])).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        loss.backward()


def _criterion(name: str, *args: Any, **options: Any) -> nn.Module:
    task = SimpleNamespace(target_dictionary=SimpleNamespace(pad=lambda: PAD))
    return CRITERION_REGISTRY[name](task, *args, **options)


def _sample(sentences: argparse.Namespace, is_lm: bool) -> dict[str, Any]:
    inputs = {"src_tokens": sentences.source, "src_lengths": (sentences.source != PAD).sum(1)}
    if is_lm:
        inputs = {"src_tokens": sentences.shifted, "src_lengths": None}
    else:
        inputs["prev_output_tokens"] = sentences.shifted
    return {
        "net_input": inputs,
        "target": sentences.target,
        "ntokens": int((sentences.target != PAD).sum()),
    }


@pytest.mark.parametrize(
    ("name", "args", "options"),
    [
        ("cross_entropy", (False,), {}),
        ("cross_entropy", (True,), {}),
        ("label_smoothed_cross_entropy", (False, 0.1), {}),
        ("label_smoothed_cross_entropy", (True, 0.0), {}),
        (
            "label_smoothed_cross_entropy",
            (False, 0.2),
            {"ignore_prefix_size": 2, "report_accuracy": True},
        ),
    ],
)
@pytest.mark.parametrize("model_kind", ["tied", "untied", "language_model"])
def test_criterions_are_the_same(
    name, args, options, model_kind, build_translation, build_language_model, sentences, kernels
) -> None:
    if model_kind == "language_model":
        model = build_language_model()
    else:
        tied = model_kind == "tied"
        model = build_translation(share_all_embeddings=tied)
        assert (model.decoder.output_projection.weight is model.decoder.embed_tokens.weight) == tied
    model, sample = model.double(), _sample(sentences, model_kind == "language_model")
    stock = _criterion(name, *args, **options)
    ours = _criterion(f"normexp_{name}", *args, **options, fused=True)
    for training in (True, False):
        model.train(training)
        loss, size, logged = stock(model, sample)
        own_loss, own_size, own_logged = ours(model, sample)
        # fairseq takes the logarithms in float32 whatever the model's type
        torch.testing.assert_close(own_loss, loss, rtol=1e-6, atol=0, check_dtype=False)
        assert own_size == size and own_logged.keys() == logged.keys()
        for key, value in logged.items():
            assert float(own_logged[key]) == pytest.approx(float(value), rel=1e-6)
        for got, want in zip(_gradients(model, own_loss), _gradients(model, loss), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    each, _, _ = ours(model, sample, reduce=False)
    torch.testing.assert_close(each, stock(model, sample, reduce=False)[0], rtol=0, atol=0)


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_batch_of_padding_only(build_translation: Callable[..., nn.Module], sentences) -> None:
    model, sample = build_translation(), _sample(sentences, False)
    sample["target"] = torch.full_like(sample["target"], PAD)
    ours = _criterion("normexp_label_smoothed_cross_entropy", False, 0.1, fused=True)
    loss, _, logged = ours(model.train(), sample)
    assert loss == 0 == logged["nll_loss"]
    assert all((gradient == 0).all() for gradient in _gradients(model, loss))


def test_autocast_stays_near(build_translation, sentences, kernels) -> None:
    """Within 1 % of float32, gradients within 10 % of the largest element; sums are float32."""
    model, sample = build_translation(), _sample(sentences, False)
    ours = _criterion("normexp_label_smoothed_cross_entropy", False, 0.1, fused=True)
    reference = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _, _ = ours(model.train(), sample)
    expected, _, _ = ours(reference.train(), sample)
    assert loss.dtype == torch.float32 and not torch.equal(loss, expected)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)
    for got, want in zip(_gradients(model, loss), _gradients(reference, expected), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, rtol=0, atol=0.1 * want.abs().max().item() + 1e-2)


def test_adaptive_softmax_is_refused(build_language_model, sentences) -> None:
    model = build_language_model(
        adaptive_softmax_cutoff="8,16", share_decoder_input_output_embed=False
    )
    ours = _criterion("normexp_cross_entropy", False, fused=True)
    with pytest.raises(ValueError, match="one linear projection"):
        ours(model, _sample(sentences, True))
