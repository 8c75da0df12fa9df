"""PN-V, PN (Algorithm 2) and PN as its authors released it."""

import numpy as np

from normexp.norms.reference.base import (
    Array,
    ExactReference,
    Reference,
    Step,
    mean_over,
    positions,
    real_positions,
    reference_of,
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
        psi2 = mean_over(x**2, real_positions(pad)) if training else self.state["running_psi2"]
        y = np.zeros(x.shape, dtype=np.result_type(x, *parameters.values()))
        for t, b in positions(pad):
            x_hat = x[t, b] / np.sqrt(psi2 + self.eps)
            y[t, b] = parameters["weight"] * x_hat + parameters["bias"]
        return y, 0.0

    def advance(self, x, pad):
        if real_positions(pad):
            psi2_batch = mean_over(x**2, real_positions(pad))
            psi2 = self.state["running_psi2"]
            self.state["running_psi2"] = self.alpha * psi2 + (1 - self.alpha) * psi2_batch
            self.state["step"] = self.state["step"] + 1


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


@reference_of("power")
class Power(Reference):
    """Shen et al. (2020), Algorithm 2; the first warmup_steps steps as PN-V.

    bound_nu: the pace p of nu is 1 - alpha_bwd or 1 / Gamma, whichever is less, per channel.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bwd: float = 0.9,
        warmup_steps: int = 4000,
        bound_nu: bool = False,
        sync: bool = False,
    ):
        super().__init__(num_features)
        self.eps, self.alpha_fwd, self.alpha_bwd = eps, alpha_fwd, alpha_bwd
        self.warmup_steps, self.bound_nu = warmup_steps, bound_nu
        self.state = {
            "running_psi2": np.ones(num_features),
            "nu": np.zeros(num_features),
            "step": np.array(0),
        }

    def train_step(self, x, pad, gy):
        real = real_positions(pad)
        before = self.state["running_psi2"]
        psi2_batch = mean_over(x**2, real)
        in_warmup = self.state["step"] < self.warmup_steps
        psi2 = psi2_batch if in_warmup else before
        x_hat = x / np.sqrt(psi2 + self.eps)
        self.state["running_psi2"] = self.alpha_fwd * before + (1 - self.alpha_fwd) * psi2_batch
        self.state["step"] = self.state["step"] + 1

        g = self.parameters["weight"] * gy
        nu = self.state["nu"]
        gamma, lam = mean_over(x_hat * x_hat, real), mean_over(g * x_hat, real)
        gx = np.zeros_like(x)
        for t, b in real:
            x_tilde = g[t, b] - (lam if in_warmup else nu) * x_hat[t, b]
            gx[t, b] = x_tilde / np.sqrt(psi2 + self.eps)
        pace = np.full(len(nu), 1 - self.alpha_bwd)
        if self.bound_nu:
            for c in range(len(nu)):
                if pace[c] * gamma[c] > 1:
                    pace[c] = 1 / gamma[c]
        self.state["nu"] = nu * (1 - pace * gamma) + pace * lam
        return Step(affine(x_hat, self.parameters), gx, affine_gradients(gy, x_hat, real))

    def infer(self, x, pad):
        return affine(x / np.sqrt(self.state["running_psi2"] + self.eps), self.parameters)


@reference_of("power_released")
class PowerReleased(Reference):
    """The authors' released layer: group scaling, double averaging, e in place of nu."""

    padding_takes_part = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bwd: float = 0.9,
        warmup_steps: int = 10000,
        num_groups: int = 1,
        sync: bool = False,
    ):
        super().__init__(num_features)
        self.eps, self.alpha_fwd, self.alpha_bwd = eps, alpha_fwd, alpha_bwd
        self.warmup_steps, self.num_groups = warmup_steps, num_groups
        self.state = {
            "running_psi2": np.ones(num_features),
            "e": np.zeros(num_features),
            "step": np.array(0),
        }

    def group_rms(self, token: Array) -> Array:
        """Root mean square (C,) of each channel's group in one token (C,)."""
        size = len(token) // self.num_groups
        rms = np.zeros(len(token))
        for c in range(len(token)):
            first = c // size * size
            rms[c] = np.sqrt(sum(token[first : first + size] ** 2) / size + self.eps)
        return rms

    def scaled(self, x: Array) -> Array:
        z = np.zeros_like(x)
        for t in range(x.shape[0]):
            for b in range(x.shape[1]):
                z[t, b] = x[t, b] / self.group_rms(x[t, b])
        return z

    def through_scaling(self, x: Array, gz: Array) -> Array:
        """Gradient at a token x (C,) from the gradient gz (C,) at the scaled token.

        d z_i / d x_j = [i = j] / r - x_i x_j / (size r^3) within a group.
        """
        size = len(x) // self.num_groups
        rms = self.group_rms(x)
        gx = np.zeros_like(x)
        for j in range(len(x)):
            for i in range(len(x)):
                if i // size == j // size:
                    gx[j] += gz[i] * ((i == j) / rms[j] - x[i] * x[j] / (size * rms[j] ** 3))
        return gx

    def train_step(self, x, pad, gy):
        everywhere, real = list(positions(pad)), real_positions(pad)
        z = self.scaled(x)
        step = self.state["step"] + 1
        running = self.state["running_psi2"]
        psi2_batch = mean_over(z**2, real)
        x_hat = z / np.sqrt((psi2_batch if step <= self.warmup_steps else running) + self.eps)
        if step < self.warmup_steps:
            running = running * (step - 1) / step + psi2_batch / step
        self.state["running_psi2"] = self.alpha_fwd * running + (1 - self.alpha_fwd) * psi2_batch
        self.state["step"] = step

        g = self.parameters["weight"] * gy
        x_tilde = g - (1 - self.alpha_bwd) * self.state["e"] * x_hat
        gx = np.zeros_like(x)
        for t, b in everywhere:
            gz = x_tilde[t, b] / np.sqrt(psi2_batch + self.eps)
            gx[t, b] = self.through_scaling(x[t, b], gz)
        self.state["e"] = self.state["e"] + mean_over(x_tilde * x_hat, everywhere)
        return Step(affine(x_hat, self.parameters), gx, affine_gradients(gy, x_hat, everywhere))

    def infer(self, x, pad):
        x_hat = self.scaled(x) / np.sqrt(self.state["running_psi2"] + self.eps)
        return affine(x_hat, self.parameters)
