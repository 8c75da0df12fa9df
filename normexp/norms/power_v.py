"""PN-V: power normalization by the batch's quadratic mean, with the exact gradient."""

from typing import Any

import torch
from torch import Tensor

from normexp.norms.core import option_checks
from normexp.norms.core.averaging import average_
from normexp.norms.core.masking import num_real, only_real
from normexp.norms.core.replay_cache import recomputing
from normexp.norms.distributed.collectives import pooled_mean, sum_over_ranks
from normexp.norms.quadratic_norm import QuadraticNorm, Scale
from normexp.norms.registry import register_norm
from normexp.norms.running_norm import NATIVE_SOURCES


@register_norm("power_v")
class PowerNormV(QuadraticNorm):
    """PN-V (paper, section 4.1): batch normalization without the mean.

    Training, per channel over the N real tokens:
        psi2_B = mean_N(x^2),  x_hat = x / sqrt(psi2_B + eps),  y = w x_hat + b
        running_psi2 <- alpha running_psi2 + (1 - alpha) psi2_B
    with the exact gradient dL/dx = (g - x_hat mean_N(g x_hat)) / sqrt(psi2_B + eps), g = w dL/dy.
    Inference: y = w x / sqrt(running_psi2 + eps) + b.

    In training, padded positions are zeros in x and y and influence nothing, nor do gradients
    there. RunningNorm tells the rules of the state.
    """

    native_source = NATIVE_SOURCES / "power.cpp"

    def __init__(
        self, num_features: int, eps: float = 1e-5, alpha: float = 0.9, sync: bool = False
    ):
        super().__init__(num_features, eps, sync)
        option_checks.decay(alpha=alpha)
        self.alpha = alpha
        self.register_buffer("running_psi2", torch.ones(num_features))

    def _kernel_step(self, operators: Any, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        return operators.power_v(
            x,
            padding_mask,
            *(self.weight, self.bias, self.running_psi2, self.step, self.rejected),
            *(recomputing(), self.eps, self.alpha),
        )

    def _normalize(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        return _ExactScale.apply(tokens, self.weight, self.bias, real, self)

    @torch.no_grad()
    def _step(self, squares: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        psi2, n = pooled_mean(squares, n, self.sync)
        if not recomputing():
            usable = self._usable(n, psi2)
            average_(self.running_psi2, psi2, 1 - self.alpha, usable)
            self.step += usable
        return psi2, n

    def _step_backward(self, products: Tensor, n: Tensor) -> Tensor:
        return sum_over_ranks(products, self.sync) / n.clamp(min=1)

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        return torch.rsqrt(self.running_psi2 + self.eps) * self.weight, self.bias

    def statistics(self) -> dict[str, Tensor]:
        return {"psi2": self.running_psi2}

    def retained(self, first: Tensor, last: Tensor) -> Tensor:
        return self.alpha ** (last - first)


class _ExactScale(Scale):
    """Its gradient is the derivative of the forward and can be differentiated in turn."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return Scale.backward(ctx, gradient)
        tokens, weight, real, *_ = ctx.saved_tensors
        norm, real_tokens = ctx.norm, only_real(tokens, real)
        squares = real_tokens.square().sum(0)
        psi2, _ = pooled_mean(squares, num_real(tokens, real), norm.sync)
        y = only_real(real_tokens * (torch.rsqrt(psi2 + norm.eps) * weight), real)
        d_tokens, d_weight = torch.autograd.grad(y, (tokens, weight), gradient, create_graph=True)
        return d_tokens, d_weight, only_real(gradient, real).sum(0), None, None
