"""Signals that end a run early and in order: a checkpoint first, so that nothing is lost.

SLURM sends SIGUSR2 before the time limit (submitit asks for it) and SIGTERM when it preempts,
requeues or cancels a job; other systems send SIGTERM. A signal during training waits for the end of
the running update (and of its validation); then the state is saved as checkpoint_last.pt and the
run ends. A signal at any other time ends the run at once. On the way out W&B is finished and the
run folder released. Last, the handler that was installed before gets the signal: submitit's, which
requeues the job. Without one the process exits with 128 + the signal's number.
"""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch.distributed

from normexp.training.process_group import this_process

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
REQUEUE_SECONDS = 60
WORKER_SECONDS = 60  # how long a worker outlives a signal at most


class Preempted(BaseException):
    """A signal ends this run. Not an Exception, so that no handler treats it as a failure."""

    of_all_ranks = True  # in training all ranks agree on it; elsewhere each gets its own signal

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class _State:
    """The signals that a process has received; one for the process, as signal handlers are."""

    process: int = field(default_factory=os.getpid)
    training: bool = False
    received: int = 0  # number of the first signal while training, 0: none
    leaving: bool = False


_state = _State(leaving=True)


@contextmanager
def signals_handled() -> Iterator[None]:
    """Let SIGTERM, SIGUSR1 and SIGUSR2 raise Preempted, during training after an update.

    This context turns Preempted into a requeued job, or into SystemExit with 128 + number. It does
    nothing outside the main thread, where Python does not let signals be handled.
    """
    global _state
    state = _State()
    try:
        earlier = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    except ValueError:
        yield
        return
    _state = state
    try:
        yield
    except Preempted as preempted:
        _requeue_or_exit(preempted.number, earlier)
    finally:
        state.leaving = True
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def checkpoint_at_updates(fairseq_train: Any) -> Iterator[None]:
    """Within this context signals wait until fairseq's training loop has ended its update.

    fairseq_train: the module fairseq_cli.train. The loop saves and raises Preempted after what it
    does at the end of an update, so that a run which resumes later validates and logs at the same
    updates. At the end of an epoch it first does one update of the next: only then everything
    about the old one is on disk. All ranks stop after the same update.
    """
    from fairseq import checkpoint_utils

    from normexp.fairseq_plugin.patches import after_updates

    def save_and_leave(cfg: Any, trainer: Any, epoch_itr: Any, at_end: bool) -> None:
        number = _received_by_any_rank(trainer.device)
        if number and not at_end:
            checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
            _print(number, f"saved after update {trainer.get_num_updates()}")
            _raise_preempted(number)

    with after_updates(fairseq_train, save_and_leave):
        _state.training = True
        try:
            yield
        finally:
            _state.training = False


def raise_if_signalled() -> None:
    """Raise Preempted if a signal came during the last update, after which training had ended."""
    if _state.received:
        _raise_preempted(_state.received)


def _on_signal(number: int, frame: FrameType | None) -> None:
    if _state.leaving:
        return
    if os.getpid() != _state.process:  # a forked worker, which SLURM signals too
        if not _state.training:
            os._exit(128 + number)
        signal.alarm(WORKER_SECONDS)
        return  # the running update needs its data
    if _state.training:
        _state.received = _state.received or number
    else:
        _raise_preempted(number)


def _raise_preempted(number: int) -> None:
    _state.leaving = True  # a second signal must not disturb what happens on the way out
    raise Preempted(number)


def _received_by_any_rank(device: torch.device) -> int:
    """Return the largest number of a signal that a rank has received, 0 if there is none."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return _state.received
    number = torch.tensor(_state.received, device=device)
    distributed.all_reduce(number, distributed.ReduceOp.MAX)
    return int(number)


def _requeue_or_exit(number: int, earlier: dict[int, Any]) -> None:
    """Call the handler that was installed before; raise SystemExit(128 + number) if it returns.

    earlier: signal number -> that handler.
    """
    requeue = _submitit_handler(earlier)
    if requeue is not None and (number != signal.SIGTERM or _job_is_running()):
        _print(number, "the job is requeued and resumes from the last checkpoint")
        try:
            requeue(number, None)
        except subprocess.CalledProcessError as error:
            if error.returncode != -signal.SIGTERM:
                raise
            # SLURM was quick: it ended the job, and `scontrol requeue` with it
        # Only rank 0 requeues, and SLURM then ends the others. One that ends before could count as
        # a failure of the job.
        time.sleep(REQUEUE_SECONDS if os.environ.get("SLURM_PROCID", "0") != "0" else 0)
    _print(number, "the same command resumes from the last checkpoint")
    if callable(earlier[number]) and requeue is None:
        earlier[number](number, None)
    sys.exit(128 + number)


def _submitit_handler(earlier: dict[int, Any]) -> Callable[[int, None], None] | None:
    """Return submitit's handler, None outside its jobs.

    submitit listens to one of SIGUSR1 and SIGUSR2 and ignores SIGTERM.
    """
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return None
    return next(
        (earlier[n] for n in (signal.SIGUSR2, signal.SIGUSR1) if callable(earlier[n])), None
    )


def _job_is_running() -> bool:
    """Return False once SLURM itself ends the job: cancelled by its owner, or requeued by SLURM.

    SIGTERM to a job that SLURM still calls running announces preemption: the job has a period of
    grace, and a job that ends in it without having requeued itself is not requeued.
    """
    command = ["squeue", "--noheader", "--jobs", os.environ.get("SLURM_JOB_ID", ""), "--format=%T"]
    try:
        shown = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return shown.stdout.strip() == "RUNNING"


def _print(number: int, text: str) -> None:
    line = f"{signal.Signals(number).name}: {text}"
    logger.info(line)
    if this_process().is_main:
        print(line, flush=True)
