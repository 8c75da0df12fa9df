"""Activation checkpointing: the second run of a forward must repeat the first one's state."""

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_CAPACITY = 64  # forwards
_TOLERANCE = 1e-3  # relative distance of statistics up to which two forwards count as the same


def in_recomputation() -> bool:
    """Whether this forward runs inside a backward pass, as only a recomputation does."""
    # torch.utils.checkpoint itself asks the same question in the same way.
    return torch._C._current_graph_task_id() != -1


def may_be_repeated() -> bool:
    """Whether this forward repeats another one, or may be repeated later.

    What checkpointing repeats has run without recording, or with hooks on what autograd saves.
    """
    return not torch.is_grad_enabled() or in_recomputation() or _hooks_on_saved(False) is not None


# Older versions of PyTorch do not tell; there any forward may be repeated.
_hooks_on_saved = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


class ReplayCache:
    """What the last 64 training forwards of a layer read from its state.

    Activation checkpointing runs a forward again in the backward pass, when other forwards may
    have moved the state on. Nothing says which forward is replayed, so it is recognised by a
    statistic of its own batch. The cache is not part of a layer's state: copies and pickles of it
    are empty.

    Where several forwards with the very same statistic wait for their backwards at once (the same
    batch twice; with sync=True also several batches of padding only on one rank), the latest is
    replayed first. That is right for one backward through all of them, and wrong, without notice,
    where their backwards run one by one in the order of the forwards.
    """

    def __init__(self) -> None:
        self._forwards: deque[_Forward] = deque(maxlen=_CAPACITY)

    def store(self, batch_statistic: Tensor, *saved: Any) -> None:
        """Keep what a forward `saved`; its batch_statistic (C,) is the key."""
        if not torch.is_inference_mode_enabled():  # no backward pass can follow
            self._forwards.append(_Forward(batch_statistic.detach(), saved))

    def replay(self, batch_statistic: Tensor) -> tuple[Any, ...]:
        """What the forward with this batch_statistic (C,) saved. RuntimeError if it is gone."""
        saved = self.lookup(batch_statistic)
        if saved is None:
            raise RuntimeError(
                "activation checkpointing repeats a forward that is not among the layer's last "
                f"{_CAPACITY} in training; run backward after fewer forwards"
            )
        return saved

    def lookup(self, batch_statistic: Tensor) -> tuple[Any, ...] | None:
        """As `replay`, but None where the forward is not in the cache.

        Ties: fewest replays first, then most recent, the order in which backward meets them.
        """
        key = batch_statistic.detach().nan_to_num()
        latest_first = list(reversed(self._forwards))
        distances = [float("inf")]
        if latest_first:
            keys = torch.stack([forward.batch_statistic for forward in latest_first]).nan_to_num()
            distances = (keys - key).abs().sum(1).tolist()
        if min(distances) > _TOLERANCE * float(key.abs().sum()):
            return None
        order = range(len(latest_first))
        best = latest_first[min(order, key=lambda i: (distances[i], latest_first[i].replays))]
        best.replays += 1
        return best.saved

    def __deepcopy__(self, memo: object) -> "ReplayCache":
        return ReplayCache()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return ReplayCache, ()


@dataclass
class _Forward:
    batch_statistic: Tensor
    saved: tuple[Any, ...]
    replays: int = 0
