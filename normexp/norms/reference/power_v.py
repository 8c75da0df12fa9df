"""PN-V, token by token in numpy: the paper's equations and no others."""

import numpy as np

from normexp.norms.reference.base import (
    ExactReference,
    mean_over,
    positions,
    reference_of,
    token_positions,
)


@reference_of("power_v")
class PowerV(ExactReference):
    """Shen et al. (2020), section 4.1: x over the batch's quadratic mean."""

    def __init__(
        self, num_features: int, eps: float = 1e-5, alpha: float = 0.9, sync: bool = False
    ):
        super().__init__(num_features)
        self.eps, self.alpha = eps, alpha
        self.state = {"running_psi2": np.ones(num_features), "step": np.array(0)}

    def normalize(self, x, pad, parameters, training):
        psi2 = mean_over(x**2, token_positions(pad)) if training else self.state["running_psi2"]
        y = np.zeros(x.shape, dtype=np.result_type(x, *parameters.values()))
        for t, b in positions(pad):
            x_hat = x[t, b] / np.sqrt(psi2 + self.eps)
            y[t, b] = parameters["weight"] * x_hat + parameters["bias"]
        return y, 0.0

    def advance(self, x, pad):
        if token_positions(pad):
            psi2_batch = mean_over(x**2, token_positions(pad))
            psi2 = self.state["running_psi2"]
            self.state["running_psi2"] = self.alpha * psi2 + (1 - self.alpha) * psi2_batch
            self.state["step"] = self.state["step"] + 1
