"""The functions that the layers call, by the names of the C++ operators. Imports triton."""

from normexp.norms.kernels.triton.batch import batch
from normexp.norms.kernels.triton.power import power, power_v
from normexp.norms.kernels.triton.power_released import power_released

__all__ = ["batch", "power", "power_released", "power_v"]
