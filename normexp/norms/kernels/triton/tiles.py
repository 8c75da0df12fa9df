"""How a batch is divided among programs: tiles of channels and of rows, which are the tokens."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# A limit for step counters that is never reached: the pass that it guards is always needed.
ALWAYS = 2**62

_BYTES_OF_A_ROW = 128  # what a program reads of a row: one full memory transaction
_TILE = 2048  # values that a program holds at once: 16 per thread
_MOST_ROWS = 256
_PROGRAMS_PER_PROCESSOR = 8
# Interpreted, a program costs milliseconds, however large it is.
_INTERPRETED_WIDTH, _INTERPRETED_ROWS, _INTERPRETED_PROGRAMS = 512, 8, 2
_FINISHING = 8192  # values that the one program of a finishing kernel holds at once


class Tiles:
    """x (T, B, C) or (N, C), contiguous, with its mask (B, T) or (N,), as arguments of kernels.

    grid: (tiles of channels, programs over rows), for kernels that take `arguments`. A program
    works on every `programs`-th tile of rows of its channels: those of one group where `groups`
    are given, else as many as make memory transactions full.

    Raises ValueError where x is not contiguous.
    """

    def __init__(self, x: Tensor, mask: Tensor | None, groups: int | None = None):
        if not x.is_contiguous():
            raise ValueError("x must be contiguous")
        self.channels = x.shape[-1]
        self.rows = x.numel() // max(1, self.channels)
        self.sums_in = sums_type(x)
        self._device = x.device
        whole = triton.next_power_of_2(self.channels)
        size = self.channels // groups if groups else _BYTES_OF_A_ROW // x.element_size()
        if not x.is_cuda and not groups:
            size = _INTERPRETED_WIDTH
        size = min(size, whole)
        block = triton.next_power_of_2(size)
        columns = triton.cdiv(self.channels, size)
        if x.is_cuda:
            rows = max(1, min(_MOST_ROWS, _TILE // block))
            processors = torch.cuda.get_device_properties(x.device).multi_processor_count
            most = _PROGRAMS_PER_PROCESSOR * processors // columns
        else:
            rows, most = _INTERPRETED_ROWS, _INTERPRETED_PROGRAMS
        self.programs = max(1, min(triton.cdiv(self.rows, rows), most))
        self.grid = (columns, self.programs)
        three = x.dim() == 3
        accumulator = tl.float64 if self.sums_in == torch.float64 else tl.float32
        padded = x if mask is None else mask.view(torch.uint8)
        self.arguments: dict[str, Any] = {
            "mask": padded,
            "rows": self.rows,
            "channels": self.channels,
            "sentences": x.shape[1] if three else 1,
            "sentence_stride": mask.stride(0) if three and mask is not None else 0,
            "time_stride": mask.stride(-1) if mask is not None else 0,
            "HAS_MASK": mask is not None,
            "SUMS_IN": accumulator,
            "ROWS": rows,
            "WIDTH": block,
            "num_warps": 4 if rows * block <= _TILE else 8,
        }
        # For kernels of one program, which finish what the programs have summed.
        self.finishing: dict[str, Any] = {
            "programs": self.programs,
            "channels": self.channels,
            "MANY": max(1, min(triton.next_power_of_2(self.programs), _FINISHING // whole)),
            "WIDTH": whole,
            "num_warps": 8,
        }
        self.many = max(1, min(triton.next_power_of_2(self.programs), _TILE // block))

    def partial_sums(self, *quantities: int) -> Tensor:
        """Empty tensor for a sum per program, quantity and channel: (*quantities, P, C)."""
        return torch.empty(
            *quantities, self.programs, self.channels, dtype=self.sums_in, device=self._device
        )

    def counts(self, passes: int) -> Tensor:
        """Empty tensor for the number of real tokens that each program sees: (passes, P)."""
        return torch.empty(passes, self.programs, dtype=torch.int32, device=self._device)

    def vector(self, dtype: torch.dtype) -> Tensor:
        """Empty tensor for a value per channel: (C,)."""
        return torch.empty(self.channels, dtype=dtype, device=self._device)

    def saved(self) -> Tensor:
        """Empty tensor for what a forward of PN saves, two vectors and two numbers: (2 C + 2,)."""
        return torch.empty(2 * self.channels + 2, dtype=torch.float64, device=self._device)

    def scalar(self, dtype: torch.dtype) -> Tensor:
        """Empty scalar tensor."""
        return torch.empty((), dtype=dtype, device=self._device)


def sums_type(x: Tensor) -> torch.dtype:
    """The type in which values of x are summed: float32 at least."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def check_buffers(*buffers: Tensor) -> None:
    """Raise ValueError unless the buffers that a kernel writes to are contiguous."""
    if not all(buffer.is_contiguous() for buffer in buffers):
        raise ValueError("buffers must be contiguous")
