"""Regularized BN, token by token in numpy."""

import numpy as np

from normexp.norms.reference.base import reference_of
from normexp.norms.reference.batch import Batch


@reference_of("regularized_batch")
class RegularizedBatch(Batch):
    """Wang, Wu, Huang (2022): BN plus a penalty on the distance of batch to running statistics.

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
