"""IN, token by token in numpy."""

import numpy as np

from normexp.norms.reference.base import ExactReference, mean_over, reference_of


@reference_of("instance")
class Instance(ExactReference):
    """Ulyanov, Vedaldi, Lempitsky (2016), masked; biased variance; the same in inference."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features)
        self.eps = eps

    def normalize(self, x, pad, parameters, training):
        y = np.zeros(x.shape, dtype=np.result_type(x, *parameters.values()))
        for b in range(x.shape[1]):
            tokens = [(t, b) for t in range(x.shape[0]) if not pad[b, t]]
            if not tokens:
                continue
            mean = mean_over(x, tokens)
            var = mean_over((x - mean) ** 2, tokens)
            for t in range(x.shape[0]):
                x_hat = (x[t, b] - mean) / np.sqrt(var + self.eps)
                y[t, b] = parameters["weight"] * x_hat + parameters["bias"]
        return y, 0.0
