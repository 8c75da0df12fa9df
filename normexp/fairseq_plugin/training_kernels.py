"""Whether the compiled kernels of training (training_kernels.cpp) are there for a tensor."""

from pathlib import Path

import torch
from torch import Tensor

from normexp.norms.kernels import native

_SOURCE = Path(__file__).with_suffix(".cpp")


def compiled_for(x: Tensor, *dtypes: torch.dtype) -> bool:
    """Whether torch.ops.normexp offers its kernels for x, which must be of one of these types.

    The first call of an installation compiles, for half a minute; see normexp.norms.kernels.native.
    """
    return x.device.type == "cpu" and x.dtype in dtypes and native.load(_SOURCE)
