"""The run folder: where a run keeps its configuration, log, curves, checkpoints and record.

config.yaml       resolved configuration (paths included), enough to evaluate again
command.txt       command lines that worked on this run, one per start
environment.json  hardware, package versions, code version, data at the last start
metrics.jsonl     curves: one JSON object per line
log.txt           fairseq's and our log
checkpoints/      fairseq's checkpoints, and the one that was evaluated
hypotheses/       <split>.txt: translations, one per line, detokenised
wandb/            W&B's files
training_finished.json  written when training ended as configured
record.json       written last; the committed copy is results/records/<task>/<label>-seed<k>.json
"""

import fcntl
import json
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from normexp.config.identity import differences, is_same_training
from normexp.config.settings import EvaluationSettings, RunSettings, parse
from normexp.errors import UserError
from normexp.files import whole_file
from normexp.runs.archive import CURE, archive
from normexp.runs.provenance import command_of_this_run
from normexp.runs.saved_settings import read_resolved

LOCK = ".lock"
_DAMAGE = (ValueError, TypeError, AttributeError, AssertionError, RecursionError, OSError)
LOCK_SECONDS = 1.0  # whoever looks whether the folder is in use holds the lock for a moment


class OtherSettings(UserError):
    """A run folder has settings that this version does not know or accept."""


@dataclass(frozen=True)
class RunFolder:
    """Paths inside a run folder."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

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
        """Return whether a process holds the folder at this moment."""
        # By hand, because filelock needs permission to write, which others' folders may refuse.
        try:
            lock = open(self.path / LOCK, "rb")  # noqa: SIM115
        except OSError:
            return False
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return True
        return False

    def read_settings(self, mended: EvaluationSettings | None = None) -> RunSettings:
        """Read the settings of the run.

        mended: evaluation in the place of the run's own, but for the checkpoints that it keeps.
        Raises UserError where there are none or the file is damaged, and OtherSettings where they
        are of another version.
        """
        if not self.config.is_file():
            raise UserError(
                f"{self.path} is no run folder: it has no config.yaml (run folders lie under "
                "results/own/runs/<task>/; scripts/train.py makes them)"
            )
        if mended is None and (plain := read_resolved(self.config)):
            return plain
        try:
            cfg = OmegaConf.load(self.config)
        # OmegaConf raises OSError for a file that holds a number.
        except (YAMLError, OmegaConfBaseException, *_DAMAGE) as error:
            reason = str(error).split("\n")[0]
            raise UserError(f"{self.config} is damaged ({reason}); {self._cure}") from None
        if not isinstance(cfg, DictConfig) or "task" not in cfg:
            raise UserError(f"{self.config} is not the configuration of a run; {self._cure}")
        try:
            if mended is not None:
                kept = {
                    key: OmegaConf.select(cfg, f"evaluation.{key}")
                    for key in ("checkpoint", "average_last")
                }
                cfg.evaluation = mended.model_dump(mode="json") | kept
            return parse(cfg)
        except OmegaConfBaseException as error:
            reason = str(error).split("\n")[0]
            raise OtherSettings(f"{self.config}: {reason}; {self._cure}") from None
        except UserError as error:
            raise OtherSettings(f"{self.config}: {error}; {self._cure}") from None

    def difference_from(self, settings: RunSettings) -> str:
        """Return how the folder's training differs from that of `settings`; "" if it does not.

        Also "" for an empty folder. Raises UserError where its settings are damaged or missing.
        """
        if not self.config.is_file():
            self._refuse_files_of_nobody()
            return ""
        try:
            own = self.read_settings()
        except OtherSettings as error:
            try:  # an earlier version accepted an evaluation that this command mends
                own = self.read_settings(mended=settings.evaluation)
            except OtherSettings:
                return str(error)
        return "" if is_same_training(own, settings) else differences(own, settings)

    def has_result(self) -> bool:
        """Return whether a run has ended here otherwise than by an error."""
        try:
            return json.loads(self.record.read_text(encoding="utf-8"))["status"] != "failed"
        except FileNotFoundError:
            return False
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            return True  # damaged: somebody has to look at it

    def _refuse_files_of_nobody(self) -> None:
        """Raise UserError for files without the settings that they were made with."""
        # A killed run leaves its lock, or parts of a file, before it has written its settings.
        left = self.path.glob("*") if self.path.is_dir() else ()
        kept = sorted(path.name for path in left if not path.name.startswith((LOCK, "config.yaml")))
        if kept:
            raise UserError(
                f"{self.path} has no config.yaml but {', '.join(kept[:3])}: nothing says which run "
                "made them; restore it, or move the folder away"
            )

    @property
    def _cure(self) -> str:
        return "restore it, or remove the folder to train anew"


@contextmanager
def open_run(settings: RunSettings) -> Iterator[RunFolder]:
    """Create the run folder of these settings or reopen it, and hold it for this process.

    The folder of another training that has not ended is archived. Raises UserError where that one
    has ended, for files without settings, and when the folder is in use by another process or
    cannot be written.
    """
    folder = RunFolder(settings.run_dir.absolute())
    lock = _lock(folder)
    try:
        while changed := folder.difference_from(settings):
            if folder.has_result():
                raise UserError(f"{folder.path} is of another configuration ({changed}); {CURE}")
            why = f"another configuration: {changed}"
            archive(folder.path, settings.results_dir, settings.task.name, why)
            lock.release()  # it is that of the archived folder
            lock = _lock(folder)
        text = settings.as_yaml()
        if not folder.config.is_file() or folder.config.read_text(encoding="utf-8") != text:
            with whole_file(folder.config) as file:  # a new one, or another evaluation
                file.write(text)
        with open(folder.path / "command.txt", "a", encoding="utf-8") as file:
            file.write(shlex.join(["python", *command_of_this_run()]) + "\n")
        yield folder
    finally:
        lock.release()


@contextmanager
def hold(folder: RunFolder) -> Iterator[RunSettings]:
    """Hold an existing run folder for this process, and return the settings of the run.

    One that may only be read is not held. Raises UserError when it is in use, and as
    `read_settings` does.
    """
    settings = folder.read_settings()  # before a lock is made in a folder of something else
    if os.access(folder.path, os.W_OK):
        lock = _lock(folder)
        try:
            yield settings
        finally:
            lock.release()
    elif folder.in_use():
        raise UserError(_in_use(folder))
    else:
        yield settings


def _in_use(folder: RunFolder) -> str:
    return f"{folder.path} is in use by another process: the same run is under way"


def _lock(folder: RunFolder) -> FileLock:
    """Hold the folder until the lock returned is released."""
    path = folder.path / LOCK
    while True:
        lock = FileLock(path, fallback_to_soft=False)  # a soft lock would outlive a killed run
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
            try:
                path.touch()
                before = path.stat()
                lock.acquire(timeout=LOCK_SECONDS)
            except FileNotFoundError:  # archived by another process meanwhile
                continue
        except Timeout:
            raise UserError(_in_use(folder)) from None
        except OSError as error:
            raise UserError(
                f"cannot write the run folder {folder.path}: {error.strerror}; set results_dir=..."
            ) from None
        # Another process may have archived the folder before the lock was ours. Nothing is ever
        # moved back, so an unchanged file is the one that was locked.
        with suppress(FileNotFoundError):
            if os.path.samestat(before, path.stat()):
                return lock
        lock.release()
