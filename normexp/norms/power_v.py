"""PN-V: power normalization by the batch's quadratic mean, with the exact gradient.

PN (power.py) is derived from PN-V and shares its passes over the tokens, `PowerNormFunction`.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normexp.norms.core.averaging import average_
from normexp.norms.core.masking import mask_padding_, num_tokens
from normexp.norms.core.option_checks import check_decay
from normexp.norms.core.replay_cache import in_recomputation
from normexp.norms.core.second_order import power_v_gradients
from normexp.norms.distributed.collectives import pooled_mean, sum_over_ranks
from normexp.norms.kernels.dispatch import native_operator
from normexp.norms.kernels.native import NATIVE_SOURCES
from normexp.norms.registry import register_norm
from normexp.norms.running_norm import RunningNorm


class QuadraticNorm(RunningNorm):
    """Base of PN and PN-V: y = w x_hat + b,  x_hat = x / sqrt(psi2 + eps).

    dL/dx = (g - correction x_hat) / sqrt(psi2 + eps),  g = w dL/dy.

    A subclass chooses psi2 (C,) and correction (C,). All that it computes is per channel; what
    touches every token is in `PowerNormFunction`.
    """

    def _train_torch(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        return PowerNormFunction.apply(tokens, self.weight, self.bias, token_mask, self)

    def _step(self, sum_sq: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        """psi2 (C,) to divide by, and other tensors to be saved for `_step_backward`.

        sum_sq (C,): sums of x^2 over the rank's n real tokens.
        """
        raise NotImplementedError

    def _step_backward(self, products: Tensor, *saved: Tensor) -> Tensor:
        """The correction (C,); products (C,): sums of g x_hat over the rank's real tokens."""
        raise NotImplementedError


class PowerNormFunction(torch.autograd.Function):
    """x -> y of a QuadraticNorm and its gradient, in as few passes as torch's operations allow."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        token_mask: Tensor | None,
        norm: QuadraticNorm,
    ) -> Tensor:
        sum_sq = mask_padding_(tokens.square(), token_mask).sum(0)
        psi2, *saved = norm._step(sum_sq, num_tokens(tokens, token_mask))
        inverse = torch.rsqrt(psi2 + norm.eps)
        y = torch.addcmul(bias.to(tokens.dtype), tokens, inverse * weight)
        ctx.save_for_backward(tokens, weight, token_mask, inverse, *saved)
        ctx.norm = norm
        return mask_padding_(y, token_mask)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, token_mask, inverse, *saved = ctx.saved_tensors
        if token_mask is not None:
            gradient = mask_padding_(gradient.clone(), token_mask)
        # One buffer as large as x: first for the products g x_hat, then for dL/dx.
        buf = mask_padding_(gradient * tokens, token_mask)
        d_weight = buf.sum(0) * inverse
        d_bias = gradient.sum(0)
        scale = weight * inverse
        correction = ctx.norm._step_backward(d_weight * weight, *saved)
        torch.mul(gradient, scale, out=buf)
        buf.addcmul_(tokens, correction * inverse.square(), value=-1)
        d_tokens = mask_padding_(buf, token_mask)
        return d_tokens, d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None


@register_norm("power_v")
class PowerNormV(QuadraticNorm):
    """PN-V (paper, section 4.1): batch normalization without the mean.

    Training, per channel over the N real tokens:
        psi2_B = mean_N(x^2),  x_hat = x / sqrt(psi2_B + eps),  y = w x_hat + b
        running_psi2 <- alpha running_psi2 + (1 - alpha) psi2_B
    with the exact gradient dL/dx = (g - x_hat mean_N(g x_hat)) / sqrt(psi2_B + eps), g = w dL/dy.
    Inference: y = w x / sqrt(running_psi2 + eps) + b.

    In training, padded positions are zeros in x and y and influence nothing, nor do gradients
    there. RunningNorm lists the rules of the state.

    Reference: normexp/norms/reference/power_v.py
    Proof: pytest tests/norms/test_references.py -k "power_v]"
    Number: results/README.md: multi30k, ptb (PN-V)
    """

    native_source = NATIVE_SOURCES / "power.cpp"
    has_triton_kernel = True

    def __init__(
        self, num_features: int, eps: float = 1e-5, alpha: float = 0.9, sync: bool = False
    ):
        super().__init__(num_features, eps, sync)
        check_decay(alpha=alpha)
        self.alpha = alpha
        self.register_buffer("running_psi2", torch.ones(num_features))

    def _train_torch(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        return PowerNormVFunction.apply(tokens, self.weight, self.bias, token_mask, self)

    def _train_native(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        return self._train_by(native_operator("power_v"), x, padding_mask)

    def _train_kernel(self, operators: Any, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        return self._train_by(operators.power_v, x, padding_mask)

    def _train_by(
        self, operator: Callable[..., Tensor], x: Tensor, padding_mask: Tensor | None
    ) -> Tensor:
        return operator(
            x,
            padding_mask,
            *self._parameters_and("running_psi2", "step", "num_rejected"),
            *(in_recomputation(), self.eps, self.alpha),
        )

    @torch.no_grad()
    def _step(self, sum_sq: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        psi2, n = pooled_mean(sum_sq, n, self.sync, self)
        if not in_recomputation():
            usable = self._is_finite_batch(n, psi2)
            average_(self.running_psi2, psi2, 1 - self.alpha, usable)
            self.step += usable
        return psi2, n

    def _step_backward(self, products: Tensor, n: Tensor) -> Tensor:
        return sum_over_ranks(products, self.sync) / n.clamp(min=1)

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        return torch.rsqrt(self.running_psi2 + self.eps) * self.weight, self.bias

    def statistics(self) -> dict[str, Tensor]:
        return {"psi2": self.running_psi2}

    def decay_over(self, first: Tensor, last: Tensor) -> Tensor:
        return self.alpha ** (last - first)


class PowerNormVFunction(PowerNormFunction):
    """PN-V's gradient is the derivative of its forward and can be differentiated in turn."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return PowerNormFunction.backward(ctx, gradient)
        tokens, weight, token_mask, *_ = ctx.saved_tensors
        eps, sync = ctx.norm.eps, ctx.norm.sync
        gradients = power_v_gradients(
            *(tokens, weight, gradient, tokens, token_mask, eps),
            mean=lambda sum_sq, n: pooled_mean(sum_sq, n, sync)[0],
        )
        return *gradients, None, None
