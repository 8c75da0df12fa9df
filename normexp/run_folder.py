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
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from normexp.atomic import whole_file
from normexp.config import experiment, resolved
from normexp.errors import UserError


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

    Raises UserError when the folder belongs to another configuration, is in use by another
    process, or cannot be written.
    """
    folder = RunFolder(Path(resolved(cfg)["run_dir"]).absolute())
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        lock = open(folder.path / ".lock", "w")  # noqa: SIM115 (held as long as the run)
    except OSError as error:
        raise UserError(
            f"cannot write the run folder {folder.path}: {error.strerror}; set results_dir=..."
        ) from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{folder.path} is in use by another process: the same run is under way"
            ) from None
        _claim(folder, cfg)
        yield folder


def _claim(folder: RunFolder, cfg: DictConfig) -> None:
    if folder.config.is_file():
        earlier = folder.read_config()
        if experiment(earlier) != experiment(cfg):
            raise UserError(
                f"{folder.path} holds a run with another configuration "
                f"({_differences(experiment(earlier), experiment(cfg))}); remove that folder or "
                "choose another label=..."
            )
    else:
        with whole_file(folder.config) as file:
            file.write(OmegaConf.to_yaml(OmegaConf.create(resolved(cfg))))
    with open(folder.path / "command.txt", "a", encoding="utf-8") as file:
        file.write(shlex.join(["python", *sys.argv]) + "\n")


def _differences(earlier: dict[str, Any], now: dict[str, Any], prefix: str = "") -> str:
    """The first few keys that differ, as 'key: old -> new'."""
    found = []
    for key in sorted(set(earlier) | set(now)):
        a, b = earlier.get(key), now.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            inner = _differences(a, b, f"{prefix}{key}.")
            found += [inner] if inner else []
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
