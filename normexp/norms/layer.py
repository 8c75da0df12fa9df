"""Layer normalization, the paper's baseline."""

from torch import Tensor, nn

from normexp.norms.core.masking import check_input
from normexp.norms.core.option_checks import check_positive
from normexp.norms.registry import register_norm


@register_norm("layer")
class LayerNorm(nn.LayerNorm):
    """LN: each token over its C channels, y = w (x - mean_C) / sqrt(var_C + eps) + b.

    Ba, Kiros, Hinton, "Layer Normalization" (2016). It is torch's own module, so a model with
    `layer` everywhere is bit for bit the stock one; padding_mask is accepted and has no effect.

    Reference: normexp/norms/reference/layer.py
    Proof: pytest tests/norms/test_references.py -k "layer]"
    Number: results/README.md: multi30k, ptb (LN)
    """

    def __init__(self, num_features: int, eps: float = 1e-5):
        check_positive(eps=eps)
        super().__init__(num_features, eps=eps)

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C) -> y like x. Raises ValueError on invalid shapes or masks."""
        check_input(x, padding_mask, self.normalized_shape[0])
        return super().forward(x)
