"""Dynamic tanh, token by token in numpy."""

import numpy as np

from normexp.norms.reference.base import TokenReference, reference_of


@reference_of("dynamic_tanh")
class DynamicTanh(TokenReference):
    """Zhu et al., "Transformers without Normalization" (2025): y = w tanh(a x) + b."""

    def __init__(self, num_features: int, alpha: float = 0.5):
        super().__init__(num_features)
        self.parameters["a"] = np.array(alpha)

    def token(self, x, p):
        return p["weight"] * np.tanh(p["a"] * x) + p["bias"]
