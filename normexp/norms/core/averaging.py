"""Exponential averages of batch statistics, kept in buffers."""

import torch
from torch import Tensor


@torch.no_grad()
def average_(running: Tensor, value: Tensor, update_rate: float, usable: Tensor) -> None:
    """In place: running <- (1 - update_rate) running + update_rate value, if usable.

    running and value have one shape, usable is a bool scalar tensor. The decision is made on the
    device, so that a GPU need not be waited for.
    """
    averaged = torch.lerp(running, value.to(running.dtype), update_rate)
    running.copy_(torch.where(usable, averaged, running))
