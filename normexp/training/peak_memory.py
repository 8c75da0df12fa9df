"""The most memory that one run held, also where the process has done other runs before."""

import gc
from pathlib import Path

import torch

from normexp.training import heap

_RESET_PEAK = "5"  # see clear_refs in proc(5)
_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


class PeakMemory:
    """Measures from its making on, with nothing counted twice: one at a time."""

    def __init__(self) -> None:
        gc.collect()
        heap.release()  # else what an earlier run freed would be this one's
        try:
            _CLEAR_REFS.write_text(_RESET_PEAK)
            self._is_own = True
        except OSError:
            self._is_own = False
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def read(self) -> int | None:
        """Bytes: of tensors on the GPU where there were some, else of the process on the CPU.

        None where the system cannot tell the peak of a run from that of the process: the CPU's on
        anything but Linux.
        """
        if torch.cuda.is_available() and (allocated := torch.cuda.max_memory_allocated()):
            return allocated
        if not self._is_own:
            return None
        (line,) = (s for s in _STATUS.read_text().split("\n") if s.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024


def larger(one: int | None, other: int | None) -> int | None:
    """The larger of two peaks; None where one is unknown."""
    return None if one is None or other is None else max(one, other)
