"""Dynamic tanh: squashing instead of normalization."""

import torch
from torch import Tensor, nn

from normexp.norms.core.masking import flatten_tokens
from normexp.norms.core.option_checks import check_positive
from normexp.norms.registry import register_norm


@register_norm("dynamic_tanh")
class DynamicTanh(nn.Module):
    """DyT: y = w tanh(a x) + b, with a learned scalar a that starts at `alpha`.

    Zhu et al., "Transformers without Normalization" (2025), equation 1. padding_mask has no effect.

    Reference: normexp/norms/reference/dynamic_tanh.py
    Proof: pytest tests/norms/test_references.py -k "dynamic_tanh]"
    Number: no training run of it is recorded
    """

    def __init__(self, num_features: int, alpha: float = 0.5):
        super().__init__()
        check_positive(alpha=alpha)
        self.num_features, self.alpha = num_features, alpha
        self.a = nn.Parameter(torch.tensor(float(alpha)))
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C) -> y like x. Raises ValueError on invalid shapes or masks."""
        tokens, _ = flatten_tokens(x, padding_mask, self.num_features)
        y = torch.tanh(self.a * tokens) * self.weight + self.bias
        return y.to(x.dtype).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{self.num_features}, alpha={self.alpha}"
