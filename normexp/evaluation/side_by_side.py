"""Work on batches in several threads at once, each of which computes on one core.

The operators of a small model are too short to be divided: with a second thread of torch's they
take longer. Two batches in two threads of Python run side by side, because torch's operators
release Python's lock.
"""

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_NO_MORE = object()


class Interrupted(Exception):
    """Raised by `check` in work whose result nobody waits for any more."""


Work = Callable[[T, Callable[[], None]], R]


def side_by_side(
    make: Callable[[], Work[T, R]], items: Iterator[T], num_threads: int
) -> Iterator[tuple[T, R]]:
    """Yield each item with the result of the work on it, in the order in which they are done.

    num_threads: how many work; with 1, the caller's thread itself, on all cores. make: returns a
    thread's own function; it gets an item and `check`, which it calls now and then: it raises
    Interrupted when the work is in vain. Gradients are off.

    An error in a thread is raised here, as it is, after the other threads have ended; so is
    KeyboardInterrupt. Items are read by one thread at a time.
    """
    if num_threads == 1:
        work = make()
        for item in items:
            yield item, work(item, lambda: None)
        return
    in_vain = threading.Event()
    reading = threading.Lock()
    done: queue.SimpleQueue[tuple[T, R] | BaseException | None] = queue.SimpleQueue()

    def check() -> None:
        if in_vain.is_set():
            raise Interrupted

    def next_item() -> T | object:
        with reading:
            check()
            return next(items, _NO_MORE)

    def run() -> None:
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                work = make()
                while (item := next_item()) is not _NO_MORE:
                    done.put((item, work(item, check)))
        except Interrupted:
            pass
        except BaseException as error:
            done.put(error)
        finally:
            done.put(None)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(num_threads)]
    with _threads_restored():
        for thread in threads:
            thread.start()
        try:
            at_work = num_threads
            while at_work:
                result = done.get()
                if isinstance(result, BaseException):
                    raise result
                if result is None:
                    at_work -= 1
                else:
                    yield result
        finally:
            in_vain.set()
            for thread in threads:
                thread.join()


@contextmanager
def _threads_restored() -> Iterator[None]:
    # A thread that sets its own number sets that of MKL, and of threads to come, for all.
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
