"""LN, token by token in numpy."""

from normexp.norms.reference.base import TokenReference, reference_of, standardize


@reference_of("layer")
class Layer(TokenReference):
    """Ba, Kiros, Hinton, "Layer Normalization" (2016)."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features)
        self.eps = eps

    def token(self, x, p):
        return p["weight"] * standardize(x, self.eps) + p["bias"]
