"""The hook through which fairseq's training loop hands out its metrics.

fairseq's own W&B wrapper calls `wandb.init` at each epoch and validation and so leaves empty run
folders behind. Here it is replaced by one that knows nothing of W&B and passes the numbers on.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from numbers import Number
from typing import Any

import torch
from fairseq.logging import progress_bar
from fairseq.logging.meters import AverageMeter

Sink = Callable[[str, int, Mapping[str, float]], None]
"""Called as `sink(tag, step, values)`: the tag is "train_inner", "train" or the name of a
validation subset, the step a number of updates."""


class MetricsBar(progress_bar.BaseProgressBar):
    """Wraps the progress bar on the console and passes every logged number to the sinks."""

    def __init__(
        self,
        wrapped_bar: progress_bar.BaseProgressBar,
        wandb_project: str,
        run_name: str | None = None,
        *,
        sinks: tuple[Sink, ...],
    ) -> None:
        super().__init__(wrapped_bar)
        self.wrapped_bar = wrapped_bar
        self.sinks = sinks

    def __iter__(self) -> Iterator[Any]:
        return iter(self.wrapped_bar)

    def log(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None):
        """Pass on statistics within an epoch."""
        self._pass_on(stats, tag, step)
        self.wrapped_bar.log(stats, tag=tag, step=step)

    def print(self, stats: Mapping[str, Any], tag: str | None = None, step: int | None = None):
        """Pass on statistics at the end of an epoch or of a validation."""
        self._pass_on(stats, tag, step)
        self.wrapped_bar.print(stats, tag=tag, step=step)

    def update_config(self, config: Mapping[str, Any]) -> None:
        """Leave the sinks alone: the run's owner has already given them its own configuration."""
        self.wrapped_bar.update_config(config)

    def _pass_on(self, stats: Mapping[str, Any], tag: str | None, step: int | None) -> None:
        for sink in self.sinks:
            sink(tag or "", int(stats["num_updates"] if step is None else step), numbers(stats))


def numbers(stats: Mapping[str, Any]) -> dict[str, float]:
    """What of fairseq's statistics is a number, the number of updates apart."""
    values = {name: _number(stat) for name, stat in stats.items() if name != "num_updates"}
    return {name: value for name, value in values.items() if value is not None}


def _number(stat: Any) -> float | None:
    if isinstance(stat, AverageMeter):
        stat = stat.val
    if isinstance(stat, Number) or (torch.is_tensor(stat) and stat.numel() == 1):
        return float(stat)
    return None


@contextmanager
def metrics_to(*sinks: Sink) -> Iterator[None]:
    """Within this context fairseq's metrics go to the sinks.

    fairseq uses the hook only where `common.wandb_project` is set (to any string), and only on
    the master process.
    """
    original = progress_bar.WandBProgressBarWrapper
    progress_bar.WandBProgressBarWrapper = partial(MetricsBar, sinks=sinks)
    try:
        yield
    finally:
        progress_bar.WandBProgressBarWrapper = original
