"""Training in less time with the same losses: the settings under `speed`."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from normexp.errors import UserError
from normexp.norms.kernels import choice as kernels

STOCK = {
    "precision": "float32",
    "fast_dropout": False,
    "fused_loss": False,
    "fused_adam": False,
    "kernels": "auto",
}
"""What fairseq does by itself; the kernels are those of layers that it does not have."""

PRECISIONS = ("float32", "bfloat16")
_FUSED_CRITERIONS = ("normexp_cross_entropy", "normexp_label_smoothed_cross_entropy")
_FUSED_MODELS = ("normexp_transformer", "normexp_transformer_lm")


def settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a resolved configuration; those it does not have, as in `STOCK`.

    Raises UserError for unknown names and values.
    """
    chosen = plain.get("speed", STOCK)
    unknown = set(chosen) - set(STOCK)
    if unknown:
        raise UserError(f"speed.{min(unknown)} is unknown; known: {', '.join(STOCK)}")
    chosen = {**STOCK, **chosen}
    if chosen["precision"] not in PRECISIONS:
        raise UserError(f"speed.precision={chosen['precision']!r}; known: {', '.join(PRECISIONS)}")
    if chosen["kernels"] not in kernels.CHOICES:
        known = ", ".join(kernels.CHOICES)
        raise UserError(f"speed.kernels={chosen['kernels']!r}; known: {known}")
    for name, value in chosen.items():
        if name not in ("precision", "kernels") and not isinstance(value, bool):
            raise UserError(f"speed.{name}={value!r} must be true or false")
    return chosen


def into_fairseq(speed: Mapping[str, Any], node: dict[str, Any]) -> None:
    """Choose the loss and the optimizer in a fairseq configuration with model, in place.

    fused_loss is for the two cross entropies of models that end in one linear projection, and not
    for float16, whose small gradients need scaling before they are rounded. fused_adam is for
    `adam`. Raises UserError where precision contradicts fairseq's own settings.
    """
    common, optimizer, criterion = node["common"], node["optimizer"], node["criterion"]
    reduced = [
        name
        for name in ("fp16", "bf16", "amp", "memory_efficient_fp16", "memory_efficient_bf16")
        if common.get(name)
    ]
    if reduced and speed["precision"] != "float32":
        raise UserError(
            f"speed.precision={speed['precision']} and fairseq.common.{reduced[0]}=true are two "
            "ways of saving precision; choose one"
        )
    fits = criterion["_name"] in _FUSED_CRITERIONS and node["model"]["_name"] in _FUSED_MODELS
    if speed["fused_loss"] and fits and not reduced:
        criterion["fused"] = True
    special = [name for name in ("use_old_adam", "fp16_adam_stats") if optimizer.get(name)]
    memory_efficient = any(name.startswith("memory_efficient") for name in reduced)
    if speed["fused_adam"] and optimizer["_name"] == "adam" and not (special or memory_efficient):
        optimizer["_name"] = "normexp_adam"


def apply_to_model(speed: Mapping[str, Any], model: nn.Module, criterion: nn.Module) -> None:
    """Let a fairseq model and its criterion train as the settings say, in place.

    speed: with the keys of `STOCK`; `fast_dropout` and `precision` matter here.
    """
    from normexp.fairseq_plugin.dropout import use_fast_dropout
    from normexp.fairseq_plugin.fast_attention import use_fast_attention

    if speed["fast_dropout"]:
        use_fast_dropout(model)
    if speed["precision"] == "bfloat16":
        _train_in_bfloat16(criterion)
    if speed["fast_dropout"] or speed["precision"] == "bfloat16":
        use_fast_attention(model)


def _train_in_bfloat16(criterion: nn.Module) -> None:
    """Run the criterion's training steps, forward pass of the model included, under autocast."""
    forward = criterion.forward

    @functools.wraps(forward)
    def mixed(model: nn.Module, sample: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
        device = sample["target"].device.type
        # Only the training steps: validation costs little, and its losses choose checkpoints and
        # are compared with those of other precisions.
        with torch.autocast(device, torch.bfloat16, enabled=model.training):
            return forward(model, sample, *args, **kwargs)

    criterion.forward = mixed
