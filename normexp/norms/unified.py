"""Unified normalization: power normalization by means over a window of batches."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normexp.norms.core.averaging import average_
from normexp.norms.core.masking import mask_padding_, num_tokens
from normexp.norms.core.option_checks import check_count, check_decay, check_flag, check_positive
from normexp.norms.core.replay_cache import in_recomputation, may_be_repeated
from normexp.norms.distributed.collectives import pooled_mean
from normexp.norms.kernels.dispatch import native_operator
from normexp.norms.kernels.native import NATIVE_SOURCES
from normexp.norms.registry import register_norm
from normexp.norms.running_norm import RunningNorm

_MOST_CORRECTION = 5.0
_STEPS_UNCORRECTED = 1000


@register_norm("unified")
class UnifiedNorm(RunningNorm):
    """UN (Yang et al., "Unified Normalization for Accelerating and Stabilizing ...", 2022).

    As their code computes it; s is the step, counted from 1, M the window_size, m the momentum.
    forward: psi2_B = mean_N(x^2) over the real tokens goes into slot s mod M of the window.
        V = psi2_B while s <= M or s < warmup_steps or the batch is skipped,
            else the geometric mean of the window
        x_hat = x / sqrt(V + eps),  y = w x_hat + b
        r = sqrt(V + eps) / sqrt(psi2 + eps), clamped to [1/5, 5], with psi2 of before this step;
            1 while s <= max(1000, warmup_steps) or skipped
        psi2 <- m psi2 + (1 - m) V
    backward: g = r w dL/dy; lambda = mean(g x_hat) over all T*B positions, padding included, goes
    into the slot of the second window (e instead, if skipped).
        Lambda = lambda while s <= M or s < warmup_steps or skipped, else the window's mean
        e <- m e + (1 - m) Lambda
        dL/dx = (g - e x_hat) / sqrt(V + eps), with Lambda instead of e if skipped
        dL/dw = sum r x_hat dL/dy over all positions
    inference: y = w x / sqrt(psi2 + eps) + b.
    outlier_filtration (off for text): after warm-up a batch is skipped when in any channel the
    arithmetic minus the geometric mean of the window exceeds M times the variance of sqrt(psi2_B)
    over the window as it was before; its slot then holds psi2. `skipped` counts these.

    Because of the means over all positions, training depends on how batches are padded. In a batch
    of padding only, V is psi2 and nothing corrects the gradient.
    Double differentiation is refused. RunningNorm lists the rules of the state.

    Reference: normexp/norms/reference/unified.py
    Proof: pytest tests/norms/test_references.py -k "unified]"
    Number: no training run of it is recorded
    """

    native_source = NATIVE_SOURCES / "unified.cpp"
    averages_of_gradients = ("e", "lambda_window")

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
        super().__init__(num_features, eps, sync)
        check_decay(momentum=momentum)
        check_count(window_size=window_size, warmup_steps=warmup_steps)
        check_positive(window_size=window_size)
        check_flag(outlier_filtration=outlier_filtration)
        self.momentum, self.window_size = momentum, window_size
        self.warmup_steps, self.outlier_filtration = warmup_steps, outlier_filtration
        self.register_buffer("running_psi2", torch.ones(num_features))
        self.register_buffer("e", torch.zeros(num_features))
        self.register_buffer("psi2_window", torch.zeros(window_size, num_features))
        self.register_buffer("lambda_window", torch.zeros(window_size, num_features))
        self.register_buffer("skipped", torch.zeros((), dtype=torch.long))

    def _train_torch(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        sum_sq = mask_padding_(tokens.detach().square(), token_mask).sum(0)
        saved = self._step(sum_sq, num_tokens(tokens, token_mask))
        return UnifiedNormFunction.apply(tokens, self.weight, self.bias, *saved, self)

    def _train_native(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        given = (
            x,
            padding_mask,
            *self._parameters_and(
                *("running_psi2", "e", "psi2_window", "lambda_window"),
                *("step", "num_rejected", "skipped"),
            ),
        )
        options = (
            *(self.eps, self.momentum, self.warmup_steps, _STEPS_UNCORRECTED, _MOST_CORRECTION),
            self.outlier_filtration,
        )
        if not may_be_repeated():
            return native_operator("unified_once")(*given, *options)
        replayed = self._replayed(x, padding_mask)
        y, sum_sq, saved = native_operator("unified")(*given, replayed, *options)
        if replayed is None:
            self._replay_cache.store(sum_sq, saved)
        return y

    @torch.no_grad()
    def _step(self, sum_sq: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        """V, r, whether lambda itself corrects, whether skipped, the slot (M, 1) and N.

        sum_sq (C,): sums of x^2 over the rank's n real tokens.
        """
        if in_recomputation():
            return self._replay_cache.replay(sum_sq)
        psi2_batch, n = pooled_mean(sum_sq, n, self.sync, self)
        usable = self._is_finite_batch(n, psi2_batch)
        step, running = self.step + 1, self.running_psi2
        slots = torch.arange(self.window_size, device=sum_sq.device)[:, None]
        slot = slots == step % self.window_size
        window = torch.where(slot, psi2_batch.to(running.dtype), self.psi2_window)
        geometric = window.log().mean(0).exp()
        early = (step <= self.window_size) | (step < self.warmup_steps)
        skip = torch.zeros_like(early)
        if self.outlier_filtration:
            spread = self.psi2_window.sqrt().var(0, correction=0)
            outlier = window.mean(0) - geometric > self.window_size * spread
            skip = ~early & outlier.any()
            window = torch.where(skip & slot, running, window)
        v = torch.where(early | skip, psi2_batch, geometric.to(sum_sq.dtype))
        v = torch.where(n > 0, v, running.to(sum_sq.dtype))
        ratio = torch.sqrt((v + self.eps) / (running + self.eps))
        ratio = ratio.clamp(1 / _MOST_CORRECTION, _MOST_CORRECTION).to(sum_sq.dtype)
        uncorrected = (step <= max(_STEPS_UNCORRECTED, self.warmup_steps)) | skip
        r = torch.where(uncorrected, 1.0, ratio)
        self._replay_cache.store(sum_sq, v, r, early | skip, skip, slot, n)

        self.psi2_window.copy_(torch.where(usable, window, self.psi2_window))
        average_(running, v, 1 - self.momentum, usable)
        self.step += usable
        self.skipped += skip & usable
        return v, r, early | skip, skip, slot, n

    def _step_backward(
        self, lambda_: Tensor, direct: Tensor, skip: Tensor, slot: Tensor, n: Tensor
    ) -> Tensor:
        """The factor of x_hat in the gradient, from lambda (C,); advances e and its window."""
        lambda_ = lambda_.to(self.e.dtype)
        window = torch.where(slot, torch.where(skip, self.e, lambda_), self.lambda_window)
        smoothed = torch.where(direct, lambda_, window.mean(0))
        e = torch.lerp(self.e, smoothed, 1 - self.momentum)
        usable = self._is_finite_batch(n, e)
        correction = torch.where(n > 0, torch.where(skip, smoothed, e), 0.0)
        self.e.copy_(torch.where(usable, e, self.e))
        self.lambda_window.copy_(torch.where(usable, window, self.lambda_window))
        return correction

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        return torch.rsqrt(self.running_psi2 + self.eps) * self.weight, self.bias

    def statistics(self) -> dict[str, Tensor]:
        return {"psi2": self.running_psi2, "e": self.e}

    def decay_over(self, first: Tensor, last: Tensor) -> Tensor:
        return self.momentum ** (last - first)


class UnifiedNormFunction(torch.autograd.Function):
    """y = w x_hat + b with the backward of unified normalization."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        v: Tensor,
        r: Tensor,
        direct: Tensor,
        skip: Tensor,
        slot: Tensor,
        n: Tensor,
        norm: UnifiedNorm,
    ) -> Tensor:
        inverse = torch.rsqrt(v + norm.eps)
        ctx.save_for_backward(tokens, weight, inverse, r, direct, skip, slot, n)
        ctx.norm = norm
        return torch.addcmul(bias.to(tokens.dtype), tokens, inverse * weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, inverse, r, *which, n = ctx.saved_tensors
        buf = gradient * tokens
        d_weight = buf.sum(0) * (r * inverse)
        positions = tokens.new_full((), tokens.shape[0])
        lambda_, _ = pooled_mean(d_weight * weight, positions, ctx.norm.sync)
        correction = ctx.norm._step_backward(lambda_, *which, n).to(tokens.dtype)
        d_tokens = torch.mul(gradient, r * weight * inverse, out=buf)
        d_tokens.addcmul_(tokens, correction * inverse.square(), value=-1)
        d_bias = gradient.sum(0)
        return d_tokens, d_weight.to(weight.dtype), d_bias.to(weight.dtype), *[None] * 7
