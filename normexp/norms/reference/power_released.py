"""PN as released, token by token in numpy."""

import numpy as np

from normexp.norms.reference.base import (
    Array,
    Reference,
    Step,
    affine,
    affine_gradients,
    mean_over,
    positions,
    reference_of,
    token_positions,
)


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
        everywhere, tokens = list(positions(pad)), token_positions(pad)
        z = self.scaled(x)
        step = self.state["step"] + 1
        running = self.state["running_psi2"]
        psi2_batch = mean_over(z**2, tokens)
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
