"""PN as the authors' released code computes it, which is not Algorithm 2."""

from typing import Any

import torch
from torch import Tensor, nn

from normexp.norms import checks
from normexp.norms.averaging import average_
from normexp.norms.masking import flatten_tokens, num_real, real_mean
from normexp.norms.registry import register_norm


class _NormalizeReleased(torch.autograd.Function):
    """x -> x_hat; backward divides by the batch's statistic and drives `e` to cancel Lambda."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        psi2: Tensor,
        psi2_batch: Tensor,
        e: Tensor,
        eps: float,
        alpha_bwd: float,
    ) -> Tensor:
        x_hat = tokens * torch.rsqrt(psi2 + eps)
        ctx.save_for_backward(x_hat, torch.rsqrt(psi2_batch + eps))
        ctx.e, ctx.alpha_bwd = e, alpha_bwd
        return x_hat

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x_hat, inverse = ctx.saved_tensors
        x_tilde = g - (1 - ctx.alpha_bwd) * ctx.e * x_hat
        ctx.e.add_((x_tilde * x_hat).mean(0).to(ctx.e.dtype))
        return x_tilde * inverse, None, None, None, None, None


@register_norm("power_released")
class PowerNormReleased(nn.Module):
    """PN as released; equal to recorded outputs of the authors' layer to 1e-9 in float64.

    It departs from Algorithm 2 (`power`) as follows; s is the step, counted from 1:
    1. Group scaling first: x <- x / sqrt(mean(x^2 over the C/G channels of its group) + eps) per
       token and group, in training and inference; the gradient flows through it.
    2. While s <= warmup_steps, x_hat = x / sqrt(psi2_B + eps) and no gradient flows through
       psi2_B. While s < warmup_steps the running statistic is first set to the cumulative mean,
       psi2 <- psi2 (s - 1) / s + psi2_B / s; the exponential average with alpha_fwd follows in
       every step, so early steps count twice.
    3. Backward divides by sqrt(psi2_B + eps), the batch's, also after warm-up.
    4. nu is kept as e = nu / (1 - alpha_bwd): x_tilde = g - (1 - alpha_bwd) e x_hat,
       e <- e + mean(x_tilde x_hat), the mean over all T*B positions, padding included.
    5. Statistics are each worker's own.

    Because of 4 the padded positions receive a gradient, and training depends on how batches
    are padded. Each forward in training mode advances psi2 and step, each backward e. A batch
    without a real token leaves psi2 as it is.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        alpha_fwd: float = 0.9,
        alpha_bwd: float = 0.9,
        warmup_steps: int = 10000,
        num_groups: int = 1,
    ):
        super().__init__()
        checks.positive(eps=eps, num_groups=num_groups)
        checks.decay(alpha_fwd=alpha_fwd, alpha_bwd=alpha_bwd)
        checks.count(warmup_steps=warmup_steps, num_groups=num_groups)
        if num_features % num_groups:
            raise ValueError(f"num_groups={num_groups} does not divide {num_features} channels")
        self.num_features, self.eps = num_features, eps
        self.alpha_fwd, self.alpha_bwd = alpha_fwd, alpha_bwd
        self.warmup_steps, self.num_groups = warmup_steps, num_groups
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_psi2", torch.ones(num_features))
        self.register_buffer("e", torch.zeros(num_features))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C) -> y like x. Raises ValueError on unfit shapes or masks."""
        tokens, real = flatten_tokens(x, padding_mask, self.num_features)
        tokens = self._scale_groups(tokens)
        if self.training:
            psi2_batch = real_mean(tokens.detach().square(), real)
            step = self.step + 1
            psi2 = torch.where(
                step <= self.warmup_steps, psi2_batch, self.running_psi2.to(tokens.dtype)
            )
            n = num_real(tokens, real)
            cumulate = (step < self.warmup_steps) & (n > 0)
            cumulative = self.running_psi2 * ((step - 1) / step) + psi2_batch / step
            self.running_psi2.copy_(torch.where(cumulate, cumulative, self.running_psi2))
            average_(self.running_psi2, psi2_batch, 1 - self.alpha_fwd, n)
            self.step += 1
            x_hat = _NormalizeReleased.apply(
                tokens, psi2, psi2_batch, self.e, self.eps, self.alpha_bwd
            )
            y = x_hat * self.weight + self.bias
        else:
            y = tokens * (torch.rsqrt(self.running_psi2 + self.eps) * self.weight) + self.bias
        return y.to(x.dtype).view(x.shape)

    def _scale_groups(self, tokens: Tensor) -> Tensor:
        groups = tokens.view(tokens.shape[0], self.num_groups, -1)
        return (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)).view_as(
            tokens
        )

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics, each (C,), for diagnostics; nu in Algorithm 2's scale."""
        return {"psi2": self.running_psi2, "nu": (1 - self.alpha_bwd) * self.e}

    def extra_repr(self) -> str:
        return (
            f"{self.num_features}, eps={self.eps}, alpha_fwd={self.alpha_fwd}, "
            f"alpha_bwd={self.alpha_bwd}, warmup_steps={self.warmup_steps}, "
            f"num_groups={self.num_groups}"
        )
