"""Instance normalization: every sentence and channel over its real tokens."""

import torch
from torch import Tensor, nn

from normexp.norms.core.masking import check_input
from normexp.norms.core.option_checks import check_positive
from normexp.norms.registry import register_norm


@register_norm("instance")
class InstanceNorm(nn.Module):
    """IN: per sentence and channel, mean and variance over the sentence's real tokens.

        x_hat = (x - mean_T) / sqrt(var_T + eps),  y = w x_hat + b, in training and inference

    Ulyanov, Vedaldi, Lempitsky, "Instance Normalization" (2016), with a sentence instead of an
    image. A list of tokens (N, C) counts as one sentence. Padded positions are zeros in x and y
    and influence nothing, nor do gradients there. Every position sees the others of its sentence,
    later ones included, so the layer fits encoders only.

    Reference: normexp/norms/reference/instance.py
    Proof: pytest tests/norms/test_references.py -k "instance]"
    Number: no training run of it is recorded
    """

    mixes_positions = True

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        check_positive(eps=eps)
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C) -> y like x. Raises ValueError on invalid shapes or masks."""
        check_input(x, padding_mask, self.num_features)
        if x.dim() not in (2, 3):
            raise ValueError(
                f"instance normalization of {tuple(x.shape)}: which dimensions are the positions "
                f"of a sentence? Give (T, B, {self.num_features}) or (N, {self.num_features})"
            )
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        if padding_mask is None:
            var, mean = torch.var_mean(values, dim=0, correction=0, keepdim=True)
        else:
            token_mask = ~padding_mask.t().unsqueeze(-1)  # (T, B, 1) or (N, 1)
            values = torch.where(token_mask, values, 0.0)
            n = token_mask.sum(0, keepdim=True).clamp(min=1)
            mean = values.sum(0, keepdim=True) / n
            deviations = torch.where(token_mask, values - mean, 0.0)
            var = deviations.square().sum(0, keepdim=True) / n
        x_hat = (values - mean) * torch.rsqrt(var + self.eps)
        y = x_hat * self.weight + self.bias
        if padding_mask is not None:
            y = torch.where(token_mask, y, 0.0)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"
