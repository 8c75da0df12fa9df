"""Running statistics, back to where they started."""

from torch import nn

from normexp.norms.running_norm import RunningNorm


def reset_statistics(model: nn.Module) -> None:
    """Put the running statistics of every norm in a model to their start; parameters stay.

    Step counters too, so a warm-up begins anew. A single norm does the same by
    `reset_running_stats()`. In data-parallel training: on all ranks at the same point.
    """
    for module in model.modules():
        if isinstance(module, RunningNorm):
            module.reset_running_stats()
