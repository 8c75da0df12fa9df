"""Masked batch normalization with the exact gradient."""

from typing import Any

import torch
from torch import Tensor

from normexp.norms.core.averaging import average_
from normexp.norms.core.masking import mask_padding_, num_tokens
from normexp.norms.core.option_checks import check_share
from normexp.norms.core.replay_cache import in_recomputation
from normexp.norms.core.second_order import batch_gradients
from normexp.norms.distributed.collectives import pooled_moments, sum_over_ranks
from normexp.norms.kernels.dispatch import native_operator
from normexp.norms.kernels.native import NATIVE_SOURCES
from normexp.norms.registry import register_norm
from normexp.norms.running_norm import RunningNorm


@register_norm("batch")
class BatchNorm(RunningNorm):
    """BN over the N real tokens of a batch (paper, section 3; Ioffe and Szegedy, 2015).

    Training, per channel over real tokens only:
        mu_B = mean_N(x),  var_B = mean_N((x - mu_B)^2)
        x_hat = (x - mu_B) / sqrt(var_B + eps),  y = w x_hat + b
        running_mean <- (1 - momentum) running_mean + momentum mu_B
        running_var  <- (1 - momentum) running_var  + momentum var_B N / (N - 1)
    with the exact gradient. Inference: the running values replace the batch's. Without padding
    this is torch's BatchNorm1d over the tokens, gradient and running values included.

    In training, padded positions are zeros in x and y and influence nothing, nor do gradients
    there. With a single real token var_B is 0 and y = b. RunningNorm lists the rules of the state.

    Reference: normexp/norms/reference/batch.py
    Proof: pytest tests/norms/test_references.py -k "batch] and not regularized"
    Number: results/README.md: multi30k, ptb (BN)
    """

    native_source = NATIVE_SOURCES / "batch.cpp"
    has_triton_kernel = True
    _regularized = False  # for the kernels: the two lines of RegularizedBatchNorm's formula

    def __init__(
        self, num_features: int, eps: float = 1e-5, momentum: float = 0.05, sync: bool = False
    ):
        super().__init__(num_features, eps, sync)
        check_share(momentum=momentum)
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _train_torch(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        y, mean, var, n = BatchNormFunction.apply(tokens, self.weight, self.bias, token_mask, self)
        if not in_recomputation():
            usable = self._is_finite_batch(n, mean, var)
            average_(self.running_mean, mean.detach(), self.momentum, usable)
            new_var = self._var_to_average(var.detach(), n)
            average_(self.running_var, new_var, self.momentum, usable)
            self.step += usable
        self._after_step(mean, var, n)
        return y

    def _train_native(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        return native_operator("batch")(
            x,
            padding_mask,
            *self._parameters_and("running_mean", "running_var", "step", "num_rejected"),
            *(in_recomputation(), self.eps, self.momentum),
        )

    def _train_kernel(self, operators: Any, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        y, *statistics = operators.batch(
            x,
            padding_mask,
            *(self.weight, self.bias, self.running_mean, self.running_var),
            *(self.step, self.num_rejected),
            *(in_recomputation(), self.eps, self.momentum, self._regularized),
        )
        self._after_step(*statistics)
        return y

    def inference_affine(self) -> tuple[Tensor, Tensor]:
        scale = self._inverse_std(self.running_var) * self.weight
        # A copy, because autograd keeps it and a later training forward changes the buffer.
        return scale, self.bias - self.running_mean.clone() * scale

    def _after_step(self, mean: Tensor, var: Tensor, n: Tensor) -> None:
        """For subclasses: mu_B, var_B (C,), differentiable, and N, after the state has changed."""

    def _var_to_average(self, var: Tensor, n: Tensor) -> Tensor:
        """What running_var averages, from the biased variance (C,) of n real tokens."""
        return var * n / (n - 1).clamp(min=1)

    def _inverse_std(self, var: Tensor) -> Tensor:
        """The factor (C,) of x - mean, from the variance (C,)."""
        return torch.rsqrt(var + self.eps)

    def _inverse_std_slope(self, var: Tensor) -> Tensor:
        """Derivative of `_inverse_std`."""
        return -0.5 * self._inverse_std(var) ** 3

    def statistics(self) -> dict[str, Tensor]:
        return {"mean": self.running_mean, "var": self.running_var}

    def decay_over(self, first: Tensor, last: Tensor) -> Tensor:
        return (1 - self.momentum) ** (last - first)


class BatchNormFunction(torch.autograd.Function):
    """x -> y, mu_B, var_B, N; of all ranks where the layer is synchronized.

    Written out because autograd would make and keep a dozen tensors as large as x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weight: Tensor,
        bias: Tensor,
        token_mask: Tensor | None,
        norm: BatchNorm,
    ) -> tuple[Tensor, ...]:
        n = num_tokens(tokens, token_mask)
        centered = tokens.clone()
        mean = mask_padding_(centered, token_mask).sum(0) / n.clamp(min=1)
        mask_padding_(centered.sub_(mean), token_mask)
        local_mean, buf = mean, centered.square()
        n, mean, var = pooled_moments(n, mean, buf.sum(0), norm.sync, norm)
        if norm.sync:
            mask_padding_(centered.add_(local_mean - mean), token_mask)
        scale = norm._inverse_std(var) * weight
        y = torch.addcmul(bias.to(tokens.dtype), centered, scale, out=buf)
        ctx.save_for_backward(tokens, centered, weight, token_mask, var, n)
        ctx.norm = norm
        ctx.mark_non_differentiable(n)
        return mask_padding_(y, token_mask), mean, var, n

    @staticmethod
    def backward(
        ctx: Any, gradient: Tensor, d_mean: Tensor, d_var: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        tokens, centered, weight, token_mask, var, n = ctx.saved_tensors
        norm = ctx.norm
        if torch.is_grad_enabled():  # this gradient is to be differentiated in turn
            gradients = batch_gradients(
                *(tokens, weight, (gradient, d_mean, d_var), tokens, token_mask),
                inverse_std=norm._inverse_std,
                moments=lambda n, mean, m2: pooled_moments(n, mean, m2, norm.sync)[1:],
            )
            return *gradients, None, None
        if token_mask is not None:
            gradient = mask_padding_(gradient.clone(), token_mask)
        inverse, d_bias = norm._inverse_std(var), gradient.sum(0)
        buf = gradient * centered
        products = buf.sum(0)
        # What reaches mu_B and var_B, from the tokens of all ranks.
        d_var = d_var + products * weight * norm._inverse_std_slope(var)
        d_mean = d_mean - d_bias * weight * inverse
        total = sum_over_ranks(torch.cat([d_mean, d_var]), norm.sync) / n.clamp(min=1)
        d_mean, d_var = total.chunk(2)
        torch.addcmul(d_mean, centered, 2 * d_var, out=buf)
        buf.addcmul_(gradient, weight * inverse)
        d_tokens = mask_padding_(buf, token_mask)
        d_weight = products * inverse
        return d_tokens, d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None
