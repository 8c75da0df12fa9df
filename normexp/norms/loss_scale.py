"""Averages of gradients, and a loss that is multiplied by another number than before."""

import torch
from torch import nn

from normexp.norms.core import option_checks
from normexp.norms.distributed.deferred import EXCHANGE
from normexp.norms.running_norm import RunningNorm


@torch.no_grad()
def follow_loss_scale(model: nn.Module, factor: float) -> None:
    """Tell the layers that losses, from the next on, are `factor` times what they were.

    PN and its kin keep averages of the gradients that reach them (nu, e): exactly as many times
    larger as the loss is. While that number is constant it cancels, in a loss summed over tokens
    as in a mean, with gradients accumulated or not. Where it changes during training, as the loss
    scale of float16 does, gradients would be corrected wrongly until the averages have caught up,
    some tens of steps. scripts/train.py calls this by itself; with torch.amp.GradScaler:

        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() != before:
            follow_loss_scale(model, scaler.get_scale() / before)

    Raises ValueError unless factor is a number greater than 0.
    """
    option_checks.positive(factor=factor)
    EXCHANGE.settle()
    for norm in model.modules():
        if isinstance(norm, RunningNorm):
            for name in norm.averages_of_gradients:
                getattr(norm, name).mul_(factor)
