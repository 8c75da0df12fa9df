"""The run folder: where a run keeps its configuration, log, curves, checkpoints and record.

config.yaml       resolved configuration (paths included), enough to evaluate again
command.txt       command lines that worked on this run, one per start
environment.json  hardware, package versions, code version at the last start
metrics.jsonl     curves: one JSON object per line
log.txt           fairseq's and our log
checkpoints/      fairseq's checkpoints, and the one that was evaluated
hypotheses/       <split>.txt: translations, one per line, detokenised
wandb/            W&B's files
training_finished.json  written when training ended as configured
record.json       written last; the committed copy is results/records/<task>/<label>-seed<k>.json
"""

import fcntl
import os
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from normexp.config.identity import differences, experiment, resolved
from normexp.errors import UserError
from normexp.files import whole_file
from normexp.runs.archive import put_aside
from normexp.runs.command_line import command_of_this_run

LOCK = ".lock"
LOCK_SECONDS = 1.0  # whoever looks whether the folder is in use holds the lock for a moment


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    @property
    def hypotheses(self) -> Path:
        return self.path / "hypotheses"

    @property
    def finished(self) -> Path:
        return self.path / "training_finished.json"

    @property
    def record(self) -> Path:
        return self.path / "record.json"

    def in_use(self) -> bool:
        """Whether a process holds the folder at this moment."""
        try:
            lock = open(self.path / LOCK)  # noqa: SIM115
        except OSError:
            return False
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def read_config(self) -> DictConfig:
        """The run's resolved configuration. Raises UserError where there is none."""
        if not self.config.is_file():
            raise UserError(
                f"{self.path} is no run folder: it has no config.yaml (run folders lie under "
                "results/runs/<task>/)"
            )
        try:
            cfg = OmegaConf.load(self.config)
        except (YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{self.config} is damaged ({reason}); {self._cure}") from None
        if not isinstance(cfg, DictConfig) or "task" not in cfg:
            raise UserError(f"{self.config} is not the configuration of a run; {self._cure}")
        return cfg

    @property
    def _cure(self) -> str:
        return "restore it, or remove the folder to train anew"


@contextmanager
def open_run(cfg: DictConfig) -> Iterator[RunFolder]:
    """Create the run folder of a configuration or reopen it, and hold it for this process.

    A folder of another configuration is put aside. Raises UserError when the folder is in use by
    another process or cannot be written.
    """
    plain = resolved(cfg)
    folder = RunFolder(Path(plain["run_dir"]).absolute())
    lock = _lock(folder)
    try:
        now = experiment(cfg)
        while folder.config.is_file() and (earlier := experiment(folder.read_config())) != now:
            why = f"another configuration: {differences(earlier, now)}"
            put_aside(folder.path, Path(plain["results_dir"]), plain["task"]["name"], why)
            lock.close()  # it is that of the folder put aside
            lock = _lock(folder)
        if not folder.config.is_file():
            with whole_file(folder.config) as file:
                file.write(OmegaConf.to_yaml(OmegaConf.create(plain)))
        with open(folder.path / "command.txt", "a", encoding="utf-8") as file:
            file.write(shlex.join(["python", *command_of_this_run()]) + "\n")
        yield folder
    finally:
        lock.close()


def _lock(folder: RunFolder) -> IO[str]:
    """Hold the folder until the file returned is closed."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            lock = open(folder.path / LOCK, "w")  # noqa: SIM115 (held as long as the run)
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {folder.path}: {error.strerror}; set results_dir=..."
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Somebody may have put the folder aside before the lock was ours.
            if os.path.samestat(os.fstat(lock.fileno()), os.stat(folder.path / LOCK)):
                return lock
        except OSError:
            pass
        lock.close()
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder.path} is in use by another process: the same run is under way"
            )
        time.sleep(0.05)
