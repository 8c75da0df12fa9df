"""A folded model has the outputs of the model, without its norms."""

import argparse
import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fairseq import models, tasks
from fairseq.sequence_generator import SequenceGenerator
from torch import nn

from normexp.fairseq_plugin.folding import fold_norms
from normexp.norms.fold_into_linear import why_not_foldable
from normexp.sites import SITES

FOLDABLE = ["batch", "power", "power_v", "regularized_batch", "unified"]


def _everywhere(kind: str, norm: str) -> dict[str, Any]:
    return {"norm_sites": json.dumps(dict.fromkeys(SITES[kind], norm))}


def _with_statistics(model: nn.Module) -> nn.Module:
    """Set weights and running statistics far from their initial values."""
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
    assert not hasattr(folded.encoder.layer_norm, "weight")
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


def _share_feed_forward(model: nn.Module) -> None:
    model.encoder.layers[1].fc1 = model.encoder.layers[0].fc1


def _share_self_attention(model: nn.Module) -> None:
    model.decoder.layers[1].self_attn = model.decoder.layers[0].self_attn


def _share_cross_attention(model: nn.Module) -> None:
    model.decoder.layers[1].encoder_attn = model.decoder.layers[0].encoder_attn


def _repeat_a_layer(model: nn.Module) -> None:
    model.encoder.layers[1] = model.encoder.layers[0]


def _attend_to_biases(model: nn.Module) -> None:
    """fairseq's add_bias_kv and add_zero_attn add keys and values without a norm before them."""
    for layer in model.encoder.layers:
        layer.self_attn.bias_k = nn.Parameter(torch.randn(1, 1, 16))
        layer.self_attn.bias_v = nn.Parameter(torch.randn(1, 1, 16))
        layer.self_attn.add_zero_attn = True


@pytest.mark.parametrize(
    ("change", "staying"),
    [
        (_share_feed_forward, {"encoder_ffn"}),
        (_share_self_attention, {"decoder_attention"}),
        # Its keys and values come from one norm all the same, its queries from two.
        (_share_cross_attention, {"decoder_cross"}),
        (_repeat_a_layer, set()),
        (_attend_to_biases, set()),
        (lambda model: model.make_generation_fast_(), set()),
        (lambda model: model.train(), set()),
    ],
)
def test_models_that_were_changed_by_hand(
    change: Callable[[nn.Module], None],
    staying: set[str],
    build_translation: Callable[..., nn.Module],
    sentences: argparse.Namespace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = _with_statistics(build_translation(**_everywhere("translation", "batch"), dropout=0.5))
    change(model)
    was_training = model.training
    with caplog.at_level(logging.INFO):
        folded = fold_norms(model)
    assert model.training == was_training and not folded.training
    model.eval()
    assert _relative(_logits(folded, sentences), _logits(model, sentences)) < 1e-5
    said = [message for message in caplog.messages if "folded: " in message]
    assert {m.split()[2] for m in said if m.startswith("not ")} == staying
    assert {m.split()[1] for m in said if m.startswith("folded")} == {
        *SITES["translation"]
    } - staying


@pytest.mark.parametrize(
    "values",
    [
        {"checkpoint_activations": True},
        {"quant_noise": {"pq": 0.1, "pq_block_size": 8}},
        {"encoder": {"layerdrop": 0.5}, "decoder": {"layerdrop": 0.5}},
    ],
)
def test_what_acts_in_training_only_does_not_disturb(
    values: dict[str, Any],
    build_translation: Callable[..., nn.Module],
    sentences: argparse.Namespace,
) -> None:
    model = _with_statistics(build_translation(**_everywhere("translation", "power"), **values))
    folded = fold_norms(model)
    logits = _logits(folded, sentences)
    assert _foldable_norms(folded) == []
    assert _relative(logits, _logits(model, sentences)) < 1e-5
    # fairseq's checkpoint wrapper holds the layer's own forward: that of the copy
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(_logits(folded, sentences), logits)


def test_the_final_norm_of_a_narrow_output_goes_into_the_projection_to_it(
    build_language_model: Callable[..., nn.Module],
) -> None:
    model = build_language_model(norm="batch", decoder_input_dim=8, decoder_output_dim=8)
    folded = fold_norms(_with_statistics(model))
    tokens = torch.randint(4, 24, (3, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert _relative(folded(tokens)[0], model(tokens)[0]) < 1e-5
    assert folded.decoder.layer_norm is None and folded.decoder.output_projection.bias is None


def test_the_copy_cannot_be_trained(
    build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = build_translation(norm="power").eval()
    logits, _ = fold_norms(model)(sentences.source, None, sentences.shifted)
    with pytest.raises(RuntimeError, match="does not require grad"):
        logits.sum().backward()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("pre_norm", [True, False])
def test_tensorized_language_model(
    pre_norm: bool, structured_config: Callable[..., Any], language_model_data: Path
) -> None:
    shape = {
        "_name": "normexp_tensorized_lm",
        "decoder_layers": 2,
        "decoder_embed_dim": 16,
        "decoder_head_dim": 6,
        "decoder_ffn_embed_dim": 24,
        "decoder_normalize_before": pre_norm,
        "norm": "batch",
    }
    task = {
        "_name": "language_modeling",
        "data": str(language_model_data),
        "tokens_per_sample": 12,
    }
    config = structured_config(model=shape, task=task)
    model = _with_statistics(models.build_model(config.model, tasks.setup_task(config.task)))
    if not pre_norm:
        with pytest.raises(ValueError, match="decoder_ffn: post-norm"):
            fold_norms(model)
        return
    for layer in model.decoder.layers:
        nn.init.normal_(layer.self_attn.out.weight)  # not the tiny start
        nn.init.normal_(layer.self_attn.cores)
    folded = fold_norms(model)
    tokens = torch.randint(4, 24, (3, 12), generator=torch.Generator().manual_seed(0))
    tokens[0, 8:] = 1  # padding
    with torch.no_grad():
        assert _relative(folded(tokens)[0], model(tokens)[0]) < 1e-5
    assert _foldable_norms(folded) == []


def test_folded_layers_get_their_input_in_order(
    build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    """On a transposed view, as fairseq's residual stream is, linear layers are much slower."""
    folded = fold_norms(_with_statistics(build_translation(**_everywhere("translation", "power"))))
    seen = []

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args or [kwargs[name] for name in ("query", "key", "value")]
        seen.extend(x.is_contiguous() for x in states)

    for name, module in folded.named_modules():
        if name.endswith((".fc1", ".self_attn", ".encoder_attn")):
            module.register_forward_pre_hook(look, with_kwargs=True)
    _logits(folded, sentences)
    assert len(seen) == 4 + 3 * 6 and all(seen)
