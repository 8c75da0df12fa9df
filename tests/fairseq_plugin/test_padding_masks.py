"""Every norm gets the mask of the states that it normalizes, and padding changes nothing."""

import argparse
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normexp.norms import available_norms, norm_class
from normexp.sites import SITES

PAD = 1
# Without warm-up, so that running statistics decide from the second step on.
OPTIONS = {
    "power": {"warmup_steps": 1},
    "power_released": {"warmup_steps": 1},
    "unified": {"warmup_steps": 1, "window_size": 1},
}
# These take the padded positions into their statistics by design (`batch_released` the variance,
# the others the mean in their backward), so padding does change their results.
DEPENDENT_ON_PADDING = ["batch_released", "power_released", "unified"]
INDEPENDENT_OF_PADDING = [name for name in available_norms() if name not in DEPENDENT_ON_PADDING]
# A norm that lets positions see later ones is refused in decoders.
CAUSAL = [name for name in available_norms() if not hasattr(norm_class(name), "mixes_positions")]


def _everywhere(kind: str, norm: str) -> dict[str, str]:
    choice = {"name": norm, **OPTIONS.get(norm, {})}
    sites = [site for site in SITES[kind] if norm in CAUSAL or site.startswith("encoder")]
    return {"norm_sites": json.dumps(dict.fromkeys(sites, choice))}


