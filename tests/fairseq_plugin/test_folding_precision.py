"""Folding a model in float32 and converting it afterwards loses no accuracy by the folding."""

import argparse
import copy
import json
from collections.abc import Callable

import pytest
import torch
from torch import nn

from normexp.fairseq_plugin.folding import fold_norms
from normexp.sites import SITES


@pytest.fixture
def model(build_translation: Callable[..., nn.Module]) -> nn.Module:
    """PN everywhere, with statistics and parameters as after some training."""
    torch.manual_seed(0)
    built = build_translation(norm_sites=json.dumps(dict.fromkeys(SITES["translation"], "power")))
    for module in built.modules():
        if hasattr(module, "running_psi2"):
            module.running_psi2.uniform_(0.3, 3)
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return built.eval()


def _logits(model: nn.Module, sentences: argparse.Namespace) -> torch.Tensor:
    with torch.inference_mode():
        logits = model(sentences.source, None, sentences.shifted)[0]
    return logits[sentences.target != 1].float()


def test_in_bfloat16_folding_first_costs_no_accuracy(
    model: nn.Module, sentences: argparse.Namespace, caplog: pytest.LogCaptureFixture
) -> None:
    exact = _logits(model, sentences)

    def error(candidate: nn.Module) -> float:
        return float((_logits(candidate, sentences) - exact).square().mean().sqrt())

    unfolded = error(copy.deepcopy(model).bfloat16())
    assert error(fold_norms(model).bfloat16()) < 1.15 * unfolded
    assert "half precision" not in caplog.text
    assert error(fold_norms(copy.deepcopy(model).bfloat16())) < 1.3 * unfolded
    assert "fold in float32 and convert afterwards" in caplog.text


def test_folding_first_is_nearer_to_the_exact_weights(model: nn.Module) -> None:
    exact = fold_norms(copy.deepcopy(model).double())
    first = fold_norms(model).bfloat16()
    after = fold_norms(copy.deepcopy(model).bfloat16())
    better = 0
    for name, weight in exact.named_parameters():
        if not name.endswith("fc1.weight"):
            continue
        folded_first, folded_after = (m.get_parameter(name).double() for m in (first, after))
        # one rounding: at most half of the last of 8 bits
        assert (folded_first - weight).abs().max() <= 2**-8 * weight.abs().max()
        errors = [(one - weight).square().sum() for one in (folded_first, folded_after)]
        better += bool(errors[0] < errors[1])
    assert better == 4
