"""Compile every Triton kernel for a GPU of the Hopper generation, on a machine without one.

    python triton_compilation.py [others]  # the first of BATCHES, or the others

Run by test_triton.py, without TRITON_INTERPRET: the interpreter takes much of Python for Triton.
"""

import contextlib
import inspect
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from normexp.norms.kernels.triton import batch, power, power_released

TARGET = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
# type, shape, masked, groups
BATCHES = [
    (torch.float32, (64, 128, 512), True, 4),
    (torch.bfloat16, (8192, 513), False, 1),
    (torch.float64, (64, 128, 60), True, 3),
    (torch.float16, (300, 1), True, 1),
]


class OnGPU(Tensor):
    """A tensor that says it lies on a GPU."""

    is_cuda = True


def compile_instead(
    self: JITFunction, *args: Any, grid: object, num_warps: int = 4, warmup: bool = False, **kw: Any
) -> None:
    """In the place of a launch."""
    given = inspect.signature(self.fn).bind(*args, **kw).arguments
    types, constants = {}, {}
    for parameter in self.params:
        value = given[parameter.name]
        # As a launch does: what is 1 is known to the compiler.
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            types[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            types[parameter.name] = TYPES[value.dtype]
        else:
            types[parameter.name] = "i32" if value < 2**31 else "i64"
    key = f"{self.fn.__module__}.{self.fn.__name__} {types} {constants}"
    if key not in compiled:
        source = ASTSource(self, types, constants)
        kernel = triton.compile(source, target=TARGET, options={"num_warps": num_warps})
        compiled[key] = kernel.asm["cubin"]


def launch_all(dtype: torch.dtype, shape: tuple[int, ...], masked: bool, groups: int) -> None:
    """Forward and backward of each operator; what they compute does not matter."""
    x = torch.zeros(shape, dtype=dtype).as_subclass(OnGPU)
    mask = torch.zeros(shape[-2::-1], dtype=torch.bool) if masked else None
    like = torch.float64 if dtype == torch.float64 else torch.float32
    weight, bias, running, nu = (torch.zeros(shape[-1], dtype=like) for _ in range(4))
    step, num_rejected = (torch.zeros((), dtype=torch.long) for _ in range(2))
    state, given = (running, step, num_rejected), (x, mask, weight, bias)

    _, _, saved = power._forward_op._init_fn(*given, *state, 1e-5, 0.9, 4, False)
    power._replay_op._init_fn(*given, saved, 1e-5)
    power._backward_op._init_fn(x, mask, weight, x, saved, nu, num_rejected, 1e-5, 0.9, True)
    power._backward_v_op._init_fn(x, mask, weight, x, saved, 1e-5)

    _, _, *saved = power_released._forward_op._init_fn(*given, *state, groups, 1e-5, 0.9, 4)
    power_released._backward_op._init_fn(x, weight, *saved, x, nu, num_rejected, groups, 1e-5, 0.9)

    for regularized in (False, True):
        buffers = nu, *state
        _, *saved = batch._forward_op._init_fn(*given, *buffers, False, 1e-5, 0.1, regularized)
        upstream = x, *(saved[:2] if regularized else (None, None))
        batch._backward_op._init_fn(x, mask, weight, *saved, *upstream, 1e-5, regularized)


compiled: dict[str, bytes] = {}
JITFunction.run = compile_instead
torch.cuda.device_of = lambda tensor: contextlib.nullcontext()
torch.cuda.get_device_properties = lambda device: SimpleNamespace(multi_processor_count=132)
for case in BATCHES[1:] if "others" in sys.argv else BATCHES[:1]:
    launch_all(*case)
assert all(compiled.values())
print(f"{len(compiled)} kernels compiled")
