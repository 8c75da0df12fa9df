"""What the references share: their interface, loops over tokens, complex-step derivatives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
REFERENCES: dict[str, type["Reference"]] = {}


def reference_of(name: str) -> Callable[[type["Reference"]], type["Reference"]]:
    """Class decorator: this is the reference of the normalization `name`."""

    def add(cls: type["Reference"]) -> type["Reference"]:
        REFERENCES[name] = cls
        return cls

    return add


@dataclass
class Step:
    """Results of one training step: y and gx (T, B, C), gradients of the parameters by name."""

    y: Array
    gx: Array
    gradients: dict[str, Array]
    penalty: float = 0.0


class Reference:
    """A normalization in float64. x, gy (T, B, C); pad (B, T) bool, True = padding.

    Subclasses take num_features and the options of the layer, with the same defaults; `parameters`
    and `state` hold arrays under the layer's names. padding_takes_part says whether padded
    positions are treated like others; where not, y is undefined there and influences nothing.
    """

    padding_takes_part = False

    def __init__(self, num_features: int):
        self.parameters: dict[str, Array] = {
            "weight": np.ones(num_features),
            "bias": np.zeros(num_features),
        }
        self.state: dict[str, Array] = {}

    def train_step(self, x: Array, pad: Array, gy: Array) -> Step:
        """One forward and one backward of sum(gy * y) + penalty in training mode."""
        raise NotImplementedError

    def infer(self, x: Array, pad: Array) -> Array:
        """y (T, B, C) in inference mode."""
        raise NotImplementedError


class ExactReference(Reference):
    """A normalization whose backward is the derivative of its forward."""

    def normalize(
        self, x: Array, pad: Array, parameters: dict[str, Array], training: bool
    ) -> tuple[Array, complex]:
        """y (T, B, C) and the penalty; changes no state; x and parameters may be complex."""
        raise NotImplementedError

    def advance(self, x: Array, pad: Array) -> None:
        """Change the running state as one training forward does."""

    def train_step(self, x: Array, pad: Array, gy: Array) -> Step:
        def loss(x: Array, parameters: dict[str, Array]) -> complex:
            y, penalty = self.normalize(x, pad, parameters, training=True)
            counted = positions(pad) if self.padding_takes_part else token_positions(pad)
            return sum((gy[t, b] * y[t, b]).sum() for t, b in counted) + penalty

        y, penalty = self.normalize(x, pad, self.parameters, training=True)
        gx = derivative(lambda value: loss(value, self.parameters), x)
        gradients = {
            name: derivative(lambda value, n=name: loss(x, {**self.parameters, n: value}), array)
            for name, array in self.parameters.items()
        }
        self.advance(x, pad)
        return Step(y, gx, gradients, float(penalty))

    def infer(self, x: Array, pad: Array) -> Array:
        return self.normalize(x, pad, self.parameters, training=False)[0]


class TokenReference(ExactReference):
    """A normalization that treats every token by itself; padding has no meaning for it."""

    padding_takes_part = True

    def token(self, x: Array, p: dict[str, Array]) -> Array:
        """y (C,) of one token x (C,), p its parameters."""
        raise NotImplementedError

    def normalize(self, x, pad, parameters, training):
        y = np.zeros(x.shape, dtype=np.result_type(x, *parameters.values()))
        for t, b in positions(pad):
            y[t, b] = self.token(x[t, b], parameters)
        return y, 0.0


def derivative(function: Callable[[Array], complex], at: Array) -> Array:
    """Gradient of a real scalar function by complex steps: imag f(x + ih) / h.

    As central differences, but without their rounding error: no difference is taken, so h may be
    tiny and every digit counts. A part of `function` that takes .real holds that part constant.
    """
    h = 1e-30
    gradient = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        shifted = np.array(at, dtype=complex)
        shifted[index] += 1j * h
        gradient[index] = np.imag(function(shifted)) / h
    return gradient


def positions(pad: Array) -> Iterator[tuple[int, int]]:
    """(t, b) of every position, padding included."""
    for b in range(pad.shape[0]):
        for t in range(pad.shape[1]):
            yield t, b


def token_positions(pad: Array) -> list[tuple[int, int]]:
    """(t, b) of every real token."""
    return [(t, b) for t, b in positions(pad) if not pad[b, t]]


def mean_over(values: Array, where: list[tuple[int, int]]) -> Array:
    """Mean (C,) of values (T, B, C) over the given positions; there must be one."""
    total = np.zeros(values.shape[-1], dtype=values.dtype)
    for t, b in where:
        total = total + values[t, b]
    return total / len(where)


def standardize(x: Array, eps: float) -> Array:
    """(x - mean) / sqrt(var + eps) over the entries of x, biased variance."""
    mean = sum(x) / len(x)
    var = sum((entry - mean) ** 2 for entry in x) / len(x)
    return (x - mean) / np.sqrt(var + eps)


def affine(x_hat: Array, parameters: dict[str, Array]) -> Array:
    """w x_hat + b at every position."""
    y = np.zeros_like(x_hat)
    for t in range(x_hat.shape[0]):
        for b in range(x_hat.shape[1]):
            y[t, b] = parameters["weight"] * x_hat[t, b] + parameters["bias"]
    return y


def affine_gradients(gy: Array, x_hat: Array, where: list[tuple[int, int]]) -> dict[str, Array]:
    """Gradients of w and b, summed over the given positions."""
    weight, bias = np.zeros(gy.shape[-1]), np.zeros(gy.shape[-1])
    for t, b in where:
        weight = weight + gy[t, b] * x_hat[t, b]
        bias = bias + gy[t, b]
    return {"weight": weight, "bias": bias}
