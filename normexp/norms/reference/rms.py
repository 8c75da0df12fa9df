"""RMSNorm, token by token in numpy."""

import numpy as np

from normexp.norms.reference.base import TokenReference, reference_of


@reference_of("rms")
class RMS(TokenReference):
    """Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019)."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features)
        del self.parameters["bias"]
        self.eps = eps

    def token(self, x, p):
        return p["weight"] * x / np.sqrt(sum(entry**2 for entry in x) / len(x) + self.eps)
