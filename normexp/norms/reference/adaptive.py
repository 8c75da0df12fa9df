"""AdaNorm, token by token in numpy."""

from normexp.norms.reference.base import TokenReference, reference_of, standardize


@reference_of("adaptive")
class Adaptive(TokenReference):
    """AdaNorm of Xu et al., "Understanding and Improving Layer Normalization" (2019)."""

    def __init__(self, num_features: int, eps: float = 1e-5, k: float = 0.1, scale: float = 1.0):
        super().__init__(num_features)
        self.parameters = {}
        self.eps, self.k, self.scale = eps, k, scale

    def token(self, x, p):
        x_hat = standardize(x, self.eps)
        return self.scale * (1 - self.k * x_hat.real) * x_hat
