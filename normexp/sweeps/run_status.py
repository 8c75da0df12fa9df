"""How a run stands, found out from what lies on the disk and from SLURM's queue.

Imports neither torch nor fairseq: looking takes no longer than reading a few files.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig

from normexp.config.identity import differences, experiment, resolved
from normexp.errors import UserError
from normexp.runs.folder import RunFolder
from normexp.runs.records import Record, hash_config, path_of_run, read_record
from normexp.sweeps.slurm_queue import Job

State = Literal["done", "diverged", "running", "waiting", "failed", "interrupted", "missing"]
FINISHED = ("done", "diverged")
TAIL_BYTES = 65536


@dataclass(frozen=True)
class RunStatus:
    """One run: where it belongs, how it stands, and what there is to say about it."""

    task: str
    label: str
    seed: int
    state: State
    detail: str = ""

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do; divergence is a result."""
        return self.state in FINISHED


def recorded(cfg: DictConfig) -> tuple[Path, Record] | None:
    """The record of this configuration if it needs nothing more: complete or diverged.

    None where there is none, where it is of another configuration, cannot be read, or failed.
    """
    found = _record_of(cfg)
    return found if found and found[1].status != "failed" else None


def status_of(cfg: DictConfig, jobs: Mapping[Path, Job]) -> RunStatus:
    """How the run of a configuration stands. jobs: what slurm_queue.jobs() returns."""
    plain = resolved(cfg)
    state, detail = _state(cfg, plain, jobs)
    return RunStatus(plain["task"]["name"], str(plain["label"]), plain["seed"], state, detail)


def _state(cfg: DictConfig, plain: dict[str, Any], jobs: Mapping[Path, Job]) -> tuple[State, str]:
    folder = RunFolder(Path(plain["run_dir"]).absolute())
    found = _record_of(cfg)
    if found and found[1].status == "complete":
        return "done", f"{found[1].num_updates} updates, {found[1].finished_at}"
    if found and found[1].status == "diverged":
        return "diverged", found[1].reason or ""
    job = jobs.get(folder.path)
    changed = _other_configuration(cfg, folder)
    if folder.in_use():
        what = f"another configuration ({changed})" if changed else _progress(folder)
        return "running", what
    if job and job.state == "PENDING":
        return "waiting", f"SLURM job {job.id}: {job.reason}"
    if job and job.state:
        return "running", f"SLURM job {job.id} {job.state.lower()}, run folder not in use yet"
    if found:
        return "failed", found[1].reason or ""
    if folder.config.is_file() and not changed:
        return "interrupted", _progress(folder)
    if job and (last := job.last_words()):
        return "failed", f"SLURM job {job.id}: {last}"
    return "missing", f"there is another configuration: {changed}" if changed else ""


def _record_of(cfg: DictConfig) -> tuple[Path, Record] | None:
    plain, settings = resolved(cfg), experiment(cfg)
    path = path_of_run(
        Path(plain["results_dir"]), plain["task"]["name"], str(plain["label"]), plain["seed"]
    )
    folder = RunFolder(Path(plain["run_dir"]))
    # A run that was killed between writing its two records has not ended.
    if not path.is_file() or (folder.config.is_file() and not folder.record.is_file()):
        return None
    try:
        record = read_record(path)
    except UserError:
        return None  # the run that replaces it puts it aside
    return (path, record) if record.config_hash == hash_config(settings, ["seed"]) else None


def _other_configuration(cfg: DictConfig, folder: RunFolder) -> str:
    """What differs in the folder's configuration; empty where nothing does, or there is none."""
    if not folder.config.is_file():
        return ""
    return differences(experiment(folder.read_config()), experiment(cfg))


def _progress(folder: RunFolder) -> str:
    """The last update and how long ago it was logged."""
    try:
        with open(folder.metrics, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return "no update yet"
    for line in reversed(lines):
        try:
            entry = json.loads(line)
            step, age = int(entry["step"]), max(0.0, time.time() - entry["time"])
        except (ValueError, KeyError, TypeError):
            continue  # half a line, or the middle of a long one
        evaluating = ", trained to the end" if folder.finished.is_file() else ""
        return f"update {step}, {_ago(age)}{evaluating}"
    return "no update yet"


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
