"""The identity."""

from normexp.norms.reference.base import TokenReference, reference_of


@reference_of("none")
class Identity(TokenReference):
    """y = x."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.parameters = {}

    def token(self, x, p):
        return x
