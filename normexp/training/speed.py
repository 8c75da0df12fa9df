"""Training in less time with the same losses: what the settings under `speed` do to a model.

`config.fairseq_config.apply_speed` does their part in fairseq's configuration.
"""

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from normexp.config.settings import SpeedSettings


def apply_to_model(speed: SpeedSettings, model: nn.Module, criterion: nn.Module) -> None:
    """Let a fairseq model and its criterion train as the settings say, in place.

    Of the settings, `fast_dropout` and `precision` matter here.
    """
    from normexp.fairseq_plugin.dropout import use_fast_dropout
    from normexp.fairseq_plugin.fast_attention import use_fast_attention
    from normexp.fairseq_plugin.fast_layers import use_fast_layers

    if speed.fast_dropout:
        use_fast_dropout(model)
    if speed.precision == "bfloat16":
        _train_in_bfloat16(criterion)
    # In float32 they take as long as torch's operators, with other roundings.
    if speed.fast_dropout and speed.precision == "bfloat16":
        use_fast_layers(model)
    if speed.fast_dropout or speed.precision == "bfloat16":
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
