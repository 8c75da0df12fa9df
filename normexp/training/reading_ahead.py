"""fairseq's threads that read batches ahead, ended with the training that they read for."""

import queue
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def ended_with_training() -> Iterator[None]:
    """Within this context fairseq's readers are known, and leaving it ends them.

    By itself a training that stops within an epoch leaves its reader behind, and a reader that is
    still at work when Python ends takes the process down with SIGABRT.
    """
    from fairseq.data import iterators

    original, readers = iterators.BackgroundConsumer, []

    class Reader(original):
        def start(self) -> None:
            readers.append(self)
            super().start()

    iterators.BackgroundConsumer = Reader
    try:
        yield
    finally:
        iterators.BackgroundConsumer = original
        for reader in readers:
            reader._max_len = 0  # it ends after the batch at hand
            while reader.is_alive():
                with suppress(queue.Empty):  # it may wait for room
                    reader._queue.get_nowait()
                reader.join(0.01)
