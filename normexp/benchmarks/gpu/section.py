"""What the sections share: their rows, their device, and how they are run.

A section runs in a process of its own. An error on a GPU can leave it useless to the process, and
a section that takes too long has to be ended; either must not cost the others.
"""

import contextlib
import logging
import multiprocessing
import os
import pkgutil
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from normexp.benchmarks.timing import Timings, interleave

Row = dict[str, Any]  # of what a section leaves out: {"skipped": name, "reason": text}

_WAIT = 0.2  # seconds
_PATIENCE = 20  # with a rehearsal: triton's interpreter is slow, and the machine may be
# Of a section's process, read when it first uses what they are for.
_ENVIRONMENT = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # or cuBLAS sums in another order in a graph
_REHEARSAL = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"}


@dataclass(frozen=True)
class Section:
    """One part of the benchmark.

    rows: module:function that takes whether this is a rehearsal on the CPU, in tiny sizes, and
    yields rows. seconds: after which it is ended, with the rows that there are. needs: packages
    without which it is skipped.
    """

    title: str
    rows: str
    seconds: float
    needs: tuple[str, ...] = ()


def device() -> torch.device:
    """The GPU; in a rehearsal the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def timed(calls: Mapping[str, Callable[[], object]], rounds: int, rehearsal: bool) -> Timings:
    """`interleave`; in a rehearsal each call is made once, and the times mean nothing."""
    if not rehearsal:
        return interleave(calls, rounds, progress=False)
    seconds = {}
    for name, call in calls.items():
        started = time.perf_counter()
        call()
        seconds[name] = [time.perf_counter() - started] * 2
    return Timings(seconds, dropped=0, disturbed=True)


def run(section: Section, rehearsal: bool) -> Iterator[Row]:
    """Yield the rows of a section as they come.

    Raises RuntimeError with the reason where it fails, and TimeoutError where it takes too long.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_rows, args=(section.rows, rehearsal, sender))
    process.start()
    sender.close()  # or the end of the process would not be seen
    seconds = section.seconds * (_PATIENCE if rehearsal else 1)
    deadline = time.monotonic() + seconds
    try:
        while True:
            while not receiver.poll(_WAIT):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"ended after {seconds:.0f} s")
            kind, content = receiver.recv()
            if kind == "row":
                yield content
            elif kind == "error":
                raise RuntimeError(content)
            else:
                return
    except EOFError:
        process.join()
        raise RuntimeError(f"its process ended with {process.exitcode}") from None
    finally:
        with contextlib.suppress(ProcessLookupError):  # it has none, or they have ended
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def _send_rows(rows: str, rehearsal: bool, sender: Connection) -> None:
    os.setsid()  # with what it starts itself: compilers' processes, which would outlive it
    os.environ.update(_ENVIRONMENT | (_REHEARSAL if rehearsal else {}))
    warnings.filterwarnings("ignore", module=r"(fairseq|torch)\.")  # one for every trainer
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    logging.getLogger("fairseq").setLevel(logging.WARNING)  # it logs every trainer it builds
    try:
        for row in pkgutil.resolve_name(rows)(rehearsal):
            sender.send(("row", row))
    except Exception as error:
        traceback.print_exc()
        sender.send(("error", one_line(error)))
    else:
        sender.send(("end", None))


def one_line(error: Exception) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
