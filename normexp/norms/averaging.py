"""Exponential averages of batch statistics, kept in buffers."""

import torch
from torch import Tensor


@torch.no_grad()
def average_(running: Tensor, value: Tensor, pace: float, n: Tensor) -> None:
    """In place: running <- (1 - pace) running + pace value, unless no token was real (n = 0).

    running and value (C,); n scalar. Decided on the device, so that a GPU need not be waited for.
    """
    averaged = torch.lerp(running, value.detach().to(running.dtype), pace)
    running.copy_(torch.where(n > 0, averaged, running))
