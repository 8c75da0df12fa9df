"""Averages of gradients, and a loss that is multiplied by another number than before."""

import torch
from torch import nn

from normexp.norms.core.option_checks import check_positive
from normexp.norms.distributed.deferred import DEFERRED
from normexp.norms.running_norm import RunningNorm


@torch.no_grad()
def follow_loss_scale(model: nn.Module, factor: float) -> None:
    """Multiply the layers' averages of gradients by `factor`, as losses are from the next one on.

    PN and its kin keep averages of the gradients that reach them (nu, e), which grow in proportion
    to the loss. A constant factor of the loss cancels, in a loss summed over tokens as in a mean,
    with gradients accumulated or not. Where the factor changes during training, as the loss scale
    of float16 does, gradients would be corrected wrongly until the averages have caught up, some
    tens of steps. scripts/train.py calls this by itself; with torch.amp.GradScaler:

        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() != before:
            follow_loss_scale(model, scaler.get_scale() / before)

    factor: new scale over old scale. Raises ValueError unless it is a number greater than 0.
    """
    check_positive(factor=factor)
    DEFERRED.wait()
    for norm in model.modules():
        if isinstance(norm, RunningNorm):
            for name in norm.averages_of_gradients:
                getattr(norm, name).mul_(factor)
