"""BN as the authors' released code computes it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from normexp.norms.core.masking import masked_mean, num_tokens
from normexp.norms.core.option_checks import check_share
from normexp.norms.core.replay_cache import in_recomputation
from normexp.norms.kernels.dispatch import native_operator
from normexp.norms.kernels.native import NATIVE_SOURCES
from normexp.norms.registry import register_norm
from normexp.norms.running_norm import RunningNorm


@register_norm("batch_released")
class BatchNormReleased(RunningNorm):
    """BN as in the authors' released code.

    Equal to recorded outputs of their layer to 1e-9 in float64 (tests/norms/test_golden.py).
    It departs from masked batch normalization (`batch`) in two ways:
    1. Each token is first divided by sqrt(mean_C(x^2) + eps), in training and inference.
    2. Padded positions are replaced by the mean of the real tokens (also in inference, where
       it changes only their own output), and then all T*B positions count, so the
       variance is diluted by the share of padding (and the running variance is unbiased by
       T*B / (T*B - 1)).

    Statistics are each worker's own. RunningNorm lists the rules of the state.

    Reference: normexp/norms/reference/batch_released.py
    Proof: pytest tests/norms/test_references.py -k "batch_released]"
    Number: no training run of it is recorded
    """

    native_source = NATIVE_SOURCES / "batch_released.cpp"

    def __init__(self, num_features: int, eps: float = 1e-5, momentum: float = 0.05):
        super().__init__(num_features, eps)
        check_share(momentum=momentum)
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def _train_torch(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        mean, var = self._copied_statistics(tokens.dtype)
        y = self._batch_norm(tokens, token_mask, mean, var)
        if not in_recomputation():
            usable = self._is_finite_batch(num_tokens(tokens, token_mask), mean, var)
            self.running_mean.copy_(torch.where(usable, mean, self.running_mean))
            self.running_var.copy_(torch.where(usable, var, self.running_var))
            self.step += usable
        return y

    def _train_native(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        return native_operator("batch_released")(
            x,
            padding_mask,
            *self._parameters_and("running_mean", "running_var", "step", "num_rejected"),
            *(in_recomputation(), self.eps, self.momentum),
        )

    def _infer(self, tokens: Tensor, token_mask: Tensor | None) -> Tensor:
        return self._batch_norm(tokens, token_mask, *self._copied_statistics(tokens.dtype))

    def _copied_statistics(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        # Copies, because autograd keeps them and a later training forward changes the buffers.
        return self.running_mean.to(dtype, copy=True), self.running_var.to(dtype, copy=True)

    def _batch_norm(
        self, tokens: Tensor, token_mask: Tensor | None, mean: Tensor, var: Tensor
    ) -> Tensor:
        tokens = tokens * torch.rsqrt(tokens.square().mean(-1, keepdim=True) + self.eps)
        if token_mask is not None:
            tokens = torch.where(token_mask, tokens, masked_mean(tokens, token_mask))
        if self.training and tokens.shape[0] == 1:
            # torch refuses one position; two equal ones have the same mean and no variance either.
            return self._torch_batch_norm(tokens.expand(2, -1), mean, var)[:1]
        return self._torch_batch_norm(tokens, mean, var)

    def _torch_batch_norm(self, tokens: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        weight, bias = self.weight.to(tokens.dtype), self.bias.to(tokens.dtype)
        return F.batch_norm(tokens, mean, var, weight, bias, self.training, self.momentum, self.eps)

    def statistics(self) -> dict[str, Tensor]:
        return {"mean": self.running_mean, "var": self.running_var}

    def decay_over(self, first: Tensor, last: Tensor) -> Tensor:
        return (1 - self.momentum) ** (last - first)
