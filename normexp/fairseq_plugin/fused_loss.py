"""Output projection and label-smoothed cross entropy in one, without the N x V logits.

A chunk of rows is projected and turned into its loss and into the gradients of the features and of
the projection before the next one, so that only one chunk's logits exist at a time. fairseq's
smoothed loss of a row with logits z and target t is, with e = eps / (V - 1),

    logsumexp(z) - (1 - eps - e) z[t] - e sum(z),

and its gradient is softmax(z) - (1 - eps - e) [t] - e, where [t] is 1 at the target, else 0. The
terms with e need no pass over the logits: sum(z) = f . sum(W) + sum(b) for features f, and in the
gradient they are the same vector for every row.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from normexp.norms.kernels import native

CHUNK = 512  # rows
_ROWS = 128  # the last chunk is filled up to a multiple; see row_counts.py
_SOURCE = Path(__file__).with_suffix(".cpp")


def compiled_for(logits: Tensor) -> bool:
    """Return whether torch.ops.normexp.loss_rows_ (fused_loss.cpp) can be used for the logits.

    The first call of an installation compiles it, for half a minute; see norms/kernels/native.py.
    """
    types = (torch.float32, torch.bfloat16)
    return logits.device.type == "cpu" and logits.dtype in types and native.load(_SOURCE)


class FusedLoss(NamedTuple):
    """Sums over the rows, each a scalar tensor."""

    loss: Tensor  # label-smoothed, in nats; can be differentiated
    nll: Tensor  # negative log-likelihood in nats, without gradient
    num_correct: Tensor  # rows whose target has the largest logit; 0 unless counted


def fused_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    eps: float = 0.0,
    *,
    count_correct: bool = False,
    chunk: int = CHUNK,
) -> FusedLoss:
    """Loss in nats of targets (N,) given features (N, C), weight (V, C) and bias (V,).

    eps: label smoothing as in fairseq, 0 for plain cross entropy. count_correct: compute
    num_correct. chunk: rows at a time. N may be 0. Under autocast the matrix products have its
    type; the sums are float32 at least. Where gradients are enabled, they are computed with the
    loss; `backward` works once and cannot be differentiated further (RuntimeError).
    """
    return FusedLoss(
        *_FusedLossFunction.apply(
            features, weight, bias, targets, eps, count_correct, chunk, torch.is_grad_enabled()
        )
    )


class _FusedLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        eps: float,
        count_correct: bool,
        chunk: int,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = features.device.type
        autocast = torch.is_autocast_enabled(device)
        product = torch.get_autocast_dtype(device) if autocast else features.dtype
        each = eps / (weight.shape[0] - 1)
        nll = targets.new_zeros((), dtype=torch.float64)
        of_targets = torch.zeros_like(nll)
        num_correct = targets.new_zeros(())
        by_features, by_weight, by_bias = ctx.gradients = [
            torch.zeros_like(tensor) if with_gradients and tensor is not None else None
            for tensor in (features, weight, bias)
        ]
        with torch.autocast(device, enabled=False):
            narrow_weight = weight.to(product)
            narrow_bias = None if bias is None else bias.to(product)
            weight_sum = weight.sum(0)
            for start in range(0, len(targets), chunk):
                rows = slice(start, start + chunk)
                narrow, chunk_targets = features[rows].to(product), targets[rows]
                size = len(narrow)
                if (added := -size % _ROWS) and product == torch.bfloat16:
                    narrow = F.pad(narrow, (0, 0, 0, added))
                    chunk_targets = F.pad(chunk_targets, (0, added))
                logits = F.linear(narrow, narrow_weight, narrow_bias)
                if count_correct:
                    num_correct += logits.argmax(1).eq(chunk_targets)[:size].sum()
                logits_of_targets = logits.gather(1, chunk_targets[:, None])[:size]
                of_targets += logits_of_targets.sum(dtype=torch.float64)
                chunk_nll, by_logits = _rows(logits, chunk_targets, 1 - eps - each, with_gradients)
                nll += chunk_nll[:size].sum(dtype=torch.float64)
                if not with_gradients:
                    continue
                by_logits[size:] = 0
                by_features[rows] = (by_logits @ narrow_weight)[:size] - each * weight_sum
                _add_product(by_weight, by_logits.t(), narrow)
                if by_bias is not None:
                    by_bias += by_logits.sum(0, dtype=by_bias.dtype)
            feature_sum = features.sum(0, dtype=weight_sum.dtype)
            of_all = (feature_sum @ weight_sum).double()
            if bias is not None:
                of_all += len(targets) * bias.sum(dtype=torch.float64)
            if with_gradients:
                by_weight -= each * feature_sum
                if by_bias is not None:
                    by_bias -= each * len(targets)
        loss = nll + (eps + each) * of_targets - each * of_all
        wide = torch.promote_types(features.dtype, torch.float32)
        loss, nll = loss.to(wide), nll.to(wide)
        ctx.mark_non_differentiable(nll, num_correct)
        return loss, nll, num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the fused loss can be differentiated once; compute it again")
        gradients, ctx.gradients = ctx.gradients, None
        for tensor in gradients:
            if tensor is not None:
                tensor.mul_(gradient)
        return *gradients, None, None, None, None, None


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left @ right, which may be of a narrower type, to `total`, in place."""
    if total.dtype == right.dtype:
        total.addmm_(left, right)
    elif total.dtype == torch.float32 and compiled_for(right):
        torch.ops.normexp.accumulate_(total, left @ right)
    else:
        total += left @ right


def _rows(
    logits: Tensor, targets: Tensor, correct: float, with_gradients: bool
) -> tuple[Tensor, Tensor]:
    """Return -log softmax(z) at the targets (n,) and softmax(z) - correct [t] (n, V).

    logits z (n, V) are overwritten. Without `with_gradients` the second result is undefined.
    """
    if compiled_for(logits):
        nll = torch.ops.normexp.loss_rows_(logits, targets, correct, with_gradients)
        return nll, logits
    wide = torch.promote_types(logits.dtype, torch.float32)
    logs = F.log_softmax(logits, dim=1, dtype=wide)
    nll = -logs.gather(1, targets[:, None])
    if not with_gradients:
        return nll, logits
    softmax = logs.exp_()
    softmax.scatter_add_(1, targets[:, None], softmax.new_full((len(targets), 1), -correct))
    return nll, softmax.to(logits.dtype)
