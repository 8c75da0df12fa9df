"""PN: power normalization, the paper's Algorithm 2."""

from typing import Any

import torch
from torch import Tensor

from normexp.norms.core import option_checks
from normexp.norms.core.averaging import average_
from normexp.norms.core.replay_cache import RecentForwards, recomputing
from normexp.norms.distributed.collectives import pooled_mean, sum_over_ranks
from normexp.norms.distributed.deferred import EXCHANGE
from normexp.norms.power_ranks import step_of_ranks
from normexp.norms.quadratic_norm import QuadraticNorm
from normexp.norms.registry import register_norm
from normexp.norms.running_norm import NATIVE_SOURCES, operators


@register_norm("power")
class PowerNorm(QuadraticNorm):
    """PN, Algorithm 2 of the paper, one iteration per forward and backward in training mode.

    forward, with the running statistic of before this step:
        x_hat = x / sqrt(psi2_(t-1) + eps),  y = w x_hat + b
        psi2_t = alpha_fwd psi2_(t-1) + (1 - alpha_fwd) psi2_B,  psi2_B = mean_N(x^2)
    backward, g = w dL/dy, p = 1 - alpha_bwd:
        dL/dx = (g - nu_(t-1) x_hat) / sqrt(psi2_(t-1) + eps)
        nu_t = nu_(t-1) (1 - p Gamma) + p Lambda
        Gamma = mean_N(x_hat^2),  Lambda = mean_N(g x_hat)
    warm-up: in the first `warmup_steps` steps psi2_B normalizes and the gradient is PN-V's exact
    one, while psi2 and nu are averaged already, so that both mean something when they take over.
    inference: y = w x / sqrt(psi2 + eps) + b.

    The backward is deliberately not the derivative of the forward, so gradient checkers fail after
    warm-up, and it changes state: it reads nu when it runs, and every backward, also a second one
    through a retained graph, advances nu once. The psi2 it divides by is its own forward's.
    In training, padded positions are zeros in x and y and influence nothing, nor do gradients
    there. RunningNorm tells the other rules of the state. nu has the scale of g: a constant factor
    of the loss cancels, one that changes (float16's loss scale) has to be told by
    loss_scale.follow_loss_scale. With a loss that is the mean over a batch's tokens, g also
    changes with their number; the sum, which fairseq differentiates, is what suits nu.

    Why nu can run away: its recursion shrinks nu only while 0 < p Gamma < 2, and
    Gamma = psi2_B / (psi2_(t-1) + eps) has no bound. A batch with Gamma > 2 / p (20 by default)
    multiplies nu by |1 - p Gamma| > 1, and in the batches after it psi2 is too large, Gamma
    almost 0, and nothing shrinks nu again. Where E log|1 - p Gamma| > 0 over the batches, nu grows
    without bound although every single batch is finite. A larger alpha_bwd helps because it
    lowers p, and the released code's group scaling because it bounds psi2_B. bound_nu=True takes
    p = min(1 - alpha_bwd, 1 / Gamma) per channel instead: the same as Algorithm 2 while
    (1 - alpha_bwd) Gamma <= 1; beyond, nu_t = Lambda / Gamma. Then nu_t is always a weighted mean
    of nu_(t-1) and Lambda / Gamma, so |nu_t| <= max(|nu_(t-1)|, sqrt(mean_N(g^2) / Gamma)).
    """

    native_source = NATIVE_SOURCES / "power.cpp"
    averages_of_gradients = ("nu",)

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
        super().__init__(num_features, eps, sync)
        option_checks.decay(alpha_fwd=alpha_fwd, alpha_bwd=alpha_bwd)
        option_checks.count(warmup_steps=warmup_steps)
        option_checks.flag(bound_nu=bound_nu)
        self.alpha_fwd, self.alpha_bwd = alpha_fwd, alpha_bwd
        self.warmup_steps, self.bound_nu = warmup_steps, bound_nu
        self.register_buffer("running_psi2", torch.ones(num_features))
        self.register_buffer("nu", torch.zeros(num_features))
        self._warm = False
        self._recent_of_ranks = RecentForwards()

    def _kernel_step(self, operators: Any, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        recalled = self._recalled(x, padding_mask)
        y, squares, taken = operators.power(
            x,
            padding_mask,
            *(self.weight, self.bias, self.running_psi2, self.nu, self.step, self.rejected),
            recalled,
            *(self.eps, self.alpha_fwd, self.alpha_bwd, self.warmup_steps, self.bound_nu),
        )
        if recalled is None:
            self._recent.remember(squares, taken)
        return y

    def _step_of_ranks(self, kernels: str, x: Tensor, padding_mask: Tensor | None) -> Tensor | None:
        again = None
        if recomputing() and kernels != "plain":
            again = self._recent_of_ranks.find(self._squares(x, padding_mask))
        # A repeated forward needs nothing of the state.
        if again is None:
            if EXCHANGE.owes((self, "psi2")) or EXCHANGE.owes((self, "nu")):
                EXCHANGE.complete()
            # Not found, the forward that is repeated was still in the warm-up.
            if kernels == "plain" or recomputing() or not self._past_warmup():
                return None
        self._computed_by(kernels)
        return step_of_ranks(self, operators(kernels), x.contiguous(), padding_mask, again)

    def _past_warmup(self) -> bool:
        # On a GPU reading waits for it: no more once it is so.
        if not self._warm or self.step.device.type == "cpu":
            self._warm = int(self.step) >= self.warmup_steps
        return self._warm

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._warm = False

    @torch.no_grad()
    def _step(self, squares: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        """One iteration's forward: psi2 to divide by, Gamma, whether in warm-up, N of all ranks."""
        if recomputing():
            return self._recent.recall(squares)
        psi2_batch, n = pooled_mean(squares, n, self.sync)
        in_warmup = self.step < self.warmup_steps
        psi2 = torch.where(in_warmup, psi2_batch, self.running_psi2.to(squares.dtype))
        gamma = psi2_batch / (psi2 + self.eps)
        self._recent.remember(squares, psi2, gamma, in_warmup, n)
        usable = self._usable(n, psi2_batch)
        average_(self.running_psi2, psi2_batch, 1 - self.alpha_fwd, usable)
        self.step += usable
        return psi2, gamma, in_warmup, n

    def _step_backward(
        self, products: Tensor, gamma: Tensor, in_warmup: Tensor, n: Tensor
    ) -> Tensor:
        """One iteration's backward; advances nu."""
        lam = sum_over_ranks(products, self.sync) / n.clamp(min=1)
        # During warm-up psi2 is the batch's own and the exact gradient (PN-V's) is at hand.
        correction = torch.where(in_warmup, lam, self.nu.to(lam.dtype))
        self._advance_nu(lam, gamma, n)
        return correction

    def _advance_nu(self, lam: Tensor, gamma: Tensor, n: Tensor) -> None:
        """From Lambda and Gamma (C,) of an iteration with n real tokens."""
        pace = gamma.new_full((), 1 - self.alpha_bwd)
        if self.bound_nu:
            pace = torch.minimum(pace, 1 / gamma)
        nu = self.nu * (1 - pace * gamma) + pace * lam
        self.nu.copy_(torch.where(self._usable(n, nu), nu, self.nu))

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        EXCHANGE.settle()
        return torch.rsqrt(self.running_psi2 + self.eps) * self.weight, self.bias

    def statistics(self) -> dict[str, Tensor]:
        EXCHANGE.settle()
        return {"psi2": self.running_psi2, "nu": self.nu}

    def retained(self, first: Tensor, last: Tensor) -> Tensor:
        return self.alpha_fwd ** (last - first)
