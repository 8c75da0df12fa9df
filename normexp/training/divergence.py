"""The site at which a training that diverged first had values that are not finite."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from normexp.norms.running_norm import RunningNorm
from normexp.sites import site_of


class StatisticsWatch:
    """Finds, after a failed update, the site at which statistics were first not finite.

    A layer with running statistics counts the passes whose statistics were not finite
    (`RunningNorm.num_rejected`). The watch copies all counts before and after each forward pass
    of an update, because afterwards NaN has spread to all sites in one direction or the other.
    That costs two copies of one integer per layer and forward pass, without waiting for the
    device. The watch is false, and costs nothing, where the model has no such layer.
    """

    def __init__(self, model: nn.Module, criterion: nn.Module):
        self._norms = {
            site_of(path) or path: module
            for path, module in model.named_modules()
            if isinstance(module, RunningNorm)
        }
        self._order: list[str] = []  # sites in the order of the forward pass
        self._counts: list[Tensor] = []
        if self._norms:
            for name, norm in self._norms.items():
                self._note_order(name, norm)
            criterion.register_forward_pre_hook(self._count)
            criterion.register_forward_hook(self._count)

    def begin_update(self) -> None:
        """Forget the update before."""
        self._counts = []

    def first_site(self, num_batches: int) -> tuple[str, str] | None:
        """Return the first site with values that are not finite and a name for them, or None.

        num_batches: the batches of the failed update; passes that fairseq ran after them, in search
        of the cause, are left out. A running statistic itself (read from a damaged checkpoint, for
        example) comes first, then the order of the computation: the statistics of a forward pass or
        of a backward pass (nu's). The values arrived at this site, so they arose between it and the
        site before, in the direction of the pass.
        """
        if not self:
            return None
        for site in self._order:
            values = self._norms[site].statistics().values()
            if not all(bool(value.isfinite().all()) for value in values):
                return site, "running statistics"
        counts = [*self._counts, self._current()][: 2 * num_batches + 1]
        for number, (before, after) in enumerate(pairwise(counts)):
            more = (after > before).tolist()
            sites = [name for name, risen in zip(self._norms, more, strict=True) if risen]
            if sites:
                forward = number % 2 == 0
                first = (min if forward else max)(sites, key=self._order.index)
                return first, f"statistics of the {'forward' if forward else 'backward'} pass"
        return None

    def __bool__(self) -> bool:
        return bool(self._norms)

    def _note_order(self, name: str, norm: nn.Module) -> None:
        def note(*_: Any) -> None:
            self._order.append(name)
            handle.remove()

        handle = norm.register_forward_pre_hook(note)

    def _count(self, criterion: nn.Module, *_: Any) -> None:
        if criterion.training:
            self._counts.append(self._current())

    def _current(self) -> Tensor:
        return torch.stack([norm.num_rejected for norm in self._norms.values()])
