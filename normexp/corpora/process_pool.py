"""An ordered map over blocks of text in several processes, in bounded memory."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

S = TypeVar("S")
T = TypeVar("T")
_function: Callable[[Any], Any] | None = None  # of a worker process


def available_cores() -> int:
    """Cores this process may use, which a scheduler can have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def map_blocks(function: Callable[[S], T], blocks: Iterable[S], workers: int) -> Iterator[T]:
    """``map(function, blocks)`` in order; at most ``3 * workers`` blocks are held at a time.

    A block is a message to a worker, so that it should be worth one. `function` is sent once to
    every worker; what it caches lives as long as the map.
    """
    blocks = iter(blocks)
    head = list(islice(blocks, 2))
    if workers == 1 or len(head) < 2:  # starting processes costs more than the work on one block
        yield from map(function, chain(head, blocks))
        return
    # Not multiprocessing.Pool, which hangs forever when a worker is killed; this one raises.
    with ProcessPoolExecutor(workers, initializer=_install, initargs=(function,)) as pool:
        pending = deque(pool.submit(_apply, block) for block in head)
        for block in blocks:
            pending.append(pool.submit(_apply, block))
            if len(pending) > 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _install(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent process is killed; it would wait for work forever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _apply(block: Any) -> Any:
    return _function(block)
