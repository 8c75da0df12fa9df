"""Signals that end a run early and in order: a checkpoint first, so that nothing is lost.

SLURM sends SIGUSR2 before the time limit (submitit asks for it), SIGTERM when it preempts,
requeues or cancels a job; other systems send SIGTERM. A signal that comes while training waits for
the end of the running update (and of a validation), then the state is saved as checkpoint_last.pt
and the run is left; a signal at any other time leaves at once. On the way out W&B is finished and
the run folder released, and at last the handler takes over that was there before: submitit's, which
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
    """A signal ends this run. Not an Exception: nothing on the way may take it for a failure."""

    of_all_ranks = True  # they have agreed on it in training; elsewhere each has its own signal

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class _State:
    """Signals belong to a process as a whole, and so does what has been received."""

    process: int = field(default_factory=os.getpid)
    training: bool = False
    received: int = 0  # number of the first signal while training, 0: none
    leaving: bool = False


_state = _State(leaving=True)


@contextmanager
def handled() -> Iterator[None]:
    """Within this context SIGTERM, SIGUSR1 and SIGUSR2 raise Preempted, in training at the end of
    an update; the context turns that into requeueing, or into an exit with 128 + number.

    Does nothing outside the main thread, where Python does not let signals be handled.
    """
    global _state
    state = _State()
    try:
        earlier = {number: signal.signal(number, _receive) for number in SIGNALS}
    except ValueError:
        yield
        return
    _state = state
    try:
        yield
    except Preempted as preempted:
        _hand_over(preempted.number, earlier)
    finally:
        state.leaving = True
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextmanager
def checkpoint_at_updates(fairseq_train: Any) -> Iterator[None]:
    """Within this context signals wait for fairseq's training loop to end its update.

    The loop saves and raises Preempted after what it does at the end of an update, so that a run
    that goes on later validates and logs at the same updates. At the end of an epoch it goes on
    to the first update of the next: only then everything about the old one is on disk. Of several
    ranks all stop after the same update.
    """
    from fairseq import checkpoint_utils

    original = fairseq_train.validate_and_save

    def validate_and_save(
        cfg: Any, trainer: Any, task: Any, epoch_itr: Any, subsets: list[str], end_of_epoch: bool
    ) -> tuple[list[float | None], bool]:
        losses, should_stop = original(cfg, trainer, task, epoch_itr, subsets, end_of_epoch)
        number = _received_by_any_rank(trainer.device)
        if number and not (end_of_epoch or should_stop):
            checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
            _say(number, f"saved after update {trainer.get_num_updates()}")
            _leave(number)
        return losses, should_stop

    fairseq_train.validate_and_save = validate_and_save
    _state.training = True
    try:
        yield
    finally:
        _state.training = False
        fairseq_train.validate_and_save = original


def leave_if_asked() -> None:
    """Raise Preempted if a signal came so late that training ended as configured."""
    if _state.received:
        _leave(_state.received)


def _receive(number: int, frame: FrameType | None) -> None:
    if _state.leaving:
        return
    if os.getpid() != _state.process:  # a forked worker, which SLURM signals too
        if not _state.training:
            os._exit(128 + number)
        signal.alarm(WORKER_SECONDS)
        return  # the update in progress needs its data
    if _state.training:
        _state.received = _state.received or number
    else:
        _leave(number)


def _leave(number: int) -> None:
    _state.leaving = True  # a second signal must not disturb what happens on the way out
    raise Preempted(number)


def _received_by_any_rank(device: torch.device) -> int:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return _state.received
    number = torch.tensor(_state.received, device=device)
    distributed.all_reduce(number, distributed.ReduceOp.MAX)
    return int(number)


def _hand_over(number: int, earlier: dict[int, Any]) -> None:
    """Let the earlier handler have the signal; leave with 128 + number if it does not."""
    requeue = _submitit_handler(earlier)
    if requeue is not None and (number != signal.SIGTERM or _job_is_running()):
        _say(number, "the job is requeued and goes on from the last checkpoint")
        try:
            requeue(number, None)
        except subprocess.CalledProcessError as error:
            if error.returncode != -signal.SIGTERM:
                raise
            # SLURM was quick: it ended the job, and `scontrol requeue` with it
        # Only rank 0 requeues, and SLURM then ends the others. One that ends before could count as
        # a failure of the job.
        time.sleep(REQUEUE_SECONDS if os.environ.get("SLURM_PROCID", "0") != "0" else 0)
    _say(number, "the same command goes on from the last checkpoint")
    if callable(earlier[number]) and requeue is None:
        earlier[number](number, None)
    sys.exit(128 + number)


def _submitit_handler(earlier: dict[int, Any]) -> Callable[[int, None], None] | None:
    """submitit listens to one of SIGUSR1 and SIGUSR2 and ignores SIGTERM."""
    if os.environ.get("SUBMITIT_EXECUTOR") != "slurm":
        return None
    return next(
        (earlier[n] for n in (signal.SIGUSR2, signal.SIGUSR1) if callable(earlier[n])), None
    )


def _job_is_running() -> bool:
    """False once SLURM itself ends the job: cancelled by its owner, or requeued by SLURM.

    SIGTERM to a job that SLURM still calls running announces preemption: the job has a period of
    grace, and if it ended in that period without asking for it, nobody would requeue it.
    """
    asked = ["squeue", "--noheader", "--jobs", os.environ.get("SLURM_JOB_ID", ""), "--format=%T"]
    try:
        shown = subprocess.run(asked, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return shown.stdout.strip() == "RUNNING"


def _say(number: int, text: str) -> None:
    line = f"{signal.Signals(number).name}: {text}"
    logger.info(line)
    if this_process().is_main:
        print(line, flush=True)
