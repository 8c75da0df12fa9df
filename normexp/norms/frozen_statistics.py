"""A forward in training mode that leaves the running statistics alone."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from normexp.norms.running_norm import RunningNorm


@contextmanager
def statistics_frozen(*modules: nn.Module) -> Iterator[None]:
    """Within this context forwards and backwards in training mode do not change any statistic.

    For a second forward within a step, as sharpness-aware minimization (SAM) and gradient penalties
    need it, which would otherwise count as a second batch. Outputs and gradients are those of a
    training step: BN normalizes by this batch's statistics, PN after its warm-up by the running
    ones. Step counters and warm-ups stand still, and what a backward averages (PN's nu) does too,
    also in a backward that comes after the context. Only with activation checkpointing, which runs
    forwards again in the backward pass, has that to be in the context.
    """
    norms = [norm for module in modules for norm in module.modules()]
    before = [(norm, norm.is_frozen) for norm in norms if isinstance(norm, RunningNorm)]
    for norm, _ in before:
        norm.is_frozen = True
    try:
        yield
    finally:
        for norm, is_frozen in before:
            norm.is_frozen = is_frozen
