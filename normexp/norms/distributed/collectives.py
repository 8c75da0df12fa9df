"""Statistics over the ranks of data-parallel training: one collective per layer and direction."""

import functools
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from normexp.norms.distributed.same_layer import NUM_MARKS, check_marks, marks


def several_ranks() -> bool:
    """Whether this process trains together with others (the default process group)."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def sum_over_ranks(packed: Tensor, sync: bool) -> Tensor:
    """Sum a vector (K,) over the ranks; its gradient is summed over the ranks too.

    That is the gradient of the sum of the ranks' losses. Without sync, or on a single rank, returns
    the vector itself.
    """
    return _SumOverRanks.apply(packed) if sync and several_ranks() else packed


def pooled_mean(
    partial_sums: Tensor, n: Tensor, sync: bool, layer: nn.Module | None = None
) -> tuple[Tensor, Tensor]:
    """Mean over the tokens of all ranks.

    partial_sums (C,): sums over the rank's tokens; n: scalar, their number; layer: whose sums they
    are. Returns the mean (C,), zero where there is no token, and n over all ranks. Raises
    RuntimeError where it is not the same layer on all ranks.
    """
    parts = [partial_sums, n[None]]
    marked = layer is not None and sync and several_ranks()
    if marked:
        parts.append(marks([layer], partial_sums))
    packed = sum_over_ranks(torch.cat(parts), sync)
    if marked:
        check_marks(packed[-NUM_MARKS:])
        packed = packed[:-NUM_MARKS]
    n = packed[-1].detach()
    return packed[:-1] / n.clamp(min=1), n


def pooled_moments(
    n: Tensor, mean: Tensor, m2: Tensor, sync: bool, layer: nn.Module | None = None
) -> tuple[Tensor, ...]:
    """Mean and biased variance over the tokens of all ranks.

    n: scalar, number of the rank's real tokens; mean (C,) of them; m2 (C,) = their sum of
    (x - mean)^2; layer: whose moments they are. Returns n, mean and variance over all ranks,
    differentiable. Raises RuntimeError where it is not the same layer on all ranks. Moments are
    combined as by Chan, Golub, LeVeque (1979); E[x^2] - E[x]^2 loses its digits where the mean is
    large.
    """
    if not (sync and several_ranks()):
        return n, mean, m2 / n.clamp(min=1)
    parts = [n[None], mean, m2]
    if layer is not None:
        parts.append(marks([layer], mean))
    ranks = _GatherRanks.apply(torch.cat(parts))
    if layer is not None:
        check_marks(ranks[:, -NUM_MARKS:].sum(0))
        ranks = ranks[:, :-NUM_MARKS]
    n_of, (mean_of, m2_of) = ranks[:, :1].detach(), ranks[:, 1:].chunk(2, dim=1)
    n = n_of.sum()
    mean = (n_of * mean_of).sum(0) / n.clamp(min=1)
    var = (m2_of + n_of * (mean_of - mean).square()).sum(0) / n.clamp(min=1)
    return n, mean, var


@functools.cache
def warn_of_private_statistics() -> None:
    """Warn once per process that checkpoints will hold the statistics of one rank only."""
    warnings.warn(
        "normalization statistics are private to each rank of this data-parallel training, and a "
        "checkpoint holds those of the rank that writes it (DistributedDataParallel, unless told "
        "broadcast_buffers=False, replaces them by rank 0's before each forward); build the norms "
        "with sync=True, or call normexp.norms.average_statistics(model) on all ranks before "
        "saving",
        stacklevel=3,
    )


class _SumOverRanks(torch.autograd.Function):
    """(K,) on each rank -> their sum (K,) on all."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        total = packed.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class _GatherRanks(torch.autograd.Function):
    """(K,) on each rank -> (ranks, K) on all."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        rows = [torch.empty_like(packed) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, packed.contiguous())
        return torch.stack(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total[dist.get_rank()]
