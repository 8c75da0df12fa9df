"""The choice of kernels for one training step of one layer."""

import functools
from collections.abc import Callable
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
    where torch's operations have to do: the layer has no kernel for the device, it has parameters
    in float16, or the kernel is not available.

    Raises RuntimeError where `use_kernels` has chosen kernels that are not available.
    """
    if runs_native(norm, x):
        return "native", torch.ops.normexp
    # On a CPU triton only interprets its kernels, for tests.
    if (
        norm.has_triton_kernel
        and (x.is_cuda or (x.is_cpu and chosen_kernels() == "triton"))
        and type(x) in _PLAIN_TENSORS
        and not _is_half(norm)
        and triton.load()
    ):
        return "triton", triton.operators()
    return "plain", None


def runs_native(norm: nn.Module, x: Tensor, is_loaded: bool = False) -> bool:
    """Whether C++ computes `norm` on x. is_loaded: it has done so in this process.

    Raises RuntimeError where `use_kernels` has chosen native kernels and they are not available.
    """
    return (
        x.is_cpu
        and x.dtype in _NATIVE_TYPES
        and type(x) in _PLAIN_TENSORS
        and chosen_kernels() in ("auto", "native")
        and norm.native_source is not None
        and not _is_half(norm)
        and (is_loaded or native.load(norm.native_source))
    )


def runs_native_anywhere(norm: nn.Module, x: Tensor) -> bool:
    """`runs_native` for a layer without state, which also has to work where operations are seen.

    There it is torch's: in compiled, traced and exported programs, in transforms of torch.func and
    forward-mode differentiation.
    """
    return (
        not torch.compiler.is_compiling()
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and runs_native(norm, x)
    )


@functools.cache
def native_operator(name: str) -> Callable[..., Any]:
    """The C++ operator of a name; getting it from torch.ops takes longer than this."""
    return getattr(torch.ops.normexp, name).default


def _is_half(norm: nn.Module) -> bool:
    # As an attribute of an nn.Module it would take half a microsecond.
    weight = norm._parameters.get("weight")
    return (norm.weight if weight is None else weight).dtype == torch.float16
