"""GN of single tokens in numpy."""

import numpy as np

from normexp.norms.reference.base import TokenReference, reference_of, standardize


@reference_of("group")
class Group(TokenReference):
    """Wu, He, "Group Normalization" (2018), each token by itself."""

    def __init__(self, num_features: int, eps: float = 1e-5, num_groups: int = 4):
        super().__init__(num_features)
        self.eps, self.num_groups = eps, num_groups

    def token(self, x, p):
        groups = np.split(x, self.num_groups)
        x_hat = np.concatenate([standardize(group, self.eps) for group in groups])
        return p["weight"] * x_hat + p["bias"]
