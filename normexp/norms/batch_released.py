"""BN as the authors' released code computes it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normexp.norms import checks
from normexp.norms.masking import flatten_tokens, real_mean
from normexp.norms.registry import register_norm


@register_norm("batch_released")
class BatchNormReleased(nn.Module):
    """BN as released; equal to recorded outputs of the authors' layer to 1e-9 in float64.

    It departs from masked batch normalization (`batch`) in two ways:
    1. Each token is first divided by sqrt(mean_C(x^2) + eps), in training and inference.
    2. Padded positions are replaced by the mean of the real tokens (also in inference, where
       only their own output changes by it), and then all T*B positions take part, so the
       variance is diluted by the share of padding (and the running variance is unbiased by
       T*B / (T*B - 1)).
    """

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.05):
        super().__init__()
        checks.positive(eps=eps)
        checks.share(momentum=momentum)
        self.num_features, self.eps, self.momentum = num_features, eps, momentum
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C) -> y like x. Raises ValueError on unfit shapes or masks."""
        tokens, real = flatten_tokens(x, padding_mask, self.num_features)
        tokens = tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + self.eps)
        if real is not None:
            tokens = torch.where(real, tokens, real_mean(tokens, real))
        if self.training:
            self.step += 1
        y = F.batch_norm(
            tokens,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
        )
        return y.to(x.dtype).view(x.shape)

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics, each (C,), for diagnostics."""
        return {"mean": self.running_mean, "var": self.running_var}

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"
