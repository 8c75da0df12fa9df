"""Calls of W&B that are waited for only so long.

W&B can wait for ever: wandb 0.31.0 waits on a lock of its own when its service, the process
`wandb-core`, cannot start, and a service that is stopped or hangs is waited for without limit. No
time-out of W&B's reaches these places, so the calls are made in another thread.
"""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


class Unresponsive(Exception):
    """A call that did not return in time; the message says so."""


class BoundedCalls:
    """Makes calls one after another in a thread of its own, which never holds the process."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future] | None]
        self._calls = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def __call__(self, action: Callable[[], T], seconds: float) -> T:
        """Return what `action` returns, or raise what it raises.

        Raises Unresponsive after `seconds`. The thread is stuck then, so that there is no use in
        further calls, and W&B's service is ended: at its exit, Python would wait for it.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
            self._thread.start()
        future: Future[T] = Future()
        self._calls.put((action, future))
        try:
            return future.result(seconds)
        except TimeoutError:
            if future.done():  # the action's own
                raise
            _end_service()
            raise Unresponsive(f"no answer within {seconds:g} s") from None

    def close(self) -> None:
        """End the thread after the call at hand."""
        self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            action, future = call
            try:
                future.set_result(action())
            except SystemExit as error:  # W&B's teardown, when its service failed
                future.set_exception(RuntimeError(f"W&B's service failed: {error}"))
            except BaseException as error:
                future.set_exception(error)


def _end_service() -> None:
    """Kill this process's `wandb-core`; what it has written to disk stays.

    W&B's exit hook would ask the service to end and wait until it has. There is no public way to
    leave without that.
    """
    with suppress(Exception):
        from wandb.sdk import wandb_setup

        connection = wandb_setup._singleton._connection
        connection._proc._process.kill()
        connection._cleanup()  # unregisters the exit hook
