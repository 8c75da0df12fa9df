"""PN: power normalization, the paper's Algorithm 2."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normexp.norms.core.averaging import average_
from normexp.norms.core.option_checks import check_count, check_decay, check_flag
from normexp.norms.core.replay_cache import ReplayCache, in_recomputation, may_be_repeated
from normexp.norms.distributed.collectives import pooled_mean, sum_over_ranks
from normexp.norms.distributed.deferred import DEFERRED
from normexp.norms.kernels.dispatch import native_operator
from normexp.norms.kernels.native import NATIVE_SOURCES
from normexp.norms.power_v import QuadraticNorm
from normexp.norms.registry import register_norm


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
    there. RunningNorm lists the other rules of the state. nu has the scale of g: a constant factor
    of the loss cancels; after a change of that factor (float16's loss scale) call
    follow_loss_scale. With a loss that is the mean over a batch's tokens, g also changes with
    their number; the sum, which fairseq differentiates, is what suits nu.

    Why nu can run away: its recursion shrinks nu only while 0 < p Gamma < 2, and
    Gamma = psi2_B / (psi2_(t-1) + eps) has no bound. A batch with Gamma > 2 / p (20 by default)
    multiplies nu by |1 - p Gamma| > 1, and in the batches after it psi2 is too large, Gamma
    almost 0, and nothing shrinks nu again. Where E log|1 - p Gamma| > 0 over the batches, nu grows
    without bound although every single batch is finite. A larger alpha_bwd helps because it
    lowers p, and the released code's group scaling because it bounds psi2_B. bound_nu=True takes
    p = min(1 - alpha_bwd, 1 / Gamma) per channel instead: the same as Algorithm 2 while
    (1 - alpha_bwd) Gamma <= 1; beyond, nu_t = Lambda / Gamma. Then nu_t is always a weighted mean
    of nu_(t-1) and Lambda / Gamma, so |nu_t| <= max(|nu_(t-1)|, sqrt(mean_N(g^2) / Gamma)).

    Reference: normexp/norms/reference/power.py
    Proof: pytest tests/norms/test_references.py -k "power]"
    Number: results/README.md: multi30k, ptb (PN)
    """

    native_source = NATIVE_SOURCES / "power.cpp"
    has_triton_kernel = True
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
        check_decay(alpha_fwd=alpha_fwd, alpha_bwd=alpha_bwd)
        check_count(warmup_steps=warmup_steps)
        check_flag(bound_nu=bound_nu)
        self.alpha_fwd, self.alpha_bwd = alpha_fwd, alpha_bwd
        self.warmup_steps, self.bound_nu = warmup_steps, bound_nu
        self.register_buffer("running_psi2", torch.ones(num_features))
        self.register_buffer("nu", torch.zeros(num_features))
        self._is_warm = False
        self._deferred_cache = ReplayCache()

    # --- Algorithm 2 per channel; PowerNormFunction in power_v.py applies it to the tokens

    @torch.no_grad()
    def _step(self, sum_sq: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        """One iteration's forward: psi2 to divide by, Gamma, whether in warm-up, N of all ranks."""
        if in_recomputation():
            return self._replay_cache.replay(sum_sq)
        psi2_batch, n = pooled_mean(sum_sq, n, self.sync, self)
        in_warmup = self.step < self.warmup_steps
        psi2 = torch.where(in_warmup, psi2_batch, self.running_psi2.to(sum_sq.dtype))
        gamma = psi2_batch / (psi2 + self.eps)
        self._replay_cache.store(sum_sq, psi2, gamma, in_warmup, n)
        self._advance_psi2(psi2_batch, n)
        return psi2, gamma, in_warmup, n

    def _step_backward(
        self, products: Tensor, gamma: Tensor, in_warmup: Tensor, n: Tensor
    ) -> Tensor:
        """One iteration's backward: the correction (C,); advances nu."""
        lambda_ = sum_over_ranks(products, self.sync) / n.clamp(min=1)
        # During warm-up psi2 is the batch's own, and Lambda gives the exact gradient (PN-V's).
        correction = torch.where(in_warmup, lambda_, self.nu.to(lambda_.dtype))
        self._advance_nu(lambda_, gamma, n)
        return correction

    def _advance_psi2(self, psi2_batch: Tensor, n: Tensor) -> None:
        """psi2_(t-1) -> psi2_t, from psi2_B (C,) of n real tokens; counts the step."""
        usable = self._is_finite_batch(n, psi2_batch)
        average_(self.running_psi2, psi2_batch, 1 - self.alpha_fwd, usable)
        self.step += usable

    def _advance_nu(self, lambda_: Tensor, gamma: Tensor, n: Tensor) -> None:
        """nu_(t-1) -> nu_t, from Lambda and Gamma (C,) of an iteration with n real tokens."""
        update_rate = gamma.new_full((), 1 - self.alpha_bwd)
        if self.bound_nu:
            update_rate = torch.minimum(update_rate, 1 / gamma)
        nu = self.nu * (1 - update_rate * gamma) + update_rate * lambda_
        self.nu.copy_(torch.where(self._is_finite_batch(n, nu), nu, self.nu))

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        return torch.rsqrt(self.settled("running_psi2") + self.eps) * self.weight, self.bias

    def statistics(self) -> dict[str, Tensor]:
        return {"psi2": self.settled("running_psi2"), "nu": self.settled("nu")}

    def decay_over(self, first: Tensor, last: Tensor) -> Tensor:
        return self.alpha_fwd ** (last - first)

    # --- The same by a kernel

    def _train_native(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        if may_be_repeated():
            return self._train_kernel(torch.ops.normexp, x, padding_mask)
        return native_operator("power_once")(
            x,
            padding_mask,
            *self._parameters_and("running_psi2", "nu", "step", "num_rejected"),
            *(self.eps, self.alpha_fwd, self.alpha_bwd, self.warmup_steps, self.bound_nu),
        )

    def _train_kernel(self, operators: Any, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        replayed = self._replayed(x, padding_mask)
        y, sum_sq, saved = operators.power(
            x,
            padding_mask,
            *self._parameters_and("running_psi2", "nu", "step", "num_rejected"),
            replayed,
            *(self.eps, self.alpha_fwd, self.alpha_bwd, self.warmup_steps, self.bound_nu),
        )
        if replayed is None:
            self._replay_cache.store(sum_sq, saved)
        return y

    # --- The same over several ranks, without waiting for them

    def _train_deferred(
        self, operators: Any, x: Tensor, padding_mask: Tensor | None
    ) -> Tensor | None:
        """After the warm-up neither y nor dL/dx depends on this step's sums over the ranks.

        Both follow from the state of before the step. The kernels of a single rank compute them on
        a copy of the state that is thrown away; the sums over the rank's tokens that they return
        go to `DEFERRED`, and the totals advance the true state before the layer's next step.
        """
        replayed = None
        if in_recomputation() and operators is not None:
            replayed = self._deferred_cache.lookup(self._sum_sq(x, padding_mask))
        # A repeated forward needs nothing of the state.
        if replayed is None:
            if DEFERRED.pending((self, "psi2")) or DEFERRED.pending((self, "nu")):
                DEFERRED.flush()
            # Not in the cache, the forward that is repeated was still in the warm-up.
            if operators is None or in_recomputation() or not self._past_warmup():
                return None
        return self._deferred_iteration(operators, x.contiguous(), padding_mask, replayed)

    def _deferred_iteration(
        self, operators: Any, x: Tensor, padding_mask: Tensor | None, replayed: tuple | None
    ) -> Tensor:
        """x (T, B, C) or (N, C), contiguous -> y; replayed: what the repeated forward has saved.

        nu advances in backward passes that reach the layer's weight, as those of `.backward()` do.
        """
        saved, iteration = replayed or (None, None)
        nu = self.nu.clone()
        copies = self.running_psi2.clone(), nu, self.step.clone(), self.num_rejected.clone()
        weight = self.weight if self.weight.requires_grad else self.weight.detach().requires_grad_()
        # In bfloat16 its gradient, of which nu is made, would have eight bits. Never the parameter
        # itself: a hook on it would stay.
        weight = weight.float() if weight.dtype == torch.bfloat16 else weight.view_as(weight)
        y, sum_sq, saved = operators.power(
            *(x, padding_mask, weight, self.bias, *copies, saved),
            *(self.eps, self.alpha_fwd, self.alpha_bwd, 0, self.bound_nu),
        )
        if iteration is None:
            iteration = _Iteration()
            partial_sums = torch.cat([sum_sq, saved[-1:].to(sum_sq.dtype)])
            use = functools.partial(self._finish_forward, iteration)
            DEFERRED.add((self, "psi2"), partial_sums, use)
            self._deferred_cache.store(sum_sq, saved, iteration)
        if y.requires_grad:

            def before_backward(_: Tensor) -> None:
                if DEFERRED.pending((self, "nu")):  # another backward of this layer came before
                    DEFERRED.flush()
                nu.copy_(self.nu)

            def after_backward(d_weight: Tensor) -> None:
                products = d_weight.detach() * weight.detach()
                use = functools.partial(self._finish_backward, iteration)
                DEFERRED.add((self, "nu"), products, use)

            y.register_hook(before_backward)
            weight.register_hook(after_backward)
        return y

    @torch.no_grad()
    def _finish_forward(self, iteration: "_Iteration", total: Tensor) -> None:
        """total (C + 1,): sums of x^2 and the number of tokens, of all ranks."""
        total = total.to(self.running_psi2.device)  # the layer may have moved meanwhile
        iteration.n = total[-1]
        psi2_batch = total[:-1] / iteration.n.clamp(min=1)
        # The state is still that of the forward: the next one first flushes what is deferred.
        iteration.gamma = psi2_batch / (self.running_psi2 + self.eps)
        self._advance_psi2(psi2_batch, iteration.n)

    @torch.no_grad()
    def _finish_backward(self, iteration: "_Iteration", total: Tensor) -> None:
        """total (C,): sums of g x_hat, of all ranks."""
        total, gamma, n = (t.to(self.nu.device) for t in (total, iteration.gamma, iteration.n))
        self._advance_nu(total / n.clamp(min=1), gamma, n)

    def _past_warmup(self) -> bool:
        # Reading the step waits for a GPU; once past the warm-up it need not be read again.
        if not self._is_warm or self.step.device.type == "cpu":
            self._is_warm = int(self.step) >= self.warmup_steps
        return self._is_warm

    def _state_replaced(self) -> None:
        super()._state_replaced()
        self._is_warm = False


@dataclass
class _Iteration:
    """One deferred forward and its backward: N and Gamma (C,) of all ranks, once known."""

    n: Tensor | None = None
    gamma: Tensor | None = None
