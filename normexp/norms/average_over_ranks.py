"""Averages over the ranks, for running statistics that each rank has kept for itself."""

import torch
import torch.distributed as dist
from torch import nn

from normexp.norms.distributed.collectives import several_ranks
from normexp.norms.distributed.deferred import DEFERRED
from normexp.norms.running_norm import RunningNorm


@torch.no_grad()
def average_statistics(model: nn.Module) -> None:
    """Replace every running statistic by its mean over the ranks, on all ranks.

    For layers with sync=False, whose statistics are each rank's own: call it on all ranks at the
    same point, before a checkpoint is written or the model is evaluated. Does nothing on a single
    rank. The step counters stay as they are.
    """
    DEFERRED.wait()
    norms = [module for module in model.modules() if isinstance(module, RunningNorm)]
    buffers = [buffer for norm in norms for buffer in norm.buffers() if buffer.is_floating_point()]
    if not buffers or not several_ranks():
        return
    packed = torch.cat([buffer.double().flatten() for buffer in buffers])
    dist.all_reduce(packed)
    packed /= dist.get_world_size()
    parts = packed.split([buffer.numel() for buffer in buffers])
    for buffer, mean in zip(buffers, parts, strict=True):
        buffer.copy_(mean.view_as(buffer))
