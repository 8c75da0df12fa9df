"""PN (the paper's Algorithm 2), token by token in numpy."""

import numpy as np

from normexp.norms.reference.base import (
    Reference,
    Step,
    affine,
    affine_gradients,
    mean_over,
    reference_of,
    token_positions,
)


@reference_of("power")
class Power(Reference):
    """Shen et al. (2020), Algorithm 2; the first warmup_steps steps as PN-V.

    bound_nu: the update rate p of nu is 1 - alpha_bwd or 1 / Gamma, whichever is less, per channel.
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
        # Forward: divide by the statistic of before this step, then average the batch's own in.
        tokens = token_positions(pad)
        before = self.state["running_psi2"]
        psi2_batch = mean_over(x**2, tokens)
        in_warmup = self.state["step"] < self.warmup_steps
        psi2 = psi2_batch if in_warmup else before
        x_hat = x / np.sqrt(psi2 + self.eps)
        self.state["running_psi2"] = self.alpha_fwd * before + (1 - self.alpha_fwd) * psi2_batch
        self.state["step"] = self.state["step"] + 1

        # Backward: correct the gradient by nu of before this step, then advance nu.
        g = self.parameters["weight"] * gy
        nu = self.state["nu"]
        gamma, lambda_ = mean_over(x_hat * x_hat, tokens), mean_over(g * x_hat, tokens)
        gx = np.zeros_like(x)
        for t, b in tokens:
            x_tilde = g[t, b] - (lambda_ if in_warmup else nu) * x_hat[t, b]
            gx[t, b] = x_tilde / np.sqrt(psi2 + self.eps)
        update_rate = np.full(len(nu), 1 - self.alpha_bwd)
        if self.bound_nu:
            for c in range(len(nu)):
                if update_rate[c] * gamma[c] > 1:
                    update_rate[c] = 1 / gamma[c]
        self.state["nu"] = nu * (1 - update_rate * gamma) + update_rate * lambda_
        return Step(affine(x_hat, self.parameters), gx, affine_gradients(gy, x_hat, tokens))

    def infer(self, x, pad):
        return affine(x / np.sqrt(self.state["running_psi2"] + self.eps), self.parameters)
