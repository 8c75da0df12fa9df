"""Merge a norm that is per-channel affine at inference into the linear layers that follow it."""

from collections.abc import Iterable

import torch
from torch import nn

from normexp.norms.running_norm import RunningNorm


def why_not_foldable(norm: nn.Module) -> str | None:
    """The reason why a norm cannot be folded, None if it can.

    Foldable are `batch`, `regularized_batch`, `power_v`, `power` and `unified`: at inference they
    are y = x * scale + shift, with one scale and shift per channel.
    """
    if isinstance(norm, RunningNorm):
        # The base declares the method; layers that do more at inference do not define it.
        if type(norm).inference_affine is RunningNorm.inference_affine:
            return f"{type(norm).__name__} scales each token before its affine map"
        return None
    return f"{type(norm).__name__} is no affine map of the channels with running statistics"


@torch.no_grad()
def fold_into(norm: nn.Module, linears: Iterable[nn.Linear]) -> None:
    """Change linear layers, in place, so that they give for x what they gave for norm(x).

        W (x * scale + shift) + c = (W scale) x + (W shift + c)

    linears: every consumer of norm(x), and nothing else may pass through them; the caller then
    removes the norm. A layer without bias gets one. Computed in float64 and rounded once to the
    layer's dtype. The result equals the model in eval mode only: train the unfolded one.

    Raises ValueError for a norm that cannot be folded, with the reason, and for a layer of another
    width or whose weight is computed anew at each call (weight norm, parametrizations); nothing is
    changed then.
    """
    linears = list(dict.fromkeys(linears))
    reason = why_not_foldable(norm)
    if reason is not None:
        raise ValueError(f"cannot fold: {reason}")
    for linear in linears:
        if not isinstance(linear, nn.Linear) or linear.in_features != norm.num_features:
            raise ValueError(f"cannot fold {norm.num_features} channels into {linear}")
        if not isinstance(linear.weight, nn.Parameter):
            raise ValueError(f"cannot fold into {linear}: its weight is computed at each call")
    scale, shift = (vector.double() for vector in norm.inference_affine())
    for linear in linears:
        weight = linear.weight.double()
        bias = weight @ shift
        if linear.bias is not None:
            bias += linear.bias.double()
        # New parameters: the old ones may be shared with other modules.
        linear.weight = nn.Parameter((weight * scale).to(linear.weight.dtype))
        linear.bias = nn.Parameter(bias.to(linear.weight.dtype))
