"""Sums over the ranks that nobody has to wait for, packed into one collective for all layers.

A layer whose output does not depend on the sums of this step adds them here with a function of
their totals. When the backward pass ends, everything added leaves in one asynchronous all-reduce,
which runs while the optimizer steps; the totals are used when a layer next needs its state. Since
every rank adds the same in the same order, no rank waits for one that does not come; sums of other
layers than on the other ranks are an error.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable

from normexp.norms.core.replay_cache import in_recomputation
from normexp.norms.distributed.same_layer import NUM_MARKS, check_marks, marks


@dataclass
class _Entry:
    key: Hashable
    partial_sums: Tensor
    use: Callable[[Tensor], None]


@dataclass
class _AllReduce:
    work: Any
    packed: Tensor
    entries: list[_Entry]


class DeferredSums:
    """Sums that this process has added and whose totals have not been used, in order of adding."""

    def __init__(self) -> None:
        self._queued: list[_Entry] = []
        self._in_flight: list[_AllReduce] = []
        self._will_launch = False

    def add(self, key: Hashable, partial_sums: Tensor, use: Callable[[Tensor], None]) -> None:
        """Have partial_sums (K,) summed over the ranks some time; use(total) is then called once.

        The all-reduce of what is added in a backward pass begins when that pass ends; of what is
        added elsewhere, at the end of the next pass that adds something.
        """
        self._queued.append(_Entry(key, partial_sums, use))
        if in_recomputation() and not self._will_launch:
            self._will_launch = True
            Variable._execution_engine.queue_callback(self._launch)

    def pending(self, key: Hashable) -> bool:
        """Whether totals of sums that were added under `key` have not been used yet."""
        return any(
            entry.key == key
            for entries in (self._queued, *(sent.entries for sent in self._in_flight))
            for entry in entries
        )

    def wait(self) -> None:
        """Use all totals in flight. No collective begins, so a single rank may call this."""
        while self._in_flight:
            sent = self._in_flight.pop(0)
            sent.work.wait()
            sizes = [entry.partial_sums.numel() for entry in sent.entries]
            *totals, of_layers = sent.packed.split([*sizes, NUM_MARKS])
            check_marks(of_layers)
            for entry, total in zip(sent.entries, totals, strict=True):
                entry.use(total.to(entry.partial_sums.dtype))

    def flush(self) -> None:
        """Sum and use everything added. Call it on all ranks at the same point."""
        self._launch()
        self.wait()

    def _launch(self) -> None:
        self._will_launch = False
        entries, self._queued = self._queued, []
        for _, group in groupby(entries, key=lambda entry: entry.partial_sums.device):
            on_one_device = list(group)
            layers = [entry.key[0] for entry in on_one_device]
            sums = [entry.partial_sums for entry in on_one_device]
            packed = torch.cat([*sums, marks(layers, sums[0])])
            work = dist.all_reduce(packed, async_op=True)
            self._in_flight.append(_AllReduce(work, packed, on_one_device))


DEFERRED = DeferredSums()
"""One for all layers of this process: the ranks agree on the layers' order among each other."""
