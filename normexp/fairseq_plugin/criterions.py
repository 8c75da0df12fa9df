"""fairseq's criterions with the penalties of the normalization layers added to the loss.

Each normexp_<name> is fairseq's criterion <name>. For a model without a layer that has a
`penalty()` the two are equal to the bit, except that normexp_adaptive_loss counts words that
fairseq's leaves out. With `fused` the other two compute their loss in less time and memory, equal
up to rounding.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from fairseq.criterions import register_criterion
from fairseq.criterions.adaptive_loss import AdaptiveLoss, AdaptiveLossConfig
from fairseq.criterions.cross_entropy import CrossEntropyCriterion, CrossEntropyCriterionConfig
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.logging import metrics
from torch import Tensor, nn

from normexp.fairseq_plugin.fused_loss import FusedLoss, fused_loss


class _WithPenalties:
    """Adds the penalties; a mixin before a criterion of fairseq."""

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Return (loss, sample_size, logged values) as fairseq does, in training with penalties.

        loss: summed over the tokens, in nats; the sum of the layers' penalties is added to it, as
        in the code of regularized batch normalization neither averaged nor multiplied by the number
        of tokens. The logged `loss` is without them; `penalty` is their sum.
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
        """Log what fairseq logs, and the penalties in the unit of the loss, bits per token."""
        super().reduce_metrics(logging_outputs)
        if any("penalty" in logged for logged in logging_outputs):
            total = sum(logged.get("penalty", 0) for logged in logging_outputs)
            sample_size = sum(logged.get("sample_size", 0) for logged in logging_outputs)
            metrics.log_scalar("penalty", total / sample_size / math.log(2), sample_size, round=5)


class _Fused:
    """Computes the loss by `fused_loss` if `fused`; a mixin before a criterion of fairseq.

    Where the loss of every token is asked for (reduce=False), fairseq's own code computes it.
    """

    fused: bool
    eps = 0.0
    ignore_prefix_size = 0
    report_accuracy = False

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Return (loss, sample_size, logged values) as fairseq does.

        Raises ValueError with `fused` and a model that does not end in nn.Linear.
        """
        if not (self.fused and reduce):
            return super().forward(model, sample, reduce)
        projection = getattr(model.decoder, "output_projection", None)
        if type(projection) is not nn.Linear:
            raise ValueError(
                "criterion.fused needs a model whose logits are one linear projection; "
                f"{type(model).__name__} has none (an adaptive softmax, or one of its own)"
            )
        output = model(**sample["net_input"], features_only=True)  # output[0]: (B, T, C)
        target = model.get_targets(sample, output)[:, self.ignore_prefix_size :].flatten()
        features = output[0][:, self.ignore_prefix_size :].flatten(0, 1)
        tokens = (target != self.padding_idx).nonzero().squeeze(1)  # (N,), without padding
        result = fused_loss(
            features.index_select(0, tokens),
            projection.weight,
            projection.bias,
            target[tokens],
            self.eps,
            count_correct=self.report_accuracy,
        )
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logged = {
            "loss": result.loss.detach(),
            **self._more_to_log(result),
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
        }
        if self.report_accuracy:
            logged |= {"n_correct": int(result.num_correct), "total": len(tokens)}
        return result.loss, sample_size, logged

    def _more_to_log(self, result: FusedLoss) -> dict[str, Tensor]:
        return {}


@dataclass
class _FusedConfig:
    fused: bool = field(
        default=False,
        metadata={"help": "compute the projection to the vocabulary and the loss in one"},
    )


@dataclass
class PenalizedCrossEntropyConfig(_FusedConfig, CrossEntropyCriterionConfig):
    """fairseq's configuration and `fused`."""


@register_criterion("normexp_cross_entropy", dataclass=PenalizedCrossEntropyConfig)
class PenalizedCrossEntropy(_WithPenalties, _Fused, CrossEntropyCriterion):
    """Cross entropy and the penalties of the layers."""

    def __init__(self, task: Any, sentence_avg: bool, fused: bool = False):
        super().__init__(task, sentence_avg)
        self.fused = fused


@dataclass
class PenalizedLabelSmoothedCrossEntropyConfig(
    _FusedConfig, LabelSmoothedCrossEntropyCriterionConfig
):
    """fairseq's configuration and `fused`."""


@register_criterion(
    "normexp_label_smoothed_cross_entropy", dataclass=PenalizedLabelSmoothedCrossEntropyConfig
)
class PenalizedLabelSmoothedCrossEntropy(
    _WithPenalties, _Fused, LabelSmoothedCrossEntropyCriterion
):
    """Label-smoothed cross entropy and the penalties of the layers."""

    def __init__(
        self,
        task: Any,
        sentence_avg: bool,
        label_smoothing: float,
        ignore_prefix_size: int = 0,
        report_accuracy: bool = False,
        fused: bool = False,
    ):
        super().__init__(task, sentence_avg, label_smoothing, ignore_prefix_size, report_accuracy)
        self.fused = fused

    def _more_to_log(self, result: FusedLoss) -> dict[str, Tensor]:
        return {"nll_loss": result.nll.detach()}


class _ExactAdaptiveLoss(AdaptiveLoss):
    """fairseq's adaptive loss without an error that leaves words out.

    fairseq passes the index of padding as ignore_index to every band of the softmax. In the bands
    after the first, targets are counted from the band's beginning, so one word of each (the second,
    where padding is 1) costs its band and nothing within it.
    """

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Return (loss, sample_size, logged values), the loss summed over all words, in nats.

        Raises ValueError for reduce=False.
        """
        if not reduce:
            raise ValueError("the adaptive loss is a sum: reduce=False is not possible")
        features = model(**sample["net_input"])[0]
        target = model.get_targets(sample, None)
        token_mask = target != self.padding_idx
        logits, targets = model.decoder.adaptive_softmax(features[token_mask], target[token_mask])
        loss = features.new_zeros(())
        for scores, band_targets in zip(logits, targets, strict=True):  # one band after the other
            if band_targets is not None:
                loss = loss + F.cross_entropy(scores, band_targets, reduction="sum")
        tokens, sentences = int(token_mask.sum()), target.shape[0]
        sample_size = sentences if self.sentence_avg else tokens
        logged = {
            "loss": loss.detach(),
            "ntokens": tokens,
            "nsentences": sentences,
            "sample_size": sample_size,
        }
        return loss, sample_size, logged


@register_criterion("normexp_adaptive_loss", dataclass=AdaptiveLossConfig)
class PenalizedAdaptiveLoss(_WithPenalties, _ExactAdaptiveLoss):
    """Loss of the adaptive softmax, of every word, and the penalties of the layers."""
