"""Dropout on the CPU without torch's serial generator, which takes a fifth of a training step.

torch's own draws 53 random bits for every element. Here 16 (compiled) or 15 bits (torch only)
decide, and the compiled kernel draws them with vector instructions, in the backward pass once more
instead of keeping a mask. Every mask comes of torch's generator, directly or through a seed, so
seeding it makes training repeatable, as with torch's dropout; the masks are others.
"""

from typing import Any

import torch
import torch.nn.functional as F
from fairseq.modules import FairseqDropout
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normexp.fairseq_plugin.training_kernels import compiled_for


def fast_dropout(x: Tensor, p: float) -> Tensor:
    """Zero elements of x with probability p, scale the others so that the mean stays.

    x: any shape. p, from 0 to below 1, is rounded to a multiple of 2^-16 (compiled) or 2^-15, and
    the scale is 1/(1-p) with the rounded p. On other devices than the CPU this is torch's dropout.
    Raises ValueError for another p.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability must be at least 0 and below 1, got {p}")
    if p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    compiled = compiled_for(x, torch.float32, torch.float64, torch.bfloat16)
    return (_Recomputed if compiled else _Masked).apply(x, p)


class FastDropout(FairseqDropout):
    """fairseq's dropout module with `fast_dropout`."""

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """x of any shape; inplace is a wish that is not granted."""
        active = self.training or self.apply_during_inference
        return fast_dropout(x, self.p) if active else x


def use_fast_dropout(model: nn.Module) -> None:
    """Let every dropout module of a fairseq model be a FastDropout, in place."""
    for module in model.modules():
        if type(module) is FairseqDropout:
            module.__class__ = FastDropout


class _Masked(torch.autograd.Function):
    """With a mask that is kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        threshold = min(round(p * 2**15), 2**15 - 1)
        # Four draws of 15 bits in each int64; the topmost bit of random_() is never set.
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_()
        draws = draws.view(torch.int16).bitwise_and_(2**15 - 1)[: x.numel()]
        kept = (draws >= threshold).view(x.shape)
        ctx.save_for_backward(kept)
        ctx.scale = 1 / (1 - threshold / 2**15)
        return (x * kept).mul_(ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        return (gradient * kept).mul_(ctx.scale), None


class _Recomputed(torch.autograd.Function):
    """With the compiled kernel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        key, stream = torch.empty(2, dtype=torch.int64).random_().tolist()
        ctx.draws = (min(round(p * 2**16), 2**16 - 1), key, stream)
        return torch.ops.normexp.dropout(x, *ctx.draws)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.ops.normexp.dropout(gradient, *ctx.draws), None
