"""PN-V: power normalization by the batch's quadratic mean, with the exact gradient."""

import torch
from torch import Tensor, nn

from normexp.norms import checks
from normexp.norms.averaging import average_
from normexp.norms.masking import flatten_tokens, num_real, real_mean
from normexp.norms.registry import register_norm


@register_norm("power_v")
class PowerNormV(nn.Module):
    """PN-V (paper, section 4.1): batch normalization without the mean.

    Training, per channel over the N real tokens:
        psi2_B = mean_N(x^2),  x_hat = x / sqrt(psi2_B + eps),  y = w x_hat + b
        running_psi2 <- alpha running_psi2 + (1 - alpha) psi2_B
    with the exact gradient dL/dx = (g - x_hat mean_N(g x_hat)) / sqrt(psi2_B + eps), g = w dL/dy,
    which autograd supplies. Inference: y = w x / sqrt(running_psi2 + eps) + b.

    Padded positions are normalized like the others and influence nothing. A batch without a
    real token leaves running_psi2 as it is. Every forward in training mode counts as one step,
    also under gradient accumulation.
    """

    def __init__(self, num_features: int, eps: float = 1e-5, alpha: float = 0.9):
        super().__init__()
        checks.positive(eps=eps)
        checks.decay(alpha=alpha)
        self.num_features, self.eps, self.alpha = num_features, eps, alpha
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_psi2", torch.ones(num_features))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C) -> y like x. Raises ValueError on unfit shapes or masks."""
        tokens, real = flatten_tokens(x, padding_mask, self.num_features)
        psi2 = self.running_psi2
        if self.training:
            psi2 = real_mean(tokens.square(), real)
            average_(self.running_psi2, psi2, 1 - self.alpha, num_real(tokens, real))
            self.step += 1
        y = tokens * (torch.rsqrt(psi2 + self.eps) * self.weight) + self.bias
        return y.to(x.dtype).view(x.shape)

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics, each (C,), for diagnostics."""
        return {"psi2": self.running_psi2}

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, alpha={self.alpha}"
