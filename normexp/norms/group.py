"""Group normalization of single tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normexp.norms.core.masking import flatten_tokens
from normexp.norms.core.option_checks import check_groups, check_positive
from normexp.norms.registry import register_norm


@register_norm("group")
class GroupNorm(nn.Module):
    """GN: each token over each of its G groups of C/G channels, as LN does over all C.

        x_hat = (x - mean_group) / sqrt(var_group + eps),  y = w x_hat + b

    Wu, He, "Group Normalization" (2018), with a token instead of an image; num_groups=1 is
    LN. padding_mask has no effect.

    Reference: normexp/norms/reference/group.py
    Proof: pytest tests/norms/test_references.py -k "group]"
    Number: no training run of it is recorded
    """

    def __init__(self, num_features: int, eps: float = 1e-5, num_groups: int = 4):
        super().__init__()
        check_positive(eps=eps)
        check_groups(num_features, num_groups)
        self.num_features, self.eps, self.num_groups = num_features, eps, num_groups
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """x (T, B, C) or (N, C) -> y like x. Raises ValueError on invalid shapes or masks."""
        tokens, _ = flatten_tokens(x, padding_mask, self.num_features)
        groups = tokens.unflatten(1, (self.num_groups, -1))
        x_hat = F.layer_norm(groups, groups.shape[-1:], eps=self.eps).flatten(1)
        return (x_hat * self.weight + self.bias).to(x.dtype).reshape(x.shape)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, num_groups={self.num_groups}"
