"""Exponential averages of batch statistics, kept in buffers."""

import torch
from torch import Tensor


@torch.no_grad()
def average_(running: Tensor, value: Tensor, pace: float, usable: Tensor) -> None:
    """In place: running <- (1 - pace) running + pace value, if usable.

    running and value of one shape; usable a bool scalar tensor. Decided on the device, so that a
    GPU need not be waited for.
    """
    averaged = torch.lerp(running, value.to(running.dtype), pace)
    running.copy_(torch.where(usable, averaged, running))
