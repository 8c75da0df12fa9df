"""The models carry the chosen norm at the chosen site, and keep its state."""

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf.errors import ConfigKeyError
from torch import nn

from normexp.norms.batch import BatchNorm
from normexp.norms.layer import LayerNorm
from normexp.norms.power import PowerNorm

ATTRIBUTES = {
    "encoder_attention": ("encoder.layers", "self_attn_layer_norm"),
    "encoder_ffn": ("encoder.layers", "final_layer_norm"),
    "encoder_final": ("encoder", "layer_norm"),
    "decoder_attention": ("decoder.layers", "self_attn_layer_norm"),
    "decoder_cross": ("decoder.layers", "encoder_attn_layer_norm"),
    "decoder_ffn": ("decoder.layers", "final_layer_norm"),
    "decoder_final": ("decoder", "layer_norm"),
}
LANGUAGE_MODEL_SITES = ["decoder_attention", "decoder_ffn", "decoder_final"]


def _at(model: nn.Module, site: str) -> list[nn.Module]:
    parent, attribute = ATTRIBUTES[site]
    owner = model.get_submodule(parent)
    owners = owner if isinstance(owner, nn.ModuleList) else [owner]
    return [getattr(owner, attribute) for owner in owners]


@pytest.mark.parametrize("site", ATTRIBUTES)
def test_each_site_takes_its_own_norm_and_options(
    site: str, build_translation: Callable[..., nn.Module]
) -> None:
    choice = {"name": "power", "alpha_fwd": 0.5, "warmup_steps": 7}
    model = build_translation(norm_sites=json.dumps({site: choice}))
    for other in ATTRIBUTES:
        norms = _at(model, other)
        assert len(norms) == (1 if other.endswith("final") else 2)
        for norm in norms:
            assert type(norm) is (PowerNorm if other == site else LayerNorm)
    assert all((norm.alpha_fwd, norm.warmup_steps) == (0.5, 7) for norm in _at(model, site))


@pytest.mark.parametrize("site", LANGUAGE_MODEL_SITES)
def test_each_site_of_a_language_model_takes_its_own_norm(
    site: str, build_language_model: Callable[..., nn.Module]
) -> None:
    model = build_language_model(
        norm="batch", norm_options='{"momentum": 0.25}', norm_sites=json.dumps({site: "power"})
    )
    for other in LANGUAGE_MODEL_SITES:
        for norm in _at(model, other):
            assert type(norm) is (PowerNorm if other == site else BatchNorm)
            assert other == site or norm.momentum == 0.25


def test_norm_means_the_encoder_of_a_translation_model(
    build_translation: Callable[..., nn.Module],
) -> None:
    model = build_translation(norm="batch", norm_options='{"momentum": 0.25}')
    for site in ATTRIBUTES:
        for norm in _at(model, site):
            assert type(norm) is (BatchNorm if site.startswith("encoder") else LayerNorm)
            assert not site.startswith("encoder") or norm.momentum == 0.25


def test_post_norm_models_have_no_final_norms(build_translation: Callable[..., nn.Module]) -> None:
    post = {"normalize_before": False}
    model = build_translation(norm="batch", encoder=post, decoder=post)
    assert model.encoder.layer_norm is None and model.decoder.layer_norm is None
    assert all(type(norm) is BatchNorm for norm in _at(model, "encoder_ffn"))
    with pytest.raises(ValueError, match="no decoder_final"):
        build_translation(decoder=post, norm_sites='{"decoder_final": "batch"}')


def test_no_cross_attention_leaves_no_cross_site(
    build_translation: Callable[..., nn.Module],
) -> None:
    model = build_translation(norm="batch", no_cross_attention=True, cross_self_attention=True)
    assert _at(model, "decoder_cross") == [None, None]


def test_a_wide_decoder_gets_norms_of_its_own_width(
    build_translation: Callable[..., nn.Module],
) -> None:
    model = build_translation(
        decoder={"embed_dim": 24}, share_all_embeddings=False, norm_sites='{"decoder_ffn":"batch"}'
    )
    assert all(norm.num_features == 24 for norm in _at(model, "decoder_ffn"))


@pytest.mark.parametrize("values", [{"encoder": {"layerz": 2}}, {"nrm": "batch"}])
def test_typos_in_a_translation_configuration_are_refused(
    values: dict[str, Any], build_translation: Callable[..., nn.Module]
) -> None:
    with pytest.raises(ConfigKeyError, match=r"layerz|nrm"):
        build_translation(**values)


def test_typos_in_a_language_model_configuration_are_refused(
    build_language_model: Callable[..., nn.Module],
) -> None:
    with pytest.raises(ConfigKeyError, match="decoder_layerz"):
        build_language_model(decoder_layerz=2)


@pytest.mark.parametrize("arch", ["normexp_transformer", "normexp_transformer_lm"])
def test_typos_on_the_command_line_are_refused(
    arch: str,
    command_line_config: Callable[..., Any],
    translation_data: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as stopped:
        command_line_config(str(translation_data), "--arch", arch, "--decoder-layerz", "2")
    assert stopped.value.code == 2
    assert "--decoder-layerz" in capsys.readouterr().err


def test_quantization_noise_that_would_be_ignored_is_refused(
    build_translation: Callable[..., nn.Module],
) -> None:
    with pytest.raises(ValueError, match=r"quant_noise\.scalar has no effect"):
        build_translation(quant_noise={"scalar": 0.1})


def _train_a_step(model: nn.Module, sentences: argparse.Namespace) -> None:
    model.train()
    logits, _ = model(sentences.source, None, sentences.shifted)
    logits.square().mean().backward()


def _logits(model: nn.Module, sentences: argparse.Namespace) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(sentences.source, None, sentences.shifted)[0]


def test_a_deep_copy_works_and_is_independent(
    build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = build_translation(norm="power")
    _train_a_step(model, sentences)
    twin = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(_logits(twin, sentences), _logits(model, sentences))
    _train_a_step(twin, sentences)
    _train_a_step(twin, sentences)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for side in ("running_psi2", "nu"):
        key = f"encoder.layers.0.final_layer_norm.{side}"
        assert not torch.equal(twin.state_dict()[key], before[key]), key


@pytest.mark.parametrize("norm", ["batch", "power", "power_v"])
def test_saved_and_loaded_models_agree_in_state_and_output(
    norm: str,
    tmp_path: Path,
    build_translation: Callable[..., nn.Module],
    sentences: argparse.Namespace,
) -> None:
    model = build_translation(norm=norm, seed=1)
    _train_a_step(model, sentences)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other = build_translation(norm=norm, seed=2)
    assert not torch.equal(_logits(other, sentences), _logits(model, sentences))
    other.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert torch.equal(_logits(other, sentences), _logits(model, sentences))
    buffers = dict(model.encoder.layer_norm.named_buffers())
    assert buffers
    for name, value in other.encoder.layer_norm.named_buffers():
        assert torch.equal(value, buffers[name]), name
