"""The choice of kernels for one training step of one layer."""

from typing import Any

import torch
from torch import Tensor, nn

from normexp.norms.kernels import native, triton
from normexp.norms.kernels.choice import chosen_kernels

_NATIVE_TYPES = (torch.float32, torch.float64, torch.bfloat16)


def operators_for(norm: nn.Module, x: Tensor) -> tuple[str, Any]:
    """What computes a training step of `norm` on x: the kernels' name and their operators.

    ("native", torch.ops.normexp), ("triton", the same operators by Triton), or ("plain", None)
    where torch's operations have to do: the layer names no `native_source`, has parameters in
    float16, or neither kernel is available for x.

    Raises RuntimeError where `use_kernels` has chosen kernels that are not available.
    """
    if (
        norm.native_source is None
        or type(x) not in (Tensor, nn.Parameter)  # subclasses may have no memory to read
        or norm.weight.dtype == torch.float16
    ):
        return "plain", None
    # On a CPU triton only interprets its kernels, for tests.
    if x.is_cuda or (x.device.type == "cpu" and chosen_kernels() == "triton"):
        return ("triton", triton.operators()) if triton.load() else ("plain", None)
    runs_native = x.device.type == "cpu" and x.dtype in _NATIVE_TYPES
    if runs_native and native.load(norm.native_source):
        return "native", torch.ops.normexp
    return "plain", None
