"""Masked batch normalization with the exact gradient."""

import torch
from torch import Tensor, nn

from normexp.norms import checks
from normexp.norms.averaging import average_
from normexp.norms.masking import flatten_tokens, num_real, only_real, real_mean
from normexp.norms.registry import register_norm


@register_norm("batch")
class BatchNorm(nn.Module):
    """BN over the N real tokens of a batch (paper, section 3; Ioffe and Szegedy, 2015).

    Training, per channel over real tokens only:
        mu_B = mean_N(x),  var_B = mean_N((x - mu_B)^2)
        x_hat = (x - mu_B) / sqrt(var_B + eps),  y = w x_hat + b
        running_mean <- (1 - momentum) running_mean + momentum mu_B
        running_var  <- (1 - momentum) running_var  + momentum var_B N / (N - 1)
    Inference: the running values take the place of the batch's. Without padding this is
    torch's BatchNorm1d over the tokens, gradient and running values included.

    Padded positions are normalized like the others and influence nothing. A batch without a
    real token leaves the running values as they are; with a single one, var_B is 0 and y = b.
    Every forward in training mode counts as one step, also under gradient accumulation.
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
        mean, var = self.running_mean, self.running_var
        if self.training:
            mean = real_mean(tokens, real)
            var = real_mean((only_real(tokens, real) - mean).square(), real)
            n = num_real(tokens, real)
            average_(self.running_mean, mean, self.momentum, n)
            average_(self.running_var, var * n / (n - 1).clamp(min=1), self.momentum, n)
            self.step += 1
        y = (tokens - mean) * (torch.rsqrt(var + self.eps) * self.weight) + self.bias
        return y.to(x.dtype).view(x.shape)

    def statistics(self) -> dict[str, Tensor]:
        """Running statistics, each (C,), for diagnostics."""
        return {"mean": self.running_mean, "var": self.running_var}

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"
