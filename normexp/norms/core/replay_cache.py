"""Activation checkpointing: the second run of a forward must repeat the first one's state."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_REMEMBERED = 64
_TOLERANCE = 1e-3


def recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as only a recomputation does."""
    # torch.utils.checkpoint itself asks the same question in the same way.
    return torch._C._current_graph_task_id() != -1


class RecentForwards:
    """What the last forwards of a layer in training took from its state.

    Activation checkpointing runs a forward again in the backward pass, when other forwards may
    have moved the state on. Nothing says which forward is being repeated, so it is recognised by
    a statistic of its own batch. Not part of a layer's state: copies and pickles are empty.

    Where several forwards with the very same statistic wait for their backwards at once (the same
    batch twice; with sync=True also several batches of padding only on one rank), the latest is
    taken first. That is right for one backward through all of them, and wrong, without notice,
    where their backwards run one by one in the order of the forwards.
    """

    def __init__(self) -> None:
        self._forwards: deque[_Forward] = deque(maxlen=_REMEMBERED)

    def remember(self, batch_statistic: Tensor, *taken: Any) -> None:
        """Keep what was `taken` by a forward, to be found by its batch_statistic (C,)."""
        if not torch.is_inference_mode_enabled():  # no backward pass can follow
            self._forwards.append(_Forward(batch_statistic.detach(), taken))

    def recall(self, batch_statistic: Tensor) -> tuple[Any, ...]:
        """As `find`; RuntimeError when there is none."""
        taken = self.find(batch_statistic)
        if taken is None:
            raise RuntimeError(
                "activation checkpointing repeats a forward that is not among the layer's last "
                f"{_REMEMBERED} in training; run backward after fewer forwards"
            )
        return taken

    def find(self, batch_statistic: Tensor) -> tuple[Any, ...] | None:
        """What the forward with this batch_statistic (C,) took, if it is among the last 64.

        Among equal ones those recalled least come first, then the latest: the order in which
        backward meets them.
        """
        wanted = batch_statistic.detach().nan_to_num()
        past = list(reversed(self._forwards))
        distances = [float("inf")]
        if past:
            statistics = torch.stack([forward.batch_statistic for forward in past]).nan_to_num()
            distances = (statistics - wanted).abs().sum(1).tolist()
        if min(distances) > _TOLERANCE * float(wanted.abs().sum()):
            return None
        best = min(range(len(past)), key=lambda i: (distances[i], past[i].recalls))
        past[best].recalls += 1
        return past[best].taken

    def __deepcopy__(self, memo: object) -> "RecentForwards":
        return RecentForwards()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return RecentForwards, ()


@dataclass
class _Forward:
    batch_statistic: Tensor
    taken: tuple[Any, ...]
    recalls: int = 0
