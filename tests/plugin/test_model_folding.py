"""A folded model gives the same as the model, without the norms."""

import argparse
import copy
import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator
from torch import nn

from normexp.fairseq_plugin.folding import fold_norms
from normexp.norms.folding import why_not_foldable
from normexp.sites import SITES

FOLDABLE = ["batch", "power", "power_v", "regularized_batch", "unified"]


def _everywhere(kind: str, norm: str) -> dict[str, Any]:
    return {"norm_sites": json.dumps(dict.fromkeys(SITES[kind], norm))}


def _with_statistics(model: nn.Module) -> nn.Module:
    """Weights and running statistics that are far from where they start."""
    generator = torch.Generator().manual_seed(0)
    for name, value in model.state_dict().items():
        if "layer_norm" not in name or not value.is_floating_point():
            continue
        with torch.no_grad():
            if name.endswith(("running_psi2", "running_var")):
                value.copy_(torch.rand(value.shape, generator=generator) * 3 + 0.3)
            else:
                value.add_(torch.randn(value.shape, generator=generator) * 0.5)
    return model.eval()


def _logits(model: nn.Module, sentences: argparse.Namespace) -> torch.Tensor:
    with torch.no_grad():
        logits = model(sentences.source, None, sentences.shifted)[0]
    return logits[sentences.target != 1]


def _foldable_norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "num_features") and not why_not_foldable(m)]


def _relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("norm", FOLDABLE)
@pytest.mark.parametrize("tied", [True, False])
def test_translation_model_without_its_norms_is_the_same(
    norm: str,
    tied: bool,
    build_translation: Callable[..., nn.Module],
    sentences: argparse.Namespace,
) -> None:
    model = _with_statistics(
        build_translation(**_everywhere("translation", norm), share_all_embeddings=tied)
    )
    before = copy.deepcopy(model.state_dict())
    folded = fold_norms(model)
    assert len(_foldable_norms(model)) == 12 and _foldable_norms(folded) == []
    assert not folded.training
    assert _relative(_logits(folded, sentences), _logits(model, sentences)) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # the embeddings are still those of the input
    assert torch.equal(folded.decoder.embed_tokens.weight, model.decoder.embed_tokens.weight)
    exact = _relative(
        _logits(fold_norms(model.double()), sentences), _logits(model.double(), sentences)
    )
    assert exact < 1e-6  # fairseq's attention takes its softmax in float32


@pytest.mark.parametrize("norm", FOLDABLE)
def test_language_model_without_its_norms_is_the_same(
    norm: str, build_language_model: Callable[..., nn.Module]
) -> None:
    model = _with_statistics(build_language_model(norm=norm))
    folded = fold_norms(model)
    tokens = torch.randint(4, 24, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert _relative(folded(tokens)[0], model(tokens)[0]) < 1e-5
    assert _foldable_norms(folded) == []


def test_the_default_folds_the_encoder_and_keeps_the_decoders_layer_norms(
    build_translation: Callable[..., nn.Module],
    sentences: argparse.Namespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = _with_statistics(build_translation(norm="power"))
    with caplog.at_level(logging.INFO):
        folded = fold_norms(model)
    assert _relative(_logits(folded, sentences), _logits(model, sentences)) < 1e-5
    assert folded.encoder.layer_norm is None
    assert len([m for m in folded.modules() if isinstance(m, nn.LayerNorm)]) == 7
    assert "folded: encoder_final (PowerNorm)" in caplog.text
    assert "not folded: decoder_ffn (LayerNorm is no affine map" in caplog.text


@pytest.mark.parametrize("site", SITES["translation"])
def test_each_site_alone(
    site: str, build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = _with_statistics(build_translation(norm_sites=json.dumps({site: "batch"})))
    folded = fold_norms(model)
    assert _relative(_logits(folded, sentences), _logits(model, sentences)) < 1e-5
    assert _foldable_norms(folded) == []


def test_beam_search_finds_the_same(
    build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = _with_statistics(build_translation(**_everywhere("translation", "power")))
    sample = {
        "net_input": {
            "src_tokens": sentences.source,
            "src_lengths": (sentences.source != 1).sum(1),
        }
    }
    found = []
    for searched in (model, fold_norms(model)):
        generator = SequenceGenerator([searched], model.decoder.dictionary, beam_size=3, max_len=9)
        found.append([beam for beams in generator.generate([searched], sample) for beam in beams])
    assert len(found[0]) == 9
    for plain, folded in zip(*found, strict=True):
        assert torch.equal(plain["tokens"], folded["tokens"])
        torch.testing.assert_close(folded["score"], plain["score"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "encoder_attention: LayerNorm is no affine map"),
        ({"norm": "power_released"}, "encoder_ffn: PowerNormReleased scales each token"),
        ({"norm": "batch_released"}, "encoder_final: BatchNormReleased scales each token"),
        (
            {
                "norm": "power",
                "encoder": {"normalize_before": False},
                "decoder": {"normalize_before": False},
            },
            "encoder_ffn: post-norm: the residual stream",
        ),
        (
            {"norm_sites": '{"decoder_final": "power"}', "adaptive_softmax_cutoff": [10]},
            "decoder_final: an adaptive softmax follows",
        ),
        (
            {
                "norm_sites": '{"encoder_final": "power"}',
                "no_cross_attention": True,
                "cross_self_attention": True,
            },
            "encoder_final: (decoder layers read|no layer of the decoder)",
        ),
    ],
)
def test_impossible_folding_is_refused_with_the_reason(
    values: dict[str, Any], reason: str, build_translation: Callable[..., nn.Module]
) -> None:
    with pytest.raises(ValueError, match=f"no norm of this model can be folded.*{reason}"):
        fold_norms(build_translation(**values))


def test_folding_twice_is_refused(build_translation: Callable[..., nn.Module]) -> None:
    folded = fold_norms(build_translation(norm="power"))
    with pytest.raises(ValueError, match="no norm of this model can be folded"):
        fold_norms(folded)
