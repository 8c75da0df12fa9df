"""Sums over the ranks that nobody has to wait for, packed into one collective for all layers.

A layer whose output does not depend on the sums of this step adds them here with a function of
their totals. When the backward pass ends, everything added leaves in one asynchronous all-reduce,
which runs while the optimizer steps; the totals are used in a layer's next forward. Since every
rank adds the same in the same order, no rank waits for one that does not come; sums of other layers
than on the other ranks are an error.

Whoever only reads a state, to save or evaluate it, perhaps on one rank alone, must not use the
totals: DistributedDataParallel copies rank 0's buffers to the others before each forward, and ranks
would differ in what their buffers contain already. Readers ask for `arrived` and leave the state.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable

from normexp.norms.core.replay_cache import in_recomputation
from normexp.norms.distributed.same_layer import NUM_MARKS, check_marks, marks


@dataclass
class _Entry:
    key: tuple[nn.Module, str]
    partial_sums: Tensor
    use: Callable[[Tensor], None]


@dataclass
class _AllReduce:
    work: Any
    packed: Tensor
    entries: list[_Entry]

    def totals(self) -> list[tuple[_Entry, Tensor]]:
        """Each entry with its total; waits for it."""
        self.work.wait()
        sizes = [entry.partial_sums.numel() for entry in self.entries]
        *totals, of_layers = self.packed.split([*sizes, NUM_MARKS])
        check_marks(of_layers)
        return [
            (entry, total.to(entry.partial_sums.dtype))
            for entry, total in zip(self.entries, totals, strict=True)
        ]


class DeferredSums:
    """Sums that this process has added and whose totals have not been used, in order of adding."""

    def __init__(self) -> None:
        self._queued: list[_Entry] = []
        self._in_flight: list[_AllReduce] = []
        self._will_launch = False
        self.num_launched = 0  # all-reduces so far

    def add(
        self, key: tuple[nn.Module, str], partial_sums: Tensor, use: Callable[[Tensor], None]
    ) -> None:
        """Have partial_sums (K,) summed over the ranks some time; use(total) is then called once.

        key: the layer, and which of its sums. use has no effect but on the layer's buffers. The
        all-reduce of what is added in a backward pass begins when that pass ends; of what is
        added elsewhere, at the end of the next pass that adds something.
        """
        self._queued.append(_Entry(key, partial_sums, use))
        if in_recomputation() and not self._will_launch:
            self._will_launch = True
            Variable._execution_engine.queue_callback(self._launch)

    def pending(self, key: tuple[nn.Module, str]) -> bool:
        """Whether totals of sums that were added under `key` have not been used yet."""
        return any(
            entry.key == key
            for entries in (self._queued, *(sent.entries for sent in self._in_flight))
            for entry in entries
        )

    def in_flight(self) -> bool:
        """Whether there are totals that have not been used, of whatever layer."""
        return bool(self._in_flight)

    def arrived(self, layer: nn.Module) -> list[Callable[[], None]]:
        """What `wait` will call for this layer, in its order; changes nothing."""
        return [
            functools.partial(entry.use, total)
            for sent in self._in_flight
            for entry, total in sent.totals()
            if entry.key[0] is layer
        ]

    def wait(self) -> None:
        """Use all totals in flight. No collective begins, but all ranks have to do it."""
        while self._in_flight:
            for entry, total in self._in_flight.pop(0).totals():
                entry.use(total)

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
            self.num_launched += 1


DEFERRED = DeferredSums()
"""One for all layers of this process: the ranks agree on the layers' order among each other."""
