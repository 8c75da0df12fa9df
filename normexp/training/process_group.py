"""The processes that train one model together: who they are, and how they start and end as one.

torchrun and srun start the same command several times. Each process finds its rank in the
environment. Rank 0 does everything that a single process does; the others train along and are
otherwise silent: they write nothing and print nothing. What they need to know rank 0 tells them,
and whatever ends one of them ends all.
"""

import functools
import itertools
import json
import logging
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from normexp.errors import UserError

MEETING_TIMEOUT = timedelta(minutes=15)
"""How long ranks wait for rank 0 to start."""
COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""How long ranks wait in training for a slow one, such as rank 0 that writes a checkpoint."""
FAREWELL_SECONDS = 60.0
"""How long a failed rank waits for rank 0 to record why."""
PARTING_SECONDS = 10.0
"""How long rank 0 waits at its end until all others have learnt of it."""
_POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)
_meetings = itertools.count()


@dataclass(frozen=True)
class Process:
    """One of `size` processes; `local_rank` counts those of its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""  # where rank 0 can be reached
    port: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def this_process(environment: Mapping[str, str] = os.environ) -> Process:
    """Who this process is: by torchrun's variables, else by those of an srun step, else alone.

    An allocation of several tasks makes no ranks; an srun step of several tasks does. Raises
    UserError where the variables are incomplete.
    """
    if int(environment.get("WORLD_SIZE", 1)) > 1 and "RANK" in environment:
        return _by_torchrun(environment)
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1 and "RANK" not in environment:
        return _by_srun(environment)
    return Process()


def _by_torchrun(environment: Mapping[str, str]) -> Process:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not environment.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE={environment['WORLD_SIZE']} says that there are several ranks, but "
            f"{', '.join(missing)} is not set; start with torchrun, which sets all of them"
        )
    rank, size, local_rank = (int(environment[name]) for name in names[:3])
    return Process(rank, size, local_rank, environment["MASTER_ADDR"], int(environment[names[4]]))


