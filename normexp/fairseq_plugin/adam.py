"""`normexp_adam`: fairseq's Adam in one pass over the parameters instead of seven."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.optim import FairseqOptimizer, register_optimizer
from fairseq.optim.adam import FairseqAdam, FairseqAdamConfig


class _FusedAdam(torch.optim.AdamW):
    """torch's fused AdamW with fairseq's epsilon.

    fairseq adds epsilon to the root of the second moment before the bias correction, torch after
    it. So torch's epsilon is fairseq's divided by the correction in each step. The result is equal
    for parameters that have had a gradient in every step.
    """

    supports_flat_params = True

    def __init__(self, params: Any, *, eps: float, **options: Any):
        super().__init__(params, eps=eps, fused=True, **options)
        self._eps = eps

    def step(self, closure: Any = None) -> Any:
        """Do one step, as torch's does."""
        for group in self.param_groups:
            # Counted here, because torch's own counts are tensors, on a GPU if the model is.
            group["steps"] = group.get("steps", 0) + 1
            group["eps"] = self._eps / math.sqrt(1 - group["betas"][1] ** group["steps"])
        return super().step(closure)


@dataclass
class FusedAdamConfig(FairseqAdamConfig):
    """fairseq's configuration of Adam; use_old_adam and fp16_adam_stats must stay false."""


@register_optimizer("normexp_adam", dataclass=FusedAdamConfig)
class FusedAdam(FairseqAdam):
    """Adam with decoupled weight decay, equal to fairseq's `adam` up to rounding.

    Raises ValueError for use_old_adam and fp16_adam_stats.
    """

    def __init__(self, cfg: Any, params: Any):
        FairseqOptimizer.__init__(self, cfg)
        if cfg.use_old_adam or cfg.fp16_adam_stats:
            raise ValueError("normexp_adam has neither use_old_adam nor fp16_adam_stats")
        self._optimizer = _FusedAdam(params, **self.optimizer_config)
