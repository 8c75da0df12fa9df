"""RMS normalization."""

import torch
from torch import Tensor, nn

from normexp.norms.core.masking import flatten_tokens, refusal
from normexp.norms.core.option_checks import check_positive
from normexp.norms.kernels.dispatch import native_operator, runs_native_anywhere
from normexp.norms.kernels.native import NATIVE_SOURCES
from normexp.norms.registry import register_norm


@register_norm("rms")
class RMSNorm(nn.Module):
    """RMSNorm: each token over its C channels, y = w x / sqrt(mean_C(x^2) + eps).

    Zhang, Sennrich, "Root Mean Square Layer Normalization" (2019). padding_mask has no effect.

    Reference: normexp/norms/reference/rms.py
    Proof: pytest tests/norms/test_references.py -k "rms]"
    Number: no training run of it is recorded
    """

    native_source = NATIVE_SOURCES / "rms.cpp"

    def __init__(self, num_features: int, eps: float = 1e-5):
        super().__init__()
        check_positive(eps=eps)
        self.num_features, self.eps = num_features, eps
        self.weight = nn.Parameter(torch.ones(num_features))
        self.kernels: str | None = None  # what computed the last forward

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C) -> y like x. Raises ValueError on invalid shapes or masks."""
        if x.dim() in (2, 3) and runs_native_anywhere(self, x):
            try:
                operator = native_operator("rms")
                y = operator(x.contiguous(), padding_mask, self.weight, self.eps)
            except ValueError as error:
                raise refusal(error, x, padding_mask, self.num_features) from None
            self._record_kernels("native")
            return y
        self._record_kernels("plain")
        tokens, _ = flatten_tokens(x, padding_mask, self.num_features)
        inverse = torch.rsqrt(tokens.square().mean(-1, keepdim=True) + self.eps)
        return (tokens * inverse * self.weight).to(x.dtype).reshape(x.shape)

    def _record_kernels(self, kernels: str) -> None:
        if kernels != self.kernels and not torch.compiler.is_compiling():
            self.kernels = kernels

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"
