"""The processes that train one model together: their ranks, how they start and how they end.

torchrun and srun start the same command several times. Each process reads its rank from the
environment. Rank 0 does everything that a single process does; the others only train, write
nothing and print nothing. Rank 0 publishes the values that they need in a store that all share,
and the end of one process, by success, error or kill, ends all.
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

JOIN_TIMEOUT = timedelta(minutes=15)
"""How long ranks wait for rank 0 to start."""
COLLECTIVE_TIMEOUT = timedelta(hours=1)
"""How long ranks wait in training for a slow one, such as rank 0 that writes a checkpoint."""
REPORT_SECONDS = 60.0
"""How long a failed rank waits for rank 0 to record why."""
EXIT_SECONDS = 10.0
"""How long rank 0 waits at its end until all others know of it."""
_POLL_SECONDS = 0.2

logger = logging.getLogger(__name__)
_joins = itertools.count()


@dataclass(frozen=True)
class Process:
    """One of `size` processes; `local_rank` is its number among those of its node."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    address: str = ""  # where rank 0 can be reached
    port: int = 0

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0


def this_process(environment: Mapping[str, str] = os.environ) -> Process:
    """Read this process's rank from torchrun's variables, else from those of an srun step.

    Without either it is the only process. An srun step of several tasks has ranks, an allocation of
    several tasks by itself has none. Raises UserError where the variables are incomplete.
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
    """Return the first name of a SLURM node list: "gpu[03-05,9]-ib,cpu1" gives "gpu03-ib"."""
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", nodes).split(",")[0]


class MainExited(Exception):
    """Rank 0 has ended the run, by success or failure, and this rank can end."""


class FailedOnMain(UserError):
    """The run has failed, and rank 0 has shown the user the reason."""


class Ranks:
    """All processes of a run as seen by one of them; see `joined`.

    succeeded: set by rank 0 before the end; False makes all exit with an error. on_failure: called
    on rank 0, with a reason, when another rank has failed.
    """

    def __init__(self, process: Process):
        self.process = process
        self.rank, self.size, self.is_main = process.rank, process.size, process.is_main
        self.succeeded = True
        self.on_failure: Callable[[str], None] | None = None
        self._end_noticed = threading.Event()  # by the main thread of this rank
        self._failure_shown = threading.Event()  # another rank's, by the watching thread
        if self.size > 1:
            prefix = f"normexp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{next(_joins)}"
            self.store = _store(process, prefix, "work")
            # A client of its own: while one thread waits in a client, all others wait too.
            self._watched = _store(process, prefix, "watch")
            threading.Thread(target=self._watch, daemon=True).start()

    def publish(self, name: str, value: Any) -> None:
        """Make a value (of JSON's types) known to the other ranks. Called on rank 0."""
        if self.size > 1:
            self.store.set(name, json.dumps(value))

    def receive(self, name: str) -> Any:
        """Wait, without a limit, for the value that rank 0 publishes. Called on the others.

        Raises MainExited where rank 0 ends instead.
        """
        import torch.distributed as dist

        try:
            while not self.store.check([name]):
                if self.store.check(["end"]):
                    raise MainExited
                time.sleep(_POLL_SECONDS)
            return json.loads(self.store.get(name))
        except dist.DistError:  # rank 0 or the launcher was killed, and the store with it
            raise MainExited from None

    def from_main(self, name: str, produce: Callable[[], Any]) -> Any:
        """Call `produce` on rank 0 alone and return its value (of JSON's types) on all ranks.

        Raises MainExited on the others where rank 0 ends instead.
        """
        if not self.is_main:
            return self.receive(name)
        value = produce()
        self.publish(name, value)
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
        rank_of: dict[str, int] = {}
        for rank in range(self.size):
            while not self.store.check([f"device {rank}"]):
                time.sleep(_POLL_SECONDS)
            name = self.store.get(f"device {rank}").decode()
            if name in rank_of:
                raise UserError(
                    f"ranks {rank_of[name]} and {rank} have the same GPU ({name}): start as many "
                    "processes on a node as it has GPUs, or train with fairseq.common.cpu=true"
                )
            rank_of[name] = rank

    def is_lost_peer(self, error: BaseException) -> bool:
        """Return whether an error means that another rank was killed: its connection broke.

        Where that rank had failed with a reason, this waits for the watching thread, which has
        shown the reason and ends the process.
        """
        lost = self.size > 1 and _is_lost_connection(error)
        if lost and self._failure_shown.is_set():
            time.sleep(2 * EXIT_SECONDS)
        if lost:
            self._end_noticed.set()
        return lost

    def shut_down(self, error: BaseException | None) -> None:
        """End this rank, after an error or None. The end of rank 0 is the end of all.

        On the others this returns when rank 0 has ended. There it raises SystemExit after an error
        of the rank's own and FailedOnMain where rank 0 did not succeed.
        """
        if self.size == 1:
            return
        if self.is_main:
            self._end_noticed.set()
            self._publish_end(error is None and self.succeeded)
            return
        if getattr(error, "of_all_ranks", False):
            self._wait_for_end(REPORT_SECONDS)
            self._end_noticed.set()
            self._count_out(self.store)
            return
        if error is not None and not isinstance(error, MainExited):
            self._report(error)
            self._wait_for_end(REPORT_SECONDS)
            self._count_out(self.store)
            raise SystemExit(1)
        succeeded = self._wait_for_end()
        self._end_noticed.set()
        self._count_out(self.store)
        if not succeeded:
            raise FailedOnMain("the run failed on rank 0")

    def _publish_end(self, succeeded: bool) -> None:
        """Let the others know that rank 0 ends, and wait for them."""
        import torch.distributed as dist

        # A launcher that has been killed has taken the store with it.
        with suppress(dist.DistError):
            self.store.set("end", json.dumps(succeeded))
            self._wait_for_others(self.store)

    def _wait_for_others(self, store: Any) -> None:
        # The store may be this process's, and its end would look like a failure to the others.
        deadline = time.monotonic() + EXIT_SECONDS
        while store.add("out", 0) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)

    def _count_out(self, store: Any) -> None:
        """Let rank 0 know that this rank is about to exit."""
        import torch.distributed as dist

        with suppress(dist.DistError):  # rank 0 has gone
            store.add("out", 1)

    def _wait_for_end(self, seconds: float = float("inf")) -> bool:
        """Wait for the end of rank 0 and return whether it succeeded.

        Returns False where rank 0 was killed or the time is over.
        """
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
        """Send an error of this rank to rank 0. Of several ranks' errors the first counts."""
        import torch.distributed as dist

        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        failure = {
            "reason": f"rank {self.rank}: {reason}",
            "traceback": "".join(traceback.format_exception(error)),
            "is_result": isinstance(error, Exception)
            and not isinstance(error, UserError)
            and not self.is_lost_peer(error),
        }
        with suppress(dist.DistError):  # rank 0 has gone
            self.store.compare_set("failure", "", json.dumps(failure))

    def _watch(self) -> None:
        """End this process when another has failed. Runs in a thread of its own.

        The main thread may wait in a collective for the rank that failed, forever: Python cannot
        interrupt that.
        """
        import torch.distributed as dist

        key = "failure" if self.is_main else "end"
        try:
            while not self._watched.check([key]):
                if self._end_noticed.wait(1.0):
                    return
            value = json.loads(self._watched.get(key))
        except dist.DistError:  # rank 0, or the launcher, which keeps the store, has gone
            value = False
        # Give the main thread time to find out by itself.
        if value is True or self._end_noticed.wait(2.0):
            return
        if self.is_main and value:
            self._end_by_failure(value)
        elif not self.is_main:
            self._count_out(self._watched)
        os._exit(1)

    def _end_by_failure(self, failure: Mapping[str, Any]) -> None:
        """Show and record another rank's failure, on rank 0, and end the others."""
        self._failure_shown.set()
        logger.info("another rank failed:\n%s", failure["traceback"])
        if failure["is_result"] and self.on_failure is not None:
            self.on_failure(failure["reason"])
        print(f"error: {failure['reason']}", file=sys.stderr, flush=True)
        self._watched.set("end", json.dumps(False))
        self._wait_for_others(self._watched)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Connect the ranks of one run; the end of this context on one rank ends it on all.

    Raises UserError where they cannot connect. On ranks other than 0, errors are reported to rank 0
    and become SystemExit; the context ends when rank 0's does, with FailedOnMain if that failed.
    """
    ranks = Ranks(this_process())
    try:
        yield ranks
    except BaseException as error:
        ranks.shut_down(error)
        if isinstance(error, MainExited):
            return
        raise
    ranks.shut_down(None)


@functools.cache
def _server_and_client(process: Process, purpose: str) -> Any:
    """Connect to the store, which rank 0 or torchrun serves; kept for later runs of this process.

    purpose: one connection is made for each. Raises UserError where the store cannot be reached.
    """
    import torch.distributed as dist

    torchrun_serves = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        return dist.TCPStore(
            process.address,
            process.port,
            is_master=process.is_main and not torchrun_serves and purpose == "work",
            timeout=JOIN_TIMEOUT,
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
