"""Triton kernels for training steps on a GPU: PN, PN-V, PN as released, BN and regularized BN.

The layers call the functions of `operators()`, which have the arguments and results of the C++
operators of the same names (kernels/cpp). Each touches every token once forward and once
backward where the layer's equations allow that: after the warm-ups of PN. Where a statistic is
needed before the tokens can be scaled, a pass over them comes first; in the layers with a warm-up
it looks at the step counter on the device and does nothing when it is not needed. So every step
launches the same kernels and nothing waits for the device, as CUDA graphs require. Each program
sums its own rows and the partial sums are added in a fixed order: results repeat to the bit.

Nothing here imports triton before `load` has found it.
"""

import functools
import importlib.util
import logging
import os
from types import SimpleNamespace

import torch

from normexp.norms.kernels.choice import chosen_kernels

logger = logging.getLogger(__name__)


def load() -> bool:
    """Whether the kernels are available: triton is installed, with a GPU or its interpreter.

    The interpreter (TRITON_INTERPRET=1, set before triton is imported) runs kernels slowly on the
    CPU, for tests. Where they are not available logs one line, once per process. False also where
    plain or native kernels are chosen (kernels/choice.py). Raises RuntimeError where triton's are
    chosen and not available.
    """
    if chosen_kernels() in ("plain", "native"):
        return False
    failure = _missing()
    if failure and chosen_kernels() == "triton":
        raise RuntimeError(f"triton kernels are chosen, but cannot be had: {failure}")
    return not failure


@functools.cache
def operators() -> SimpleNamespace:
    """`batch`, `power`, `power_v` and `power_released`. Imports triton: call it after `load`."""
    from normexp.norms.kernels.triton.batch import batch
    from normexp.norms.kernels.triton.power import power, power_v
    from normexp.norms.kernels.triton.power_released import power_released

    return SimpleNamespace(batch=batch, power=power, power_v=power_v, power_released=power_released)


@functools.cache
def _missing() -> str:
    """Why the kernels are not available, an empty string if they are."""
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
