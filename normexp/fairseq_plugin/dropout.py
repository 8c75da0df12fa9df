"""Dropout on the CPU without torch's serial generator, which takes a fifth of a training step.

torch's own draws 53 random bits for every element. Here 16 bits (compiled) or 15 (torch only)
decide. The compiled kernel draws them with vector instructions, and again in the backward pass
instead of keeping a mask. Every mask derives from torch's generator, directly or through a seed, so
seeding it makes training repeatable, as with torch's dropout; the masks differ from torch's.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from fairseq.modules import FairseqDropout
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from normexp.norms.kernels import native

_SOURCE = Path(__file__).with_suffix(".cpp")
_COMPILED_TYPES = (torch.float32, torch.float64, torch.bfloat16)


class Draws(NamedTuple):
    """Which elements of one tensor the compiled kernels drop: a function of their places."""

    threshold: int  # of 2^16: the probability of being dropped
    key: int
    stream: int

    @classmethod
    def new(cls, p: float) -> "Draws":
        """Draw key and stream from torch's generator, except for p = 0, which drops nothing."""
        if p == 0:
            return cls(0, 0, 0)
        key, stream = torch.empty(2, dtype=torch.int64).random_().tolist()
        return cls(min(round(p * 2**16), 2**16 - 1), key, stream)


def compiled_for(x: Tensor) -> bool:
    """Return whether torch.ops.normexp.dropout (dropout.cpp) can be used for x.

    The first call of an installation compiles it, for half a minute; see norms/kernels/native.py.
    """
    return x.device.type == "cpu" and x.dtype in _COMPILED_TYPES and native.load(_SOURCE)


def fast_dropout(x: Tensor, p: float) -> Tensor:
    """Zero elements of x with probability p and scale the others by 1/(1-p).

    x: any shape; the result has the same. p: at least 0 and below 1, rounded to a multiple of 2^-16
    (compiled) or 2^-15. On other devices than the CPU this is torch's dropout. Raises ValueError
    for another p.
    """
    if not 0 <= p < 1:
        raise ValueError(f"dropout probability must be at least 0 and below 1, got {p}")
    if p == 0:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, p)
    return (_CompiledDropoutFunction if compiled_for(x) else _PlainDropoutFunction).apply(x, p)


class FastDropout(FairseqDropout):
    """fairseq's dropout module with `fast_dropout`."""

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """Drop elements of x, of any shape. `inplace` is ignored: the result is a new tensor."""
        active = self.training or self.apply_during_inference
        return fast_dropout(x, self.p) if active else x


def use_fast_dropout(model: nn.Module) -> None:
    """Turn every dropout module of a fairseq model into a FastDropout, in place."""
    for module in model.modules():
        if type(module) is FairseqDropout:
            module.__class__ = FastDropout


class _PlainDropoutFunction(torch.autograd.Function):
    """Dropout in plain torch; keeps the mask for the backward pass."""

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


class _CompiledDropoutFunction(torch.autograd.Function):
    """Dropout by the compiled kernel; keeps the seed and draws the mask again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        ctx.draws = Draws.new(p)
        return torch.ops.normexp.dropout(x, *ctx.draws)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return torch.ops.normexp.dropout(gradient, *ctx.draws), None
