"""Masked BN, token by token in numpy."""

import numpy as np

from normexp.norms.reference.base import (
    Array,
    ExactReference,
    mean_over,
    positions,
    reference_of,
    token_positions,
)


@reference_of("batch")
class Batch(ExactReference):
    """Ioffe, Szegedy (2015) over real tokens, running values in inference."""

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.05, sync: bool = False
    ):
        super().__init__(num_features)
        self.eps, self.momentum = eps, momentum
        self.state = {
            "running_mean": np.zeros(num_features),
            "running_var": np.ones(num_features),
            "step": np.array(0),
        }

    def deviation(self, var: Array) -> Array:
        """What x - mean is divided by."""
        return np.sqrt(var + self.eps)

    def batch_statistics(self, x: Array, pad: Array) -> tuple[Array, Array]:
        """mu_B, sigma2_B (biased) over the real tokens."""
        tokens = token_positions(pad)
        mean = mean_over(x, tokens)
        return mean, mean_over((x - mean) ** 2, tokens)

    def averaged(self, x: Array, pad: Array) -> tuple[Array, Array]:
        """Running mean and variance after this batch, whose variance is made unbiased."""
        mean, var = self.batch_statistics(x.real, pad)
        n = len(token_positions(pad))
        return self.average(mean, var * n / max(n - 1, 1))

    def average(self, mean: Array, var: Array) -> tuple[Array, Array]:
        return (
            (1 - self.momentum) * self.state["running_mean"] + self.momentum * mean,
            (1 - self.momentum) * self.state["running_var"] + self.momentum * var,
        )

    def normalize(self, x, pad, parameters, training):
        mean, var = self.state["running_mean"], self.state["running_var"]
        if training:
            mean, var = self.batch_statistics(x, pad)
        y = np.zeros(x.shape, dtype=np.result_type(x, *parameters.values()))
        for t, b in positions(pad):
            x_hat = (x[t, b] - mean) / self.deviation(var)
            y[t, b] = parameters["weight"] * x_hat + parameters["bias"]
        return y, 0.0

    def advance(self, x, pad):
        if token_positions(pad):
            self.state["running_mean"], self.state["running_var"] = self.averaged(x, pad)
            self.state["step"] = self.state["step"] + 1
