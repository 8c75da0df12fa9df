"""Models with fast layers against the same models without, dropout included."""

import argparse
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normexp.config.settings import SpeedSettings
from normexp.fairseq_plugin import sublayers
from normexp.fairseq_plugin.dropout import use_fast_dropout
from normexp.fairseq_plugin.fast_attention import use_fast_attention
from normexp.fairseq_plugin.fast_layers import FastDecoderLayer, FastEncoderLayer, use_fast_layers
from normexp.fairseq_plugin.layers import NormDecoderLayer, NormEncoderLayer
from normexp.norms.kernels.choice import chosen_kernels, use_kernels
from normexp.training import speed

DROPOUT = {"dropout": 0.3, "attention_dropout": 0.2, "activation_dropout": 0.1}

pytestmark = pytest.mark.skipif(not sublayers.compiled(), reason="no compiler")


@pytest.fixture(autouse=True)
def _compiled_kernels() -> Iterator[None]:
    """Choose them: a run of another test may have chosen plain ones for the process."""
    chosen = chosen_kernels()
    use_kernels("auto")
    yield
    use_kernels(chosen)


def _kinds(model: nn.Module) -> set[type]:
    known = (NormEncoderLayer, NormDecoderLayer, FastEncoderLayer, FastDecoderLayer)
    return {type(module) for module in model.modules()} & set(known)


def _loss(model: nn.Module, sentences: argparse.Namespace, extra: int = 0) -> Tensor:
    """Sum of the losses of the targets, with `extra` columns of padding more."""
    source = F.pad(sentences.source, (extra, 0), value=1)
    shifted = F.pad(sentences.shifted, (0, extra), value=1)
    targets = F.pad(sentences.target, (0, extra), value=1)
    torch.manual_seed(5)
    if hasattr(model, "encoder"):
        logits, _ = model(source, (source != 1).sum(1), shifted)
    else:
        logits, _ = model(shifted)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=1, reduction="sum")


def _with_gradients(model: nn.Module, *args: Any) -> list[Tensor]:
    loss = _loss(model, *args)
    return [loss, *torch.autograd.grad(loss, list(model.parameters()))]


def _compare(build: Callable[..., nn.Module], sentences: argparse.Namespace, **values: Any) -> None:
    results = []
    for fast in (False, True):
        model = build(**values).double().train()
        use_fast_dropout(model)
        use_fast_attention(model)
        if fast:
            use_fast_layers(model)
        assert (_kinds(model) <= {FastEncoderLayer, FastDecoderLayer}) == fast
        results.append(_with_gradients(model, sentences))
    for expected, got in zip(*results, strict=True):
        # fairseq computes the softmax of weights that it is to return in float32.
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("norm", ["layer", "power", "power_released", "unified"])
@pytest.mark.parametrize("normalize_before", [True, False])
def test_translation_model(build_translation, sentences, norm: str, normalize_before: bool) -> None:
    """Of the same seed losses and gradients are the same, whatever a norm makes of padding."""
    options = json.dumps({"warmup_steps": 3} if norm != "layer" else {})
    placement = {"normalize_before": normalize_before}
    _compare(
        build_translation,
        sentences,
        norm=norm,
        norm_options=options,
        encoder=placement,
        decoder=placement,
        **DROPOUT,
    )


def test_language_model(build_language_model, sentences) -> None:
    _compare(build_language_model, sentences, norm="batch", **DROPOUT)


def test_more_padding_changes_nothing(build_translation, sentences) -> None:
    model = build_translation(norm="power", norm_options='{"warmup_steps": 0}').double().train()
    use_fast_layers(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    expected = _with_gradients(model, sentences)
    model.load_state_dict(state)
    for got, wanted in zip(_with_gradients(model, sentences, 5), expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-12)


def test_evaluation_is_fairseqs(build_translation, sentences) -> None:
    model = build_translation(**DROPOUT).eval()
    expected = _loss(model, sentences)
    use_fast_layers(model)
    assert torch.equal(_loss(model, sentences), expected)


@pytest.mark.parametrize(
    "values",
    [
        {"activation_fn": "gelu"},
        {"quant_noise": {"pq": 0.1}},
        {"scale_heads": True},
        {"scale_fc": True},
    ],
)
def test_layers_with_more_stay(build_translation, values: dict[str, Any]) -> None:
    if "scale_heads" in values or "scale_fc" in values:  # not of fairseq's own configuration
        model = build_translation()
        for module in model.modules():
            if type(module) is NormDecoderLayer and "scale_heads" in values:
                module.c_attn = nn.Parameter(torch.ones(2))
            elif type(module) is NormDecoderLayer:
                module.ffn_layernorm = nn.LayerNorm(24)
        expected = {FastEncoderLayer, NormDecoderLayer}
    else:
        model, expected = build_translation(**values), {NormEncoderLayer, NormDecoderLayer}
    use_fast_layers(model)
    assert _kinds(model) == expected


def test_which_settings_use_them(build_translation) -> None:
    def kinds(**chosen: Any) -> set[type]:
        model = build_translation(dropout=0.1)
        speed.apply_to_model(SpeedSettings(**chosen), model, nn.Identity())
        return _kinds(model)

    stock, fast = {NormEncoderLayer, NormDecoderLayer}, {FastEncoderLayer, FastDecoderLayer}
    assert kinds() == kinds(precision="bfloat16") == kinds(fast_dropout=True) == stock
    both = {"fast_dropout": True, "precision": "bfloat16"}
    assert kinds(**both) == fast
    chosen = chosen_kernels()
    try:
        use_kernels("plain")
        assert kinds(**both) == stock
    finally:
        use_kernels(chosen)
