"""A SLURM cluster of one node on this machine, with everything of its own in a temporary folder."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

PROGRAMS = (
    "munged",
    "slurmctld",
    "slurmd",
    "sbatch",
    "srun",
    "squeue",
    "scancel",
    "scontrol",
    "setpriv",
)
CPUS = 8  # more than there may be: what is tested is the order of things, not their speed
SYSTEM_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])

CONF = """
ClusterName=normexp
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2
SlurmdParameters=config_overrides
ReturnToService=2
SlurmUser=root
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={megabytes}
PartitionName=debug Nodes={host} Default=YES State=UP MaxTime=INFINITE
"""


def why_not() -> str | None:
    """Why no cluster can be started here; None if it can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if absent:
        return f"no {', '.join(absent)}: tests/install_debian_packages.sh installs them"
    if os.geteuid() != 0:
        return "SLURM's daemons need root"
    return None


class Cluster:
    """The running cluster; its programs are run with `run` and see no other SLURM."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("SLURM")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": SYSTEM_PATH,
        }
        self._daemons: list[subprocess.Popen] = []

    def start(self) -> None:
        """Start the three daemons and wait until the node takes jobs."""
        self.folder.chmod(0o711)  # munged wants its socket to be within everybody's reach
        for name in ("state", "spool"):
            (self.folder / name).mkdir()
        controller_port, node_port = _free_ports(2)
        (self.folder / "slurm.conf").write_text(
            CONF.format(
                host=self.host,
                folder=self.folder,
                controller_port=controller_port,
                node_port=node_port,
                cpus=CPUS,
                megabytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 // 2,
            )
        )
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        files = [
            f"--{kind}-file={self.folder}/munge.{kind}" for kind in ("key", "pid", "log", "seed")
        ]
        self._daemon("munged", "--foreground", f"--socket={self.folder}/munge.socket", *files)
        self.wait_for(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D")
        self._daemon("slurmd", "-D")
        self.wait_for(lambda: "idle" in self.run("sinfo", "-h", "-o", "%t", check=False), "slurmd")

    def stop(self) -> None:
        """End every process of the cluster, its jobs' included."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.run("scancel", "--user=root", check=False, timeout=10)
            self.run("scancel", "--user=root", "--signal=KILL", check=False, timeout=10)
        for daemon in reversed(self._daemons):
            daemon.terminate()
            try:
                daemon.wait(timeout=10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        for process in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def run(self, *command: str, check: bool = True, timeout: float = 60) -> str:
        """Standard output of one of SLURM's commands."""
        shown = subprocess.run(
            command,
            env=self.environment,
            capture_output=True,
            text=True,
            check=check,
            timeout=timeout,
        )
        return shown.stdout

    def jobs(self) -> dict[str, str]:
        """State by id of every job in the queue."""
        lines = self.run("squeue", "--noheader", "--array", "--format=%i %T").splitlines()
        return dict(line.split() for line in lines)

    def ended(self, job: str) -> dict[str, str]:
        """What the controller remembers of a job, such as JobState and ExitCode."""
        shown = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(item.split("=", 1) for item in shown.split() if "=" in item)

    def wait_for(self, condition, what: str, seconds: float = 60) -> None:
        """Until the condition holds; fails with what the daemons have logged."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                logs = [path.read_text()[-2000:] for path in self.folder.glob("*.log")]
                raise TimeoutError("\n".join([f"{what}: not within {seconds} s", *logs]))
            time.sleep(0.1)

    def _daemon(self, *command: str) -> None:
        with open(self.folder / "daemons.log", "a") as log:
            self._daemons.append(
                # ended with this process too, should that be killed
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "TERM", *command],
                    env=self.environment,
                    stdout=log,
                    stderr=log,
                )
            )

    def _processes(self) -> Iterator[int]:
        """Processes that were started with this cluster's configuration."""
        own = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for environ in Path("/proc").glob("[0-9]*/environ"):
            number = int(environ.parent.name)
            with contextlib.suppress(OSError):
                if own in environ.read_bytes().split(b"\0") and number != os.getpid():
                    yield number


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
