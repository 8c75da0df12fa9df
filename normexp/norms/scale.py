"""ScaleNorm: every token gets the same length."""

import math

import torch
from torch import Tensor, nn

from normexp.norms.core.masking import flatten_tokens
from normexp.norms.core.option_checks import check_positive
from normexp.norms.registry import register_norm


@register_norm("scale")
class ScaleNorm(nn.Module):
    """ScaleNorm: y = g x / max(||x||_2, eps), with one learned scalar g, sqrt(C) at the start.

    Nguyen, Salazar, "Transformers without Tears" (2019), equation 3. padding_mask has no effect.

    Reference: normexp/norms/reference/scale.py
    Proof: pytest tests/norms/test_references.py -k "scale]"
    Number: no training run of it is recorded
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        check_positive(eps=eps)
        self.num_features, self.eps = num_features, eps
        self.g = nn.Parameter(torch.tensor(math.sqrt(num_features)))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C) -> y like x. Raises ValueError on invalid shapes or masks."""
        tokens, _ = flatten_tokens(x, padding_mask, self.num_features)
        length = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True).clamp(min=self.eps)
        return (self.g * (tokens / length)).to(x.dtype).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"
