"""What PN and PN-V share: division by a quadratic mean, in as few passes as plain torch allows."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from normexp.norms.core.masking import num_real, zero_padding_
from normexp.norms.running_norm import RunningNorm


class QuadraticNorm(RunningNorm):
    """y = w x_hat + b,  x_hat = x / sqrt(psi2 + eps), with a psi2 that a subclass chooses.

    dL/dx = (g - correction x_hat) / sqrt(psi2 + eps),  g = w dL/dy, with a correction (C,) that a
    subclass chooses too, knowing sum_N(g x_hat). All that a subclass computes is per channel; what
    touches every token is here, and there only x is kept for backward.
    """

    def _normalize(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        return Scale.apply(tokens, self.weight, self.bias, real, self)

    def _step(self, squares: Tensor, n: Tensor) -> tuple[Tensor, ...]:
        """psi2 (C,) to divide by, and other tensors that `_step_backward` wants back.

        squares (C,): sums of x^2 over the rank's n real tokens.
        """
        raise NotImplementedError

    def _step_backward(self, products: Tensor, *taken: Tensor) -> Tensor:
        """The correction (C,); products (C,): sums of g x_hat over the rank's real tokens."""
        raise NotImplementedError


class Scale(torch.autograd.Function):
    """x -> y of a QuadraticNorm, and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        real: Tensor | None,
        norm: QuadraticNorm,
    ) -> Tensor:
        squares = zero_padding_(tokens.square(), real).sum(0)
        psi2, *taken = norm._step(squares, num_real(tokens, real))
        inverse = torch.rsqrt(psi2 + norm.eps)
        y = torch.addcmul(bias.to(tokens.dtype), tokens, inverse * weight)
        ctx.save_for_backward(tokens, weight, real, inverse, *taken)
        ctx.norm = norm
        return zero_padding_(y, real)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weight, real, inverse, *taken = ctx.saved_tensors
        if real is not None:
            gradient = zero_padding_(gradient.clone(), real)
        values = zero_padding_(gradient * tokens, real)
        d_weight = values.sum(0) * inverse
        d_bias = gradient.sum(0)
        scale = weight * inverse
        correction = ctx.norm._step_backward(d_weight * weight, *taken)
        torch.mul(gradient, scale, out=values)
        values.addcmul_(tokens, correction * inverse.square(), value=-1)
        d_tokens = zero_padding_(values, real)
        return d_tokens, d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None
