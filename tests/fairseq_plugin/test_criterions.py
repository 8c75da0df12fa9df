"""Penalties of the layers reach the loss, once, in training only, with their gradient."""

import argparse
import copy
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.logging import metrics
from torch import Tensor, nn

PAD = 1
STOCK = {"cross_entropy": (), "label_smoothed_cross_entropy": (0.1,)}


def _criterion(name: str, prefix: str = "normexp_") -> nn.Module:
    dictionary = SimpleNamespace(pad=lambda: PAD)
    task = SimpleNamespace(target_dictionary=dictionary)
    return CRITERION_REGISTRY[prefix + name](task, False, *STOCK[name])


def _sample(sentences: argparse.Namespace) -> dict[str, Any]:
    return {
        "net_input": {
            "src_tokens": sentences.source,
            "src_lengths": (sentences.source != PAD).sum(1),
            "prev_output_tokens": sentences.shifted,
        },
        "target": sentences.target,
        "ntokens": int((sentences.target != PAD).sum()),
    }


def _gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("name", STOCK)
def test_penalties_are_added_to_the_summed_loss(
    name: str, build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    """The loss is fairseq's plus the penalty computed from the input of each layer."""
    model = build_translation(
        norm="regularized_batch", norm_options='{"penalty_mean": 3.0, "penalty_var": 0.5}'
    ).double()
    by_hand = copy.deepcopy(model)
    sample = _sample(sentences)

    terms = []

    def record(norm: nn.Module, args: tuple[Tensor], kwargs: dict, y: Tensor) -> None:
        tokens = args[0][~kwargs["padding_mask"].t()]
        mean, var = tokens.mean(0), tokens.var(0, correction=0)
        running_mean, running_var = 0.05 * mean.detach(), 0.95 + 0.05 * var.detach()
        terms.append(3.0 * (running_mean - mean).square().sum())
        terms.append(0.5 * (running_var - var).abs().sum())

    norms = [module for module in by_hand.modules() if hasattr(module, "penalty")]
    assert len(norms) == 5
    for norm in norms:
        norm.register_forward_hook(record, with_kwargs=True)
    stock_loss, _, _ = _criterion(name, "")(by_hand.train(), sample)
    expected = stock_loss + sum(terms)

    loss, sample_size, logged = _criterion(name)(model.train(), sample)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    assert loss > stock_loss + 1e-3 and sample_size == sample["ntokens"]
    torch.testing.assert_close(logged["loss"], stock_loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(logged["penalty"], sum(terms).detach(), rtol=1e-12, atol=0)
    for got, want in zip(_gradients(model, loss), _gradients(by_hand, expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", STOCK)
def test_evaluation_has_no_penalty(
    name: str, build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = build_translation(norm="regularized_batch")
    sample = _sample(sentences)
    _criterion(name)(model.train(), sample)
    loss, _, logged = _criterion(name)(model.eval(), sample)
    assert torch.equal(loss, _criterion(name, "")(model, sample)[0])
    assert "penalty" not in logged


def test_penalty_is_logged_in_bits_per_token() -> None:
    logs = [
        {"loss": 5.0, "ntokens": 4, "nsentences": 1, "sample_size": 4, "penalty": 2.0},
        {"loss": 7.0, "ntokens": 6, "nsentences": 1, "sample_size": 6, "penalty": 1.0},
    ]
    with metrics.aggregate() as collected:
        _criterion("cross_entropy").reduce_metrics(logs)
    assert collected.get_smoothed_values()["penalty"] == pytest.approx(
        3.0 / 10 / math.log(2), abs=1e-5
    )
    without = [{key: log[key] for key in log if key != "penalty"} for log in logs]
    with metrics.aggregate() as collected:
        _criterion("cross_entropy").reduce_metrics(without)
    assert "penalty" not in collected.get_smoothed_values()


def test_forgotten_penalty_is_told(
    build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    """A stock criterion would train batch normalization under the name of the regularized one."""
    model = build_translation(norm="regularized_batch")
    stock, sample = _criterion("cross_entropy", ""), _sample(sentences)
    stock(model, sample)
    with pytest.warns(UserWarning, match="was not added to the loss"):
        stock(model, sample)


def test_penalty_lost_by_activation_checkpointing_is_refused(
    build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = build_translation(norm="regularized_batch", checkpoint_activations=True)
    with pytest.raises(RuntimeError, match="computed without gradients"):
        _criterion("cross_entropy")(model.train(), _sample(sentences))
