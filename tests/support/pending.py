"""References whose forwards may be several before their backwards, in any order.

Layers with an exact gradient need nothing of the kind: the order of backwards is nothing to them.
"""

from collections.abc import Sequence

import numpy as np

from normexp.norms.reference import Reference, build_reference
from normexp.norms.reference.power import Power
from normexp.norms.reference.power_released import PowerReleased
from normexp.norms.reference.unified import Unified
from support.batches import Batch


class PendingPower(Power):
    """Algorithm 2 with the forward and the backward of an iteration apart."""

    def forward(self, of: Batch) -> tuple:
        x = of.x[of.token_mask]
        psi2_batch, before = (x**2).mean(0), self.state["running_psi2"]
        in_warmup = self.state["step"] < self.warmup_steps
        divisor = np.sqrt((psi2_batch if in_warmup else before) + self.eps)
        self.state["running_psi2"] = self.alpha_fwd * before + (1 - self.alpha_fwd) * psi2_batch
        self.state["step"] = self.state["step"] + 1
        return of, x / divisor, divisor, in_warmup

    def backward(self, saved: tuple) -> np.ndarray:
        of, x_hat, divisor, in_warmup = saved
        g, nu = self.parameters["weight"] * of.gy[of.token_mask], self.state["nu"]
        gamma, lam = (x_hat**2).mean(0), (g * x_hat).mean(0)
        gx = np.zeros_like(of.x)
        gx[of.token_mask] = (g - (lam if in_warmup else nu) * x_hat) / divisor
        pace = 1 - self.alpha_bwd
        if self.bound_nu:
            pace = np.minimum(pace, 1 / gamma)
        self.state["nu"] = nu - pace * gamma * nu + pace * lam
        return gx


class PendingPowerReleased(PowerReleased):
    """PN as released, its forward and its backward apart."""

    def forward(self, of: Batch) -> tuple:
        z = self.scaled(of.x)
        psi2_batch, running = (z[of.token_mask] ** 2).mean(0), self.state["running_psi2"]
        step = self.state["step"] = self.state["step"] + 1
        x_hat = z / np.sqrt((psi2_batch if step <= self.warmup_steps else running) + self.eps)
        if step < self.warmup_steps:
            running = (running * (step - 1) + psi2_batch) / step
        self.state["running_psi2"] = self.alpha_fwd * running + (1 - self.alpha_fwd) * psi2_batch
        return of, x_hat, np.sqrt(psi2_batch + self.eps)

    def backward(self, saved: tuple) -> np.ndarray:
        of, x_hat, divisor = saved
        x_tilde = self.parameters["weight"] * of.gy
        x_tilde = x_tilde - (1 - self.alpha_bwd) * self.state["e"] * x_hat
        self.state["e"] = self.state["e"] + (x_tilde * x_hat).mean((0, 1))
        gx = np.zeros_like(of.x)
        for t, b in np.ndindex(of.x.shape[:2]):
            gx[t, b] = self.through_scaling(of.x[t, b], x_tilde[t, b] / divisor)
        return gx


class PendingUnified(Unified):
    """Unified normalization, its forward and its backward apart."""

    def forward(self, of: Batch) -> tuple:
        psi2_batch, running = (of.x[of.token_mask] ** 2).mean(0), self.state["running_psi2"]
        step = self.state["step"] = self.state["step"] + 1
        slot, window = step % self.window_size, self.state["psi2_window"]
        before = window.copy()
        window[slot] = psi2_batch
        direct = step <= self.window_size or step < self.warmup_steps
        skip = self.outlier_filtration and not direct and self.is_outlier(before, window)
        if skip:
            window[slot] = running
            self.state["skipped"] = self.state["skipped"] + 1
        v = psi2_batch if direct or skip else np.exp(np.log(window).mean(0))
        r = np.ones_like(v)
        if step > max(1000, self.warmup_steps) and not skip:
            r = np.clip(np.sqrt((v + self.eps) / (running + self.eps)), 1 / 5, 5)
        self.state["running_psi2"] = self.momentum * running + (1 - self.momentum) * v
        return of, np.sqrt(v + self.eps), r, direct or skip, skip, slot

    def backward(self, saved: tuple) -> np.ndarray:
        of, divisor, r, direct, skip, slot = saved
        x_hat, g = of.x / divisor, r * self.parameters["weight"] * of.gy
        lam = (g * x_hat).mean((0, 1))
        self.state["lambda_window"][slot] = self.state["e"] if skip else lam
        chosen = lam if direct else self.state["lambda_window"].mean(0)
        self.state["e"] = self.momentum * self.state["e"] + (1 - self.momentum) * chosen
        return (g - (chosen if skip else self.state["e"]) * x_hat) / divisor


PENDING = {
    "power": PendingPower,
    "power_released": PendingPowerReleased,
    "unified": PendingUnified,
}


def all_forwards_first(
    name: str, reference: Reference, batches: Sequence[Batch], order: Sequence[int]
) -> list[np.ndarray]:
    """Forward of every batch, then their backwards in `order`: the gradients at x, by batch."""
    if name not in PENDING:
        return [reference.train_step(of.x, of.pad, of.gy).gx for of in batches]
    saved = [reference.forward(of) for of in batches]
    gradients = {i: reference.backward(saved[i]) for i in order}
    return [gradients[i] for i in range(len(batches))]


def reference_like(name: str, norm: object, **options: object) -> Reference:
    """A reference with parameters and state of the layer."""
    reference = build_reference(name, norm.num_features, **options)
    if name in PENDING:
        reference = PENDING[name](norm.num_features, **options)
    for what, parameter in norm.named_parameters():
        reference.parameters[what] = parameter.detach().numpy().copy()
    for what in reference.state:
        reference.state[what] = getattr(norm, what).numpy().copy()
    return reference