def _record(model: nn.Module) -> list[tuple[str, tuple[int, ...], Tensor | None]]:
    """Record (name, shape of x, mask) of every call of a norm at a site."""
    calls = []

    def hook(name: str) -> Callable[..., None]:
        def write(norm: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> None:
            calls.append((name, tuple(args[0].shape), kwargs["padding_mask"]))

        return write

    for name, module in model.named_modules():
        if name.endswith("layer_norm"):
            module.register_forward_pre_hook(hook(name), with_kwargs=True)
    return calls


def _expected_calls(layers: int = 2) -> set[str]:
    names = {"encoder.layer_norm", "decoder.layer_norm"}
    for layer in range(layers):
        for norm in ("self_attn_layer_norm", "final_layer_norm"):
            names |= {f"encoder.layers.{layer}.{norm}", f"decoder.layers.{layer}.{norm}"}
        names.add(f"decoder.layers.{layer}.encoder_attn_layer_norm")
    return names


def _check_masks(
    calls: list[tuple[str, tuple[int, ...], Tensor | None]], source: Tensor, shifted: Tensor
) -> None:
    for name, (length, batch, _), mask in calls:
        tokens = source if name.startswith("encoder") else shifted
        assert (batch, length) == tuple(tokens.shape), name
        assert mask is not None and torch.equal(mask, tokens.eq(PAD)), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("cross_self_attention", [False, True])
def test_every_norm_of_a_translation_model_gets_the_mask_of_its_side(
    training: bool,
    cross_self_attention: bool,
    build_translation: Callable[..., nn.Module],
    sentences: argparse.Namespace,
) -> None:
    model = build_translation(
        cross_self_attention=cross_self_attention,
        no_cross_attention=cross_self_attention,
        norm="batch",
    ).train(training)
    calls = _record(model)
    model(sentences.source, None, sentences.shifted)
    expected = _expected_calls()
    if cross_self_attention:
        expected = {name for name in expected if "encoder_attn" not in name}
    assert {name for name, _, _ in calls} == expected and len(calls) == len(expected)
    _check_masks(calls, sentences.source, sentences.shifted)


def test_every_norm_of_a_language_model_gets_the_mask(
    build_language_model: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = build_language_model(norm="batch").train()
    calls = _record(model)
    model(sentences.shifted)
    model.extract_features(sentences.shifted)  # a way in that does not pass decoder.forward
    assert len(calls) == 2 * (2 * 2 + 1)
    _check_masks(calls, sentences.shifted, sentences.shifted)


def test_layerdrop_leaves_the_masks_right(
    build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    drop = {"layers": 6, "layerdrop": 0.5}
    model = build_translation(norm="batch", encoder=drop, decoder=drop).train()
    calls = _record(model)
    torch.manual_seed(0)
    model(sentences.source, None, sentences.shifted)
    assert 2 < len(calls) < len(_expected_calls(layers=6))  # some layers ran and some did not
    _check_masks(calls, sentences.source, sentences.shifted)


@pytest.mark.parametrize("norm", available_norms())
def test_incremental_decoding_equals_the_full_forward(
    norm: str, build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = build_translation(**_everywhere("translation", norm)).double()
    _steps(model, sentences.source, sentences.shifted, sentences.target)
    model.eval()
    source, shifted = sentences.source, sentences.shifted
    with torch.no_grad():
        encoded = model.encoder(source)
        full, _ = model.decoder(shifted, encoder_out=encoded)
        calls, state = _record(model.decoder), {}
        for position in range(shifted.shape[1]):
            step, _ = model.decoder(
                shifted[:, : position + 1], encoder_out=encoded, incremental_state=state
            )
            real = shifted[:, position] != PAD
            # fairseq's incremental attention takes its softmax in float32.
            torch.testing.assert_close(step[real, 0], full[real, position], rtol=0, atol=1e-5)
            for name, shape, mask in calls:
                # The layers learn of a mask only where there is padding in the batch.
                assert shape[:2] == (1, 3), name
                padded = torch.zeros(3, 1, dtype=torch.bool) if mask is None else mask
                assert torch.equal(padded, ~real.unsqueeze(1)), name
            assert len(calls) == 7
            calls.clear()


def _steps(
    model: nn.Module, source: Tensor, shifted: Tensor, target: Tensor, steps: int = 3
) -> list[Tensor]:
    """Train by SGD; return per step the logits at tokens and the loss, and the last gradients."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    results = []
    for _ in range(steps):
        logits, _ = model(source, None, shifted)
        real = target != PAD
        loss = nn.functional.cross_entropy(logits[real], target[real])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        results += [logits[real].detach(), loss.detach()]
    return results + [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("norm", INDEPENDENT_OF_PADDING)
def test_more_padding_changes_neither_results_nor_gradients_nor_state(
    norm: str, build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    # Columns only: attention itself is undefined (NaN) for a sentence that is all padding.
    def pad(tokens: Tensor, left: int, right: int) -> Tensor:
        return nn.functional.pad(tokens, (left, right), value=PAD)

    plain = build_translation(**_everywhere("translation", norm)).double()
    padded = build_translation(**_everywhere("translation", norm)).double()
    expected = _steps(plain, sentences.source, sentences.shifted, sentences.target)
    result = _steps(
        padded,
        pad(sentences.source, 3, 0),
        pad(sentences.shifted, 0, 2),
        pad(sentences.target, 0, 2),
    )
    assert len(result) == len(expected)
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(
            padded.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name
        )


@pytest.mark.parametrize("norm", available_norms())
def test_activation_checkpointing_changes_nothing(
    norm: str, build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    values = {**_everywhere("translation", norm), "dropout": 0.2}
    plain = build_translation(**values).double()
    checkpointed = build_translation(**values, checkpoint_activations=True).double()
    calls = _record(checkpointed)
    batch = (sentences.source, sentences.shifted, sentences.target)
    torch.manual_seed(0)
    expected = _steps(plain, *batch)
    torch.manual_seed(0)
    result = _steps(checkpointed, *batch)
    for got, want in zip(result, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(
            checkpointed.state_dict()[name], value, rtol=1e-9, atol=1e-12, msg=name
        )
    assert len(calls) == 3 * (2 * 2 * 2 + 2 * 2 * 3 + 2)  # 3 steps, the layers twice in each
    _check_masks(calls, sentences.source, sentences.shifted)


@pytest.mark.parametrize("norm", CAUSAL)
def test_language_model_sees_no_future_token(
    norm: str, build_language_model: Callable[..., nn.Module]
) -> None:
    model = build_language_model(norm=norm)
    tokens = torch.randint(4, 24, (3, 12), generator=torch.Generator().manual_seed(0))
    model(tokens)[0].sum().backward()  # so that running statistics are not at their start
    model.eval()
    changed = tokens.clone()
    changed[:, 6:] = 4 + (tokens[:, 6:] - 4 + 1) % 20
    with torch.no_grad():
        before, after = model(tokens)[0], model(changed)[0]
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()


def test_a_norm_called_outside_its_layer_is_refused(
    build_translation: Callable[..., nn.Module], sentences: argparse.Namespace
) -> None:
    model = build_translation(norm="batch")
    model(sentences.source, None, sentences.shifted)
    with pytest.raises(RuntimeError, match="padding mask is unknown"):
        model.encoder.layer_norm(torch.zeros(7, 3, 16))
