"""An ordered map over rows of text in several processes, in bounded memory."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice

Row = tuple[str, ...]
_CHUNK = 1000  # rows per message; sending single rows would cost more than tokenizing them
_function: Callable[[Row], Row] | None = None  # of a worker process


def available_cores() -> int:
    """Cores this process may use, which a scheduler can have made fewer than there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def map_rows(function: Callable[[Row], Row], rows: Iterable[Row], workers: int) -> Iterator[Row]:
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
    # Not multiprocessing.Pool: it hangs for ever when a worker is killed, this one raises.
    with ProcessPoolExecutor(workers, initializer=_install, initargs=(function,)) as pool:
        pending = deque([pool.submit(_apply, head)])
        while chunk := list(islice(rows, _CHUNK)):
            pending.append(pool.submit(_apply, chunk))
            if len(pending) > 2 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _install(function: Callable[[Row], Row]) -> None:
    global _function
    _function = function


def _apply(chunk: list[Row]) -> list[Row]:
    return list(map(_function, chunk))
