"""PN: power normalization, the paper's Algorithm 2."""

from typing import Any

import torch
from torch import Tensor, nn

from normexp.norms import checks
from normexp.norms.averaging import average_
from normexp.norms.masking import flatten_tokens, num_real, only_real, real_mean
from normexp.norms.registry import register_norm


class _Normalize(torch.autograd.Function):
    """x -> x_hat with Algorithm 2's backward, which is not the derivative of its forward."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        real: Tensor | None,
        psi2: Tensor,
        in_warmup: Tensor,
        nu: Tensor,
        eps: float,
        alpha_bwd: float,
    ) -> Tensor:
        inverse = torch.rsqrt(psi2 + eps)
        x_hat = tokens * inverse
        ctx.save_for_backward(x_hat, inverse, real, in_warmup)
        ctx.nu, ctx.alpha_bwd = nu, alpha_bwd
        return x_hat

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x_hat, inverse, real, in_warmup = ctx.saved_tensors
        nu, pace = ctx.nu, 1 - ctx.alpha_bwd
        n = num_real(x_hat, real).clamp(min=1)
        # During warm-up psi2 is the batch's own and the exact gradient (PN-V's) is at hand; its
        # sum takes every position, because every position was divided by psi2.
        exact = (g * x_hat).sum(0) / n
        correction = torch.where(in_warmup, exact, nu.to(g.dtype))
        # The correction is confined to real tokens: psi2 does not depend on padding, and a
        # gradient there would make the layers below depend on how a batch is padded.
        dx = (g - only_real(correction * x_hat, real)) * inverse
        gamma = real_mean(x_hat.square(), real)
        lam = real_mean(g * x_hat, real)
        nu.copy_(nu * (1 - pace * gamma) + pace * lam)
        return dx, None, None, None, None, None, None


@register_norm("power")
class PowerNorm(nn.Module):
    """PN, Algorithm 2 of the paper, one iteration per forward and backward in training mode.

    forward, with the running statistic of before this step:
        x_hat = x / sqrt(psi2_(t-1) + eps),  y = w x_hat + b
        psi2_t = alpha_fwd psi2_(t-1) + (1 - alpha_fwd) psi2_B,  psi2_B = mean_N(x^2)
    backward, g = w dL/dy:
        dL/dx = (g - nu_(t-1) x_hat) / sqrt(psi2_(t-1) + eps)
        nu_t = nu_(t-1) (1 - (1 - alpha_bwd) Gamma) + (1 - alpha_bwd) Lambda
        Gamma = mean_N(x_hat^2),  Lambda = mean_N(g x_hat)
    warm-up: in the first `warmup_steps` steps psi2_B normalizes and the gradient is PN-V's exact
    one, while psi2 and nu are averaged already, so that both mean something when they take over.
    inference: y = w x / sqrt(psi2 + eps) + b.

    The backward is deliberately not the derivative of the forward, so gradient checkers fail
    after warm-up, and it changes state (nu): every backward advances nu once and every forward in
    training mode advances psi2 and step once, also under gradient accumulation. Padded positions
    are normalized like the others and influence nothing; without a real token no state changes
    but step.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bwd: float = 0.9,
        warmup_steps: int = 4000,
    ):
        super().__init__()
        checks.positive(eps=eps)
        checks.decay(alpha_fwd=alpha_fwd, alpha_bwd=alpha_bwd)
        checks.count(warmup_steps=warmup_steps)
        self.num_features, self.eps = num_features, eps
        self.alpha_fwd, self.alpha_bwd = alpha_fwd, alpha_bwd
        self.warmup_steps = warmup_steps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_psi2", torch.ones(num_features))
        self.register_buffer("nu", torch.zeros(num_features))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C) -> y like x. Raises ValueError on unfit shapes or masks."""
        tokens, real = flatten_tokens(x, padding_mask, self.num_features)
        if self.training:
            psi2_batch = real_mean(tokens.detach().square(), real)
            in_warmup = self.step < self.warmup_steps
            psi2 = torch.where(in_warmup, psi2_batch, self.running_psi2.to(tokens.dtype))
            average_(self.running_psi2, psi2_batch, 1 - self.alpha_fwd, num_real(tokens, real))
            self.step += 1
            x_hat = _Normalize.apply(
                tokens, real, psi2, in_warmup, self.nu, self.eps, self.alpha_bwd
            )
            y = x_hat * self.weight + self.bias
        else:
            y = tokens * (torch.rsqrt(self.running_psi2 + self.eps) * self.weight) + self.bias
        return y.to(x.dtype).view(x.shape)

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics, each (C,), for diagnostics."""
        return {"psi2": self.running_psi2, "nu": self.nu}

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, alpha_fwd={self.alpha_fwd}, "
            f"alpha_bwd={self.alpha_bwd}, warmup_steps={self.warmup_steps}"
        )
