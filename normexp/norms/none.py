"""No normalization."""

from torch import Tensor, nn

from normexp.norms.core.masking import check_input
from normexp.norms.registry import register_norm


@register_norm("none")
class NoNorm(nn.Module):
    """Identity: y = x, the control without normalization. No parameters.

    Reference: normexp/norms/reference/none.py
    Proof: pytest tests/norms/test_references.py -k "none]"
    Number: no training run of it is recorded
    """

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C) -> x itself. Raises ValueError on invalid shapes or masks."""
        check_input(x, padding_mask, self.num_features)
        return x

    def extra_repr(self) -> str:
        return f"{self.num_features}"
