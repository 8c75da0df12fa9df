"""An ordered map over rows of text in several processes, in bounded memory."""

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from typing import Any, TypeVar

Row = tuple[str, ...]
T = TypeVar("T")
_CHUNK = 1000  # rows per message; sending single rows would cost more than tokenizing them
_function: Callable[[Row], Any] | None = None  # of a worker process


def available_cores() -> int:
    """Cores this process may use, which a scheduler can have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def map_rows(function: Callable[[Row], T], rows: Iterable[Row], workers: int) -> Iterator[T]:
    """``map(function, rows)`` in order; at most ``3 * workers`` chunks are held at a time.

    `function` is sent once to every worker, so what it caches lives as long as the map.
    """
    rows = iter(rows)
    # Starting processes costs more than a few rows do.
    head = list(islice(rows, _CHUNK + 1)) if workers > 1 else []
    if len(head) <= _CHUNK:
        yield from map(function, head)
        yield from map(function, rows)
        return
    # Not multiprocessing.Pool, which hangs forever when a worker is killed; this one raises.
    with ProcessPoolExecutor(workers, initializer=_install, initargs=(function,)) as pool:
        pending = deque([pool.submit(_apply, head)])
        while chunk := list(islice(rows, _CHUNK)):
            pending.append(pool.submit(_apply, chunk))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _install(function: Callable[[Row], Any]) -> None:
    global _function
    _function = function
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this worker when its parent process is killed; it would wait for work forever."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _apply(chunk: list[Row]) -> list:
    return list(map(_function, chunk))
