"""AdaNorm: layer normalization with a factor that depends on the token instead of parameters."""

import torch.nn.functional as F
from torch import Tensor, nn

from normexp.norms.core.masking import flatten_tokens
from normexp.norms.core.option_checks import check_not_negative, check_positive
from normexp.norms.registry import register_norm


@register_norm("adaptive")
class AdaNorm(nn.Module):
    """AdaNorm: y = scale (1 - k x_hat) x_hat, x_hat = (x - mean_C) / sqrt(var_C + eps).

    Xu et al., "Understanding and Improving Layer Normalization" (2019), equation 6. No gradient
    flows through the factor (1 - k x_hat), as in the paper, and there are no parameters.
    padding_mask has no effect.

    Reference: normexp/norms/reference/adaptive.py
    Proof: pytest tests/norms/test_references.py -k "adaptive]"
    Number: no training run of it is recorded
    """

    def __init__(self, num_features: int, eps: float = 1e-5, k: float = 0.1, scale: float = 1.0):
        super().__init__()
        check_positive(eps=eps, scale=scale)
        check_not_negative(k=k)
        self.num_features, self.eps, self.k, self.scale = num_features, eps, k, scale

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C) -> y like x. Raises ValueError on invalid shapes or masks."""
        tokens, _ = flatten_tokens(x, padding_mask, self.num_features)
        x_hat = F.layer_norm(tokens, tokens.shape[-1:], eps=self.eps)
        y = self.scale * (1 - self.k * x_hat).detach() * x_hat
        return y.to(x.dtype).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, k={self.k}, scale={self.scale}"
