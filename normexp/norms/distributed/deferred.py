"""Sums over the ranks that nobody has to wait for, packed into one collective for all layers.

A layer whose output does not depend on the sums of this step posts them here and says what is to be
done with the totals. When the backward pass ends, everything posted leaves in one asynchronous
all-reduce, which runs while the optimizer steps; the totals are used when a layer next needs its
state. Since every rank posts the same in the same order, no rank waits for one that does not come.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Variable

from normexp.norms.core.replay_cache import recomputing


@dataclass
class _Post:
    about: Hashable
    sums: Tensor
    use: Callable[[Tensor], None]


@dataclass
class _UnderWay:
    work: Any
    packed: Tensor
    posts: list[_Post]


class Exchange:
    """What this process has posted and not yet used, in the order of posting."""

    def __init__(self) -> None:
        self._waiting: list[_Post] = []
        self._under_way: list[_UnderWay] = []
        self._will_launch = False

    def post(self, about: Hashable, sums: Tensor, use: Callable[[Tensor], None]) -> None:
        """Have `sums` (K,) summed over the ranks some time; then use(total) is called once.

        In a backward pass the summing begins when it ends, otherwise with the next that does.
        """
        self._waiting.append(_Post(about, sums, use))
        if recomputing() and not self._will_launch:
            self._will_launch = True
            Variable._execution_engine.queue_callback(self._launch)

    def owes(self, about: Hashable) -> bool:
        """Whether totals that were posted as `about` have not been used yet."""
        return any(
            post.about == about
            for posts in (self._waiting, *(sent.posts for sent in self._under_way))
            for post in posts
        )

    def settle(self) -> None:
        """Use all totals that are under way. No collective begins, so one rank alone may do it."""
        while self._under_way:
            sent = self._under_way.pop(0)
            sent.work.wait()
            sizes = [post.sums.numel() for post in sent.posts]
            for post, total in zip(sent.posts, sent.packed.split(sizes), strict=True):
                post.use(total.to(post.sums.dtype))

    def complete(self) -> None:
        """Sum and use everything posted; on all ranks at the same point."""
        self._launch()
        self.settle()

    def _launch(self) -> None:
        self._will_launch = False
        posts, self._waiting = self._waiting, []
        for _, group in groupby(posts, key=lambda post: post.sums.device):
            together = list(group)
            packed = torch.cat([post.sums for post in together])
            work = dist.all_reduce(packed, async_op=True)
            self._under_way.append(_UnderWay(work, packed, together))


EXCHANGE = Exchange()
"""Of all layers of this process: their order among each other is what the ranks agree on."""
