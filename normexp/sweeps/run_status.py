"""The status of a run, from its files and from SLURM's queue.

Imports neither torch nor fairseq: looking takes no longer than reading a few files.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from normexp.config.settings import RunSettings
from normexp.runs.folder import RunFolder
from normexp.runs.lookup import find_record, is_final
from normexp.sweeps.slurm_queue import Job

State = Literal["done", "diverged", "running", "waiting", "failed", "interrupted", "missing"]
FINISHED = ("done", "diverged")
TAIL_BYTES = 65536


@dataclass(frozen=True)
class RunStatus:
    """The status of one run; `detail` says more in a few words."""

    task: str
    label: str
    seed: int
    state: State
    detail: str = ""

    @property
    def finished(self) -> bool:
        """Whether the run needs nothing more; divergence is a result."""
        return self.state in FINISHED


def status_of(
    settings: RunSettings, jobs: Mapping[Path, Job], from_folder: bool = False
) -> RunStatus:
    """Return the status of the run of these settings.

    jobs: what slurm_queue.jobs() returns. from_folder: the settings are those that the run folder
    holds, with which they need not be compared.
    """
    state, detail = _state(settings, jobs, from_folder)
    return RunStatus(settings.task.name, settings.label, settings.seed, state, detail)


def _state(settings: RunSettings, jobs: Mapping[Path, Job], from_folder: bool) -> tuple[State, str]:
    folder = RunFolder(settings.run_dir.absolute())
    found = find_record(settings)
    if found and found[1].status == "complete" and is_final(found[1]):
        return "done", f"{found[1].num_updates} updates, {found[1].finished_at}"
    if found and found[1].status == "diverged":
        return "diverged", found[1].reason or ""
    job = jobs.get(folder.path)
    changed = "" if from_folder else folder.difference_from(settings)
    if folder.in_use():
        what = f"another configuration ({changed})" if changed else _progress(folder)
        return "running", what
    if job and job.state == "PENDING":
        return "waiting", f"SLURM job {job.id}: {job.reason}"
    if job and job.state:
        return "running", f"SLURM job {job.id} {job.state.lower()}, run folder not in use yet"
    if found:
        return "failed", found[1].reason or "its metrics are not finite"
    if folder.config.is_file() and not changed:
        return "interrupted", _progress(folder)
    if job and (last := job.last_words()):
        return "failed", f"SLURM job {job.id}: {last}"
    return "missing", f"there is another configuration: {changed}" if changed else ""


def last_logged(folder: RunFolder) -> tuple[int, float] | None:
    """Return the last update that the run's metrics.jsonl has, and the time of it since 1970."""
    try:
        with open(folder.metrics, "rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        try:
            entry = json.loads(line)
            return int(entry["step"]), float(entry["time"])
        except (ValueError, LookupError, TypeError, ArithmeticError, RecursionError):
            continue  # half a line, or the middle of a long one
    return None


def _progress(folder: RunFolder) -> str:
    """Return the last update and how long ago it was logged."""
    if (logged := last_logged(folder)) is None:
        return "no update yet"
    evaluating = ", trained to the end" if folder.finished.is_file() else ""
    return f"update {logged[0]}, {_ago(max(0.0, time.time() - logged[1]))}{evaluating}"


def _ago(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.0f} s ago"
