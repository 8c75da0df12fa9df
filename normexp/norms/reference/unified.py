"""UN, token by token in numpy."""

import numpy as np

from normexp.norms.reference.base import (
    Reference,
    Step,
    affine,
    affine_gradients,
    mean_over,
    positions,
    reference_of,
    token_positions,
)


@reference_of("unified")
class Unified(Reference):
    """Yang et al., "Unified Normalization for Accelerating and Stabilizing Transformers" (2022).

    `skipped` counts the batches that outlier filtration let pass by the window.
    """

    padding_takes_part = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.9,
        window_size: int = 4,
        warmup_steps: int = 4000,
        outlier_filtration: bool = False,
        sync: bool = False,
    ):
        super().__init__(num_features)
        self.eps, self.momentum, self.window_size = eps, momentum, window_size
        self.warmup_steps, self.outlier_filtration = warmup_steps, outlier_filtration
        self.state = {
            "running_psi2": np.ones(num_features),
            "e": np.zeros(num_features),
            "psi2_window": np.zeros((window_size, num_features)),
            "lambda_window": np.zeros((window_size, num_features)),
            "step": np.array(0),
            "skipped": np.array(0),
        }

    def is_outlier(self, before: np.ndarray, after: np.ndarray) -> bool:
        """Whether the window with this batch, `after`, spreads more than `before` lets expect."""
        m = self.window_size
        for c in range(before.shape[1]):
            arithmetic = sum(after[:, c]) / m
            geometric = np.prod(after[:, c] ** (1 / m))
            roots = [np.sqrt(value) for value in before[:, c]]
            mean = sum(roots) / m
            variance = sum((root - mean) ** 2 for root in roots) / m
            if arithmetic - geometric > m * variance:
                return True
        return False

    def train_step(self, x, pad, gy):
        everywhere, tokens = list(positions(pad)), token_positions(pad)
        m, keep, state = self.window_size, self.momentum, self.state
        state["step"] = step = state["step"] + 1
        slot = step % m
        running = state["running_psi2"]
        psi2_batch = mean_over(x**2, tokens)

        before = state["psi2_window"].copy()
        state["psi2_window"][slot] = psi2_batch
        by_batch = step <= m or step < self.warmup_steps
        skip = (
            self.outlier_filtration
            and not by_batch
            and self.is_outlier(before, state["psi2_window"])
        )
        if skip:
            state["psi2_window"][slot] = running
            state["skipped"] = state["skipped"] + 1
        if by_batch or skip:
            v = psi2_batch
        else:
            v = np.ones(x.shape[-1])
            for row in state["psi2_window"]:
                v = v * row ** (1 / m)
        x_hat = x / np.sqrt(v + self.eps)
        r = np.ones(x.shape[-1])
        if step > max(1000, self.warmup_steps) and not skip:
            r = np.clip(np.sqrt(v + self.eps) / np.sqrt(running + self.eps), 1 / 5, 5)
        state["running_psi2"] = keep * running + (1 - keep) * v

        g = r * self.parameters["weight"] * gy
        lambda_ = mean_over(g * x_hat, everywhere)
        state["lambda_window"][slot] = state["e"] if skip else lambda_
        smoothed = lambda_ if by_batch or skip else sum(state["lambda_window"]) / m
        state["e"] = keep * state["e"] + (1 - keep) * smoothed
        gx = np.zeros_like(x)
        for t, b in everywhere:
            x_tilde = g[t, b] - (smoothed if skip else state["e"]) * x_hat[t, b]
            gx[t, b] = x_tilde / np.sqrt(v + self.eps)
        gradients = affine_gradients(gy, r * x_hat, everywhere)
        return Step(affine(x_hat, self.parameters), gx, gradients)

    def infer(self, x, pad):
        return affine(x / np.sqrt(self.state["running_psi2"] + self.eps), self.parameters)
