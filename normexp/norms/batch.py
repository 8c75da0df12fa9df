"""Masked batch normalization with the exact gradient."""

import torch
from torch import Tensor

from normexp.norms import checks
from normexp.norms.averaging import average_
from normexp.norms.masking import num_real, only_real
from normexp.norms.recomputation import recomputing
from normexp.norms.registry import register_norm
from normexp.norms.running_norm import RunningNorm
from normexp.norms.synchronization import pooled_moments


@register_norm("batch")
class BatchNorm(RunningNorm):
    """BN over the N real tokens of a batch (paper, section 3; Ioffe and Szegedy, 2015).

    Training, per channel over real tokens only:
        mu_B = mean_N(x),  var_B = mean_N((x - mu_B)^2)
        x_hat = (x - mu_B) / sqrt(var_B + eps),  y = w x_hat + b
        running_mean <- (1 - momentum) running_mean + momentum mu_B
        running_var  <- (1 - momentum) running_var  + momentum var_B N / (N - 1)
    with the exact gradient, which autograd supplies. Inference: the running values take the place
    of the batch's. Without padding this is torch's BatchNorm1d over the tokens, gradient and
    running values included.

    In training, padded positions are zeros in x and y and influence nothing, nor do gradients
    there. With a single real token var_B is 0 and y = b. RunningNorm tells the rules of the state.
    """

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.05, sync: bool = False
    ):
        super().__init__(num_features, eps, sync)
        checks.share(momentum=momentum)
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _normalize(self, tokens: Tensor, real: Tensor | None) -> Tensor:
        tokens = only_real(tokens, real)
        n = num_real(tokens, real)
        mean = tokens.sum(0) / n.clamp(min=1)
        m2 = only_real(tokens - mean, real).square().sum(0)
        n, mean, var = pooled_moments(n, mean, m2, self.sync)
        if not recomputing():
            usable = self._usable(n, mean, var)
            average_(self.running_mean, mean, self.momentum, usable)
            # Detached: what autograd saves must be the same when the forward is recomputed.
            new_var = self._var_to_average(var.detach(), n)
            average_(self.running_var, new_var, self.momentum, usable)
            self.step += usable
        self._after_step(mean, var, n)
        scale = self._inverse_std(var) * self.weight
        return only_real((tokens - mean) * scale + self.bias, real)

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        scale = self._inverse_std(self.running_var) * self.weight
        # A copy, because autograd keeps it and a later training forward changes the buffer.
        return scale, self.bias - self.running_mean.clone() * scale

    def _after_step(self, mean: Tensor, var: Tensor, n: Tensor) -> None:
        """For subclasses: the batch's statistics, with their gradient, after the state moved on."""

    def _var_to_average(self, var: Tensor, n: Tensor) -> Tensor:
        return var * n / (n - 1).clamp(min=1)

    def _inverse_std(self, var: Tensor) -> Tensor:
        return torch.rsqrt(var + self.eps)

    def statistics(self) -> dict[str, Tensor]:
        return {"mean": self.running_mean, "var": self.running_var}
