"""Triton kernels for training steps on a GPU: PN, PN-V, PN as released, BN and regularized BN.

What the layers call are the functions of `operators()`, with the arguments and results of the C++
operators of the same names (kernels/cpp). Each touches every token once forward and once
backward where the layer's equations allow that: after the warm-ups of PN. Where a statistic is
needed before the tokens can be scaled, a pass over them comes first; in the layers with a warm-up
it looks at the step counter on the device and does nothing when it is not needed. So every step
launches the same kernels and nothing waits for the device, as CUDA graphs require. Sums
are taken per program and added in a fixed order: results repeat to the bit.

Nothing here imports triton before `load` has found it.
"""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

from normexp.norms.kernels.choice import chosen_kernels

logger = logging.getLogger(__name__)


def load() -> bool:
    """Whether the kernels can be had: triton is installed, and there is a GPU or its interpreter.

    The interpreter (TRITON_INTERPRET=1, set before triton is imported) runs kernels slowly on the
    CPU, for tests. Where they cannot be had logs one line, once per process. False also where
    plain or native kernels are chosen (kernels/choice.py). Where triton's are chosen, raises
    RuntimeError instead.
    """
    if chosen_kernels() in ("plain", "native"):
        return False
    failure = _missing()
    if failure and chosen_kernels() == "triton":
        raise RuntimeError(f"triton kernels are chosen, but cannot be had: {failure}")
    return not failure


def operators() -> ModuleType:
    """The module with `power`, `power_v`, `power_released` and `batch`; only after `load`."""
    return importlib.import_module(f"{__name__}.entry")


@functools.cache
def _missing() -> str:
    """What stands in the way, or an empty string."""
    if importlib.util.find_spec("triton") is None:
        failure = "triton is not installed"
    elif not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        failure = "there is no GPU, and TRITON_INTERPRET=1 is not set"
    else:
        try:
            operators()
            return ""
        except (ImportError, AttributeError) as error:
            failure = str(error).split("\n")[0]
    logger.warning("plain kernels instead of Triton's, slower but the same: %s", failure)
    return failure
