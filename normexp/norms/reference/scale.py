"""ScaleNorm, token by token in numpy."""

import numpy as np

from normexp.norms.reference.base import TokenReference, reference_of


@reference_of("scale")
class Scale(TokenReference):
    """Nguyen, Salazar, "Transformers without Tears" (2019): y = g x / max(||x||, eps)."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features)
        self.parameters = {"g": np.array(np.sqrt(num_features))}
        self.eps = eps

    def token(self, x, p):
        norm = np.sqrt(sum(entry**2 for entry in x))
        return p["g"] * x / (norm if norm.real > self.eps else self.eps)
