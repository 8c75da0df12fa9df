"""Normalizations that treat every token by itself; padding has no meaning for them."""

import numpy as np

from normexp.norms.reference.base import Array, ExactReference, positions, reference_of


class _PerToken(ExactReference):
    padding_takes_part = True

    def token(self, x: Array, p: dict[str, Array]) -> Array:
        """y (C,) of one token x (C,), p its parameters."""
        raise NotImplementedError

    def normalize(self, x, pad, parameters, training):
        y = np.zeros(x.shape, dtype=np.result_type(x, *parameters.values()))
        for t, b in positions(pad):
            y[t, b] = self.token(x[t, b], parameters)
        return y, 0.0


def standardize(x: Array, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) over the entries of x, biased variance."""
    mean = sum(x) / len(x)
    var = sum((entry - mean) ** 2 for entry in x) / len(x)
    return (x - mean) / np.sqrt(var + eps)


@reference_of("layer")
class Layer(_PerToken):
    """Ba, Kiros, Hinton, "Layer Normalization" (2016)."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features)
        self.eps = eps

    def token(self, x, p):
        return p["weight"] * standardize(x, self.eps) + p["bias"]


@reference_of("rms")
class RMS(_PerToken):
    """Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019)."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features)
        del self.parameters["bias"]
        self.eps = eps

    def token(self, x, p):
        return p["weight"] * x / np.sqrt(sum(entry**2 for entry in x) / len(x) + self.eps)


@reference_of("scale")
class Scale(_PerToken):
    """Nguyen, Salazar, "Transformers without Tears" (2019): y = g x / max(||x||, eps)."""

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__(num_features)
        self.parameters = {"g": np.array(np.sqrt(num_features))}
        self.eps = eps

    def token(self, x, p):
        norm = np.sqrt(sum(entry**2 for entry in x))
        return p["g"] * x / (norm if norm.real > self.eps else self.eps)


@reference_of("group")
class Group(_PerToken):
    """Wu, He, "Group Normalization" (2018), each token by itself."""

    def __init__(self, num_features: int, eps: float = 1e-5, num_groups: int = 4):
        super().__init__(num_features)
        self.eps, self.num_groups = eps, num_groups

    def token(self, x, p):
        groups = np.split(x, self.num_groups)
        x_hat = np.concatenate([standardize(group, self.eps) for group in groups])
        return p["weight"] * x_hat + p["bias"]


@reference_of("adaptive")
class Adaptive(_PerToken):
    """AdaNorm of Xu et al., "Understanding and Improving Layer Normalization" (2019)."""

    def __init__(self, num_features: int, eps: float = 1e-5, k: float = 0.1, scale: float = 1.0):
        super().__init__(num_features)
        self.parameters = {}
        self.eps, self.k, self.scale = eps, k, scale

    def token(self, x, p):
        x_hat = standardize(x, self.eps)
        return self.scale * (1 - self.k * x_hat.real) * x_hat


@reference_of("dynamic_tanh")
class DynamicTanh(_PerToken):
    """Zhu et al., "Transformers without Normalization" (2025): y = w tanh(a x) + b."""

    def __init__(self, num_features: int, alpha: float = 0.5):
        super().__init__(num_features)
        self.parameters["a"] = np.array(alpha)

    def token(self, x, p):
        return p["weight"] * np.tanh(p["a"] * x) + p["bias"]


@reference_of("none")
class Identity(_PerToken):
    """y = x."""

    def __init__(self, num_features: int):
        super().__init__(num_features)
        self.parameters = {}

    def token(self, x, p):
        return x
