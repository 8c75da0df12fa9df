"""Running statistics anew from data, as torch's update_bn does for torch's own batch norms."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from normexp.norms.distributed.collectives import several_ranks
from normexp.norms.distributed.deferred import DEFERRED
from normexp.norms.running_norm import RunningNorm


@torch.no_grad()
def recompute_statistics(
    loader: Iterable[Any],
    model: nn.Module,
    device: torch.device | str | None = None,
    forward: Callable[[Any], object] | None = None,
) -> None:
    """Replace the running statistics of a model's norms by means over the batches of a loader.

    For weights that no training step has seen, such as averages of checkpoints (SWA, EMA), whose
    activations are others than those that were averaged. torch.optim.swa_utils.update_bn passes
    over these norms; like it, this runs the model in training mode, dropout included, on every
    batch, each norm normalizes by the statistics of that batch, and every batch weighs the same.

    loader: gives tensors, tuples or lists whose first item is the input, or mappings whose items
    are the model's arguments. device: where inputs are moved to. forward: what runs the model on an
    item of the loader, instead of that; with `replace_layer_norms` it has to be within
    `padding_mask_for`. With sync=True the statistics are those of all ranks, which have to take
    part with as many batches each.

    Only what inference reads changes, the buffers named running_*: neither step counters nor what a
    backward averages does, nor the modes of modules. Raises ValueError, and leaves all as it was,
    where the loader gave no usable batch (finite, with a real token) to some norm;
    NotImplementedError for a norm that does not define `decay_over`.
    """
    if several_ranks():
        DEFERRED.flush()
    norms = [module for module in model.modules() if isinstance(module, RunningNorm)]
    means = [_MeanOverBatches(norm) for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for mean in means:
            mean.begin()
        model.train()
        for batch in loader:
            _run(model, batch, device) if forward is None else forward(batch)
    finally:
        for mean in means:
            mean.end()
        for module, mode in modes:
            module.training = mode
    without = [str(mean.norm) for mean in means if mean.num_batches == 0]
    if without:
        raise ValueError(
            f"no usable batch for {len(without)} of {len(means)} norms, such as {without[0]}; the "
            "loader must give batches, with finite values and real tokens"
        )
    for mean in means:
        mean.take_over()


def _run(model: nn.Module, batch: Any, device: torch.device | str | None) -> None:
    if isinstance(batch, Mapping):
        model(**{name: _moved(value, device) for name, value in batch.items()})
    else:
        model(_moved(batch[0] if isinstance(batch, list | tuple) else batch, device))


def _moved(value: Any, device: torch.device | str | None) -> Any:
    return value.to(device) if device is not None and isinstance(value, Tensor) else value


class _MeanOverBatches:
    """Means of the statistics of a norm's batches, collected while its model runs on them.

    A forward averages its batch's statistic into the running one: new = d old + (1 - d) batch.
    Where old is 0, and d is the norm's own `decay_over`, new / (1 - d) is the batch's.
    """

    def __init__(self, norm: RunningNorm):
        self.norm, self.num_batches = norm, 0
        self._running = [name for name in norm._buffers if name.startswith("running_")]
        self._sums = {name: torch.zeros((), dtype=torch.float64) for name in self._running}
        self._before = {name: buffer.clone() for name, buffer in norm._buffers.items()}
        self._attributes = {
            name: getattr(norm, name)
            for name in ("warmup_steps", "is_frozen", "_num_rejected_reported")
            if hasattr(norm, name)
        }
        self._hooks: list[RemovableHandle] = []

    def begin(self) -> None:
        self.norm.is_frozen = False
        if hasattr(self.norm, "warmup_steps"):
            self.norm.warmup_steps = 2  # in its first step it normalizes by the batch's statistic
        self.norm._state_replaced()
        zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
        decay = self.norm.decay_over(zero, one)
        if decay is None:
            raise NotImplementedError(f"{self.norm} does not define decay_over")
        self._share = float(1 - decay)
        self._hooks = [
            self.norm.register_forward_pre_hook(self._before_batch),
            self.norm.register_forward_hook(self._after_batch),
        ]

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._restore()
        self.norm._state_replaced()
        for name, value in self._attributes.items():
            setattr(self.norm, name, value)

    def take_over(self) -> None:
        for name in self._running:
            getattr(self.norm, name).copy_(self._sums[name] / self.num_batches)

    def _before_batch(self, *_: object) -> None:
        self._restore()
        for name in ("step", *self._running):
            getattr(self.norm, name).zero_()

    def _after_batch(self, *_: object) -> None:
        if self.norm.step == 0:  # no usable batch
            return
        self.num_batches += 1
        for name in self._running:
            self._sums[name] = self._sums[name] + getattr(self.norm, name).double() / self._share

    def _restore(self) -> None:
        for name, value in self._before.items():
            getattr(self.norm, name).copy_(value)