def _by_srun(environment: Mapping[str, str]) -> Process:
    # Below the ports that systems hand out by themselves; jobs on one node get different ones.
    step = 7 * int(environment["SLURM_JOB_ID"]) + int(environment.get("SLURM_STEP_ID", 0))
    return Process(
        rank=int(environment["SLURM_PROCID"]),
        size=int(environment["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(environment["SLURM_LOCALID"]),
        address=environment.get("MASTER_ADDR") or first_node(environment["SLURM_STEP_NODELIST"]),
        port=int(environment.get("MASTER_PORT") or 15000 + step % 15000),
    )


def first_node(nodes: str) -> str:
    """First name of a SLURM node list: "gpu[03-05,9]-ib,cpu1" gives "gpu03-ib"."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]


class MainEnded(Exception):
    """Rank 0 has ended the run, well or not, and needs this rank no more."""


class ToldByMain(UserError):
    """The run has failed, and rank 0 has told the user why."""


class Ranks:
    """All processes of a run as seen by one of them; see `together`."""

    def __init__(self, process: Process):
        self.process = process
        self.rank, self.size, self.is_main = process.rank, process.size, process.is_main
        self.succeeded = True
        self.on_failure: Callable[[str], None] | None = None
        self._noticed = threading.Event()  # the end, by the thread that runs this rank
        self._told_of_failure = threading.Event()  # of another rank, by the thread that watches
        if self.size > 1:
            prefix = f"normexp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_meetings)}"
            self.store = _store(process, prefix, "work")
            # A client of its own, because one that waits makes all others of its threads wait.
            self._watched = _store(process, prefix, "watch")
            threading.Thread(target=self._watch, daemon=True).start()

    def tell(self, name: str, value: Any) -> None:
        """Let the other ranks know a value (of JSON's types); on rank 0."""
        if self.size > 1:
            self.store.set(name, json.dumps(value))

    def told(self, name: str) -> Any:
        """What rank 0 tells under this name, waited for without a limit; on the others.

        Raises MainEnded where rank 0 ends instead.
        """
        import torch.distributed as dist

        try:
            while not self.store.check([name]):
                if self.store.check(["end"]):
                    raise MainEnded
                time.sleep(_POLL_SECONDS)
            return json.loads(self.store.get(name))
        except dist.DistError:  # rank 0 or the launcher was killed, and the store with it
            raise MainEnded from None

    def from_main(self, name: str, produce: Callable[[], Any]) -> Any:
        """What `produce` returns on rank 0, where alone it is called, on all ranks."""
        if not self.is_main:
            return self.told(name)
        value = produce()
        self.tell(name, value)
        return value

    def refuse_other_number(self, ranks: int) -> None:
        """Raise UserError where the configuration asks for another number of ranks."""
        if ranks != self.size:
            raise UserError(
                f"distributed.ranks={ranks}, but the number of processes started is {self.size}: "
                "start as many by torchrun --nproc_per_node or srun -n, or leave it out"
            )

    def refuse_shared_devices(self, device: str) -> None:
        """Raise UserError on rank 0 where two ranks name the same device."""
        self.store.set(f"device {self.rank}", device)
        if not self.is_main:
            return
        found: dict[str, int] = {}
        for rank in range(self.size):
            while not self.store.check([f"device {rank}"]):
                time.sleep(_POLL_SECONDS)
            name = self.store.get(f"device {rank}").decode()
            if name in found:
                raise UserError(
                    f"ranks {found[name]} and {rank} have the same GPU ({name}): start as many "
                    "processes on a node as it has GPUs, or train with fairseq.common.cpu=true"
                )
            found[name] = rank

    def lost_another(self, error: BaseException) -> bool:
        """Whether an error says that the connection to another rank broke: it was killed."""
        lost = self.size > 1 and _is_lost_connection(error)
        if lost and self._told_of_failure.is_set():
            # By its end the rank that failed broke the connection; the other thread has told of it
            # and is about to end this process.
            time.sleep(2 * PARTING_SECONDS)
        if lost:
            self._noticed.set()
        return lost

    def leave(self, error: BaseException | None) -> None:
        """End this rank's part with an error or None; rank 0's is the end for all.

        On the others this returns when rank 0 has ended. Raises SystemExit after an error of the
        rank's own and ToldByMain where rank 0 did not succeed.
        """
        if self.size == 1:
            return
        if self.is_main:
            self._noticed.set()
            self._end(error is None and self.succeeded)
            return
        if getattr(error, "of_all_ranks", False):
            self._wait_for_end(FAREWELL_SECONDS)
            self._noticed.set()
            self._count_out(self.store)
            return
        if error is not None and not isinstance(error, MainEnded):
            self._report(error)
            self._wait_for_end(FAREWELL_SECONDS)
            self._count_out(self.store)
            raise SystemExit(1)
        succeeded = self._wait_for_end()
        self._noticed.set()
        self._count_out(self.store)
        if not succeeded:
            raise ToldByMain("the run failed on rank 0")

    def _end(self, succeeded: bool) -> None:
        import torch.distributed as dist

        # A launcher that has been killed has taken the store with it.
        with suppress(dist.DistError):
            self.store.set("end", json.dumps(succeeded))
            self._wait_for_others(self.store)

    def _wait_for_others(self, store: Any) -> None:
        # The store may be this process's, and its end would look like a failure to the others.
        deadline = time.monotonic() + PARTING_SECONDS
        while store.add("out", 0) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _count_out(self, store: Any) -> None:
        import torch.distributed as dist

        with suppress(dist.DistError):  # rank 0 has gone
            store.add("out", 1)

    def _wait_for_end(self, seconds: float = float("inf")) -> bool:
        """Whether rank 0 succeeded; no, where it is not heard of (any more)."""
        import torch.distributed as dist

        deadline = time.monotonic() + seconds
        try:
            while not self.store.check(["end"]):
                if time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_SECONDS)
            return json.loads(self.store.get("end"))
        except dist.DistError:
            return False

    def _report(self, error: BaseException) -> None:
        import torch.distributed as dist

        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        said = {
            "reason": f"rank {self.rank}: {reason}",
            "traceback": "".join(traceback.format_exception(error)),
            "is_result": isinstance(error, Exception)
            and not isinstance(error, UserError)
            and not self.lost_another(error),
        }
        with suppress(dist.DistError):  # rank 0 has gone
            self.store.compare_set("failure", "", json.dumps(said))

    def _watch(self) -> None:
        """End this process when another has failed: its own thread may wait for that one forever.

        A process group cannot be left from Python while it waits for a rank that is not there.
        """
        import torch.distributed as dist

        sign = "failure" if self.is_main else "end"
        try:
            while not self._watched.check([sign]):
                if self._noticed.wait(1.0):
                    return
            said = json.loads(self._watched.get(sign))
        except dist.DistError:  # rank 0, or the launcher, which keeps the store, has gone
            said = False
        # First the rank's own thread may find out by itself.
        if said is True or self._noticed.wait(2.0):
            return
        if self.is_main and said:
            self._end_by_failure(said)
        elif not self.is_main:
            self._count_out(self._watched)
        os._exit(1)

    def _end_by_failure(self, said: Mapping[str, Any]) -> None:
        self._told_of_failure.set()
        logger.info("another rank failed:\n%s", said["traceback"])
        if said["is_result"] and self.on_failure is not None:
            self.on_failure(said["reason"])
        print(f"error: {said['reason']}", file=sys.stderr, flush=True)
        self._watched.set("end", json.dumps(False))
        self._wait_for_others(self._watched)


@contextmanager
def together() -> Iterator[Ranks]:
    """The ranks of one run, met on entering; whatever ends it on one ends it on all.

    Raises UserError where they cannot meet. On ranks other than 0, errors are reported to rank 0
    and become SystemExit; they leave the context when rank 0 does, with ToldByMain if it failed.
    """
    ranks = Ranks(this_process())
    try:
        yield ranks
    except BaseException as error:
        ranks.leave(error)
        if isinstance(error, MainEnded):
            return
        raise
    ranks.leave(None)


@functools.cache
def _server_and_client(process: Process, purpose: str) -> Any:
    """A connection to the store, kept for further runs of this process; rank 0 or torchrun has it.

    purpose: tells the connections of one process apart.
    """
    import torch.distributed as dist

    torchrun_has_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            process.address,
            process.port,
            is_master=process.is_main and not torchrun_has_it and purpose == "work",
            timeout=MEETING_TIMEOUT,
            wait_for_workers=False,
        )
    except dist.DistError as error:
        reason = str(error).split("\n")[0]
        raise UserError(
            f"rank {process.rank} of {process.size} cannot meet the others at "
            f"{process.address}:{process.port} ({reason}); set MASTER_ADDR to the first node and "
            "MASTER_PORT to a free port"
        ) from None


def _store(process: Process, prefix: str, purpose: str) -> Any:
    import torch.distributed as dist

    return dist.PrefixStore(prefix, _server_and_client(process, purpose))


def _is_lost_connection(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text
        for sign in ("onnection closed by peer", "onnection reset by peer", "roken pipe")
    )
