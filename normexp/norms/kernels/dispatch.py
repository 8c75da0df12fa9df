"""The choice of kernels for one training step of one layer."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from normexp.norms.kernels import native, triton
from normexp.norms.kernels.choice import chosen_kernels

_NATIVE_TYPES = (torch.float32, torch.float64, torch.bfloat16)
_PLAIN_TENSORS = (Tensor, nn.Parameter)  # subclasses may have no memory to read


def operators_for(norm: nn.Module, x: Tensor) -> tuple[str, Any]:
    """What computes a training step of `norm` on x: the kernels' name and their operators.

    ("native", torch.ops.normexp), ("triton", the same operators by Triton), or ("plain", None)
    where torch's operations have to do: the layer names no `native_source`, has parameters in
    float16, or neither kernel is available for x.

    Raises RuntimeError where `use_kernels` has chosen kernels that are not available.
    """
    if norm.native_source is None or type(x) not in _PLAIN_TENSORS:
        return "plain", None
    if norm.weight.dtype == torch.float16:
        return "plain", None
    # On a CPU triton only interprets its kernels, for tests.
    if x.is_cuda or (x.is_cpu and chosen_kernels() == "triton"):
        usable = norm.has_triton_kernel and triton.load()
        return ("triton", triton.operators()) if usable else ("plain", None)
    if x.is_cpu and x.dtype in _NATIVE_TYPES and native.load(norm.native_source):
        return "native", torch.ops.normexp
    return "plain", None


def runs_native(norm: nn.Module, x: Tensor) -> bool:
    """Whether C++ computes a layer without state on x (T, B, C) or (N, C), in either mode.

    Not where operations are looked into: in compiled, traced and exported programs, in transforms
    of torch.func and forward-mode differentiation. Raises as `operators_for`.
    """
    return (
        not torch.compiler.is_compiling()
        and x.is_cpu
        and type(x) in _PLAIN_TENSORS
        and x.dtype in _NATIVE_TYPES
        and x.dim() in (2, 3)
        and norm.weight.dtype != torch.float16
        and not torch.jit.is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and chosen_kernels() != "triton"
        and native.load(norm.native_source)
    )
