"""Batch normalization: masked, regularized, and as the authors of PN released it."""

import numpy as np

from normexp.norms.reference.base import (
    Array,
    ExactReference,
    mean_over,
    positions,
    real_positions,
    reference_of,
)


class _Batch(ExactReference):
    """mu_B and sigma2_B in training, the running values in inference."""

    def __init__(self, num_features: int, eps: float, momentum: float):
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
        real = real_positions(pad)
        mean = mean_over(x, real)
        return mean, mean_over((x - mean) ** 2, real)

    def averaged(self, x: Array, pad: Array) -> tuple[Array, Array]:
        """Running mean and variance after this batch, whose variance is made unbiased."""
        mean, var = self.batch_statistics(x.real, pad)
        n = len(real_positions(pad))
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
        if real_positions(pad):
            self.state["running_mean"], self.state["running_var"] = self.averaged(x, pad)
            self.state["step"] = self.state["step"] + 1


@reference_of("batch")
class Batch(_Batch):
    """Ioffe, Szegedy (2015) over real tokens."""

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.05, sync: bool = False
    ):
        super().__init__(num_features, eps, momentum)


@reference_of("batch_released")
class BatchReleased(_Batch):
    """Each token over its root mean square, then BN over all T*B positions.

    Padded positions hold the mean of the real tokens, so they dilute the variance.
    """

    padding_takes_part = True

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.05):
        super().__init__(num_features, eps, momentum)

    def prepared(self, x: Array, pad: Array) -> Array:
        scaled = np.zeros_like(x)
        for t, b in positions(pad):
            square = sum(entry**2 for entry in x[t, b]) / x.shape[-1]
            scaled[t, b] = x[t, b] / np.sqrt(square + self.eps)
        real = real_positions(pad)
        if real:
            mean = mean_over(scaled, real)
            for t, b in set(positions(pad)) - set(real):
                scaled[t, b] = mean
        return scaled

    def normalize(self, x, pad, parameters, training):
        everywhere = np.zeros_like(pad)
        return super().normalize(self.prepared(x, pad), everywhere, parameters, training)

    def averaged(self, x, pad):
        everywhere = np.zeros_like(pad)
        return super().averaged(self.prepared(x.real, pad), everywhere)


@reference_of("regularized_batch")
class RegularizedBatch(_Batch):
    """Gao, Xing et al. (2022): BN plus a penalty on the distance of batch to running statistics.

    The variance is clamped at eps from below instead of eps added, and the running variance
    averages the biased one. The penalty's running values are already updated and held constant.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.05,
        penalty_mean: float = 0.1,
        penalty_var: float = 0.01,
        sync: bool = False,
    ):
        super().__init__(num_features, eps, momentum)
        self.penalty_mean, self.penalty_var = penalty_mean, penalty_var

    def deviation(self, var):
        return np.sqrt(np.where(var.real > self.eps, var, self.eps))

    def averaged(self, x, pad):
        return self.average(*self.batch_statistics(x.real, pad))

    def normalize(self, x, pad, parameters, training):
        y, penalty = super().normalize(x, pad, parameters, training)
        if training:
            mean, var = self.batch_statistics(x, pad)
            running_mean, running_var = self.averaged(x, pad)
            for c in range(x.shape[-1]):
                difference = running_var[c] - var[c]
                magnitude = difference if difference.real > 0 else -difference
                penalty = penalty + self.penalty_mean * (running_mean[c] - mean[c]) ** 2
                penalty = penalty + self.penalty_var * magnitude
        return y, penalty
