"""fairseq's criterions with the penalties of the normalization layers added to the loss.

Each normexp_<name> is fairseq's criterion <name>; without a layer that has a `penalty()` they are
the same to the bit.
"""

import math
from typing import Any

import torch
from fairseq.criterions import register_criterion
from fairseq.criterions.adaptive_loss import AdaptiveLoss, AdaptiveLossConfig
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.logging import metrics
from torch import Tensor, nn


class _WithPenalties:
    """Stands before a criterion of fairseq."""

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """As in fairseq; in training the loss, a sum over the tokens, has the penalties added.

        The penalties are neither averaged nor multiplied by the number of tokens, as in the code
        of regularized batch normalization. The logged loss is without them; `penalty` has them.
        """
        loss, sample_size, logged = super().forward(model, sample, reduce)
        penalized = [module for module in model.modules() if hasattr(module, "penalty")]
        if model.training and penalized:
            penalty = torch.stack([layer.penalty() for layer in penalized]).sum()
            loss = loss + penalty
            logged["penalty"] = penalty.detach()
        return loss, sample_size, logged

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """As in fairseq, and the penalties in the unit of the loss, bits per token."""
        super().reduce_metrics(logging_outputs)
        if any("penalty" in logged for logged in logging_outputs):
            total = sum(logged.get("penalty", 0) for logged in logging_outputs)
            sample_size = sum(logged.get("sample_size", 0) for logged in logging_outputs)
            metrics.log_scalar("penalty", total / sample_size / math.log(2), sample_size, round=5)


@register_criterion("normexp_cross_entropy", dataclass=CrossEntropyCriterionConfig)
class PenalizedCrossEntropy(_WithPenalties, CrossEntropyCriterion):
    """Cross entropy and the penalties of the layers."""


@register_criterion(
    "normexp_label_smoothed_cross_entropy", dataclass=LabelSmoothedCrossEntropyCriterionConfig
)
class PenalizedLabelSmoothedCrossEntropy(_WithPenalties, LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross entropy and the penalties of the layers."""


@register_criterion("normexp_adaptive_loss", dataclass=AdaptiveLossConfig)
class PenalizedAdaptiveLoss(_WithPenalties, AdaptiveLoss):
    """Loss of the adaptive softmax and the penalties of the layers."""
