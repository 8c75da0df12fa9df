"""BN as released, token by token in numpy."""

import numpy as np

from normexp.norms.reference.base import Array, mean_over, positions, reference_of, token_positions
from normexp.norms.reference.batch import Batch


@reference_of("batch_released")
class BatchReleased(Batch):
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
        tokens = token_positions(pad)
        if tokens:
            mean = mean_over(scaled, tokens)
            for t, b in set(positions(pad)) - set(tokens):
                scaled[t, b] = mean
        return scaled

    def normalize(self, x, pad, parameters, training):
        everywhere = np.zeros_like(pad)
        return super().normalize(self.prepared(x, pad), everywhere, parameters, training)

    def averaged(self, x, pad):
        everywhere = np.zeros_like(pad)
        return super().averaged(self.prepared(x.real, pad), everywhere)
