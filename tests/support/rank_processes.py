"""scripts/train.py on several ranks."""

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from support.forked_processes import script, start

TIMEOUT = 180  # seconds; an own end takes a few


@dataclass(frozen=True)
class Ended:
    """How the ranks ended; each list is by rank. A signal is a negative exit code."""

    codes: list[int]
    out: list[str]
    err: list[str]


def train_on_ranks(
    folder: Path,
    *arguments: str,
    size: int = 2,
    prepare: Callable[[int], object] = lambda rank: None,
) -> Ended:
    """Run scripts/train.py as torchrun does, without its agent.

    folder: for what the ranks print. prepare: called with the rank in its process before all else.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True, parents=True)
    processes = []
    for rank in range(size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        work = script("train.py", *arguments, prepare=partial(prepare, rank))
        processes.append(start(folder / f"{rank}", work, environment))
    deadline = time.monotonic() + TIMEOUT
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        time.sleep(0.02)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hung, f"ranks {hung} did not end"
    return Ended(
        [process.exitcode for process in processes],
        *(
            [Path(f"{folder / str(rank)}.{stream}").read_text() for rank in range(size)]
            for stream in ("out", "err")
        ),
    )
