"""Regularized BN: batch normalization with a loss term on how far a batch is from the average."""

import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from normexp.norms.batch import BatchNorm
from normexp.norms.core.masking import flatten_tokens, masked_mean
from normexp.norms.core.option_checks import check_not_negative
from normexp.norms.core.replay_cache import in_recomputation, may_be_repeated
from normexp.norms.distributed.collectives import several_ranks
from normexp.norms.kernels.dispatch import native_operator
from normexp.norms.registry import register_norm


@register_norm("regularized_batch")
class RegularizedBatchNorm(BatchNorm):
    """RBN, batch normalization with a penalty.

    Wang, Wu, Huang, "Understanding the Failure of Batch Normalization for Transformers in NLP"
    (2022). Masked BN (`batch`) with the biased var_B also in running_var and with
        x_hat = (x - mu_B) / sqrt(max(var_B, eps)),
    and, per layer, a term of the loss that the training code has to add:
        penalty = penalty_mean sum_C (running_mean - mu_B)^2
                  + penalty_var sum_C |running_var - var_B|
    with the running values already updated by this batch and held constant. The authors use
    0.1 / 0.01 for pre-norm and 60 / 0 for post-norm Transformers on IWSLT14, with the penalties of
    all layers added to the loss summed over the tokens.

    With sync=True each rank's penalty is its share, so that their sum counts once.

    Reference: normexp/norms/reference/regularized_batch.py
    Proof: pytest tests/norms/test_references.py -k "regularized_batch]"
    Number: no training run of it is recorded
    """

    _regularized = True

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.05,
        penalty_mean: float = 0.1,
        penalty_var: float = 0.01,
        sync: bool = False,
    ):
        super().__init__(num_features, eps, momentum, sync)
        check_not_negative(penalty_mean=penalty_mean, penalty_var=penalty_var)
        self.penalty_mean, self.penalty_var = penalty_mean, penalty_var
        self._pending = _Pending()

    def penalty(self) -> Tensor:
        """Penalty of the last forward in training mode: a scalar to add to the loss once.

        It has the unit of a loss summed over the batch's tokens.

        Raises RuntimeError if there is none, or if it carries no gradient because reentrant
        activation checkpointing ran the forward without recording.
        """
        penalty, recorded = self._pending.take()
        if torch.is_grad_enabled() and not recorded:
            raise RuntimeError(
                "the penalty of regularized batch normalization was computed without gradients; "
                "run activation checkpointing with use_reentrant=False, or not at all"
            )
        return penalty

    def _train_native(self, x: Tensor, padding_mask: Tensor | None) -> Tensor:
        is_replay = in_recomputation()
        names = "running_mean", "running_var", "step", "num_rejected"
        weight, bias, *running, step, num_rejected = self._parameters_and(*names)
        if is_replay:
            tokens, token_mask = flatten_tokens(x.detach(), padding_mask, self.num_features)
            running = self._replay_cache.replay(masked_mean(tokens, token_mask))
        y, penalty, mean = native_operator("regularized_batch")(
            *(x, padding_mask, weight, bias, *running, step, num_rejected, is_replay),
            *(self.eps, self.momentum, self.penalty_mean, self.penalty_var),
        )
        if not is_replay:
            if may_be_repeated():
                self._replay_cache.store(mean, *(buffer.clone() for buffer in running))
            self._pending.put(penalty)
        return y

    def _after_step(self, mean: Tensor, var: Tensor, n: Tensor) -> None:
        running_mean, running_var = self.running_mean.clone(), self.running_var.clone()
        if in_recomputation():
            running_mean, running_var = self._replay_cache.replay(mean)
        else:
            self._replay_cache.store(mean, running_mean, running_var)
        penalty = self.penalty_mean * (running_mean - mean).square().sum()
        penalty = penalty + self.penalty_var * (running_var - var).abs().sum()
        penalty = torch.where(n > 0, penalty, 0.0)
        if self.sync and several_ranks():
            penalty = penalty / dist.get_world_size()
        if not in_recomputation():
            self._pending.put(penalty)

    def _var_to_average(self, var: Tensor, n: Tensor) -> Tensor:
        return var

    def _inverse_std(self, var: Tensor) -> Tensor:
        return torch.rsqrt(var.clamp(min=self.eps))

    def _inverse_std_slope(self, var: Tensor) -> Tensor:
        return torch.where(var < self.eps, 0.0, super()._inverse_std_slope(var))


class _Pending:
    """A penalty on its way to the loss; copies and pickles of the layer do not have it."""

    def __init__(self) -> None:
        self._penalty: tuple[Tensor, bool] | None = None

    def put(self, penalty: Tensor) -> None:
        if self._penalty is not None and self._penalty[1]:
            warnings.warn(
                "penalty() of regularized batch normalization was not added to the loss of the "
                "last batch; with fairseq choose a criterion whose name starts with normexp_",
                stacklevel=2,
            )
        self._penalty = penalty, torch.is_grad_enabled()

    def take(self) -> tuple[Tensor, bool]:
        if self._penalty is None:
            raise RuntimeError("no penalty: no forward in training mode since the last one")
        penalty, self._penalty = self._penalty, None
        return penalty

    def __deepcopy__(self, memo: object) -> "_Pending":
        return _Pending()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Pending, ()
