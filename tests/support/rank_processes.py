"""scripts/train.py on several ranks, forked from the test's process, which has the imports done."""

import logging
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import fairseq_cli.train  # noqa: F401 (for the processes that are forked)
from hydra.core.global_hydra import GlobalHydra

import normexp.evaluation.causality
import normexp.evaluation.scores
import normexp.pipeline
import normexp.training.loop  # noqa: F401
from support.small_runs import REPOSITORY

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
    kill_when: Callable[[], bool] | None = None,
    by: signal.Signals = signal.SIGKILL,
) -> Ended:
    """Run scripts/train.py as torchrun does, without its agent.

    folder: for what the ranks print. prepare: called with the rank in its process before all else.
    kill_when: all are sent a signal, once, as soon as it returns True.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True, parents=True)
    forking = multiprocessing.get_context("fork")
    processes = []
    for rank in range(size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        todo = (folder / f"{rank}", environment, arguments, prepare)
        processes.append(forking.Process(target=_rank, args=todo))
        processes[-1].start()
    deadline = time.monotonic() + TIMEOUT
    while any(process.is_alive() for process in processes) and time.monotonic() < deadline:
        if kill_when is not None and kill_when():
            kill_when = None
            for process in processes:
                os.kill(process.pid, by)
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


def _rank(
    printed: Path,
    environment: dict[str, str],
    arguments: tuple[str, ...],
    prepare: Callable[[int], object],
) -> None:
    for descriptor, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{printed}.{stream}", os.O_CREAT | os.O_WRONLY | os.O_APPEND), descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    os.environ |= environment
    GlobalHydra.instance().clear()
    logging.getLogger().handlers.clear()  # pytest's
    script = REPOSITORY / "scripts/train.py"
    sys.argv = [str(script), *arguments]
    code: object = 0
    try:
        prepare(int(environment["RANK"]))
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as leaving:
        code = leaving.code or 0
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)  # not pytest's own ending
